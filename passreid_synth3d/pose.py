"""Poses: rotations of bones about the axes of the unposed body (x to the person's left, -y forwards, z up)."""

import math
from dataclasses import dataclass

import numpy as np

from passreid_models.synthetic.attributes import pick
from passreid_synth3d.mesh import Array

__all__ = ["Gait", "pose", "turn"]

Turns = dict[str, Array]
LEFT_FOREARM = np.array([0.118, -0.163, -0.104])  # direction at rest


@dataclass(frozen=True)
class Gait:
    """Parameters of a person's walk and posture, shared by all images."""

    stride: float  # swing of the thighs, radians
    arms: float  # swing of the arms, radians
    spread: float  # angle of the arms to the body, radians
    stoop: float  # forward bend of the upper spine, radians


def turn(axis: Array | tuple[float, float, float], angle: float) -> Array:
    """Rotation matrix [3, 3] by `angle` radians about an axis (right-hand rule)."""
    x, y, z = np.asarray(axis, float) / np.linalg.norm(axis)
    k = np.array([(0, -z, y), (z, 0, -x), (-y, x, 0)])
    return np.asarray(np.eye(3) + math.sin(angle) * k + (1 - math.cos(angle)) * k @ k, np.float32)


def pose(rng: np.random.Generator, gait: Gait, load: str = "", side: int = 1) -> Turns:
    """Random rotations of a walk or a stand; a `load` (`bag` or `case`) is in the left (1) or right (-1) hand."""
    kind = pick(rng, walk=0.74, stand=0.26)
    turns: Turns = {}
    phase = rng.uniform(0, 2 * math.pi)
    speed = gait.stride * rng.uniform(0.7, 1.15) if kind == "walk" else 0.05
    for name, sign in (("L", 1), ("R", -1)):
        swing = speed * math.sin(phase) * sign  # forwards is a negative turn about x
        lifted = max(0.0, math.cos(phase) * sign)  # of the leg that swings forward
        knee = 0.08 + speed * (0.35 * max(0.0, -math.sin(phase) * sign) + 1.5 * lifted**2)
        out = rng.normal(0.0, 0.02) - (0.09 if kind == "walk" else rng.uniform(-0.02, 0.07))
        turns[f"upperleg01.{name}"] = turn((0, 1, 0), out * -sign) @ turn((1, 0, 0), -swing - 0.3 * speed * lifted)
        turns[f"lowerleg01.{name}"] = turn((1, 0, 0), knee)
        turns[f"foot.{name}"] = turn((1, 0, 0), 0.35 * swing - 0.3 * knee + 0.25 * speed * lifted)
    _arms(turns, rng, gait, speed, phase, load, side)
    bend, twist = gait.stoop + rng.normal(0, 0.03), speed * math.sin(phase)
    turns["spine03"] = turn((1, 0, 0), bend) @ turn((0, 0, 1), rng.normal(0, 0.03) - 0.1 * twist)
    turns["spine01"] = turn((1, 0, 0), bend) @ turn((0, 0, 1), 0.25 * twist)
    look = rng.normal(0, 0.3) if rng.random() < 0.5 else 0.0
    turns["neck02"] = turn((0, 0, 1), 0.5 * look) @ turn((1, 0, 0), rng.normal(0.02, 0.08) - bend)
    turns["head"] = turn((0, 0, 1), 0.7 * look)
    return turns


# angles of a held arm, radians: down from the A-pose of rest, forwards, and at the elbow
_HELD = {
    "phone": (0.62, -0.45, 1.75), "chest": (0.7, -0.35, 1.25), "pocket": (0.5, 0.28, 0.42),
    "bag": (0.62, 0.0, 0.02), "case": (0.6, 0.35, 0.02),
}  # fmt: skip


def _arms(turns: Turns, rng: np.random.Generator, gait: Gait, speed: float, phase: float, load: str, side: int) -> None:
    for name, sign in (("L", 1), ("R", -1)):
        gesture = pick(rng, swing=8, phone=0.3, chest=0.3, pocket=0.7)
        if load:
            gesture = load if sign == side else "swing"
        inwards = 0.0
        if gesture == "swing":
            ahead = gait.arms / 0.4 * speed * math.sin(phase) * sign + rng.normal(0, 0.04)
            down, elbow = 0.68 - gait.spread + rng.normal(0, 0.03), 0.1 + 0.5 * max(0.0, -ahead)
            elbow += abs(rng.normal(0, 0.08))
        else:
            down, ahead, elbow = (angle + rng.normal(0, 0.06) for angle in _HELD[gesture])
            inwards = 0.9 if gesture in ("phone", "chest") else 0.0
        forearm = LEFT_FOREARM * (sign, 1, 1)
        towards = np.array([-inwards * sign, -1.0, 0.75 if gesture == "phone" else 0.45])
        turns[f"upperarm01.{name}"] = turn((1, 0, 0), ahead) @ turn((0, 1, 0), down * sign)
        turns[f"lowerarm01.{name}"] = turn(np.cross(forearm, towards), elbow - 0.65)  # 0.65: its bend at rest
