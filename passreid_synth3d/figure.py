"""A dressed person as triangles: layers of cloth on the body's surface, and accessories."""

import numpy as np

from passreid_synth3d.accessories import Accessory, accessories
from passreid_synth3d.body import Shape, body
from passreid_synth3d.layers import dress
from passreid_synth3d.mesh import Array, Mesh, merge
from passreid_synth3d.pose import pose, turn
from passreid_synth3d.wardrobe import Person

__all__ = ["Figure"]

STANDARD_HEIGHT = 1.666  # of the standard body, metres


class Figure:
    """An identity in 3-D; everything independent of the pose is computed once.

    `mesh` is the unposed person; `at` [F, 3, 3] are the corners of its faces in coordinates of the standard body.
    """

    def __init__(self, who: Person) -> None:
        self.who, self.body = who, body()
        self.shape: Shape = self.body.shape(**who.phenotype)
        rest = self.shape.vertices[0].numpy()
        normals = self.body.normals(rest)
        layers = dress(who, self.body, rest, normals)
        self.height = float(np.ptp(rest[self.body.skin, 2]))
        faces = np.concatenate([layer.faces for layer in layers])
        self.at = self.body.at[faces]
        vertices = np.concatenate([la.faces.ravel() + i * len(rest) for i, la in enumerate(layers)])
        new_index = np.zeros(len(layers) * len(rest), np.int32)
        new_index[vertices] = 1
        used = np.flatnonzero(new_index)
        new_index[used] = np.arange(len(used))
        self.source = used % len(rest)
        self.out = np.concatenate([layer.out for layer in layers])[used].astype(np.float32)[:, None]
        layer_of_face = np.repeat(np.arange(len(layers), dtype=np.int32), [len(layer.faces) for layer in layers])
        points = rest[self.source] + normals[self.source] * self.out
        renumbered, regions = new_index[vertices].reshape(-1, 3), self.body.region[faces[:, 0]]
        materials = [layer.material for layer in layers]
        cloth = Mesh(points, renumbered, self.body.corner_uv(faces), layer_of_face, regions, materials)
        self.accessories: list[Accessory] = accessories(who, self.shape, self.body, self.height / STANDARD_HEIGHT)
        self.mesh = merge([cloth, *(item.mesh for item in self.accessories)])
        self.at = np.concatenate([self.at, np.zeros((len(self.mesh.faces) - len(self.at), 3, 3))])

    def stand(self, rng: np.random.Generator, place: tuple[float, float], heading: float) -> tuple[Array, Array, Array]:
        """Points and normals [V, 3] and the positions of the feet [2, 3] of the figure in a random pose.

        Args:
            rng: Random generator of the pose.
            place: Position (x, y) on the ground, metres.
            heading: Direction in radians; 0 looks towards -y.
        """
        load = {"handbag": "bag", "case": "case"}.get(self.who.bag.kind if self.who.bag else "", "")
        turns = pose(rng, self.who.gait, load, self.who.side)
        base, maps = self.body.pose(self.shape, turns)
        normals = self.body.normals(base)
        out = base[self.source] + normals[self.source] * self.out
        floor = float(out[:, 2].min())
        worn = [item.posed_points(maps, floor) for item in self.accessories]
        points = np.concatenate([out, *worn]) if worn else out
        all_normals = np.concatenate([normals[self.source], np.zeros((len(points) - len(out), 3), np.float32)])
        rotation = turn((0, 0, 1), heading)
        shift = np.array((*place, -floor), np.float32)
        moved = points @ rotation.T + shift
        feet = np.stack([base[sole].mean(0) for sole in self.body.soles]) @ rotation.T
        return moved.astype(np.float32), (all_normals @ rotation.T).astype(np.float32), feet + shift
