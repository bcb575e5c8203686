"""Embedder: every kind of image, the pixels that reach the model, unreadable images, and files of descriptors."""

import csv
import json
import re
import struct
import threading
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

import passreid_models
from passreid_models.data.images import ImageError, find_images, open_image
from passreid_models.embed import MAX_NAMES, WHOLE, Embedder, is_not_finite, save_features
from passreid_models.pass_vit import PassVisionTransformer
from passreid_models.synthetic import SyntheticPersons

HEIGHT, WIDTH = 64, 32  # of images for test_pass_vit


def make_model(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_pass_vit", **kwargs).eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_model()


@pytest.fixture(scope="module")
def embed(model) -> Embedder:
    return Embedder(model, device="cpu", batch_size=4, workers=2)


@pytest.fixture(scope="module")
def persons() -> list[Image.Image]:
    data = SyntheticPersons(6, images_per_id=2, cameras=2, seed=3, size=(80, 40))
    return [data[i][0] for i in range(len(data))]


@pytest.fixture
def files(persons, tmp_path) -> list[Path]:
    paths = [tmp_path / f"person_{i:02d}.png" for i in range(len(persons))]
    for image, path in zip(persons, paths, strict=True):
        image.save(path)
    return paths


def seen(embed: Embedder, image: Any, **options: Any) -> Tensor:
    """The pixels that reach the model, batch by batch."""
    batches: list[Tensor] = []
    hook = embed.model.patch_embed.register_forward_pre_hook(lambda module, args: batches.append(args[0].clone()))
    try:
        embed(image, **options)
    finally:
        hook.remove()
    return torch.cat(batches)


def distinct(descriptors: Tensor) -> bool:
    return bool((torch.cdist(descriptors, descriptors) + 9 * torch.eye(len(descriptors)) > 1e-3).all())


# ---- The numbers


def test_descriptors_are_the_unit_vectors_of_the_model_on_timms_own_preprocessing(embed, model, persons):
    transform = create_transform(**resolve_data_config({}, model=model))
    with torch.inference_mode():
        expected = F.normalize(model(torch.stack([transform(image) for image in persons])), dim=1)
    descriptors = embed(persons)
    assert torch.allclose(descriptors, expected, atol=1e-6)
    assert descriptors.shape == (len(persons), embed.dim)
    assert descriptors.dtype == torch.float32
    assert distinct(descriptors)
    assert torch.allclose(descriptors.norm(dim=1), torch.ones(len(persons)), atol=1e-6)


def test_statistics_and_interpolation_come_from_the_pretrained_cfg_of_the_model(persons):
    model = make_model(pretrained_cfg_overlay=dict(mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear"))
    expected = persons[0].resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.asarray(expected).copy()).permute(2, 0, 1) / 255
    inputs = seen(Embedder(model, device="cpu"), persons[0])
    assert torch.allclose(inputs[0], (pixels - 0.5) / 0.25, atol=1e-6)


def test_images_are_squashed_to_the_size_of_the_model_even_if_its_cfg_has_another(persons):
    model = make_model(img_size=(96, 32))
    inputs = seen(Embedder(model, device="cpu"), persons[0])
    assert inputs.shape == (1, 3, 96, 32)
    reference = persons[0].resize((32, 96), Image.Resampling.BICUBIC)
    assert torch.equal(inputs, seen(Embedder(model, device="cpu"), reference))


def test_descriptors_of_the_multi_neck_are_the_models_own_and_are_not_normalised(persons):
    model = make_model(neck="multi")
    embed = Embedder(model, device="cpu")
    with torch.inference_mode():
        expected = model(seen(embed, persons))
    descriptors = embed(persons)
    assert torch.allclose(descriptors, expected, atol=1e-6)
    assert (descriptors.norm(dim=1) > 1.01).all()


@pytest.mark.parametrize("fusion", ["cat", "mean", "parts", "token"])
def test_fusion_overrides_the_models_own_and_leaves_the_given_model_as_it_is(model, persons, fusion):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    embed = Embedder(model, device="cpu", fusion=fusion)
    with torch.inference_mode():
        tokens = model.forward_features(seen(embed, persons))
    g, m = tokens[:, 0], tokens[:, 1:4].mean(dim=1)
    by_hand = {"cat": torch.cat([g, m], 1), "mean": (g + m) / 2, "parts": tokens[:, :4].flatten(1), "token": g}[fusion]
    descriptors = embed(persons)
    assert torch.allclose(descriptors, F.normalize(by_hand, dim=1), atol=1e-6)
    assert embed.dim == descriptors.shape[1]
    assert (model.global_pool, model.head_hidden_size) == ("cat", 128)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_given_model_stays_in_its_mode_type_and_keeps_its_gradients(persons):
    model = make_model().train()
    Embedder(model, device="cpu", dtype=torch.bfloat16)(persons[:2])
    assert model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_a_model_in_training_mode_embeds_as_in_eval_mode(embed, persons):
    model = make_model(proj_drop_rate=0.5).train()
    assert torch.allclose(Embedder(model, device="cpu")(persons), embed(persons), atol=1e-6)


def test_a_classifier_has_no_part_in_the_descriptor(embed, persons):
    model = make_model()
    model.reset_classifier(10)
    assert torch.allclose(Embedder(model, device="cpu")(persons), embed(persons), atol=1e-6)


def test_flip_averages_descriptor_and_parts_with_those_of_the_mirrored_image(embed, model, persons):
    flipping = Embedder(model, device="cpu", flip=True)
    x = seen(embed, persons)
    with torch.inference_mode():
        plain, mirrored = model.forward_features(x), model.forward_features(x.flip(-1))
        expected = F.normalize(model.forward_head(plain) + model.forward_head(mirrored), dim=1)
    descriptors, parts = flipping(persons, parts=True)
    assert torch.allclose(descriptors, expected, atol=1e-6)
    assert torch.allclose(parts, F.normalize(plain[:, 1:4] + mirrored[:, 1:4], dim=2), atol=1e-6)
    assert not torch.allclose(descriptors, embed(persons), atol=1e-3)


def test_parts_are_the_unit_vectors_of_the_part_tokens(embed, model, persons):
    with torch.inference_mode():
        expected = F.normalize(model.forward_parts(seen(embed, persons))["parts"], dim=2)
    descriptors, parts = embed(persons, parts=True)
    assert torch.allclose(parts, expected, atol=1e-6)
    assert torch.equal(descriptors, embed(persons))


def test_bfloat16_runs_in_bfloat16_and_returns_nearby_float32(embed, model, persons):
    half = Embedder(model, device="cpu", dtype=torch.bfloat16)
    assert seen(half, persons[0]).dtype == torch.bfloat16
    descriptors, parts = half(persons, parts=True)
    assert descriptors.dtype == parts.dtype == torch.float32
    assert (descriptors * embed(persons)).sum(dim=1).min() > 0.999
    assert not torch.equal(descriptors, embed(persons))


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_descriptors_do_not_depend_on_the_batch_size(embed, model, persons, batch_size):
    other = Embedder(model, device="cpu", batch_size=batch_size)
    assert torch.allclose(other(persons), embed(persons), atol=1e-6)


def test_a_saved_model_embeds_by_name_as_it_does_as_a_module(embed, model, persons, tmp_path):
    passreid_models.save_pretrained(model, tmp_path / "saved")
    assert torch.equal(Embedder(f"local-dir:{tmp_path / 'saved'}", device="cpu", batch_size=4)(persons), embed(persons))


def test_the_fingerprint_follows_weights_and_descriptor_and_not_name_dtype_flip_or_classifier(model):
    own = Embedder(model, device="cpu").fingerprint
    renamed = make_model(num_classes=7)
    renamed.load_state_dict(model.state_dict(), strict=False)
    renamed.pretrained_cfg["tag"] = "another"
    for same in (
        Embedder(renamed, device="cpu"),
        Embedder(model, device="cpu", dtype=torch.bfloat16, flip=True, batch_size=1),
    ):
        assert same.fingerprint == own
    changed = deepcopy(model)
    with torch.no_grad():
        changed.norm.weight[0] += 1e-6
    others = {
        "weights": Embedder(changed, device="cpu"),
        "fusion": Embedder(model, device="cpu", fusion="mean"),
        "mean": Embedder(make_model(pretrained_cfg_overlay=dict(mean=(0.1,) * 3)), device="cpu"),
        "crop": Embedder(make_model(pretrained_cfg_overlay=dict(crop_mode="center")), device="cpu"),
    }
    for key, other in others.items():
        assert [k for k, v in other.fingerprint.items() if v != own[k]] == [key]
    assert json.loads(json.dumps(own)) == own


def test_a_model_that_crops_images_says_so(embed, caplog):
    assert (embed.crop, caplog.text) == (WHOLE, "")
    for crop, said in (
        (dict(crop_mode="center"), "center, crop_pct 1"),
        (dict(crop_pct=0.875), "squash, crop_pct 0.875"),
    ):
        Embedder(make_model(pretrained_cfg_overlay=crop), device="cpu")
        assert f"crops images, which cuts off heads and feet: crop_mode {said};" in caplog.text


# ---- Kinds of input


def test_paths_pil_images_arrays_and_tensors_of_one_image_give_one_descriptor(embed, files, persons):
    image, array = persons[0], np.asarray(persons[0])
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    kinds = [str(files[0]), files[0], image, Image.open(files[0]), array, tensor, seen(embed, image)[0]]
    descriptors = embed(kinds)
    assert torch.allclose(descriptors, embed(image).expand_as(descriptors), atol=1e-6)


def test_mixtures_keep_their_order_and_folders_and_batches_unfold_in_place(embed, files, persons):
    folder = files[0].parent / "folder"
    (folder / "deeper").mkdir(parents=True)
    persons[3].save(folder / "deeper" / "a.png")
    persons[2].save(folder / "b.png")
    preprocessed = seen(embed, persons[5:7])
    mixture = [files[1], folder, np.asarray(persons[4]), preprocessed, persons[7], str(files[0])]
    expected = embed(persons)[[1, 2, 3, 4, 5, 6, 7, 0]]
    paths = [path.relative_to(folder).as_posix() for path in find_images(folder)]
    assert paths == ["b.png", "deeper/a.png"]
    assert torch.allclose(embed(mixture), expected, atol=1e-6)


def test_a_single_image_of_any_kind_gives_one_row(embed, files, persons):
    for single in (files[0], str(files[0]), persons[0], np.asarray(persons[0]), seen(embed, persons[0])[0]):
        assert torch.allclose(embed(single), embed(persons[:1]), atol=1e-6)


def test_a_float_batch_passes_through_untouched(embed, persons):
    batch = torch.randn(3, 3, HEIGHT, WIDTH)
    assert torch.equal(seen(embed, batch), batch)


def test_no_images_give_no_descriptors(embed):
    descriptors, parts = embed([], parts=True)
    assert descriptors.shape == (0, 128)
    assert parts.shape == (0, 3, 64)


def test_bgr_swaps_the_channels_of_arrays_and_of_nothing_else(embed, files, persons):
    array = np.asarray(persons[0])
    swapped = np.ascontiguousarray(array[..., ::-1])
    inputs = seen(embed, [swapped, persons[1], files[2], array[..., 0]], bgr=True)
    expected = seen(embed, [array, persons[1], files[2], array[..., 0]])
    assert torch.equal(inputs, expected)
    assert not torch.equal(seen(embed, swapped), expected[:1])


def test_arrays_may_be_views_with_any_strides(embed, persons):
    array = np.asarray(persons[0])
    assert torch.equal(seen(embed, array[::-1, ::-1][::-1, ::-1]), seen(embed, array))


def test_one_lazily_opened_image_may_be_given_many_times(model, persons, tmp_path):
    persons[0].resize((1200, 2400)).save(tmp_path / "large.jpg")
    many = Embedder(model, device="cpu", workers=8)
    with Image.open(tmp_path / "large.jpg") as lazy:
        descriptors = many([lazy] * 16)
    assert torch.equal(descriptors, many(tmp_path / "large.jpg").expand(16, -1))


def test_find_images_is_sorted_recursive_and_leaves_out_hidden_and_other_files(tmp_path):
    images = ["a.JPG", "b/c.png", "b/d/e.webp", "z.jpeg"]
    for name in [*images, ".hidden.jpg", ".cache/f.jpg", "notes.txt", "b/Thumbs.db"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)] == images


def test_more_threads_than_the_cores_can_use_are_refused():
    with pytest.raises(ValueError, match=r"workers: expected between 0 and \d+ on \d+ CPU cores, got 100000"):
        Embedder("test_pass_vit", device="cpu", workers=100_000)


def test_preprocess_gives_the_pixels_that_reach_the_model(embed, files, persons):
    mixture = [persons[3], files[0].parent, files[1]]
    inputs = embed.preprocess(mixture)
    assert inputs.shape == (len(files) + 2, 3, HEIGHT, WIDTH)
    assert torch.equal(inputs, seen(embed, mixture))
    assert torch.equal(embed.preprocess(inputs), inputs)
    assert embed.preprocess([]).shape == (0, 3, HEIGHT, WIDTH)
    with pytest.raises(ImageError, match=r"none.png: no such file"):
        embed.preprocess([persons[0], files[0].with_name("none.png")])


def test_a_hidden_folder_may_be_asked_for_by_name(tmp_path):
    (tmp_path / ".data").mkdir()
    (tmp_path / ".data" / "a.png").touch()
    assert [path.name for path in find_images(tmp_path / ".data")] == ["a.png"]


def test_a_folder_without_images_is_an_error_that_names_it(embed, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=f"no images .* in {tmp_path}"):
        embed(tmp_path)


# ---- Image formats: each file, and the RGB image that a viewer would show


def _gray(image: Image.Image) -> Image.Image:
    return image.convert("L")


def _cmyk(image: Image.Image, path: Path) -> tuple[Path, Image.Image]:
    cmyk = image.convert("CMYK")
    cmyk.save(path.with_suffix(".tif"))
    return path.with_suffix(".tif"), image  # its conversion to CMYK and back loses nothing


def _palette(image: Image.Image, path: Path) -> tuple[Path, Image.Image]:
    indexed = image.quantize(16)
    indexed.save(path.with_suffix(".png"))
    return path.with_suffix(".png"), indexed.convert("RGB")


def _transparent_palette(image: Image.Image, path: Path) -> tuple[Path, Image.Image]:
    indexed = image.quantize(16)
    indexed.save(path.with_suffix(".png"), transparency=bytes([0, 128, 255] * 5))
    return path.with_suffix(".png"), indexed.convert("RGB")


def _rgba(image: Image.Image, path: Path) -> tuple[Path, Image.Image]:
    cut_out = image.copy()
    cut_out.putalpha(_gray(image))
    cut_out.save(path.with_suffix(".png"))
    return path.with_suffix(".png"), image


def _grayscale(image: Image.Image, path: Path) -> tuple[Path, Image.Image]:
    _gray(image).save(path.with_suffix(".png"))
    return path.with_suffix(".png"), Image.merge("RGB", [_gray(image)] * 3)


def _gray_alpha(image: Image.Image, path: Path) -> tuple[Path, Image.Image]:
    Image.merge("LA", [_gray(image), _gray(image).rotate(180)]).save(path.with_suffix(".png"))
    return path.with_suffix(".png"), Image.merge("RGB", [_gray(image)] * 3)


def _deep(image: Image.Image, path: Path, suffix: str, dtype: str) -> tuple[Path, Image.Image]:
    deep = np.asarray(_gray(image)).astype(dtype) * 257  # 0..255 spread over 0..65535
    if suffix == ".pgm":
        path.with_suffix(suffix).write_bytes(b"P5 %d %d 65535\n" % image.size + deep.astype(">u2").tobytes())
    else:
        Image.fromarray(deep).save(path.with_suffix(suffix))
    with Image.open(path.with_suffix(suffix)) as file:
        assert file.mode in ("I", "I;16", "I;16B")
    return path.with_suffix(suffix), Image.merge("RGB", [_gray(image)] * 3)


def _one_bit(image: Image.Image, path: Path) -> tuple[Path, Image.Image]:
    bits = image.convert("1")
    bits.save(path.with_suffix(".png"))
    return path.with_suffix(".png"), Image.fromarray(np.asarray(bits)[..., None].repeat(3, 2).astype(np.uint8) * 255)


def _one_pixel(image: Image.Image, path: Path) -> tuple[Path, Image.Image]:
    Image.new("RGB", (1, 1), (200, 30, 90)).save(path.with_suffix(".png"))
    return path.with_suffix(".png"), Image.new("RGB", (WIDTH, HEIGHT), (200, 30, 90))


def _turned(image: Image.Image, path: Path, orientation: int) -> tuple[Path, Image.Image]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path.with_suffix(".png"), exif=exif)
    stored = np.asarray(image)
    upright = {
        2: stored[:, ::-1],
        3: np.rot90(stored, 2),
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),
        7: np.rot90(stored, 2).swapaxes(0, 1),
        8: np.rot90(stored, 1),
    }
    return path.with_suffix(".png"), Image.fromarray(np.ascontiguousarray(upright[orientation]))


def _animation(image: Image.Image, path: Path) -> tuple[Path, Image.Image]:
    frames = [image.quantize(16), image.rotate(180).quantize(16)]
    frames[0].save(path.with_suffix(".gif"), save_all=True, append_images=frames[1:])
    return path.with_suffix(".gif"), frames[0].convert("RGB")


FORMATS: dict[str, Callable[[Image.Image, Path], tuple[Path, Image.Image]]] = {
    "CMYK": _cmyk,
    "palette": _palette,
    "palette with transparency": _transparent_palette,
    "RGBA": _rgba,
    "grayscale": _grayscale,
    "grayscale with alpha": _gray_alpha,
    "16-bit PNG": lambda image, path: _deep(image, path, ".png", "u2"),
    "16-bit TIFF": lambda image, path: _deep(image, path, ".tif", "u2"),
    "big-endian 16-bit TIFF": lambda image, path: _deep(image, path, ".tif", ">u2"),
    "16-bit PGM": lambda image, path: _deep(image, path, ".pgm", "u2"),
    "1-bit": _one_bit,
    "1x1": _one_pixel,
    **{f"EXIF orientation {k}": partial(_turned, orientation=k) for k in range(2, 9)},
    "animated GIF": _animation,
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_model_gets_the_image_that_a_viewer_shows(name, embed, persons, tmp_path):
    path, shown = FORMATS[name](persons[0], tmp_path / "image")
    assert shown.mode == "RGB"
    expected = seen(embed, shown)
    with warnings.catch_warnings(), Image.open(path) as image:
        warnings.simplefilter("error")
        assert torch.equal(seen(embed, path), expected)
        assert torch.equal(seen(embed, image), expected)


def test_a_cmyk_jpeg_shows_its_colours_and_not_their_negative(embed, tmp_path):
    Image.new("CMYK", (WIDTH, HEIGHT), (255, 0, 0, 0)).save(tmp_path / "cyan.jpg", quality=100)
    difference = seen(embed, tmp_path / "cyan.jpg") - seen(embed, Image.new("RGB", (WIDTH, HEIGHT), (0, 255, 255)))
    assert difference.abs().max() < 0.1


@pytest.mark.parametrize(("suffix", "options"), [("jpg", {}), ("jpg", {"dpi": (96, 96)}), ("png", {}), ("webp", {})])
def test_damaged_exif_does_not_cost_the_image(embed, persons, tmp_path, suffix, options):
    persons[0].save(tmp_path / f"plain.{suffix}", **options)
    persons[0].save(tmp_path / f"damaged.{suffix}", exif=b"Exif\0\0garbage", **options)
    assert torch.equal(seen(embed, tmp_path / f"damaged.{suffix}"), seen(embed, tmp_path / f"plain.{suffix}"))


# ---- Unreadable images


def _png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


@pytest.fixture
def bad_files(persons, tmp_path) -> dict[str, Path]:
    """Unreadable files by a pattern of the reason that is given for them."""
    folder = tmp_path / "bad"
    folder.mkdir()
    persons[0].save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    persons[0].save(folder / "whole.png")
    png = bytearray((folder / "whole.png").read_bytes())
    png[len(png) // 2] ^= 0xFF
    (folder / "damaged.png").write_bytes(png)
    (folder / "text.jpg").write_text("this is not an image")
    (folder / "empty.jpg").touch()
    (folder / "bomb.png").write_bytes(_png_header(30_000, 30_000))
    Image.fromarray(np.ones((8, 8), np.float32)).save(folder / "float.tif")
    Image.fromarray(np.full((8, 8), 200, np.int32)).save(folder / "wide.tif")
    return {
        "truncated": folder / "truncated.jpg",
        "unrecognized|broken": folder / "damaged.png",
        "no image that Pillow can identify": folder / "text.jpg",
        "the file is empty": folder / "empty.jpg",
        "more pixels than Pillow opens": folder / "bomb.png",
        "a floating-point image has no known range": folder / "float.tif",
        "a 32-bit integer image has no known range: convert it to 8 bits first": folder / "wide.tif",
        "no such file": folder / "missing.jpg",
    }


def test_unreadable_images_are_named_get_rows_of_nan_and_the_others_are_done(embed, files, bad_files):
    mixed: list[Path] = []
    for good, bad in zip(files, bad_files.values(), strict=False):
        mixed += [good, bad]
    errors: dict[int, str] = {}
    descriptors, parts = embed(mixed, parts=True, errors=errors)
    assert list(errors) == list(range(1, len(mixed), 2))
    for row, reason in zip(errors, bad_files, strict=True):
        assert errors[row].startswith(f"{mixed[row]}: ")
        assert re.search(reason, errors[row])
    assert descriptors[1::2].isnan().all()
    assert parts[1::2].isnan().all()
    good_descriptors, good_parts = embed(mixed[::2], parts=True)
    assert torch.allclose(descriptors[::2], good_descriptors, atol=1e-6)
    assert torch.allclose(parts[::2], good_parts, atol=1e-6)


def test_batches_that_are_unreadable_as_a_whole_are_passed_over(model, files, tmp_path):
    errors: dict[int, str] = {}
    missing = [tmp_path / f"missing_{i}.jpg" for i in range(4)]
    descriptors = Embedder(model, device="cpu", batch_size=2)([*missing, *files[:2]], errors=errors)
    assert list(errors) == [0, 1, 2, 3]
    assert descriptors.isnan().all(dim=1).tolist() == [True] * 4 + [False] * 2


def overflowing(**kwargs: Any) -> nn.Module:
    """A model whose activations are finite in float32 and bfloat16, and not in float16."""
    model = make_model(**kwargs)
    with torch.no_grad():
        model.blocks[-1].mlp.fc2.weight.mul_(1e8)
    return model


@pytest.mark.parametrize("neck", ["", "multi"])
def test_descriptors_that_are_not_finite_are_errors_of_their_rows(files, neck):
    embed = Embedder(overflowing(neck=neck), "cpu", torch.float16, batch_size=4)
    errors: dict[int, str] = {}
    assert embed(files[:6], errors=errors).isnan().all()
    advice = "the descriptor is not finite: compute in float32 or bfloat16 (--dtype)"
    assert errors == {i: f"{path}: {advice}" for i, path in enumerate(files[:6])}
    with pytest.raises(ImageError, match=rf"{files[0]}: the descriptor is not finite"):
        embed(files[0])
    for dtype in (torch.float32, torch.bfloat16):
        assert Embedder(overflowing(neck=neck), "cpu", dtype)(files[:6]).isfinite().all()


def test_an_infinite_length_is_not_finite_though_its_unit_vector_would_be_zeros(model, files, monkeypatch):
    embed = Embedder(model, "cpu")
    monkeypatch.setattr(embed.model, "forward_head", lambda tokens, pre_logits: torch.full((len(tokens), 128), 1e30))
    with pytest.raises(ImageError, match="the descriptor is not finite: float32 overflows, or weights or pixels"):
        embed(files[0])


def test_a_zero_descriptor_has_no_cosine_and_is_an_error_of_its_row(files):
    model = make_model(global_pool="token")
    embed = Embedder(model, "cpu")
    embed.model.norm.weight.data.zero_()
    embed.model.norm.bias.data.zero_()
    errors: dict[int, str] = {}
    assert embed(files[:2], errors=errors).isnan().all()
    assert list(errors) == [0, 1]


def test_a_wrapper_with_a_forward_of_its_own_is_not_taken_off(model):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x) * torch.arange(128)

    with pytest.raises(ValueError, match="Scaled is no PASS model"):
        Embedder(Scaled(), "cpu")


def test_one_image_that_is_not_finite_leaves_the_others_of_its_batch(embed, files, tmp_path):
    good = torch.rand(3, 64, 32)
    bad = good.clone()
    bad[0, 3, 4] = torch.inf
    errors: dict[int, str] = {}
    descriptors, parts = embed([good, bad, tmp_path / "missing.jpg", good], parts=True, errors=errors)
    assert {i: reason.split(": ")[0] for i, reason in errors.items()} == {1: "a Tensor", 2: f"{tmp_path}/missing.jpg"}
    for x in (descriptors, parts.flatten(1)):
        assert x.isnan().all(dim=1).tolist() == [False, True, True, False]
        assert x[[0, 3]].isfinite().all()


def test_parts_that_are_not_finite_count_where_they_are_asked_for(files):
    model = make_model(global_pool="token")
    embed = Embedder(model, "cpu")
    forward = embed.model.forward_tokens

    def without_part(x: Tensor) -> Tensor:
        tokens = forward(x)
        tokens[0, 1] = torch.nan
        return tokens

    embed.model.forward_tokens = without_part
    assert embed(files[:2]).isfinite().all()
    errors: dict[int, str] = {}
    embed(files[:2], parts=True, errors=errors)
    assert list(errors) == [0]


def test_errors_count_the_rows_of_the_result_behind_an_unfolded_folder(embed, files, tmp_path):
    errors: dict[int, str] = {}
    descriptors = embed([files[0].parent, tmp_path / "missing.jpg", files[0]], errors=errors)
    assert list(errors) == [len(files)]
    assert len(descriptors) == len(files) + 2


def test_without_an_error_dictionary_the_first_unreadable_image_raises_its_name(embed, files, bad_files):
    for reason, path in bad_files.items():
        with pytest.raises(ImageError, match=reason) as e:
            embed([*files[:3], path])
        assert str(e.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (np.zeros((8, 8, 4), np.uint8), r"uint8 array \[H, W, 3\] or \[H, W\], got uint8 \(8, 8, 4\)"),
        (np.zeros((8, 8, 3)), r"got float64 \(8, 8, 3\)"),
        (np.zeros((0, 8, 3), np.uint8), "it has no pixels"),
        (Image.new("RGB", (8, 0)), "it has no pixels"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"uint8 tensor \[3, H, W\], got torch.uint8 \(8, 8, 3\)"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), r"got torch.int64 \(3, 8, 8\)"),
        (torch.zeros(3, 60, 32), r"taken as preprocessed, 3x64x32; got \(3, 60, 32\)"),
        (None, "expected a path, a PIL image, an array or a tensor"),
    ],
)
def test_items_that_are_not_images_are_refused_with_what_was_given_and_expected(embed, item, message):
    with pytest.raises(ImageError, match=message):
        embed([item])


def test_images_are_refused_by_a_model_of_other_channels_and_float_tensors_are_not(persons):
    embed = Embedder(make_model(in_chans=1), device="cpu")
    errors: dict[int, str] = {}
    x = embed([persons[0], torch.zeros(1, 64, 32)], errors=errors)
    assert errors == {0: "a Image: the model takes images of 1 channels: give float tensors, preprocessed"}
    assert x[0].isnan().all()
    assert x[1].isfinite().all()


# ---- Decoding


def test_later_batches_are_decoded_while_the_model_is_still_at_the_first(model, persons):
    embed = Embedder(model, device="cpu", batch_size=2, workers=1)
    transform, decoded, third_batch = embed.transform, [], threading.Event()

    def recording(image: Image.Image) -> Tensor:
        decoded.append(threading.current_thread())
        if len(decoded) > 4:
            third_batch.set()
        return transform(image)

    embed.transform = recording
    in_time: list[bool] = []
    embed.model.patch_embed.register_forward_pre_hook(lambda *_: in_time.append(third_batch.wait(timeout=20)))
    embed(persons)
    assert in_time[0]  # the first batch was held up until an image of the third one was being decoded
    assert len(decoded) == len(persons)
    assert threading.main_thread() not in decoded


def test_decoding_does_not_run_far_ahead_of_the_model(model, persons):
    embed = Embedder(model, device="cpu", batch_size=1, workers=4)
    transform, decoded, ahead = embed.transform, [], []
    embed.transform = lambda image: decoded.append(1) or transform(image)
    embed.model.patch_embed.register_forward_pre_hook(lambda *_: ahead.append(len(decoded) - len(ahead)))
    embed(persons)
    assert max(ahead) <= 4


def test_an_error_cancels_the_decoding_that_still_waits_and_ends_its_thread(model, persons, tmp_path):
    embed = Embedder(model, device="cpu", batch_size=1, workers=1)
    raised, decoded = threading.Event(), []
    embed.transform = lambda image: raised.wait(timeout=20) and decoded.append(threading.current_thread())
    with pytest.raises(ImageError):
        embed([tmp_path / "missing.jpg", *persons])
    raised.set()
    for thread in [t for t in threading.enumerate() if t.name.startswith("passreid-decode")]:
        thread.join(timeout=20)
        assert not thread.is_alive()
    assert len(decoded) <= 1  # the one that was under way


# ---- Boxes of a video frame


@pytest.fixture(scope="module")
def frame(persons) -> Image.Image:
    sheet = Image.new("RGB", (200, 100), "gray")
    for i in range(4):
        sheet.paste(persons[i], (50 * i, 10))
    return sheet


BOXES = [[0, 10, 40, 90], [50, 10, 90, 90], [100, 10, 140, 90]]


def test_crops_are_the_boxes_of_the_frame_in_their_order(embed, frame, persons):
    expected = embed(persons[:3])
    array = np.asarray(frame)
    for boxes in (BOXES, np.array(BOXES, np.float32), torch.tensor(BOXES)):
        assert torch.allclose(embed.crops(frame, boxes), expected, atol=1e-6)
    assert torch.allclose(embed.crops(array, BOXES), expected, atol=1e-6)
    assert torch.allclose(embed.crops(array[..., ::-1], BOXES, bgr=True), expected, atol=1e-6)
    descriptors, parts = embed.crops(frame, BOXES, parts=True)
    assert torch.allclose(descriptors, expected, atol=1e-6)
    assert torch.allclose(parts, embed(persons[:3], parts=True)[1], atol=1e-6)


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_frame_is_turned_upright_once_and_its_crops_not_again(embed, frame, tmp_path, orientation):
    path, shown = _turned(frame, tmp_path / "image", orientation)
    boxes = [[0, 0, 40, 80], [20, 10, 60, 90]]
    expected = embed.crops(shown, boxes)
    assert torch.equal(embed.crops(path, boxes), expected)
    with Image.open(path) as image:
        assert torch.equal(embed.crops(image, boxes), expected)
    assert open_image(open_image(path)) == shown


def test_boxes_past_the_border_are_cut_and_fractions_are_rounded(embed, frame):
    boxes = [[-30.0, -5.0, 20.4, 60.0], [150.6, 40.0, 1e9, float("inf")]]
    expected = embed([frame.crop((0, 0, 20, 60)), frame.crop((151, 40, 200, 100))])
    assert torch.allclose(embed.crops(frame, boxes), expected, atol=1e-6)


@pytest.mark.parametrize(
    "empty", [[30, 10, 30, 90], [40, 90, 0, 10], [200, 0, 240, 50], [-20, 0, -5, 50], [float("nan"), 0, 10, 10]]
)
def test_a_box_without_a_pixel_is_refused_by_its_number(embed, frame, empty):
    with pytest.raises(ValueError, match=r"box 2 \[.*\] has no pixel inside the frame of 200x100"):
        embed.crops(frame, [BOXES[0], BOXES[1], empty])


def test_a_box_without_a_pixel_leaves_the_other_boxes_of_the_frame_with_errors(embed, frame, persons):
    boxes = [BOXES[0], [200, 0, 240, 50], BOXES[2], [float("nan")] * 4]
    errors: dict[int, str] = {}
    descriptors, parts = embed.crops(frame, boxes, parts=True, errors=errors)
    assert sorted(errors) == [1, 3]
    assert errors[1].startswith("box 1 [200.0, 0.0, 240.0, 50.0] has no pixel inside the frame of 200x100")
    assert torch.allclose(descriptors[[0, 2]], embed([persons[0], persons[2]]), atol=1e-6)
    assert descriptors[[1, 3]].isnan().all()
    assert parts[[1, 3]].isnan().all()
    assert not parts[[0, 2]].isnan().any()


def test_a_crop_whose_descriptor_is_not_finite_is_an_error_of_its_row(frame):
    model = make_model()
    with torch.no_grad():
        model.norm.weight.fill_(torch.inf)
    errors: dict[int, str] = {}
    boxes = [[200, 0, 240, 50], BOXES[0]]
    assert Embedder(model, device="cpu").crops(frame, boxes, errors=errors).isnan().all()
    assert [is_not_finite(errors[i]) for i in (0, 1)] == [False, True]


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_scores_classes_and_numbers_of_tracks_after_the_corners_are_ignored(embed, frame, columns):
    more = np.full((3, columns), np.nan)
    assert torch.equal(embed.crops(frame, np.hstack([BOXES, more])), embed.crops(frame, BOXES))


@pytest.mark.parametrize("boxes", [[], np.zeros((0, 4)), torch.zeros(0, 4), np.zeros((0, 6))])
def test_a_frame_without_boxes_gives_no_descriptors(embed, frame, boxes):
    assert embed.crops(frame, boxes).shape == (0, 128)


@pytest.mark.parametrize("boxes", [[0, 10, 40, 90], np.ones((4, 3)), np.ones((4, 10)), np.ones((2, 2, 4))])
def test_boxes_of_another_shape_are_refused_and_not_reshaped(embed, frame, boxes):
    with pytest.raises(ValueError, match=r"boxes must be \[N, 4\].*got the shape"):
        embed.crops(frame, boxes)


# ---- Making an Embedder


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_size_below_one_is_refused(model, batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be 1 or more, got {batch_size}"):
        Embedder(model, batch_size=batch_size)


@pytest.mark.parametrize("name", ["pass_vit_tyni_patch16", "resnet18", "vit_small_patch16_224.dino"])
def test_a_name_of_no_model_of_this_package_is_refused_before_anything_is_downloaded(name, monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: pytest.fail("timm was asked for it"))
    with pytest.raises(ValueError, match=f"unknown model '{name}'; known: pass_vit_tiny_patch16, "):
        Embedder(name)


def test_another_kind_of_module_is_refused_by_its_class():
    with pytest.raises(ValueError, match="Linear is no PASS model"):
        Embedder(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"no pretrained_cfg, its preprocessing: make it with timm\.create_model"):
        Embedder(PassVisionTransformer(depth=1))


def test_parts_of_a_model_without_parts_are_refused(persons):
    embed = Embedder(make_model(num_parts=0), "cpu")
    with pytest.raises(ValueError, match="test_pass_vit has no part tokens"):
        embed(persons[:1], parts=True)


def test_another_size_is_that_of_the_model_or_of_a_copy_of_it(model, persons):
    embed = Embedder(model, "cpu", size=(96, 32))
    assert (embed.input_size, model.patch_embed.img_size) == ((3, 96, 32), (64, 32))
    with pytest.raises(ValueError, match=r"size must be height and width in multiples of 16, got \(100, 32\)"):
        Embedder(model, "cpu", size=(100, 32))
    by_hand = deepcopy(model)
    by_hand.set_input_size((96, 32))
    assert torch.equal(embed(persons), Embedder(by_hand, "cpu")(persons))


def test_an_unpooled_model_is_refused_unless_a_fusion_is_given(embed, persons):
    with pytest.raises(ValueError, match="unpooled"):
        Embedder(make_model(global_pool=""), device="cpu")
    with pytest.raises(ValueError, match="unpooled and holds no neck"):  # it would be a new one
        Embedder(make_model(global_pool="", neck="single"), device="cpu", fusion="cat")
    pooled = Embedder(make_model(global_pool=""), device="cpu", fusion="cat")
    assert torch.allclose(pooled(persons), embed(persons), atol=1e-6)


def test_a_device_that_is_not_there_is_refused_by_name(model):
    with pytest.raises(ValueError, match=r"^device: 'nonsense' is not there \("):
        Embedder(model, device="nonsense")


# ---- Writing


NAMES = ["a.jpg", 'with, comma and "quotes".jpg', "zwei\nZeilen.jpg", "行人.jpg", "byte\udcff.jpg"]


@pytest.fixture
def features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 6, generator=generator), torch.randn(5, 3, 2, generator=generator)


def test_safetensors_round_trip_with_the_names_in_the_metadata(features, tmp_path):
    save_features(tmp_path / "f.safetensors", NAMES, *features)
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["descriptors", "parts"]
        assert json.loads(file.metadata()["names"]) == NAMES
        assert torch.equal(file.get_tensor("descriptors"), features[0])
        assert torch.equal(file.get_tensor("parts"), features[1])


def test_npz_round_trip_without_pickle(features, tmp_path):
    save_features(tmp_path / "f.npz", NAMES, *features)
    with np.load(tmp_path / "f.npz", allow_pickle=False) as file:
        assert sorted(file) == ["descriptors", "names", "parts"]
        assert file["names"].tolist() == NAMES
        assert np.array_equal(file["descriptors"], features[0].numpy())
        assert np.array_equal(file["parts"], features[1].numpy())


def test_csv_round_trip_to_the_last_bit(features, tmp_path):
    save_features(tmp_path / "f.csv", NAMES, features[0])
    with (tmp_path / "f.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        header, *rows = csv.reader(file)
    assert header == ["name", *(f"f{i}" for i in range(6))]
    assert [row[0] for row in rows] == NAMES
    assert torch.equal(torch.tensor([[float(x) for x in row[1:]] for row in rows]), features[0])


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".csv"])
def test_views_and_empty_results_can_be_written(features, tmp_path, suffix):
    save_features(tmp_path / f"view{suffix}", NAMES[:3], features[0][::2, ::2])
    save_features(tmp_path / f"nothing{suffix}", [], features[0][:0])
    assert (tmp_path / f"view{suffix}").stat().st_size > (tmp_path / f"nothing{suffix}").stat().st_size > 0


def test_missing_folders_of_the_output_are_made(features, tmp_path):
    save_features(tmp_path / "new" / "folder" / "f.npz", NAMES, features[0])
    assert (tmp_path / "new" / "folder" / "f.npz").is_file()


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".csv"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(features, tmp_path, suffix):
    path = tmp_path / f"f{suffix}"
    path.write_text("old")
    with pytest.raises(ValueError, match="4 names for 5 rows of descriptors"):
        save_features(path, NAMES[:4], features[0])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_other_suffixes_and_parts_in_a_csv_are_refused(features, tmp_path):
    with pytest.raises(ValueError, match=r"f.txt: features are written as one of .safetensors, .npz, .csv"):
        save_features(tmp_path / "f.txt", NAMES, features[0])
    with pytest.raises(ValueError, match=r"f.csv: parts do not fit into a CSV file"):
        save_features(tmp_path / "f.csv", NAMES, *features)
    assert not list(tmp_path.iterdir())


def test_the_names_of_a_safetensors_file_may_fill_its_header_and_not_more(tmp_path):
    names, file = ["a" * (MAX_NAMES // 1000 - 7)] * 1000, tmp_path / "f.safetensors"
    with pytest.raises(ValueError, match="those of 1,001 images take more"):
        save_features(file, [*names, "a" * 1000], torch.zeros(1001, 1))
    save_features(file, names, torch.zeros(1000, 1))
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["names"]) == names


def test_a_csv_is_written_a_row_at_a_time(tmp_path):
    x = torch.randn(4000, 64)
    tracemalloc.start()
    save_features(tmp_path / "f.csv", ["a"] * len(x), x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * x.nbytes  # as floats all of them take 8 times as much


def test_parts_take_memory_only_where_they_are_asked_for(embed, files, monkeypatch):
    embed(files[0])  # imports
    made, empty = [], torch.empty
    monkeypatch.setattr("passreid_models.embed.torch.empty", lambda *shape: made.append(empty(*shape)) or made[-1])
    embed(files)
    assert sum(x.numel() for x in made) == len(files) * embed.dim
