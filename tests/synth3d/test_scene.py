"""Rendered 3-D persons. Slow: anny builds its model once on a machine, in two to three minutes."""

import subprocess
import sys
from dataclasses import replace

import baselines
import numpy as np
import pytest
import torch

from passreid_models import Embedder
from passreid_models.retrieval import evaluate
from passreid_synth3d.mesh import Material, quad
from passreid_synth3d.wardrobe import Garment, person

pytestmark = pytest.mark.slow

PAINT = (1.0, 0.0, 1.0)  # a colour that nobody wears
EVEN = dict(sun=(0, 0, 1), sunlight=(0, 0, 0), sky=(1, 1, 1), ground=(1, 1, 1), horizon=(0, 0, 0), zenith=(0, 0, 0))


def portrait(figure, heading: float, seed: int, rows: int = 192) -> np.ndarray:
    """Radiance [rows, rows / 2, 3] of a figure in even light before black, from a horizontal viewpoint."""
    from passreid_synth3d.light import Sunlight
    from passreid_synth3d.render import Solid, Window, render

    points, normals, feet = figure.stand(np.random.default_rng(seed), (0.0, 0.0), heading)
    solid = Solid(figure.mesh, figure.at)
    solid.move(points, normals)
    distance, tall = 8.0, figure.height * 1.1
    step = tall / distance / rows
    window = Window(
        np.array((0, -distance, tall / 2)), np.array((1.0, 0, 0)), np.array((0, 0, -1.0)), np.array((0, 1.0, 0)),
        -rows / 4 * step, -rows / 2 * step, step, rows, rows // 2,
    )  # fmt: skip
    background = Solid(quad((-50, 60, -50), (100, 0, 0), (0, 0, 100), Material(colour=(0.0, 0.0, 0.0))))
    return render([solid], background, window, Sunlight(**EVEN, shadow=0.0), feet)


def test_an_image_is_a_function_of_its_arguments_in_any_process():
    from passreid_synth3d.picture import draw

    first = draw(5, 3, 1, 2, (128, 64))
    draw(5, 4, 0, 0, (128, 64))
    draw(5, 3, 0, 0, (128, 64))  # the same person in another pose: the mesh is the same object
    assert first.tobytes() == draw(5, 3, 1, 2, (128, 64)).tobytes()
    code = (
        "import sys; from passreid_synth3d.picture import draw;"
        "sys.stdout.buffer.write(draw(5, 3, 1, 2, (128, 64)).tobytes())"
    )
    other = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout
    assert other == first.tobytes()
    changed = [(6, 3, 1, 2), (5, 2, 1, 2), (5, 3, 2, 2), (5, 3, 1, 3)]
    assert len({first.tobytes(), *(draw(*key, (128, 64)).tobytes() for key in changed)}) == 5


def test_no_person_shows_bare_skin_or_holes_between_neck_and_thighs_from_any_side():
    from passreid_synth3d.figure import Figure

    skin, bare, hollow = Material(colour=PAINT), [], []
    for pid in range(24):
        who = replace(person(1, pid), skin=skin, bag=None)
        image = portrait(Figure(who), pid * 0.9, pid)
        purple = (image[..., 0] > 0.5) & (image[..., 1] < 0.1) & (image[..., 2] > 0.5)
        assert purple.any()  # head and hands
        high = 0.6 if who.lower.kind in ("trousers", "jeans", "leggings") else 0.5
        middle = (slice(int(192 * 0.3), int(192 * high)), slice(44, 52))  # without hands and arms
        bare.append(purple[middle].mean())
        hollow.append((image[slice(int(192 * 0.3), int(192 * 0.5)), 46:50].max(-1) == 0).mean())
    assert max(bare) < 0.4  # a hand may be in front of the hips
    assert np.median(bare) == 0
    assert max(hollow) < 0.2  # between the thighs
    assert np.median(hollow) == 0


def test_the_check_above_finds_a_missing_garment():
    from passreid_synth3d.figure import Figure

    who = next(w for w in (person(1, pid) for pid in range(99)) if w.lower.kind == "trousers" and not w.outer)
    lower = replace(who.lower, material=replace(who.lower.material, top=-0.5))  # from the thighs on
    image = portrait(Figure(replace(who, lower=lower, bag=None)), 0.0, 0)
    assert (image[slice(int(192 * 0.42), int(192 * 0.55)), 44:52].max(-1) == 0).mean() > 0.2


def test_images_of_held_out_patterns_show_persons_and_passers_by_in_those():
    from passreid_synth3d import picture

    picture._passer.cache_clear()
    for number in range(3, 40):  # until an image has a passer-by
        picture.draw(9, number, 0, 0, (64, 32), "held-out")
        if picture._passer.cache_info().currsize:
            break
    assert picture._person(9, number, "held-out")[0].who == person(9, number, "held-out")
    passers = [picture._passer(9, picture.NOBODY + i, "held-out") for i in range(picture.PASSERS)]
    assert picture._passer.cache_info().hits == 1  # the passer-by of that image
    assert len(passers) == picture.PASSERS


def test_the_box_is_loose_but_contains_the_person():
    from passreid_synth3d.picture import _box
    from passreid_synth3d.place import place

    shares, heights = [], []
    for i in range(200):
        rng, scene = np.random.default_rng(i), place(4, i % 10)
        x, y, _ = scene.stand(rng)
        points = rng.uniform((x - 0.25, y - 0.25, 0), (x + 0.25, y + 0.25, 1.75), (500, 3))
        window = _box(rng, scene, points, 256)
        ray = points - scene.eye
        u, v = ((ray @ axis / (ray @ scene.forward)) for axis in (scene.right, scene.down))
        column, row = (u - window.left) / window.step, (v - window.top) / window.step
        inside = (column >= 0) & (column <= window.columns) & (row >= 0) & (row <= window.rows)
        shares.append(inside.mean())
        heights.append(window.rows)
    assert np.median(shares) > 0.98
    assert min(shares) > 0.55  # feet or head are cut
    assert 0.08 < np.mean(np.array(shares) < 0.93) < 0.3
    assert 40 <= min(heights) < 100 < max(heights) <= 256


def test_an_open_jacket_shows_the_shirt_in_front_and_a_closed_one_does_not():
    from passreid_synth3d.figure import Figure

    base = next(w for w in (person(1, pid) for pid in range(99)) if w.outer and w.outer.kind == "jacket")
    shirt = Garment("tshirt", replace(base.upper.material, pattern="plain", colour=PAINT, logo=-1, bump=0.0, grain=0.0))
    jacket = Material(colour=(0.0, 1.0, 0.0), sleeve=0.46, hem=0.05, top=0.6)

    def visible_shirt(opening: float, heading: float) -> int:
        outer = Garment("jacket", replace(jacket, opening=opening), 0.02)
        image = portrait(Figure(replace(base, upper=shirt, outer=outer, bag=None)), heading, 0)
        return int(((image[..., 0] > 0.5) & (image[..., 2] > 0.5) & (image[..., 1] < 0.1)).sum())

    front, back, closed = visible_shirt(0.06, 0.0), visible_shirt(0.06, np.pi), visible_shirt(-1.0, 0.0)
    assert front > 2 * back + 150  # from behind or closed, only hem and collar are visible
    assert front > 2 * closed + 150


def test_colour_histograms_retrieve_persons_better_than_chance_and_worse_than_the_trained_model():
    from passreid_synth3d.picture import draw

    persons, cameras = 24, 4
    keys = [(pid, camid, k) for pid in range(persons) for k in range(2) for camid in range(cameras)]
    pictures = [draw(0, *key, (128, 64), "held-out") for key in keys]
    pids, camids, k = np.array(keys).T
    colours = baselines.colours(pictures)
    noise = torch.randn(colours.shape, generator=torch.Generator().manual_seed(0))
    trained = Embedder("pass_vit_tiny_patch16.synth_reid")(pictures)
    q, g = k == 0, k == 1
    colour_map, chance_map, trained_map = (
        100 * evaluate(x[q], x[g], pids[q], pids[g], camids[q], camids[g]).mAP for x in (colours, noise, trained)
    )
    assert 1.5 * chance_map < colour_map < 0.8 * trained_map
