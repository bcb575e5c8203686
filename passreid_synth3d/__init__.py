"""Synthetic pedestrians in 3-D: persons with clothes, walking through places, as surveillance cameras see them.

Needs the extra ``[synth3d]``: anny's parametric body and warp, which casts the rays on the CPU.

    fabrics, prints, wardrobe    who someone is: phenotype, clothes, hair, bags, by (seed, pid)
    body, pose                   anny's body; how it moves
    layers, accessories, figure  clothes hung on the body; what is worn or carried; all of it as triangles
    scene, things, walls, surroundings, light, place
                                 where a camera hangs and what it sees, by (seed, camid)
    mesh, surfaces, kernel       triangles and materials; what surfaces look like; rays and light
    render, sensor, picture      radiance; what the camera makes of it; one image, by (seed, pid, camid, k)
    dataset, workers             a dataset in the layout of Market-1501, on all cores
"""

from typing import Any

__all__ = ["draw", "write_market1501"]


def __getattr__(name: str) -> Any:  # anny and warp are imported when an image is drawn
    if name == "draw":
        from passreid_synth3d.picture import draw

        return draw
    if name == "write_market1501":
        from passreid_synth3d.dataset import write_market1501

        return write_market1501
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
