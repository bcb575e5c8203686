"""Identities, clothes, poses, meshes and the sensor of the 3-D persons; nothing here needs anny or warp."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from passreid_synth3d.fabrics import PATTERN_FAMILIES, Dice, dye, fabric
from passreid_synth3d.light import Imaging
from passreid_synth3d.mesh import PATTERNS, Material, Mesh, box, cylinder, ellipsoid, merge, quad
from passreid_synth3d.pose import Gait, pose, turn
from passreid_synth3d.prints import FAMILIES, print_mask
from passreid_synth3d.sensor import develop
from passreid_synth3d.wardrobe import Person, person

CAMERA = Imaging(1.0, (1.0, 1.0, 1.0), 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, (95, 95))
GAIT = Gait(stride=0.4, arms=0.3, spread=0.1, stoop=0.03)


def crowd(patterns: str = "train", count: int = 300) -> list[Person]:
    return [person(3, pid, patterns) for pid in range(count)]


def garment_materials(who: Person) -> list[Material]:
    return [g.material for g in (who.upper, who.outer, who.lower, who.hat) if g]


# ---- Persons


def test_a_person_is_a_function_of_seed_pid_and_patterns():
    assert person(3, 5) == person(3, 5, "train")
    assert len({repr(person(s, p, f)) for s in (3, 4) for p in (5, 6) for f in PATTERN_FAMILIES}) == 8


def test_held_out_garments_have_patterns_and_prints_that_no_training_garment_has():
    families = {name: set(family) for name, family in PATTERN_FAMILIES.items()}
    assert not families["train"] & families["held-out"]
    assert not set(FAMILIES["train"]) & set(FAMILIES["held-out"])
    for name, family in families.items():
        worn = {cloth.pattern for who in crowd(name) for cloth in garment_materials(who)}
        assert worn - {"plain", "denim", "side"} == family  # exactly these patterns occur


def test_every_person_is_clothed():
    for who in crowd():
        assert who.upper.material.hem < who.lower.material.top - 0.03 or who.lower.kind == "dress"  # they overlap
        assert who.lower.material.hem < -0.13
        assert 0.55 < who.upper.material.top <= 0.6
        assert who.upper.material.dip <= 0.1
        assert who.shoes.material.pattern == "sole"


def test_every_kind_of_garment_hair_hat_and_bag_occurs_and_none_dominates():
    people = crowd(count=500)
    for part, kinds in {
        "upper": {"tshirt", "tank", "shirt", "sweater", "hoodie"},
        "outer": {"jacket", "coat", "vest"},
        "lower": {"trousers", "jeans", "leggings", "shorts", "skirt", "dress"},
        "shoes": {"trainers", "shoes", "boots"},
        "hair": {"long", "ponytail", "bob", "bun", "short", "afro", "buzz"},
        "hat": {"cap", "beanie", "sunhat", "hood"},
        "bag": {"backpack", "sling", "crossbody", "tote", "handbag", "case"},
    }.items():
        counts = Counter(g.kind for who in people if (g := getattr(who, part)))
        assert set(counts) == kinds
        assert max(counts.values()) < 0.6 * 500
    assert any(who.outer and who.outer.material.opening > 0 for who in crowd())
    assert any(who.upper.material.logo >= 0 for who in crowd())
    assert {who.side for who in crowd()} == {-1, 1}


def test_most_trousers_are_dark_or_denim_and_few_garments_are_vivid_as_in_the_street():
    people = crowd(count=500)
    legs = [who.lower.material for who in people if who.lower.kind in ("trousers", "jeans")]
    assert 0.6 < np.mean([cloth.pattern == "denim" or np.mean(cloth.colour) < 0.1 for cloth in legs]) < 0.95
    display = np.array([(who.outer or who.upper).material.colour for who in people]) ** (1 / 2.2)
    assert 0.1 < (np.ptp(display, axis=1) > 0.25).mean() < 0.3
    assert 0.25 < (display.max(1) < 0.35).mean() < 0.6


def test_only_the_old_have_gray_hair():
    gray = [who.phenotype["age"] for who in crowd() if who.hair and np.ptp(who.hair.material.colour) < 0.03
            and np.mean(who.hair.material.colour) > 0.1]  # fmt: skip
    assert len(gray) > 20
    assert min(gray) > 0.85


def test_prints_are_of_many_sizes():
    sizes = [cloth.logo_size for who in crowd() for cloth in garment_materials(who) if cloth.logo >= 0]
    assert len(sizes) > 60
    assert np.quantile(sizes, (0.1, 0.9)) == pytest.approx((0.06, 0.3), abs=0.04)


def test_phenotypes_differ_and_stay_in_the_range_of_anny():
    shapes = np.array([list(who.phenotype.values()) for who in crowd()])
    assert shapes.min() >= 0
    assert shapes.max() <= 1
    assert (shapes.std(0) > 0.03).all()


def test_two_dyes_of_a_garment_are_distinguishable_and_colours_are_reflectances():
    dice = Dice(1)
    for _ in range(200):
        first = dye(dice)
        second = dye(dice, unlike=first)
        assert min(*first, *second) >= 0
        assert max(*first, *second) <= 1
        assert np.abs(np.cbrt(first) - np.cbrt(second)).sum() > 0.35
    assert {fabric(dice, "train", plain=1.0).pattern for _ in range(20)} == {"plain", "denim"}
    assert fabric(dice, "train", plain=0.0, hem=0.3).hem == 0.3


def test_the_frequency_of_dark_dyes_follows_its_factor():
    shares = [np.mean([sum(dye(Dice(2, i), dark=dark)) < 0.3 for i in range(300)]) for dark in (0.2, 5.0)]
    assert shares[0] + 0.2 < shares[1]


@pytest.mark.parametrize("patterns", FAMILIES)
def test_prints_are_masks_with_a_shape_on_a_background(patterns):
    masks = [print_mask(seed, patterns, 48) for seed in range(40)]
    assert all(m.shape == (48, 48) and m.min() >= 0 and m.max() <= 1 for m in masks)
    assert all(0.04 < m.mean() < 0.96 for m in masks)
    assert len({m.tobytes() for m in masks}) > 15
    assert np.array_equal(masks[7], print_mask(7, patterns, 48))


# ---- Poses


def test_turns_are_right_handed_rotations():
    quarter = turn((0, 0, 1), np.pi / 2)
    assert np.allclose(quarter @ (1, 0, 0), (0, 1, 0), atol=1e-6)
    for turns in (pose(np.random.default_rng(i), GAIT) for i in range(20)):
        for matrix in turns.values():
            assert np.allclose(matrix @ matrix.T, np.eye(3), atol=1e-5)
            assert np.linalg.det(matrix) > 0


def test_walkers_swing_legs_and_arms_in_opposition_and_bend_knees_backwards_only():
    def ahead(matrix: np.ndarray) -> float:
        return float(-(matrix @ (0, 0, -1))[1])  # how far forward the end of a hanging limb points

    legs, arms = [], []
    for i in range(300):
        turns = pose(np.random.default_rng(i), GAIT)
        left, right = (ahead(turns[f"upperleg01.{side}"]) for side in "LR")
        legs.append(left - right)
        arms.append(ahead(turns["upperarm01.L"]) - ahead(turns["upperarm01.R"]))
        assert all(ahead(turns[f"lowerleg01.{side}"]) < 0.01 for side in "LR")  # knees do not bend forwards
    assert abs(np.mean(legs)) < 0.1
    assert np.std(legs) > 0.2
    assert np.corrcoef(legs, arms)[0, 1] < -0.5  # though some arms are held


def test_an_arm_that_carries_a_bag_hangs_straight():
    for side, name in ((1, "L"), (-1, "R")):
        elbows = [pose(np.random.default_rng(i), GAIT, "bag", side)[f"lowerarm01.{name}"] for i in range(30)]
        bends = [np.arccos(np.clip((np.trace(m) - 1) / 2, -1, 1)) for m in elbows]
        assert min(bends) > 0.4  # straightened from its bend at rest


# ---- Meshes


def volume(mesh: Mesh) -> float:
    a, b, c = np.moveaxis(mesh.points[mesh.faces], 1, 0)
    return float((np.cross(a, b) * c).sum() / 6)


def area(mesh: Mesh) -> float:
    a, b, c = np.moveaxis(mesh.points[mesh.faces], 1, 0)
    return float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2)


def test_solids_have_the_requested_size():
    stone = Material("plaster")
    assert area(box((1, 2, 3), (1, 2, 4), stone, yaw=0.7)) == pytest.approx(2 * (2 + 4 + 8))
    assert np.allclose(box((1, 2, 3), (1, 2, 4), stone, yaw=0.7).points.mean(0), (1, 2, 3))
    ball = ellipsoid((0, 0, 1), (0.3, 0.3, 0.3), stone, rings=24, sides=48)
    assert abs(volume(ball)) == pytest.approx(4 / 3 * np.pi * 0.027, rel=0.02)
    boxy = ellipsoid((0, 0, 0), (0.3, 0.3, 0.3), stone, rings=24, sides=48, power=0.4)
    assert abs(volume(boxy)) > 1.4 * abs(volume(ball))
    tube = cylinder((0, 0, 0), (0, 0, 2), (0.1, 0.1), stone, sides=40)
    assert area(tube) == pytest.approx(2 * np.pi * 0.1 * 2 + np.pi * 0.01, rel=0.01)


def test_uv_are_metres():
    wall = quad((0, 0, 0), (3, 4, 0), (0, 0, 2), Material("bricks"))
    assert np.ptp(wall.uv.reshape(-1, 2), axis=0).tolist() == [5.0, 2.0]
    tube = cylinder((0, 0, 0), (0, 0, 2), (0.1, 0.1), Material(), sides=12)
    assert np.ptp(tube.uv.reshape(-1, 2), axis=0) == pytest.approx((2 * np.pi * 0.1, 2.0))


def test_merging_keeps_corners_and_material_of_each_face():
    red, blue = Material(colour=(1.0, 0.0, 0.0)), Material(colour=(0.0, 0.0, 1.0))
    parts = [
        box((0, 0, 0), (1, 1, 1), red),
        quad((5, 0, 0), (1, 0, 0), (0, 1, 0), blue),
        box((9, 0, 0), (1, 1, 1), red),
    ]
    whole = merge(parts)
    assert whole.materials == [red, blue]
    assert area(whole) == pytest.approx(6 + 1 + 6)
    middle = whole.points[whole.faces].mean(1)[:, 0]
    assert [whole.materials[m].colour[2] for m in whole.material] == [float(4 < x < 7) for x in middle]


def test_materials_use_only_patterns_of_the_kernel():
    used = {cloth.pattern for family in PATTERN_FAMILIES for who in crowd(family) for cloth in garment_materials(who)}
    assert used | {"skin", "hair", "sole", "strap"} <= set(PATTERNS)


# ---- The sensor


def test_the_sensor_gives_the_requested_size_and_is_a_function_of_its_random_generator():
    radiance = np.random.default_rng(0).uniform(0, 1, (60, 25, 3))
    noisy = replace(CAMERA, noise=4.0, blur=0.5, sharpen=0.5, jpeg=(50, 90))
    first, second = (develop(np.random.default_rng(1), radiance, noisy, (256, 128)) for _ in range(2))
    assert first.size == (128, 256)
    assert first.mode == "RGB"
    assert (
        first.tobytes() == second.tobytes() != develop(np.random.default_rng(2), radiance, noisy, (256, 128)).tobytes()
    )


def test_exposure_white_balance_and_saturation_have_their_effect():
    gray = np.full((64, 32, 3), 0.2)
    red = gray * (1.6, 0.8, 0.6)

    def mean(radiance: np.ndarray, **settings: object) -> np.ndarray:
        image = develop(np.random.default_rng(1), radiance, replace(CAMERA, **settings), (64, 32))
        return np.asarray(image, float).mean((0, 1))

    assert (mean(gray, exposure=2.0) > mean(gray) + 20).all()
    warm = mean(gray, gains=(1.2, 1.0, 0.8))
    assert warm[0] > warm[1] + 5 > warm[2] + 10
    assert np.ptp(mean(red, saturation=0.2)) < 0.5 * np.ptp(mean(red))
    assert mean(gray * 50).max() <= 255


def test_haze_lightens_dark_cloth_and_takes_contrast():
    stripes = np.zeros((64, 32, 3)) + np.where(np.arange(64) % 16 < 8, 0.02, 0.6)[:, None, None]
    clear, hazy = (
        np.asarray(develop(np.random.default_rng(1), stripes, replace(CAMERA, haze=haze), (64, 32)), float)
        for haze in (0.0, 0.3)
    )
    assert hazy.min() > clear.min() + 20
    assert hazy.std() == pytest.approx(0.7 * clear.std(), rel=0.1)


def test_motion_blurs_some_images_along_the_rows_only():
    columns = np.zeros((200, 80, 3)) + np.where(np.arange(80) % 20 < 10, 0.1, 0.6)[:, None]
    moving = replace(CAMERA, motion=0.05)

    def sharpness(radiance: np.ndarray, axis: int) -> np.ndarray:
        images = [develop(np.random.default_rng(i), radiance, moving, (200, 80)) for i in range(40)]
        return np.array([np.abs(np.diff(np.asarray(image, float), axis=axis)).max() for image in images])

    across, along = sharpness(columns, 1), sharpness(columns[:80].swapaxes(0, 1).repeat(2, 1), 0)
    assert 0.1 < (across < 0.7 * np.median(across)).mean() < 0.45
    assert (along > 0.7 * np.median(along)).all()


def test_the_package_and_the_dataset_readers_do_not_import_anny_or_warp():
    code = (
        "import sys; sys.modules['anny'] = sys.modules['warp'] = None;"  # importing them would fail
        "import passreid_synth3d, passreid_models.evaluation.evaluate, passreid_synth3d.dataset;"
        "import passreid_synth3d.wardrobe, passreid_synth3d.place;"
        "print(passreid_synth3d.write_market1501.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("write_market1501\n", "")
