"""Synthetic pedestrians: a deterministic person re-identification dataset drawn with numpy and PIL.

A person is a 3-D skeleton of tapered capsules, turned to the camera's viewpoint, projected orthographically and painted
back to front with analytic anti-aliasing. A surface point knows its angle `theta` around its part (0 is the front of
the body) and its distance `v` from the part's start, so a chest print, an open jacket or a hairline lands where the
viewpoint puts it, without a rule for each view. Lengths are fractions of the body height; y points down.

    identity(seed, pid)      body, hair, garments, bag        never depends on the camera
    camera(seed, camid)      viewpoints, light, colour, lens, background
    draw(seed, pid, camid, k, size)   pose, jitter, occlusion of one image, keyed by these numbers alone
"""

from passreid_models.synthetic.attributes import camera, identity
from passreid_models.synthetic.dataset import SyntheticPersons, contact_sheet
from passreid_models.synthetic.scene import draw

__all__ = ["SyntheticPersons", "camera", "contact_sheet", "draw", "identity"]
