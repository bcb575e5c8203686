"""Photometric augmentation: each operation against torchvision's, their composition, and independence of the batch."""

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from PIL import Image, ImageFilter
from torch import Tensor

from passreid_models.pretrain import photometric
from passreid_models.pretrain.photometric import Photometric
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
)
from passreid_models.synthetic import SyntheticPersons

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
JITTER = {
    BRIGHTNESS: tv.adjust_brightness,
    CONTRAST: tv.adjust_contrast,
    SATURATION: tv.adjust_saturation,
    HUE: tv.adjust_hue,
}
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


def noise(n: int, size: tuple[int, int] = (32, 16)) -> Tensor:
    return torch.randint(256, (n, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def images() -> Tensor:
    """uint8 [12, 3, 64, 32]: persons, noise, and edge cases of hue and thresholds."""
    persons = SyntheticPersons(4, 1, 1, size=(64, 32))
    pixels = [torch.from_numpy(np.array(persons[i][0])).permute(2, 0, 1) for i in range(4)]
    corners = torch.cartesian_prod(*[torch.tensor([0, 127, 128, 255], dtype=torch.uint8)] * 3)  # [64, 3]: gray, ties
    pixels += [*noise(4, (64, 32)), corners.T[:, :, None].expand(3, 64, 32)]
    pixels += [torch.full((3, 64, 32), level, dtype=torch.uint8) for level in (0, 128, 255)]
    return torch.stack(pixels)


def unchanged(n: int) -> Tensor:
    params = torch.zeros(n, NUM_PARAMS)
    params[:, :3] = 1
    params[:, STEPS] = -1
    return params


def plain(views: Tensor, params: Tensor) -> Tensor:
    """Photometric without its normalisation."""
    return Photometric((0, 0, 0), (1, 1, 1))(views, params)


def expected_blur(x: Tensor, radius: float) -> Tensor:
    """torchvision's blur, but with the border replicated, as in PIL; torchvision mirrors it."""
    reach = math.ceil(3 * radius)
    padded = F.pad(x[None], (reach,) * 4, mode="replicate")
    return tv.gaussian_blur(padded, [2 * reach + 1] * 2, [radius] * 2)[0, :, reach:-reach, reach:-reach]


def expected(view: Tensor, row: list[float]) -> Tensor:
    """A view after torchvision's operations, one after the other."""
    x = tv.to_dtype(view, torch.float32, scale=True)
    for column in row[STEPS]:
        if column >= 0:
            x = JITTER[int(column)](x, row[int(column)])
    if row[GRAY]:
        x = tv.rgb_to_grayscale(x, 3)
    if row[BLUR]:
        x = expected_blur(x, row[BLUR])
    if row[SOLARIZE]:
        x = tv.solarize(x, 128 / 255)
    return tv.normalize(x, MEAN, STD)


def random_params(n: int, seed: int = 0) -> Tensor:
    """Params of n views, 11 per image: the first global view, the second, then the local views."""
    crop, rng = MultiCrop(), np.random.default_rng(seed)
    return torch.from_numpy(np.concatenate([crop.draw_params(rng) for _ in range(-(-n // 11))])[:n])


# ---- One operation


@pytest.mark.parametrize("column", list(JITTER))
def test_each_jitter_operation_is_torchvisions_with_a_factor_a_view(images, column):
    low, high = (-0.5, 0.5) if column == HUE else (0.0, 2.0)
    factors = torch.linspace(low, high, len(images))[torch.randperm(len(images))]
    params = unchanged(len(images))
    params[:, column], params[:, STEPS.start] = factors, column
    out = plain(images, params)
    for view, factor, result in zip(images / 255, factors.tolist(), out, strict=True):
        torch.testing.assert_close(result, JITTER[column](view, factor), atol=1e-5, rtol=0)


def test_gray_views_stay_gray_whatever_the_hue():
    gray = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    params = unchanged(1)
    params[:, HUE], params[:, STEPS.start] = 0.3, HUE
    torch.testing.assert_close(plain(gray, params), gray / 255, atol=1e-6, rtol=0)


def test_grayscale_is_torchvisions(images):
    params = unchanged(len(images))
    params[::2, GRAY] = 1
    out = plain(images, params)
    torch.testing.assert_close(out[::2], tv.rgb_to_grayscale(images[::2] / 255, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(out[1::2], images[1::2] / 255, atol=0, rtol=0)


def test_solarise_inverts_from_128_on():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    params = unchanged(1)
    params[:, SOLARIZE] = 1
    inverted = torch.where(levels < 128, levels, 255 - levels)
    torch.testing.assert_close(plain(levels, params), inverted / 255, atol=1e-6, rtol=0)


@pytest.mark.parametrize("radius", [0.1, 0.3, 0.5, 1.0, 1.7, 2.0])
def test_blur_is_torchvisions_gaussian_of_three_sigma(images, radius):
    params = unchanged(len(images))
    params[:, BLUR] = radius
    for view, result in zip(images / 255, plain(images, params), strict=True):
        torch.testing.assert_close(result, expected_blur(view, radius), atol=1e-5, rtol=0)


def test_three_sigma_of_a_gaussian_are_all_of_it_to_a_quarter_of_a_level(images):
    # On black and white noise the pixels cut off matter most; 8 bits cannot show 0.25 of a level.
    black_and_white = (noise(2, (64, 32)) > 127).to(torch.uint8) * 255
    views = torch.cat([images, black_and_white])
    for radius in (0.5, 1.0, 1.5, 2.0):
        params = unchanged(len(views))
        params[:, BLUR] = radius
        padded = F.pad(views / 255, (20,) * 4, mode="replicate")
        whole = tv.gaussian_blur(padded, [41, 41], [radius] * 2)[..., 20:-20, 20:-20]
        assert (plain(views, params) - whole).abs().max() < 0.25 / 255


@pytest.mark.parametrize(("radius", "level"), [(0.1, 0.1), (0.5, 1.0), (1.0, 1.0), (2.0, 1.0)])
def test_blur_of_persons_is_within_a_level_of_pils_on_average(images, radius, level):
    params = unchanged(4)
    params[:, BLUR] = radius
    for view, result in zip(images[:4], plain(images[:4], params) * 255, strict=True):
        pil = Image.fromarray(view.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(radius))
        difference = (result - torch.from_numpy(np.array(pil)).permute(2, 0, 1)).abs().mean()
        assert difference < level


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 3)])
def test_blur_of_views_smaller_than_its_kernel_keeps_flat_ones_flat(size):
    params = unchanged(1)
    params[:, BLUR] = 2.0
    flat = torch.full((1, 3, *size), 77, dtype=torch.uint8)
    torch.testing.assert_close(plain(flat, params), flat / 255, atol=1e-6, rtol=0)


def test_views_without_any_operation_are_normalised_with_imagenet_statistics(images):
    torch.testing.assert_close(Photometric()(images, unchanged(len(images))), tv.normalize(images / 255, MEAN, STD))


def test_statistics_may_be_others(images):
    half = Photometric((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))(images, unchanged(len(images)))
    torch.testing.assert_close(half, images / 127.5 - 1, atol=1e-6, rtol=0)


# ---- Composition


@pytest.mark.parametrize("order", list(permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE))))
def test_jitter_comes_in_the_order_of_the_params(images, order):
    params = unchanged(4)
    params[:, :4], params[:, STEPS] = torch.tensor([1.4, 0.6, 1.2, 0.1]), torch.tensor(order).float()
    out = Photometric()(images[2:6], params)
    for view, row, result in zip(images[2:6], params.tolist(), out, strict=True):
        torch.testing.assert_close(result, expected(view, row), atol=5e-5, rtol=0)


@pytest.mark.parametrize("whole", [False, True])
def test_the_whole_is_torchvisions_operations_view_by_view(images, whole, monkeypatch):
    if whole:  # the pieces of a GPU, with views of all kinds in one
        pieces = photometric._pieces
        monkeypatch.setattr(photometric, "_pieces", lambda rows, numel, whole: pieces(rows, numel, True))
    views, params = images[torch.arange(132) % 12], random_params(132)
    params[:, SOLARIZE] = (torch.arange(132) % 5 == 0).float()
    out = Photometric()(views, params)
    assert out.dtype == torch.float32
    for view, row, result in zip(views, params.tolist(), out, strict=True):
        difference = (result - expected(view, row)).abs()
        if row[SOLARIZE]:  # a value at the threshold may fall on the other side of it by rounding
            assert (difference > 5e-5).float().mean() < 1e-3
        else:
            assert difference.max() < 5e-5


# ---- The batch


def test_a_view_does_not_depend_on_the_others_beyond_rounding(images):
    views, params, augment = images[torch.arange(66) % 12], random_params(66), Photometric()
    params[:, SOLARIZE] = 0  # its threshold turns a rounding into a jump
    together = augment(views, params)
    alone = torch.cat([augment(v[None], p[None]) for v, p in zip(views, params, strict=True)])
    torch.testing.assert_close(together, alone, atol=5e-6, rtol=0)
    order = torch.randperm(66, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(augment(views[order], params[order]), together[order], atol=5e-6, rtol=0)


@pytest.mark.parametrize("piece", [1, 20_000, 1 << 30])
def test_results_do_not_depend_on_the_size_of_the_pieces(images, piece, monkeypatch):
    views, params = images[torch.arange(66) % 12], random_params(66)
    params[:, SOLARIZE] = 0
    usual = Photometric()(views, params)
    monkeypatch.setattr(photometric, "CPU_PIECE", piece)
    torch.testing.assert_close(Photometric()(views, params), usual, atol=5e-6, rtol=0)


def test_forward_is_deterministic_and_leaves_its_arguments_as_they_are(images):
    views, params = images.clone(), random_params(12)
    before = params.clone()
    first = Photometric()(views, params)
    torch.manual_seed(7)
    assert torch.equal(first, Photometric()(views, params))
    assert torch.equal(views, images)
    assert torch.equal(params, before)


def test_result_is_float32_under_autocast_and_for_any_strides(images):
    params = random_params(12)
    usual = Photometric()(images, params)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Photometric()(images, params), usual)
    interleaved = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    torch.testing.assert_close(Photometric()(interleaved, params), usual, atol=5e-6, rtol=0)


def test_no_views_give_no_views():
    assert Photometric()(noise(0), unchanged(0)).shape == (0, 3, 32, 16)


def test_statistics_are_no_part_of_a_checkpoint():
    assert Photometric().state_dict() == {}


INTERPRETED = """
import sys, torch
from passreid_models.pretrain import photometric_triton
photometric_triton.PIXELS = 512
torch.save([photometric_triton.photometric(*case, 128 / 255) for case in torch.load(sys.argv[1])], sys.argv[1])
"""


@needs_triton
def test_kernels_give_the_same(images, tmp_path):
    views, params, augment, file = images[:, :, :24], random_params(12), Photometric(), tmp_path / "views.pt"
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    solarized = unchanged(1)
    solarized[:, SOLARIZE] = 1
    torch.save([(views, params, augment.mean, augment.std), (levels, solarized, torch.zeros(3), torch.ones(3))], file)
    subprocess.run([sys.executable, "-c", INTERPRETED, file], check=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    result, inverted = torch.load(file)
    kept = params[:, SOLARIZE] == 0  # a value at the threshold may fall on the other side of it by rounding
    torch.testing.assert_close(result[kept], augment(views, params)[kept], atol=5e-5, rtol=0)
    torch.testing.assert_close(inverted, torch.where(levels < 128, levels, 255 - levels) / 255)


@needs_triton
@pytest.mark.parametrize("kernel", ["_change_colours", "_blur_rows", "_blur_columns_and_normalize"])
def test_kernels_compile_for_a_gpu_that_is_not_here(kernel):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from passreid_models.pretrain import photometric_triton

    function, types = getattr(photometric_triton, kernel), {"views": "*u8", "threshold": "fp32", "PIXELS": "constexpr"}
    types |= dict.fromkeys(("numel", "height", "width"), "i32")
    source = ASTSource(function, {k: types.get(k, "*fp32") for k in function.arg_names}, {"PIXELS": 512})
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm


def test_without_triton_the_reason_is_said_and_the_plain_path_stays(caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "passreid_models.pretrain.photometric_triton", None)
    photometric._triton_kernels.cache_clear()
    assert photometric._triton_kernels(torch.device("cpu")) is None
    assert "colours are changed without Triton" in caplog.text
    photometric._triton_kernels.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_and_is_never_waited_for(images):
    views, params = images[torch.arange(132) % 12], random_params(132)
    params[:, SOLARIZE] = 0
    augment, on_gpu = Photometric().cuda(), views.cuda()
    augment(on_gpu, params)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = augment(on_gpu, params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.cpu(), Photometric()(views, params), atol=5e-5, rtol=0)


# ---- Errors


def test_views_and_params_of_other_shapes_or_types_are_refused_with_what_was_given(images):
    augment = Photometric()
    with pytest.raises(ValueError, match=r"expected views uint8 .*, got torch.float32 \[12, 3, 64, 32\]"):
        augment(images.float(), unchanged(12))
    with pytest.raises(ValueError, match=r"got torch.uint8 \[3, 64, 32\]"):
        augment(images[0], unchanged(1))
    with pytest.raises(ValueError, match=r"expected params \[12, 11\], got \[11, 11\]"):
        augment(images, unchanged(11))


@pytest.mark.parametrize(("mean", "std"), [((0.5,), STD), (MEAN, (0.2, 0.2)), (MEAN, (0.2, 0.0, 0.2))])
def test_statistics_that_are_no_three_values_are_refused(mean, std):
    with pytest.raises(ValueError, match="mean and std must be three values, std above 0"):
        Photometric(mean, std)
