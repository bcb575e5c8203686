"""Training images of re-ID: the transform, and that it is a function of seed, step and place in the batch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from passreid_models.data.images import ImageError
from passreid_models.data.loader import stopping
from passreid_models.reid.batches import (
    KeySampler,
    TrainImage,
    TrainImages,
    collate,
    load,
    make_loader,
    normalise,
    train_transform,
)
from passreid_models.reid.config import DOMAIN, FinetuneConfig
from passreid_models.reid.unsupervised import ClusterRun


def varied(**options: Any) -> Any:
    """Transform to 64x32 with these options, and else with nothing random."""
    return train_transform(
        FinetuneConfig(**{"size": (64, 32), "flip_prob": 0.0, "pad": 0, "erase_prob": 0.0, **options})
    )


def finished(*images: TrainImage) -> torch.Tensor:
    """Images as the network sees them, ``[B, 3, H, W]``."""
    return normalise(*collate([(image, 0, []) for image in images])[:3])


USUAL = train_transform(FinetuneConfig(size=(64, 32)))
PLAIN = varied()


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (80, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    return [*sorted(folder.glob("?.png")), folder / "broken.jpg"]


class Images(TrainImages):
    """Training images whose first entry is as the network sees it, ``[3, H, W]``."""

    def __getitem__(self, key):
        image, index, unreadable = super().__getitem__(key)
        return finished(image)[0], index, unreadable


def images(paths: list[Path], transform: Any = USUAL, seed: int = 0) -> Images:
    return Images(paths, transform, seed)


def test_an_image_is_resized_bicubic_and_normalised_by_a_half(paths):
    pixels, index, unreadable = images(paths, PLAIN)[0, 0, 1]
    with Image.open(paths[1]) as image:
        expected = np.asarray(image.resize((32, 64), Image.Resampling.BICUBIC), dtype=np.float32) / 127.5 - 1
    torch.testing.assert_close(pixels, torch.from_numpy(expected).permute(2, 0, 1), rtol=0, atol=1e-6)
    assert (index, unreadable) == (1, [])


def test_augmentation_is_a_function_of_seed_step_and_place_alone(paths):
    x = images(paths)
    first = x[3, 5, 0][0]
    assert torch.equal(first, x[3, 5, 0][0])
    assert torch.equal(first, images(paths)[3, 5, 0][0])
    for other in (x[4, 5, 0], x[3, 6, 0], images(paths, seed=1)[3, 5, 0]):
        assert not torch.equal(first, other[0])


def test_the_generator_of_the_caller_is_unchanged(paths):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    _ = images(paths)[0, 0, 0]
    assert torch.equal(torch.rand(4), expected)


def test_the_padding_is_black_and_the_crop_random(paths):
    x = images(paths, varied(pad=10))
    black = [((x[step, 0, 0][0] == -1).all(0)).float().mean().item() for step in range(30)]
    assert len(set(black)) > 10
    assert max(black) > 0.2


def test_erasing_fills_with_noise_or_a_colour(paths):
    whole = images(paths, PLAIN)[0, 0, 0][0]
    for value in (None, (0.485, 0.456, 0.406)):
        config = FinetuneConfig(size=(64, 32), flip_prob=0, pad=0, erase_prob=1)
        erased = images(paths, train_transform(config, (0.1, 0.3), value))[0, 0, 0][0]
        changed = (erased != whole).any(0)
        assert 0.05 < changed.float().mean() < 0.35
        inside = erased[:, changed]
        if value is None:
            assert 0.8 < inside.std() < 1.2
        else:
            assert inside.std(1).max() < 1e-6
            assert inside[:, 0].tolist() == pytest.approx(value)


def test_an_unreadable_image_is_replaced_by_the_next_with_its_own_index(paths):
    pixels, index, unreadable = images(paths, PLAIN)[0, 0, 4]
    assert index == 0
    assert torch.equal(pixels, images(paths, PLAIN)[0, 0, 0][0])
    assert len(unreadable) == 1
    assert "broken.jpg" in unreadable[0]
    with pytest.raises(ImageError, match=r"1 images in a row cannot be read; the first: .*broken\.jpg"):
        _ = images(paths[4:], PLAIN)[0, 0, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_live_through_the_passes_and_labels_may_change_between_them(paths, workers):
    batches = {3: [np.array([[0, 1], [2, 3]]), np.array([[3, 2], [1, 4]])], 4: [np.array([[1, 0]])]}
    sampler = KeySampler(batches.__getitem__, [0, 5, 9, 20, 22])
    loader = make_loader(TrainImages(paths, USUAL, 0), sampler, workers, False)
    loaded, processes = [], set()
    with stopping(loader):
        for steps, labels in ((range(20, 23), [7, 8, 9, 10, 11]), (range(21, 23), [5, 4, 3, 2, 1])):
            sampler.steps = steps
            loaded.append(list(load(loader, torch.tensor(labels))))
            processes |= {worker.pid for worker in loader._iterator._workers} if workers else set()
        started = loader._iterator._workers if workers else []
    assert [[b.labels.tolist() for b in part] for part in loaded] == [
        [[7, 8, 9, 10], [10, 9, 8, 7], [8, 7]],
        [[2, 3, 4, 5], [4, 5]],
    ]
    assert [[len(b.unreadable) for b in part] for part in loaded] == [[0, 1, 0], [1, 0]]
    assert torch.equal(loaded[0][1].images[2], images(paths)[21, 2, 1][0])
    assert all(torch.equal(a.images, b.images) for a, b in zip(loaded[0][1:], loaded[1], strict=True))
    assert len(processes) == workers
    assert not any(worker.is_alive() for worker in started)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError("")])
@pytest.mark.parametrize("dies", [True, False])
def test_a_worker_that_dies_while_it_sends_a_batch_is_named_as_dead(paths, error, dies):
    sampler = KeySampler({0: [np.array([[0, 1], [2, 3]])] * 9}.__getitem__, [0])
    sampler.steps = range(9)
    loader = make_loader(TrainImages(paths, USUAL, 0), sampler, 1, False)

    def train() -> None:
        with stopping(loader):
            next(iter(loader))
            if dies:
                loader._iterator._workers[0].kill()
            raise error  # as the connection to it does, which closes first

    with pytest.raises(RuntimeError if dies else type(error), match="^DataLoader worker" if dies else None):
        train()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_with_images_kept_in_memory(paths, workers):
    sampler = KeySampler({0: [np.array([[0, 1], [2, 3]]), np.array([[3, 2], [1, 4]])]}.__getitem__, [0])
    loaded = []
    for cache in (None, (64, 32)):
        loader = make_loader(TrainImages(paths, USUAL, 0, cache), sampler, workers, False)
        with stopping(loader):
            for _ in range(2):  # the second pass finds the images in memory
                sampler.steps = range(2)
                loaded += load(loader, torch.arange(5))
    for nth, batch in enumerate(loaded):
        assert torch.equal(batch.images, loaded[nth % 2].images)
        assert torch.equal(batch.labels, loaded[nth % 2].labels)
        assert batch.unreadable == loaded[nth % 2].unreadable


def erased(transform: Any, count: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the image and heights over widths of the rectangles that are erased; shares are 0 where none is."""
    erasing, image = transform.transforms[-1], Image.new("RGB", (64, 128))
    torch.manual_seed(0)
    boxes = np.array([erasing(image).box for _ in range(count)])[:, 2:]
    return boxes.prod(1) / (128 * 64), np.array([h / w for h, w in boxes if h])


def test_erasing_of_clusters_draws_area_and_aspect_ratio_uniformly():
    transform = train_transform(FinetuneConfig(size=(128, 64)), **ClusterRun.erasing)
    areas, ratios = erased(transform)
    assert np.mean(areas > 0) == pytest.approx(0.5, abs=0.03)
    assert 0.015 < areas[areas > 0].min() < areas.max() < 0.41
    # wide rectangles of large areas do not fit into a person's image, so the median is that of what fits
    expected = expected_ratios(ClusterRun.erasing["erase_area"], uniform=True)
    log_uniform = expected_ratios(ClusterRun.erasing["erase_area"], uniform=False)
    assert np.median(ratios) == pytest.approx(expected, abs=0.08)
    assert abs(log_uniform - expected) > 0.3  # the two rules are told apart


def expected_ratios(area: tuple[float, float], uniform: bool) -> float:
    """Median aspect ratio of the rectangles that fit into 128x64, drawn by numpy."""
    rng = np.random.default_rng(1)
    share = rng.uniform(*area, 200_000) * 128 * 64
    ratio = rng.uniform(0.3, 1 / 0.3, 200_000) if uniform else np.exp(rng.uniform(np.log(0.3), -np.log(0.3), 200_000))
    h, w = np.rint(np.sqrt(share * ratio)), np.rint(np.sqrt(share / ratio))
    return float(np.median((h / w)[(h < 128) & (w < 64)]))


def test_erasing_of_clusters_fills_with_the_published_values():
    erasing = train_transform(FinetuneConfig(size=(128, 64), erase_prob=1.0), **ClusterRun.erasing)
    torch.manual_seed(0)
    (image,) = finished(erasing.transforms[-1](Image.new("RGB", (64, 128))))
    pixels = image[:, image[0] != -1]
    torch.testing.assert_close(pixels, torch.tensor([0.485, 0.456, 0.406])[:, None].expand_as(pixels))


# ---- Variation


def photograph(height: int = 96, width: int = 48) -> Image.Image:
    """Smooth colours with an edge, so that blur, JPEG and every colour change show."""
    y, x = np.mgrid[:height, :width] / (height, width)[0]
    pixels = np.stack([0.2 + 0.6 * y, 0.3 + 0.5 * x, 0.5 + 0.3 * np.sin(9 * y)], 2)
    pixels[height // 3 : height // 2] = (0.9, 0.2, 0.1)
    return Image.fromarray((255 * pixels).astype(np.uint8))


def draws(transform: Any, image: Image.Image | None = None, count: int = 40) -> torch.Tensor:
    """Images that a transform makes of one, ``[count, 3, 64, 32]``."""
    torch.manual_seed(0)
    images = [transform(image or photograph()) for _ in range(count)]
    return torch.stack(images) if isinstance(images[0], torch.Tensor) else finished(*images)


def test_the_published_transform_draws_the_same_numbers_as_ever():
    published = T.Compose(
        [
            T.Resize((64, 32), T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(0.5),
            T.RandomCrop((64, 32), 10),
            T.ToTensor(),
            T.Normalize((0.5,) * 3, (0.5,) * 3),
            T.RandomErasing(0.5, (0.02, 1 / 3), (0.3, 1 / 0.3), value="random"),  # the ratio of timm's
        ]
    )
    strengths = {
        "brightness": 1.0,
        "hue": 0.5,
        "blur_radius": (1.0, 9.0),
        "downscale": (0.1, 0.2),
        "jpeg_quality": (1, 2),
    }
    for options in ({}, strengths):  # strengths without a probability are off
        transform = train_transform(FinetuneConfig(size=(64, 32), **options))
        assert torch.equal(draws(transform), draws(published))


SWITCHES: list[dict[str, Any]] = [
    {"crop_scale": (0.5, 0.9)},
    {"jitter_prob": 1.0},
    {"gray_prob": 1.0},
    {"blur_prob": 1.0, "blur_radius": (0.5, 2.0)},  # least of the default, 0.1, changes no pixel
    {"downscale_prob": 1.0},
    {"jpeg_prob": 1.0},
]


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda s: next(iter(s)))
def test_an_operation_changes_every_image_at_probability_1_and_its_share_at_less(switch):
    (plain,) = finished(PLAIN(photograph()))
    images = draws(varied(**switch))
    assert all(not torch.equal(image, plain) for image in images)
    if "gray_prob" not in switch:
        assert len({image.numpy().tobytes() for image in images}) > 10
    if (name := next(iter(switch))) != "crop_scale":
        changed = [not torch.equal(image, plain) for image in draws(varied(**{**switch, name: 0.3}), count=300)]
        assert np.mean(changed) == pytest.approx(0.3, abs=0.08)


def test_gray_images_have_equal_channels():
    images = draws(varied(gray_prob=1.0), count=2)
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])


def test_jitter_factors_are_uniform_in_their_range():
    gray = Image.new("RGB", (32, 64), (100, 100, 100))
    alone = {"jitter_prob": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    factors = (draws(varied(**{**alone, "brightness": 0.4}), gray, 400)[:, 0, 0, 0] + 1) * 127.5 / 100
    assert 0.59 <= factors.min() < 0.65
    assert 1.35 < factors.max() <= 1.41
    assert factors.mean() == pytest.approx(1, abs=0.04)
    for name in ("contrast", "saturation", "hue"):
        assert len(draws(varied(**{**alone, name: 0.4})).unique(dim=0)) > 10
        if name != "contrast":  # gray has no colour to change
            assert len(draws(varied(**{**alone, name: 0.4}), gray).unique(dim=0)) == 1


def test_blur_widens_an_edge_by_its_standard_deviation():
    edge = Image.fromarray(np.repeat((np.arange(32) >= 16)[None, :, None] * np.uint8(255), 64, 0).repeat(3, 2))
    for sigma in (0.8, 2.0):
        profile = (draws(varied(blur_prob=1.0, blur_radius=(sigma, sigma)), edge, 1)[0, 0, 32] + 1) / 2
        weights = profile.diff()
        centres = torch.arange(31) + 0.5
        mean = (weights * centres).sum()
        assert (weights * (centres - mean) ** 2).sum().sqrt() == pytest.approx(sigma, abs=0.12)
    draws(varied(blur_prob=1.0, blur_radius=(30.0, 40.0)), edge, 1)  # the kernel is cut to the image


def test_crops_cover_their_share_of_the_image_in_its_aspect_ratio():
    """A ramp of x in red and of y in green tells the box of a crop."""
    y, x = np.mgrid[:200, :50]
    ramp = Image.fromarray(np.stack([x * 5, y * 255 // 199, 0 * x], 2).astype(np.uint8))
    images = (draws(varied(crop_scale=(0.4, 0.6)), ramp, 300) + 1) / 2
    widths = (images[:, 0, :, -1].mean(1) - images[:, 0, :, 0].mean(1)) * 255 / 5 / 50 * 32 / 31
    heights = (images[:, 1, -1].mean(1) - images[:, 1, 0].mean(1)) * 64 / 63
    areas = widths * heights
    assert 0.35 < areas.min() < 0.43
    assert 0.57 < areas.max() < 0.65
    ratios = (widths / heights).log()
    assert ratios.abs().max() < np.log(4 / 3) + 0.08
    assert abs(ratios.mean()) < 0.05


def test_a_scaled_down_image_has_the_detail_of_its_smaller_size():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype=np.uint8))
    tenth = draws(varied(downscale_prob=1.0, downscale=(0.1, 0.1)), noise)
    half = draws(varied(downscale_prob=1.0, downscale=(0.5, 0.5)), noise)
    steps = [x.diff(dim=3).abs().mean() for x in (tenth, half, finished(PLAIN(noise)))]
    assert steps[0] < 0.5 * steps[1] < 0.5 * steps[2]
    assert len(tenth.unique(dim=0)) == 9  # filters down times filters up


def test_jpeg_of_a_lower_quality_is_further_from_the_image_and_of_the_smaller_size():
    (plain,) = finished(PLAIN(photograph()))
    errors = [(draws(varied(jpeg_prob=1.0, jpeg_quality=(q, q)), count=1) - plain).abs().mean() for q in (5, 40, 95)]
    assert errors[0] > errors[1] > errors[2] > 0
    # blocks of 8 pixels at half the size are blocks of 16
    small = {"downscale_prob": 1.0, "downscale": (0.5, 0.5)}
    torch.manual_seed(0)
    step = varied(**small, jpeg_prob=1.0).transforms[2]
    sizes: list[tuple[int, int]] = []
    step.transforms = [lambda image: sizes.append(image.size) or image]
    assert step(photograph(64, 32)).size == (32, 64)
    assert sizes == [(16, 32)]


def test_variation_is_a_function_of_seed_step_and_place(paths):
    transform = train_transform(FinetuneConfig(size=(64, 32), **DOMAIN))
    x = images(paths, transform)
    first = [x[step, 5, 0][0] for step in range(10)]
    assert all(torch.equal(a, images(paths, transform)[step, 5, 0][0]) for step, a in enumerate(first))
    assert len(torch.stack(first).unique(dim=0)) == 10
