"""MultiCrop: boxes and pixels of the views, and the distribution of all random numbers."""

from collections import Counter
from dataclasses import fields
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from passreid_models.pretrain.views import (
    BLUR,
    BRIGHTNESS,
    CONTRAST,
    GRAY,
    HUE,
    NUM_PARAMS,
    SATURATION,
    SOLARIZE,
    STEPS,
    MultiCrop,
    Views,
)
from passreid_models.synthetic import SyntheticPersons

DRAWS = 4000


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return SyntheticPersons(1, 1, 1, size=(128, 64))[0][0]


@pytest.fixture(scope="module")
def params() -> np.ndarray:  # [DRAWS, 11, NUM_PARAMS]
    rng = np.random.default_rng(0)
    return np.stack([MultiCrop().draw_params(rng) for _ in range(DRAWS)])


def boxes(height: int, width: int, draws: int = DRAWS, **options: object) -> np.ndarray:  # [draws, V, 4]
    crop, rng = MultiCrop(**options), np.random.default_rng(0)
    return np.stack([crop.draw_boxes(height, width, rng) for _ in range(draws)])


def assert_share(events: np.ndarray, probability: float) -> None:
    """Assert that the share is within four standard deviations of the probability."""
    assert abs(events.mean() - probability) <= 4 * (probability * (1 - probability) / events.size) ** 0.5


def assert_uniform(values: np.ndarray, low: float, high: float) -> None:
    """Assert that values fill the range, with the deciles of a uniform distribution."""
    assert low - 1e-6 <= values.min() < low + 0.01 * (high - low)
    assert high - 0.01 * (high - low) < values.max() <= high + 1e-6
    deciles = (np.quantile(values, np.arange(0.1, 1, 0.1)) - low) / (high - low)
    assert np.abs(deciles - np.arange(0.1, 1, 0.1)).max() < 2.5 / values.size**0.5  # more than 4 deviations


# ---- Shapes


def test_views_are_two_globals_and_three_locals_of_each_area(image):
    views = MultiCrop()(image, np.random.default_rng(0))
    assert [(v.dtype, tuple(v.shape)) for v in views] == [
        (torch.uint8, (2, 3, 256, 128)),
        (torch.uint8, (9, 3, 128, 64)),
        (torch.float32, (11, NUM_PARAMS)),
    ]


@pytest.mark.parametrize(
    ("areas", "count", "num"), [(((0, 1),), 9, 9), (((0, 0.5), (0.5, 1)), 2, 4), (((0, 1),), 0, 0)]
)
def test_number_of_areas_and_of_their_locals_is_free(image, areas, count, num):
    crop = MultiCrop(size=(48, 32), local_size=(32, 16), areas=areas, locals_per_area=count)
    views = crop(image, np.random.default_rng(0))
    assert views.global_views.shape == (2, 3, 48, 32)
    assert views.local_views.shape == (num, 3, 32, 16)
    assert views.params.shape == (crop.num_views, NUM_PARAMS) == (2 + num, NUM_PARAMS)


def test_default_collate_stacks_views(image):
    one = MultiCrop()(image, np.random.default_rng(0))
    batch = default_collate([one, one, one])
    assert isinstance(batch, Views)
    assert [tuple(v.shape) for v in batch] == [(3, *v.shape) for v in one]


# ---- Boxes


@pytest.mark.parametrize(("height", "width"), [(128, 64), (257, 130)])
def test_global_boxes_are_in_the_image_and_local_boxes_in_the_rows_of_their_area(height, width):
    all_boxes = boxes(height, width)
    top, left, h, w = all_boxes.transpose(2, 1, 0)  # [V, draws]
    first = np.array([0, 0] + [0] * 3 + [height // 4] * 3 + [height // 2] * 3)
    last = np.array([height, height] + [height // 2] * 3 + [3 * height // 4] * 3 + [height] * 3)
    assert (h > 0).all()
    assert (w > 0).all()
    assert (left.min(axis=1) == 0).all()
    assert ((left + w).max(axis=1) == width).all()
    assert (top.min(axis=1) == first).all()  # and the area is used to its last row
    assert ((top + h).max(axis=1) == last).all()


def test_crop_scale_is_relative_to_the_area_and_ratio_is_three_to_four():
    _, _, h, w = boxes(1000, 500, draws=1000).transpose(2, 1, 0)
    scale = h * w / (500 * np.array([1000] * 2 + [500] * 9))[:, None]
    assert scale[:2].min() == pytest.approx(0.4, abs=0.01)
    assert scale[2:].min() == pytest.approx(0.1, abs=0.01)
    # A box of ratio 4/3 cannot fill an upright image: the largest ones are of ratio 3/4 and as wide as the image,
    # 500 / 0.75 rows of 1000. A square area has room for 0.8.
    assert scale[:2].max() == pytest.approx(500 * 500 / 0.75 / 500_000, abs=0.01)
    assert scale[2:].max() == pytest.approx(0.8, abs=0.01)
    assert (w / h).min() == pytest.approx(3 / 4, abs=0.01)
    assert (w / h).max() == pytest.approx(4 / 3, abs=0.01)


def test_boxes_are_distributed_as_those_of_random_resized_crop():
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    like = torch.zeros(1, 128, 64)
    theirs = np.array([RandomResizedCrop.get_params(like, [0.4, 1.0], [3 / 4, 4 / 3]) for _ in range(DRAWS)])
    ours = boxes(128, 64, draws=DRAWS // 2)[:, :2].reshape(-1, 4)
    for column in range(4):
        edges = np.arange(129)
        a, b = (np.searchsorted(np.sort(x[:, column]), edges, side="right") / DRAWS for x in (theirs, ours))
        assert np.abs(a - b).max() < 1.95 * (2 / DRAWS) ** 0.5  # Kolmogorov-Smirnov, level 0.001


@pytest.mark.parametrize(("height", "width", "box"), [(500, 3, (248, 0, 4, 3)), (3, 500, (0, 248, 3, 4))])
def test_images_too_narrow_for_any_ratio_give_their_centre(height, width, box):
    all_boxes = boxes(height, width, draws=5, global_scale=(0.9, 1.0))[:, :2].reshape(-1, 4)
    assert (all_boxes == box).all()


# ---- Pixels


def expected_cut(image: Image.Image, box: list[int], size: tuple[int, int], flip: bool) -> np.ndarray:
    top, left, h, w = box
    cut = image.crop((left, top, left + w, top + h)).resize(size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else cut).transpose(2, 0, 1)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(128, 64), (256, 128)])
@pytest.mark.parametrize("kind", ["person", "noise"])
def test_views_are_pils_crop_then_its_bicubic_resize_but_for_rounding(size, flip, kind):
    if kind == "person":
        image = SyntheticPersons(1, 1, 1, size=size)[0][0]
    else:
        image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8))
    crop = MultiCrop(flip_prob=float(flip))
    for seed in range(3):
        views = crop(image, np.random.default_rng(seed))
        cut = [*views.global_views, *views.local_views]
        for view, box in zip(cut, crop.draw_boxes(*size, np.random.default_rng(seed)).tolist(), strict=True):
            expected = expected_cut(image, box, tuple(view.shape[1:]), flip)
            difference = np.abs(view.numpy().astype(int) - expected)
            assert difference.max() <= 2
            assert (difference > 0).mean() < 0.02
            assert (difference > 1).mean() < 0.001


def test_local_views_see_nothing_of_the_image_outside_their_area():
    pixels = np.full((128, 64, 3), 200, np.uint8)
    pixels[64:] = 0
    crop = MultiCrop()
    for seed in range(20):
        views = crop(Image.fromarray(pixels), np.random.default_rng(seed))
        assert (views.local_views[:3] == 200).all()
        assert (views.local_views[6:] == 0).all()


def test_half_of_the_views_are_flipped_each_for_itself():
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 128, axis=0).repeat(3, axis=2)
    crop = MultiCrop(size=(8, 8), local_size=(8, 8))
    rng = np.random.default_rng(0)
    flipped = []
    for _ in range(800):
        views = crop(Image.fromarray(ramp), rng)
        pixels = torch.cat([views.global_views, views.local_views]).int()
        flipped.append((pixels[:, 0, 0, 0] > pixels[:, 0, 0, -1]).numpy())
    counts = np.stack(flipped)  # [800, V]
    assert_share(counts, 0.5)
    assert np.abs(np.corrcoef(counts.T) - np.eye(11)).max() < 4.5 / 800**0.5


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3), (37, 11), (2, 1)])
def test_images_of_any_size_give_whole_views(size):
    gray = Image.new("RGB", size[::-1], (10, 120, 240))
    for seed in range(5):
        views = MultiCrop()(gray, np.random.default_rng(seed))
        for cut in views[:2]:
            assert torch.equal(cut, torch.tensor([10, 120, 240], dtype=torch.uint8)[:, None, None].expand_as(cut))


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_images_of_other_modes_are_converted_to_rgb(image, mode):
    other = image.convert(mode)
    views, expected = (MultiCrop()(i, np.random.default_rng(0)) for i in (other, other.convert("RGB")))
    assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True))


# ---- Params


def test_jitter_factors_are_uniform_in_their_ranges(params):
    assert_uniform(params[..., BRIGHTNESS], 0.6, 1.4)
    assert_uniform(params[..., CONTRAST], 0.6, 1.4)
    assert_uniform(params[..., SATURATION], 0.8, 1.2)
    assert_uniform(params[..., HUE], -0.1, 0.1)


def test_factors_do_not_fall_below_zero():
    rng = np.random.default_rng(0)
    factors = np.stack([MultiCrop(contrast=3.0).draw_params(rng) for _ in range(500)])[..., CONTRAST]
    assert_uniform(factors, 0.0, 4.0)


def test_jitter_comes_four_times_in_five_in_any_of_the_24_orders(params):
    steps = params[..., STEPS].reshape(-1, 4).astype(int)
    jittered = (steps >= 0).any(axis=1)
    assert_share(jittered, 0.8)
    assert (steps[~jittered] == -1).all()
    counts = Counter(map(tuple, steps[jittered].tolist()))
    assert set(counts) == set(permutations(range(4)))
    expected = jittered.sum() / 24
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 49.7  # chi-squared, 23 degrees, level 0.001


def test_a_fifth_of_the_views_is_gray(params):
    assert_share(params[..., GRAY], 0.2)


def test_blur_comes_with_probability_1_for_first_globals_a_tenth_for_second_ones_and_a_half_for_locals(params):
    blurred = params[..., BLUR] > 0
    assert blurred[:, 0].all()
    assert_share(blurred[:, 1], 0.1)
    assert_share(blurred[:, 2:], 0.5)
    for group in (params[:, 0, BLUR], params[:, 2:, BLUR][blurred[:, 2:]]):
        assert_uniform(group, 0.1, 2.0)


def test_a_fifth_of_the_second_globals_is_solarised_and_nothing_else(params):
    assert_share(params[:, 1, SOLARIZE], 0.2)
    assert not params[:, [0, *range(2, 11)], SOLARIZE].any()


def test_operations_are_drawn_independently_of_each_other(params):
    second = params[:, 1]
    events = np.stack([second[:, 4] >= 0, second[:, GRAY] > 0, second[:, BLUR] > 0, second[:, SOLARIZE] > 0])
    assert np.abs(np.corrcoef(events) - np.eye(4)).max() < 4.5 / DRAWS**0.5


# ---- Randomness


def test_views_are_a_function_of_the_image_and_the_generator(image):
    def seeded(seed: int) -> list[Tensor]:
        torch.manual_seed(np.random.default_rng().integers(1000))  # of no influence
        return list(MultiCrop()(image, np.random.default_rng(seed)))

    assert all(torch.equal(a, b) for a, b in zip(seeded(3), seeded(3), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(seeded(3), seeded(4), strict=True))


def test_image_is_left_as_it_is(image):
    before = np.array(image)
    MultiCrop()(image, np.random.default_rng(0))
    assert np.array_equal(before, image)


# ---- Configuration


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", (256,)),
        ("size", 256),
        ("size", (256.0, 128)),
        ("local_size", (0, 64)),
        ("areas", ()),
        ("areas", ((0.5, 0.5),)),
        ("areas", ((0.0, 1.1),)),
        ("areas", (0.0, 0.5)),
        ("locals_per_area", -1),
        ("locals_per_area", 1.5),
        ("global_scale", (0.0, 1.0)),
        ("global_scale", (0.9, 0.4)),
        ("local_scale", (0.1, 1.5)),
        ("ratio", (0.0, 1.0)),
        ("ratio", (4 / 3, 3 / 4)),
        ("flip_prob", 1.1),
        ("jitter_prob", -0.1),
        ("brightness", -0.4),
        ("contrast", float("nan")),
        ("saturation", "0.2"),
        ("hue", 0.6),
        ("gray_prob", True),
        ("blur_probs", (1.0, 0.1)),
        ("blur_probs", (1.0, 0.1, 2.0)),
        ("blur_radius", (0.0, 2.0)),
        ("blur_radius", (2.0, 0.1)),
        ("blur_radius", (0.1, float("inf"))),
        ("solarize_prob", 2),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_field(field, value):
    with pytest.raises(ValueError, match=rf"^{field} must be .*, got "):
        MultiCrop(**{field: value})


def test_names_of_the_options_and_their_defaults_are_those_of_the_paper():
    assert {f.name: f.default for f in fields(MultiCrop)} == dict(
        size=(256, 128), local_size=(128, 64), areas=((0.0, 0.5), (0.25, 0.75), (0.5, 1.0)), locals_per_area=3,
        global_scale=(0.4, 1.0), local_scale=(0.1, 0.8), ratio=(3 / 4, 4 / 3), flip_prob=0.5, jitter_prob=0.8,
        brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, gray_prob=0.2, blur_probs=(1.0, 0.1, 0.5),
        blur_radius=(0.1, 2.0), solarize_prob=0.2,
    )  # fmt: skip
