"""Rendering: from meshes, a window and a light to an image of linear radiance."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import warp as wp

from passreid_synth3d import kernel
from passreid_synth3d.light import Sunlight
from passreid_synth3d.mesh import Array, Mesh
from passreid_synth3d.surfaces import table_of

__all__ = ["LOGO", "Solid", "Window", "render"]

LOGO = 48  # side of a print's mask, pixels
WINDOW = ("eye", "right", "down", "forward", "left", "top", "step")
LIGHT = tuple(field.name for field in fields(Sunlight))


@dataclass(frozen=True)
class Window:
    """The part of a camera's view that is rendered, in units of the focal length from the optical axis."""

    eye: Array
    right: Array
    down: Array
    forward: Array
    left: float
    top: float
    step: float
    rows: int
    columns: int


class Solid:
    """A mesh prepared for ray casting.

    Args:
        mesh: The triangles.
        at: Corners in coordinates of the standard body [F, 3, 3], for cloth and skin.
        logo: Mask [LOGO, LOGO] of the print on its clothes.
        surfaces: Table of the mesh's materials; by default computed.
    """

    def __init__(self, mesh: Mesh, at: Array | None = None, logo: Array | None = None, surfaces: Any = None) -> None:
        self.mesh = mesh
        self.points = _vectors(mesh.points)
        self.corners = mesh.faces.astype(np.int32).ravel()
        self.at = (np.zeros((len(mesh.faces), 3, 3)) if at is None else at).astype(np.float32).reshape(-1, 3)
        self.uv = mesh.uv.astype(np.float32).reshape(-1, 2)
        self.normals = np.zeros((len(mesh.points), 3), np.float32)
        self.surfaces = table_of(mesh.materials) if surfaces is None else surfaces
        self.logo = logo
        self.warp = wp.Mesh(self.points, wp.array(self.corners, dtype=int, device="cpu"), bvh_leaf_size=2)

    def within(self, window: Window) -> "Solid":
        """Solid of the faces that may be visible in a window: rays from the eye then test fewer boxes."""
        ray = self.mesh.points - window.eye
        depth = ray @ window.forward
        near = np.maximum(depth, 1e-3)
        x, y, behind = ray @ window.right / near, ray @ window.down / near, depth < 0.05
        right, bottom = window.left + window.columns * window.step, window.top + window.rows * window.step
        outside = np.stack([x < window.left, x > right, y < window.top, y > bottom]) & ~behind
        faces = self.mesh.faces
        hidden = outside[:, faces].all(2).any(0) | behind[faces].all(1)
        shown = np.flatnonzero(~hidden)
        mesh = self.mesh
        part = Mesh(mesh.points, faces[shown], mesh.uv[shown], mesh.material[shown], mesh.region[shown], mesh.materials)
        return Solid(part, surfaces=self.surfaces) if len(shown) else self

    def move(self, points: Array, normals: Array) -> None:
        """Set vertices and normals [V, 3]; the BVH is refitted, not rebuilt, so neighbours should stay neighbours."""
        self.points.numpy()[:] = points
        self.normals = normals
        self.warp.refit()


def render(persons: Sequence[Solid], surroundings: Solid, window: Window, light: Sunlight, feet: Array) -> Array:
    """Render radiance [rows, columns, 3] of persons in their surroundings.

    Args:
        persons: The persons in the picture; nearest first is fastest.
        surroundings: Everything else.
        window: The part of the camera's view.
        light: The light of the place.
        feet: Positions [N, 3] around which the ground is darkened.
    """
    parts = [*persons, surroundings.within(window), surroundings]
    scene, offsets = kernel.Scene(), np.cumsum([0, *(len(part.mesh.points) for part in parts)])
    scene.ids = wp.array([part.warp.id for part in parts], dtype=wp.uint64, device="cpu")
    scene.starts = _numbers(np.cumsum([0, *(len(part.mesh.faces) for part in parts[:-1])]))
    scene.corners = _numbers(np.concatenate([part.corners + o for part, o in zip(parts, offsets[:-1], strict=True)]))
    offsets = np.cumsum([0, *(len(part.surfaces) for part in parts[:-1])])
    scene.materials = _numbers(np.concatenate([p.mesh.material + o for p, o in zip(parts, offsets, strict=True)]))
    scene.regions = _numbers(np.concatenate([part.mesh.region for part in parts]))
    scene.uvs = wp.array(np.concatenate([part.uv for part in parts]), dtype=wp.vec2, device="cpu")
    scene.ats = _vectors(np.concatenate([part.at for part in parts]))
    scene.normals = _vectors(np.concatenate([part.normals for part in parts]))
    surfaces = [part.surfaces.copy() for part in parts]
    for i, (part, table) in enumerate(zip(parts, surfaces, strict=True)):
        table["logo"] = np.where((table["logo"] < 0) | (part.logo is None), -1, i)
    scene.surfaces = wp.array(np.concatenate(surfaces), dtype=kernel.Surface, device="cpu")
    logos = np.stack([np.zeros((LOGO, LOGO)) if part.logo is None else part.logo for part in parts])
    scene.logos = wp.array(np.ascontiguousarray(logos, np.float32), dtype=float, device="cpu")
    scene.feet = _vectors(feet)
    image = wp.zeros((window.rows, window.columns), dtype=wp.vec3, device="cpu")
    inputs = [scene, _filled(kernel.View(), window, WINDOW), _filled(kernel.Light(), light, LIGHT)]
    wp.launch(kernel.picture, (window.rows, window.columns), inputs, outputs=[image], device="cpu")
    return np.asarray(image.numpy())


def _filled(struct: Any, values: Any, names: Sequence[str]) -> Any:
    """Copy the named fields of a dataclass to a warp struct."""
    for name in names:
        value = getattr(values, name)
        setattr(struct, name, float(value) if np.ndim(value) == 0 else wp.vec3(*map(float, value)))
    return struct


def _vectors(a: Array) -> wp.array:
    return wp.array(np.ascontiguousarray(a, np.float32).reshape(-1, 3), dtype=wp.vec3, device="cpu")


def _numbers(a: Array) -> wp.array:
    return wp.array(np.ascontiguousarray(a, np.int32).ravel(), dtype=int, device="cpu")
