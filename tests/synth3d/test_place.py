"""Places of cameras: deterministic, with people in view and clear of solids."""

import math

import numpy as np
import pytest

from passreid_models.synthetic.attributes import stream
from passreid_synth3d.mesh import PATTERNS, Array, Material, Mesh, box
from passreid_synth3d.place import HEIGHTS, Place, clearance, place, visible
from passreid_synth3d.surroundings import KINDS, surroundings

SEED, CAMERAS, PEOPLE = 5, 12, 25


def people(camid: int, count: int = PEOPLE) -> Array:
    """Spots (x, y, heading) of people in a camera [count, 3]."""
    rng = stream(SEED, 77, camid, 1)
    return np.array([place(SEED, camid).stand(rng) for _ in range(count)])


def at_height(spots: Array, z: float) -> Array:
    return np.concatenate([spots[:, :2], np.full((len(spots), 1), z)], 1)


def meets(mesh: Mesh, start: Array, end: Array) -> np.ndarray:
    """Whether the segments from start to end, both [N, 3], cross a triangle [N] (Moeller and Trumbore)."""
    a, b, c = mesh.points[mesh.faces].swapaxes(0, 1)  # [F, 3]
    e1, e2 = b - a, c - a
    d = end - start
    h = np.cross(d[:, None], e2)
    det = (h * e1).sum(-1)
    inverse = 1 / np.where(np.abs(det) < 1e-12, np.inf, det)
    s = start[:, None] - a
    u = (s * h).sum(-1) * inverse
    q = np.cross(s, e1)
    v = (q * d[:, None]).sum(-1) * inverse
    t = (q * e2).sum(-1) * inverse
    return ((u >= 0) & (v >= 0) & (u + v <= 1) & (t > 0) & (t < 1) & (inverse != 0)).any(1)


def alike(a: Place, b: Place) -> bool:
    numbers = [(p.mesh.points, p.mesh.uv, p.eye, p.right, p.down, p.forward, p.clear, p.hidden) for p in (a, b)]
    rest = [(p.kind, p.mesh.materials, p.light, p.imaging, p.focal, p.frame) for p in (a, b)]
    return rest[0] == rest[1] and all(np.array_equal(x, y) for x, y in zip(*numbers, strict=True))


# ---- Determinism


def test_a_place_depends_only_on_its_arguments():
    first = [place(SEED, camid) for camid in range(3)]
    stands = [people(camid, 5) for camid in range(3)]
    place.cache_clear()
    np.random.seed(0)
    place(SEED + 1, 2)
    for camid in (2, 0, 1):
        assert place(SEED, camid) is not first[camid]
        assert alike(place(SEED, camid), first[camid])
        np.testing.assert_array_equal(people(camid, 5), stands[camid])


def test_places_differ_between_cameras_and_between_seeds():
    places = [place(seed, camid) for seed in (SEED, SEED + 1) for camid in range(4)]
    for i, a in enumerate(places):
        for b in places[:i]:
            assert not np.allclose(a.eye, b.eye)
            assert a.imaging != b.imaging
            assert a.light != b.light
            assert a.mesh.materials != b.mesh.materials


# ---- Where people stand


@pytest.mark.parametrize("camid", range(CAMERAS))
def test_a_person_is_fully_in_the_frame_at_the_size_of_surveillance(camid):
    scene, spots = place(SEED, camid), people(camid)
    ends, depths = zip(*(scene.project(at_height(spots, z)) for z in (0.0, 1.75)), strict=True)
    for pixels, depth in zip(ends, depths, strict=True):
        assert (depth > 1).all()
        assert (np.abs(pixels) < np.array(scene.frame) / 2).all()
    tall = np.linalg.norm(ends[0] - ends[1], axis=1)
    assert (tall > HEIGHTS[0] - 8).all()
    assert (tall < HEIGHTS[1]).all()
    assert (ends[1][:, 1] < ends[0][:, 1]).all()  # heads are above feet


@pytest.mark.parametrize("camid", range(CAMERAS))
def test_the_mesh_does_not_intersect_persons(camid):
    scene, spots = place(SEED, camid), people(camid)
    for dx, dy in ((0, 0), *(0.25 * np.array((math.cos(a), math.sin(a))) for a in np.arange(0, 6.28, 0.8))):
        low, high = (at_height(spots + np.array((dx, dy, 0)), z) for z in (0.03, 1.75))
        assert not meets(scene.mesh, low, high).any()


def test_the_check_above_finds_a_person_in_a_box():
    crate = box((2, 1, 0.5), (1, 1, 1), Material())
    spots = np.array([(2.1, 1.2, 0), (2.8, 1.2, 0)])
    assert meets(crate, at_height(spots, 0.03), at_height(spots, 1.75)).tolist() == [True, False]


def test_people_stand_on_the_ground():
    for camid in range(4):
        spots = people(camid)
        assert meets(place(SEED, camid).mesh, at_height(spots, 0.03), at_height(spots, -0.01)).all()


def test_some_people_are_partly_hidden_and_most_are_fully_visible():
    shares = []
    for camid in range(CAMERAS):
        scene, spots = place(SEED, camid), people(camid)
        side = np.append(scene.right[:2], 0) / np.linalg.norm(scene.right[:2])
        points = [at_height(spots, z) + s * side for z in (0.3, 1.05, 1.6) for s in (-0.15, 0.0, 0.15)]
        eyes = np.broadcast_to(scene.eye, points[0].shape)
        shares.append(np.mean([meets(scene.mesh, eyes, p) for p in points], 0))
    hidden = np.stack(shares)
    assert 0.04 < (hidden > 0.1).mean() < 0.25
    assert (hidden > 0.7).mean() < 0.02  # hardly anybody is mostly hidden
    assert (hidden < 0.05).mean() > 0.7


# ---- Views


def yaws(camid: int) -> Array:
    """Angle of each person from facing the camera, radians."""
    spots = people(camid)
    to_camera = place(SEED, camid).eye[:2] - spots[:, :2]
    return (spots[:, 2] - np.arctan2(to_camera[:, 0], -to_camera[:, 1])) % (2 * math.pi)


def test_a_camera_sees_several_sides_of_people_and_all_cameras_together_every_side():
    octants = [np.floor(yaws(camid) / (math.pi / 4)).astype(int) for camid in range(CAMERAS)]
    assert min(len(set(o)) for o in octants) >= 3
    assert np.median([len(set(o)) for o in octants]) >= 6
    counts = np.bincount(np.concatenate(octants), minlength=8) / (CAMERAS * PEOPLE)
    assert counts.min() > 0.04


def test_heading_0_walks_towards_minus_y():
    """A person who walks towards a camera far along -y shows the front: a yaw of 0."""
    scene, spots = place(SEED, 0), people(0)
    ahead = spots[:, :2] + np.stack([np.sin(spots[:, 2]), -np.cos(spots[:, 2])], 1)
    nearer = np.linalg.norm(ahead - scene.eye[:2], axis=1) < np.linalg.norm(spots[:, :2] - scene.eye[:2], axis=1)
    turned = np.abs(np.remainder(yaws(0) + math.pi, 2 * math.pi) - math.pi)
    away = np.abs(turned - math.pi / 2) > 0.2  # excludes those seen from the side
    np.testing.assert_array_equal(nearer[away], (turned < math.pi / 2)[away])


def test_the_camera_axes_are_orthonormal_and_the_camera_looks_down():
    for camid in range(CAMERAS):
        scene = place(SEED, camid)
        axes = np.stack([scene.right, scene.down, scene.forward])
        np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-9)
        assert np.linalg.det(axes) == pytest.approx(1)
        assert scene.down[2] < -0.5
        assert scene.forward[2] < 0
        assert 1.9 < scene.eye[2] <= 5


# ---- Surroundings and light


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_surroundings_has_few_faces_and_only_known_patterns(kind):
    scene = surroundings(stream(SEED, 78, 1, 1), kind)
    assert sum(len(mesh.faces) for mesh in scene.meshes) < 4000
    assert {m.pattern for mesh in scene.meshes for m in mesh.materials} <= set(PATTERNS)
    assert all(0 < c < 1 for mesh in scene.meshes for m in mesh.materials for c in m.colour)


def test_gray_ground_is_neither_black_nor_white():
    for camid in range(CAMERAS):
        light, imaging = place(SEED, camid).light, place(SEED, camid).imaging
        assert math.hypot(*light.sun) == pytest.approx(1)
        sunny = 0.4 * (np.array(light.sky) + light.sun[2] * np.array(light.sunlight))
        assert 0.25 < sunny.mean() < 0.95
        assert 0.2 < (sunny * imaging.exposure * imaging.gains).mean() < 1.3


def test_cameras_differ_in_exposure_white_balance_saturation_and_haze_as_real_ones_do():
    cameras = [place(seed, camid).imaging for seed in (SEED, SEED + 1) for camid in range(CAMERAS)]
    gains = np.log([camera.gains for camera in cameras])
    assert 0.06 < (gains[:, 0] - gains[:, 2]).std() < 0.2
    assert 0.15 < np.std([math.log(camera.exposure) for camera in cameras]) < 0.6
    assert min(camera.saturation for camera in cameras) < 0.72 < 1 < max(camera.saturation for camera in cameras)
    assert 0 < sum(camera.haze > 0.05 for camera in cameras) < CAMERAS


# ---- Geometry by hand


def test_visible_agrees_with_hand_computed_cases():
    solids = np.array([(5, 0, 1, 0.5, 0, 0, 2), (0, 5, 1, 0.1, math.pi / 2, 1, 2)])
    start = np.array((0, 0, 1.5))
    ends = np.array([(10, 0, 1.5), (10, 2, 1.5), (10, 0, 9), (3, 0, 1.5), (0, 10, 1.5), (0, 10, 0), (1, 10, 1.5)])
    assert visible(start, ends, solids).tolist() == [False, True, True, True, False, True, True]


def test_clearance_agrees_with_hand_computed_distances():
    solids = np.array([(0, 0, 2, 1, math.pi / 2, 0, 1), (9, 9, 1, 1, 0, 2.5, 4)])  # the second hangs overhead
    at = np.array([(0, 0), (3, 0), (0, 3), (4, 6), (9, 9)])
    np.testing.assert_allclose(clearance(at, solids), (0, 2, 1, 5, math.hypot(8, 7)))


# ---- Errors


@pytest.mark.parametrize("arguments", [(-1, 0), (0, -3)])
def test_negative_numbers_are_refused_by_name(arguments):
    with pytest.raises(ValueError, match=rf"must not be negative, got seed {arguments[0]} and camid {arguments[1]}"):
        place(*arguments)


def test_studios_differ_only_in_the_viewpoint_and_the_side_of_the_light():
    studios = [place(SEED, camid, "studio") for camid in range(8)]
    assert {s.kind for s in studios} == {"studio"}
    assert len({s.imaging for s in studios}) == 1
    assert len({(s.light.sunlight, s.light.sky, s.light.horizon) for s in studios}) == 1
    assert len({tuple(s.eye) for s in studios}) == len({s.light.sun for s in studios}) == 8
    assert all(len(s.hidden) == 0 and len(s.clear) > 50 for s in studios)
    with pytest.raises(ValueError, match="place must be one of street, studio, got 'beach'"):
        place(SEED, 0, "beach")
