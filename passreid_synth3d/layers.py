"""Layers of skin, clothes and hair: faces of the base mesh, moved out along the normals and cut by their material."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from passreid_synth3d.body import Body
from passreid_synth3d.mesh import REGIONS, Array, Material
from passreid_synth3d.wardrobe import Garment, Person

__all__ = ["Layer", "dress"]

TORSO, ARM, LEG, HEAD, FOOT, HAND = (REGIONS.index(r) for r in ("torso", "arm", "leg", "head", "foot", "hand"))
EYE = Material(colour=(0.12, 0.1, 0.09), shine=0.2)
CROTCH = -0.03  # lower end of the suit's torso; longer coats continue on the faces of the skirt
Faces = NDArray[np.int32]


@dataclass(frozen=True)
class Layer:
    """Faces [F, 3] of the base mesh, and the distance [V] by which its vertices are moved out, metres."""

    faces: Faces
    out: Array
    material: Material


def dress(who: Person, body: Body, rest: Array, normals: Array) -> list[Layer]:
    """Layers of a person from the skin outwards, given the unposed vertices and normals [V, 3]."""
    return _Dresser(who, body, rest, normals).layers


class _Dresser:
    def __init__(self, who: Person, body: Body, rest: Array, normals: Array) -> None:
        self.who, self.body, self.rest, self.normals = who, body, rest, normals
        self.suit, self.skirt, self.height = body.faces["helper-tights"], body.faces["helper-skirt"], body.at[:, 2]
        self.layers = [Layer(body.faces[f"helper-{side}-eye"], self.flat(0.0), EYE) for side in "lr"]
        self.layers.append(Layer(self.bare(), self.flat(0.0), who.skin))
        self.feet()
        sleeveless = ~np.isin(body.region[self.suit], (ARM, HAND)).any(1)
        limbs = self.suit[sleeveless & (self.height[self.suit] > -0.79).all(1)]
        self.trunk = self.above(self.suit[~np.isin(body.region[self.suit], (HEAD, FOOT)).all(1)], -0.08)
        self.lower(limbs)
        surface, thickness = self.upper()
        if who.outer:
            surface = self.outer(who.outer, surface, thickness)
        if who.bag and who.bag.kind in ("backpack", "crossbody", "sling"):
            strap = 0.0 if who.bag.kind == "backpack" else float(who.side)
            self.layers.append(
                Layer(self.trunk, surface + 0.005, Material("strap", who.bag.material.colour, seed=strap))
            )
        self.head()

    def flat(self, metres: float) -> Array:
        return np.full(len(self.height), metres)

    def above(self, faces: Faces, height: float) -> Faces:
        return faces[(self.height[faces] > height).any(1)]

    def draped(self, out: Array, least: Array | float, rounds: int) -> Array:
        """Distances [V] of a cloth that spans hollows of the body: `out` smoothed, but at least `least`."""
        smooth = self.body.smoothed(self.rest + self.normals * out[:, None], rounds)
        return np.maximum(least, ((smooth - self.rest) * self.normals).sum(1))

    def hanging(self, top: Garment, base: float) -> Array:
        """Distances [V] of a top, larger towards its hem and the ends of its sleeves."""
        down = np.clip((0.5 - self.height) / 0.45, 0, 1)
        along = np.clip(self.body.along_arm / max(top.material.sleeve, 0.1), 0, 1)
        on_arm = np.isin(self.body.region, (ARM, HAND))
        return base + top.loose * np.where(on_arm, 0.25 + 0.5 * along, 0.3 + 0.7 * down)

    def bare(self) -> Faces:
        """Faces of the skin that clothes leave open, and a margin under their edges."""
        low, high, along = self.body.skin_reach.T
        torso, head, hand, arm, leg = self.body.skin_touches[:, [TORSO, HEAD, HAND, ARM, LEG]].T
        upper, hem = self.who.upper.material, self.who.lower.material.hem
        sleeve = max(upper.sleeve, self.who.outer.material.sleeve if self.who.outer else 0.0)
        below = leg & (low < hem + 0.08) & (low < 0.0) & (hem > -0.7)
        chest = torso & (high > upper.top - upper.dip - 0.08)
        return self.body.faces["body"][head | hand | chest | below | (arm & (along > sleeve - 0.06))]

    def feet(self) -> None:
        shoes = self.who.shoes
        self.layers.append(Layer(self.below(-0.56), self.flat(0.002), replace(self.who.socks, top=-0.56, hem=-0.75)))
        shaft = 0.007 if shoes.kind == "boots" else 0.004
        out = np.where(self.height < -0.74, shoes.loose + 0.004 * (self.height < -0.8), shaft)
        self.layers.append(Layer(self.below(shoes.material.top + 0.04), out, shoes.material))

    def below(self, height: float) -> Faces:
        return self.suit[(self.height[self.suit] < height).all(1)]

    def lower(self, limbs: Faces) -> None:
        lower = self.who.lower
        if lower.kind in ("skirt", "dress"):
            out = self.draped(self.flat(0.008 + lower.loose), 0.008, 10)
            self.layers.append(Layer(self.skirt, out, replace(lower.material, top=0.16)))
            pants = Material(colour=lower.material.colour, hem=-0.13, top=0.16)
            self.layers.append(Layer(self.above(limbs, -0.16), self.flat(0.002), pants))
        else:
            down = np.clip((0.05 - self.height) / 0.75, 0, 1)
            out = 0.005 + lower.loose * (0.25 + 0.75 * down) * (self.height < 0.12)
            self.layers.append(Layer(limbs, self.draped(out, 0.005, 4), lower.material))

    def upper(self) -> tuple[Array, float]:
        """Add the top; return its distances [V] and its approximate thickness, metres."""
        top = self.who.upper
        surface = self.draped(self.hanging(top, 0.011), 0.011, int(300 * top.loose))
        self.add_top(top, surface)
        return surface, 0.013 + top.loose

    def add_top(self, top: Garment, surface: Array) -> None:
        hem = max(top.material.hem, CROTCH)
        self.layers.append(Layer(self.above(self.trunk, hem), surface, replace(top.material, hem=hem)))

    def outer(self, top: Garment, under: Array, thickness: float) -> Array:
        surface = self.draped(self.hanging(top, thickness + 0.006), under + 0.006, 14)
        self.add_top(top, surface)
        if top.kind == "coat":
            out = self.draped(self.flat(thickness + 0.7 * top.loose), thickness, 10)
            self.layers.append(Layer(self.skirt, out, replace(top.material, top=0.1)))
        return surface

    def head(self) -> None:
        at, skin, hat, hair = self.body.at, self.body.faces["body"], self.who.hat, self.who.hair
        outside = (self.body.region == HEAD) & self.body.outer_head
        scalp = outside & ((np.abs(at[:, 0]) < 0.083) | (self.height > 0.775)) & (self.height > 0.6)  # without the ears
        if hair:
            rise = 0.35 + 0.65 * np.clip((self.height - 0.7) / 0.1, 0, 1) if hair.kind != "afro" else self.flat(1.0)
            out, cut = (
                hair.loose * rise * (0.4 if hat else 1.0),
                replace(hair.material, hem=max(hair.material.hem, 0.67)),
            )
            self.layers.append(Layer(skin[scalp[skin].all(1)], out, cut))
            if hair.kind in ("long", "bob"):
                strands = self.body.faces["helper-hair"]
                self.layers.append(Layer(strands, self.flat(0.004), replace(hair.material, top=0.68, dip=0.0)))
        if hat:
            covered = outside if hat.kind == "hood" else scalp
            out = self.flat(hat.loose + (0.004 if hair else 0.0))
            self.layers.append(Layer(skin[covered[skin].all(1)], out, hat.material))
