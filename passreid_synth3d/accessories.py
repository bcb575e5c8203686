"""Accessories: bags, cases, brims and buns, rigid meshes that follow a bone."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from passreid_synth3d.body import Body, Shape
from passreid_synth3d.mesh import Array, Material, Mesh, box, cylinder, ellipsoid, merge
from passreid_synth3d.wardrobe import Person

__all__ = ["Accessory", "accessories"]

Add = Callable[..., None]
METAL = Material(colour=(0.06, 0.06, 0.065), shine=0.2)
LEFT_HAND = np.array((0.46, -0.235, 0.2))  # its place on the standard body, metres


@dataclass(frozen=True)
class Accessory:
    """A mesh in the coordinates of the unposed person, attached to a bone.

    `follows` is `fixed` (turns with the bone), `hanging` (moves with the bone but stays upright) or `standing` (the
    same, and stretched down to the ground).
    """

    mesh: Mesh
    bone: int
    joint: Array  # [3], the head of the bone in the unposed person
    follows: str = "fixed"

    def posed_points(self, maps: Array, floor: float) -> Array:
        """Points [V, 3] in a pose, given the bones' maps from rest [J, 4, 4] and the height of the ground."""
        matrix = maps[self.bone]
        if self.follows == "fixed":
            return (self.mesh.points @ matrix[:3, :3].T + matrix[:3, 3]).astype(np.float32)
        points = self.mesh.points + (matrix[:3, :3] @ self.joint + matrix[:3, 3] - self.joint)
        if self.follows == "standing":  # the top stays in the hand, the lower part is stretched to the ground
            top, low = points[:, 2].max(), points[:, 2].min()
            down = np.clip((top - points[:, 2]) / (top - low), 0, 1)
            points[:, 2] += (floor - low) * np.minimum(1, 2.5 * down)
        return points.astype(np.float32)


def accessories(who: Person, shape: Shape, body: Body, scale: float) -> list[Accessory]:
    """Accessories of a person whose height is `scale` times that of the standard body."""
    rest = shape.bones[0, :, :3, 3].numpy()
    standard = body.model.template_bone_heads.numpy()
    worn: list[Accessory] = []

    def add(bone: str, *meshes: Mesh, follows: str = "fixed") -> None:
        """Attach meshes, given in coordinates of the standard body, to a bone of this person."""
        number, mesh = body.names.index(bone), merge(meshes)
        mesh.points = (mesh.points - standard[number]) * scale + rest[number]
        worn.append(Accessory(mesh, number, rest[number], follows))

    _on_the_head(who, add)
    if who.upper.kind == "hoodie" and not (who.hat and who.hat.kind == "hood") and not who.outer:
        add("spine01", ellipsoid((0, body.back, 0.535), (0.12, 0.05, 0.075), _plain(who.upper.material), power=0.85))
    if who.bag:
        _bag(who, body, add)
    return worn


def _plain(cloth: Material) -> Material:
    return Material(colour=cloth.colour, grain=cloth.grain, seed=cloth.seed)


def _on_the_head(who: Person, add: Add) -> None:
    if who.hair:
        strand = Material("hair", who.hair.material.colour, seed=who.hair.material.seed, shine=0.06)
        if who.hair.kind == "bun":
            add("head", ellipsoid((0, 0.065, 0.79), (0.05, 0.045, 0.045), strand))
        elif who.hair.kind == "ponytail":
            tail = ellipsoid((0, 0.095, 0.66), (0.033, 0.03, 0.13), strand)
            add("head", ellipsoid((0, 0.065, 0.775), (0.032, 0.045, 0.03), strand), tail)
    if who.hat and who.hat.kind == "cap":
        add("head", ellipsoid((0, -0.17, 0.805), (0.072, 0.08, 0.009), _plain(who.hat.material), rings=6))
    elif who.hat and who.hat.kind == "sunhat":
        add("head", ellipsoid((0, -0.055, 0.79), (0.165, 0.19, 0.012), _plain(who.hat.material), rings=6, sides=16))


def _bag(who: Person, body: Body, add: Add) -> None:
    assert who.bag is not None
    cover, size, side = who.bag.material, who.bag.loose, who.side
    hand = f"finger3-1.{'L' if side > 0 else 'R'}"
    x, y, z = LEFT_HAND * (side, 1, 1)
    if who.bag.kind in ("backpack", "sling"):
        back = body.back - 0.01 + (0.02 if who.outer else 0.0) + 0.5 * who.upper.loose
        height, depth = 0.3 + 0.2 * size, 0.12 + 0.1 * size
        middle = 0.52 - height / 2
        if who.bag.kind == "sling":
            height, depth, middle = 0.6 * height, 0.6 * depth, 0.3
        pocket = ellipsoid((0, back + depth * 0.95, middle - 0.2 * height), (0.1, 0.04, height * 0.22),
                           Material(colour=cover.second), power=0.5)  # fmt: skip
        sack = ellipsoid((0, back + depth / 2, middle), (0.13 + 0.03 * size, depth / 2, height / 2), cover, power=0.55)
        add("spine01", sack, pocket)
    elif who.bag.kind == "crossbody":
        radii = (0.055, 0.11 + 0.04 * size, 0.09 + 0.04 * size)
        add("root", ellipsoid((-side * 0.2, 0.0, 0.05), radii, cover, power=0.5))
    elif who.bag.kind == "tote":
        radii = (0.05, 0.13 + 0.05 * size, 0.12 + 0.05 * size)
        loops = [
            cylinder((side * 0.2, y, 0.2), (side * 0.15, y, 0.515), (0.009, 0.009), cover, 5) for y in (-0.02, 0.1)
        ]
        add("spine01", ellipsoid((side * 0.21, 0.05, 0.14), radii, cover, power=0.5), *loops)
    elif who.bag.kind == "handbag":
        width, tall = 0.22 + 0.22 * size, 0.18 + 0.26 * size
        loops = [cylinder((x, y + d * width, z - 0.14), (x, y, z), (0.007, 0.007), cover, 5) for d in (-0.3, 0.3)]
        add(
            hand,
            ellipsoid((x, y, z - 0.13 - tall / 2), (0.06, width / 2, tall / 2), cover, power=0.45),
            *loops,
            follows="hanging",
        )
    elif who.bag.kind == "case":
        tall = 0.42 + 0.14 * size
        trunk = box((x, y + 0.2, z - 0.4 - tall / 2), (0.36 + 0.08 * size, 0.2 + 0.06 * size, tall), cover)
        bars = [cylinder((x + d, y + 0.18, z - 0.4), (x + d, y, z), (0.008, 0.008), METAL, 5) for d in (-0.09, 0.09)]
        add(hand, trunk, *bars, follows="standing")
