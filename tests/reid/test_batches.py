"""Training images of re-ID: the transform, and that it is a function of seed, step and place in the batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from passreid_models.data.images import ImageError
from passreid_models.reid.batches import KeySampler, TrainImages, TrainTransform, load_epoch

USUAL = TrainTransform((64, 32))
PLAIN = TrainTransform((64, 32), flip_prob=0, pad=0, erase_prob=0)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (80, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    return [*sorted(folder.glob("?.png")), folder / "broken.jpg"]


def images(paths: list[Path], transform: TrainTransform = USUAL, seed: int = 0) -> TrainImages:
    return TrainImages(paths, np.array([7, 8, 9, 10, 11])[: len(paths)], transform, seed)


def test_an_image_is_resized_bicubic_and_normalised_by_a_half(paths):
    pixels, label, unreadable = images(paths, PLAIN)[0, 0, 1]
    with Image.open(paths[1]) as image:
        expected = np.asarray(image.resize((32, 64), Image.Resampling.BICUBIC), dtype=np.float32) / 127.5 - 1
    torch.testing.assert_close(pixels, torch.from_numpy(expected).permute(2, 0, 1), rtol=0, atol=1e-6)
    assert (label, unreadable) == (8, [])


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
    transform = TrainTransform((64, 32), flip_prob=0, pad=10, erase_prob=0)
    x = images(paths, transform)
    black = [((x[step, 0, 0][0] == -1).all(0)).float().mean().item() for step in range(30)]
    assert len(set(black)) > 10
    assert max(black) > 0.2


def test_erasing_fills_with_noise_or_a_colour(paths):
    whole = images(paths, PLAIN)[0, 0, 0][0]
    for value in ("random", (0.485, 0.456, 0.406)):
        erased = images(paths, TrainTransform((64, 32), 0, 0, 1, (0.1, 0.3), value))[0, 0, 0][0]
        changed = (erased != whole).any(0)
        assert 0.05 < changed.float().mean() < 0.35
        inside = erased[:, changed]
        if value == "random":
            assert 0.8 < inside.std() < 1.2
        else:
            assert inside.std(1).max() < 1e-6
            assert inside[:, 0].tolist() == pytest.approx(value)


def test_an_unreadable_image_is_replaced_by_the_next_with_its_own_label(paths):
    pixels, label, unreadable = images(paths, PLAIN)[0, 0, 4]
    assert label == 7
    assert torch.equal(pixels, images(paths, PLAIN)[0, 0, 0][0])
    assert len(unreadable) == 1
    assert "broken.jpg" in unreadable[0]
    with pytest.raises(ImageError, match=r"1 images in a row cannot be read; the first: .*broken\.jpg"):
        _ = images(paths[4:], PLAIN)[0, 0, 0]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_has_the_batches_of_its_sampler(paths, workers):
    batches = [np.array([[0, 1], [2, 3]]), np.array([[3, 2], [1, 4]])]
    loaded = list(load_epoch(images(paths), KeySampler(batches, 20), torch.device("cpu"), workers))
    assert [b.labels.tolist() for b in loaded] == [[7, 8, 9, 10], [10, 9, 8, 7]]
    assert [len(b.unreadable) for b in loaded] == [0, 1]
    assert torch.equal(loaded[1].images[2], images(paths)[21, 2, 1][0])


def erased(transform: TrainTransform, count: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the image and heights over widths of the rectangles that are erased; shares are 0 where none is."""
    erasing = transform.compose().transforms[-1]
    torch.manual_seed(0)
    areas, ratios = np.zeros(count), []
    for i in range(count):
        mask = erasing(torch.zeros(3, 128, 64))[0] != 0
        areas[i] = mask.float().mean()
        if mask.any():
            ratios.append(int(mask.any(1).sum()) / int(mask.any(0).sum()))
    return areas, np.array(ratios)


def test_erasing_of_clusters_draws_area_and_aspect_ratio_uniformly():
    transform = TrainTransform(erase_area=(0.02, 0.4), erase_value=(0.485, 0.456, 0.406), erase_uniform=True)
    areas, ratios = erased(transform)
    assert np.mean(areas > 0) == pytest.approx(0.5, abs=0.03)
    assert 0.015 < areas[areas > 0].min() < areas.max() < 0.41
    # wide rectangles of large areas do not fit into a person's image, so the median is that of what fits
    expected = expected_ratios(transform.erase_area, uniform=True)
    log_uniform = expected_ratios(transform.erase_area, uniform=False)
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
    erasing = TrainTransform(erase_prob=1.0, erase_value=(0.485, 0.456, 0.406), erase_uniform=True).compose()
    torch.manual_seed(0)
    image = erasing.transforms[-1](torch.zeros(3, 128, 64))
    pixels = image[:, image[0] != 0]
    torch.testing.assert_close(pixels, torch.tensor([0.485, 0.456, 0.406])[:, None].expand_as(pixels))
