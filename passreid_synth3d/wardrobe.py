"""Identities: phenotype, clothes, hair and bags, as functions of (seed, pid)."""

from dataclasses import dataclass, replace
from typing import Any

from passreid_synth3d.fabrics import PATTERN_FAMILIES, Dice, dye, fabric, near, pale
from passreid_synth3d.mesh import Colour, Material
from passreid_synth3d.pose import Gait

__all__ = ["Garment", "Person", "person"]

PERSON = 21  # the random stream
_SKINS = [(0.62, 0.42, 0.32), (0.53, 0.34, 0.24), (0.42, 0.25, 0.16), (0.28, 0.15, 0.09), (0.14, 0.07, 0.045)]
_HAIRS = [(0.012, 0.01, 0.01), (0.018, 0.014, 0.012), (0.035, 0.02, 0.013), (0.09, 0.05, 0.028), (0.3, 0.19, 0.09)]
_GRAY = [(0.16, 0.155, 0.15), (0.32, 0.31, 0.3)]
_JEANS = [(0.03, 0.045, 0.09), (0.07, 0.12, 0.24), (0.2, 0.29, 0.42), (0.03, 0.03, 0.034)]
WHITE, BLACK = (0.72, 0.72, 0.7), (0.02, 0.02, 0.02)


@dataclass(frozen=True)
class Garment:
    """A garment of a `kind`, `loose` metres from the body where it is widest; for bags, `loose` is the size, 0 to 1."""

    kind: str
    material: Material
    loose: float = 0.01


@dataclass(frozen=True)
class Person:
    """Attributes that all images of a person share."""

    phenotype: dict[str, float]
    skin: Material
    upper: Garment
    outer: Garment | None
    lower: Garment
    shoes: Garment
    socks: Material
    hair: Garment | None
    hat: Garment | None
    bag: Garment | None
    side: int  # the hand that carries a bag: 1 left, -1 right
    gait: Gait
    logo: int  # seed of the print on chest or back


def person(seed: int, pid: int, patterns: str = "train") -> Person:
    """Draw the appearance of an identity, from the arguments alone.

    Args:
        seed: Seed of the world.
        pid: The identity.
        patterns: The family of garment patterns, a key of `PATTERN_FAMILIES`.
    """
    dice = Dice(seed, PERSON, pid, list(PATTERN_FAMILIES).index(patterns))
    woman, child, warm = dice.chance(0.5), dice.chance(0.05), dice.chance(0.42)  # warm: dressed for warm weather
    phenotype = dict(
        gender=dice.around(0.9 if woman else 0.1, 0.1, 0, 1),
        age=dice.between(0.36, 0.5) if child else dice.between(0.6, 1.0),
        muscle=dice.around(0.52, 0.16, 0.1, 0.95),
        weight=dice.around(0.5, 0.2, 0.05, 1.0),
        height=dice.around(0.45, 0.055, 0.3, 0.6),
        proportions=dice.between(0.3, 0.9),
    )
    old = phenotype["age"] > 0.85 and dice.chance(0.65)
    tone, strands = near(dice, _SKINS), near(dice, _GRAY if old else _HAIRS)
    beard = dice.between(0.5, 0.95) if not woman and not child and dice.chance(0.3) else 0.0
    lips = (tone[0] * 0.95, tone[1] * 0.62, tone[2] * 0.66)
    upper = _upper(dice, warm, patterns)
    lower = _lower(dice, woman, warm, patterns, upper)
    return Person(
        phenotype=phenotype,
        skin=Material("skin", tone, lips, strands, duty=beard, shine=0.04),
        upper=upper,
        outer=_outer(dice, patterns) if dice.chance(0.12 if warm else 0.58) else None,
        lower=lower,
        shoes=_shoes(dice, lower.kind),
        socks=Material(colour=dye(dice, dark=3.0) if dice.chance(0.5) else WHITE),
        hair=_hair(dice, woman, strands),
        hat=_hat(dice, patterns, upper),
        bag=_bag(dice, woman),
        side=1 if dice.chance(0.5) else -1,
        gait=Gait(
            stride=dice.between(0.26, 0.46),
            arms=dice.between(0.15, 0.5),
            spread=dice.between(0.02, 0.16),
            stoop=dice.around(0.03, 0.05, -0.05, 0.2),
        ),
        logo=int(dice.rng.integers(1 << 30)),
    )


def _upper(dice: Dice, warm: bool, patterns: str) -> Garment:
    kind = dice.kind(tshirt=5, tank=0.6, shirt=2) if warm else dice.kind(tshirt=2, shirt=2, sweater=3, hoodie=3)
    short = kind == "tshirt" or (kind == "shirt" and dice.chance(0.3))
    cut = dict(sleeve=dice.between(0.12, 0.26) if short else 0.46, hem=dice.between(-0.02, 0.09))
    cut |= dict(top=dice.between(0.56, 0.6), dip=dice.between(0.02, 0.09) if dice.chance(0.5) else 0.0)
    if kind == "tank":
        cut |= dict(sleeve=0.015, top=0.565, dip=dice.between(0.06, 0.1))
    cloth = _with_print(dice, fabric(dice, patterns, plain=0.55, **cut), 0.05 if kind == "shirt" else 0.42)
    return Garment(kind, cloth, dice.between(0.008, 0.045 if kind == "hoodie" else 0.035))


def _with_print(dice: Dice, cloth: Material, probability: float) -> Material:
    """Add, with the given probability, a small or large print to the chest or the back."""
    if not dice.chance(probability):
        return cloth
    position: dict[str, Any]
    if dice.chance(0.45):
        position = dict(
            logo_size=dice.between(0.04, 0.1), logo_x=dice.between(0.04, 0.08), logo_z=dice.between(0.3, 0.42)
        )
    else:
        position = dict(logo_size=dice.between(0.12, 0.36), logo_x=0.0, logo_z=dice.between(0.22, 0.37))
    side = 1.0 if dice.chance(0.25) else -1.0
    return replace(cloth, logo=0, logo_side=side, logo_colour=dye(dice, unlike=cloth.colour), **position)


def _outer(dice: Dice, patterns: str) -> Garment:
    kind = dice.kind(jacket=5, coat=3, vest=1)
    hem = dice.between(-0.5, -0.1) if kind == "coat" else dice.between(-0.02, 0.1)
    opening = dice.between(0.03, 0.11) if dice.chance(0.55) else -1.0
    cut = dict(sleeve=0.0 if kind == "vest" else 0.465, hem=hem, top=dice.between(0.58, 0.62), opening=opening)
    cloth = fabric(dice, patterns, plain=0.8, dark=2.0, shine=0.12 if dice.chance(0.3) else 0.0, **cut)
    return Garment(kind, _with_print(dice, cloth, 0.25), dice.between(0.012, 0.05))


def _lower(dice: Dice, woman: bool, warm: bool, patterns: str, upper: Garment) -> Garment:
    weights = dict(trousers=5.0, jeans=4.0, leggings=1.6 if woman else 0.2, shorts=3.0 if warm else 0.3)
    if woman:
        weights |= dict(skirt=2.2 if warm else 1.2, dress=2.4 if upper.kind in ("tshirt", "tank", "sweater") else 0)
    kind, waist = dice.kind(**weights), dice.between(0.13, 0.19)
    if kind == "dress":
        return Garment(kind, replace(upper.material, hem=dice.between(-0.6, -0.2)), dice.between(0.0, 0.03))
    hem = dice.between(-0.765, -0.72)
    if kind == "shorts":
        hem = dice.between(-0.42, -0.14)
    elif kind == "leggings" and dice.chance(0.33):
        hem = dice.between(-0.6, -0.4)
    elif kind == "skirt":
        hem = dice.between(-0.38, -0.2) if dice.chance(0.5) else dice.between(-0.7, -0.4)
    if kind == "jeans":
        blue = near(dice, _JEANS, 0.25)
        faded, seed = dice.between(0.2, 0.7), dice.between(0, 9)
        cloth = Material("denim", blue, pale(blue), duty=faded, bump=0.2, grain=0.15, seed=seed, hem=hem, top=waist)
        return Garment(kind, cloth, dice.between(0.004, 0.045))
    plain, dark = 0.55 if kind == "skirt" else 0.82, 1.0 if kind == "shorts" else 2.5
    cloth = fabric(dice, patterns, plain, dark, hem=hem, top=waist)
    if kind != "skirt" and cloth.pattern == "plain" and dice.chance(0.25):
        cloth = replace(cloth, pattern="side", period=dice.between(0.015, 0.05))
    loose = {"leggings": 0.0, "skirt": dice.between(0, 0.03)}.get(kind, dice.between(0.008, 0.05))
    return Garment(kind, cloth, loose)


def _shoes(dice: Dice, lower: str) -> Garment:
    kind = dice.kind(trainers=5, shoes=3, boots=0.3 if lower == "shorts" else 2)
    tall = kind == "boots" and lower in ("leggings", "skirt", "dress")  # under trousers a high shaft is not visible
    upper = WHITE if kind == "trainers" and dice.chance(0.35) else dye(dice, dark=4.0)
    sole = WHITE if kind == "trainers" and dice.chance(0.7) else BLACK
    top = dice.between(-0.62, -0.45) if tall else (-0.62 if kind == "boots" else -0.66)
    cap = -0.76 if dice.chance(0.4) else -9.0  # height of the toe cap, which has the third colour
    height = dice.between(-0.812, -0.795)
    material = Material("sole", upper, sole, dye(dice), height, cap, shine=0.08, top=top)
    return Garment(kind, material, dice.between(0.006, 0.014))


def _hair(dice: Dice, woman: bool, tone: Colour) -> Garment | None:
    weights = dict(long=4, ponytail=2.5, bob=2.5, bun=1.4, short=1.2, afro=0.6)
    kind = dice.kind(**weights if woman else dict(short=7, buzz=2, bald=1, bob=0.5, afro=0.5, bun=0.2))
    if kind == "bald":
        return None
    hem = {"long": dice.between(0.22, 0.5), "bob": dice.between(0.56, 0.66)}.get(kind, 0.67)
    height = {"buzz": 0.006, "afro": dice.between(0.035, 0.075)}.get(kind, dice.between(0.012, 0.026))
    top, seed = dice.between(0.69, 0.71), dice.between(0, 9)
    return Garment(kind, Material("hair", tone, tone, hem=hem, top=top, dip=-0.3, shine=0.06, seed=seed), height)


def _hat(dice: Dice, patterns: str, upper: Garment) -> Garment | None:
    kind = dice.kind(none=8, cap=1.3, beanie=0.9, sunhat=0.35, hood=0.6 if upper.kind == "hoodie" else 0)
    if kind == "none":
        return None
    if kind == "hood":
        return Garment(kind, replace(upper.material, hem=0.55, dip=0.0, top=0.69, logo=-1), 0.03)
    cloth = fabric(dice, patterns, plain=0.8, hem=0.75 if kind == "cap" else 0.735, dip=-0.42, top=-9.0)
    return Garment(kind, cloth, dice.between(0.016, 0.028))


def _bag(dice: Dice, woman: bool) -> Garment | None:
    kind = dice.kind(none=5, backpack=2.2, sling=0.5, crossbody=1, tote=1 if woman else 0.4, handbag=1.5, case=0.45)
    if kind == "none":
        return None
    cover = Material(colour=dye(dice, dark=2.0), second=dye(dice, dark=2.0), shine=0.1 if dice.chance(0.5) else 0.0)
    return Garment(kind, cover, dice.between(0, 1))
