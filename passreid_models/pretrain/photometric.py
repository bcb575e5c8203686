"""Photometric augmentation of a batch of views: colour jitter, grayscale, blur, solarisation, normalisation.

The loader's worker drew all random numbers (`passreid_models.pretrain.views`), so that the result is a function of
views and params, the same on a CPU and on a GPU. A CUDA device runs `passreid_models.pretrain.photometric_triton`, or
this file where Triton does not work: there the views of an operation are chosen by the params on the CPU, so that
nothing waits for the GPU. On a CPU views are processed in pieces that stay in its cache; views of one jitter order are
put side by side, so that an operation takes a whole piece, without gathering rows.

Shapes: N views, n views of one piece.
"""

# CPU time of the 11 views of an image, one core (median; 64-bit AMD EPYC, torch 2.14): this file 2.8 ms, torchvision's
# functional operations view by view 15.5 ms. Of 8 local views, in ms:
#   hue         this 0.38, kornia 0.9 adjust_hue 4.3, torchvision adjust_hue 8 x 0.36
#   blur        this 0.61, depthwise conv2d 0.64 (8 global views: this 2.7, conv2d 10.8), two banded matrix products
#               0.97, PIL 8 x 0.30, kornia gaussian_blur2d 1.2 (this 0.72 in that run), torchvision 8 x 0.49
#   contrast    this 0.10, kornia 0.19;  saturation  this 0.12, kornia 0.16

import logging
import math
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import rgb_to_grayscale, solarize

from passreid_models.architectures import IMAGENET
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
    Views,
)

_logger = logging.getLogger(__name__)

CPU_PIECE = 1 << 17  # floats per piece
GPU_PIECE = 1 << 25
SOLARIZE_THRESHOLD = 128 / 255


class Photometric(nn.Module):
    """Apply the colour changes of params to views, and normalise them.

    Values are kept in [0, 1] after each operation, as torchvision's tensor operations do; nothing is rounded to
    8 bits on the way. The result of a view does not depend on the others in the batch (beyond float rounding).

    Args:
        mean: Mean of each channel; ImageNet's by default.
        std: Standard deviation of each channel; ImageNet's by default.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] = IMAGENET[0], std: Sequence[float] = IMAGENET[1]) -> None:
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean and std must be three values, std above 0, got mean={mean!r} and std={std!r}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def batch(self, views: Views) -> tuple[Tensor, Tensor]:
        """Apply ``forward`` to a loader's batch, by view: ``[2, B, 3, H, W]`` and ``[A * L, B, 3, h, w]``."""
        outputs, start = [], 0
        for images in views[:2]:
            images = images.transpose(0, 1)
            params = views.params[:, start : start + len(images)].transpose(0, 1).flatten(0, 1)
            outputs.append(self(images.flatten(0, 1), params).unflatten(0, images.shape[:2]))
            start += len(images)
        return outputs[0], outputs[1]

    def forward(self, views: Tensor, params: Tensor) -> Tensor:
        """Apply params to views.

        Args:
            views: uint8 ``[N, 3, H, W]``, on the device of the module.
            params: ``[N, NUM_PARAMS]``, best on the CPU: without Triton, reading them from a GPU waits for it.

        Returns:
            float32 ``[N, 3, H, W]``.

        Raises:
            ValueError: If a shape or type is wrong.
        """
        if views.dtype != torch.uint8 or views.dim() != 4 or views.shape[1] != 3:
            raise ValueError(f"expected views uint8 [N, 3, H, W], got {views.dtype} {list(views.shape)}")
        if params.shape != (len(views), NUM_PARAMS):
            raise ValueError(f"expected params [{len(views)}, {NUM_PARAMS}], got {list(params.shape)}")
        if views.is_cuda and (kernels := _triton_kernels(views.device)):
            params = params.to(views.device, torch.float32, non_blocking=True)
            return kernels(views, params, self.mean, self.std, SOLARIZE_THRESHOLD)
        rows = params.tolist()  # waits for the GPU if params are on it
        pieces = _pieces(rows, views[:1].numel(), whole=views.device.type != "cpu")
        order = torch.tensor([i for piece in pieces for i in piece], dtype=torch.int64)
        params = params.index_select(0, order.to(params.device)).to(views.device, non_blocking=True)
        order = order.to(views.device, non_blocking=True)
        out = torch.empty(views.shape, device=views.device)
        start = 0
        for piece in pieces:
            part = slice(start, start := start + len(piece))
            x = views.index_select(0, order[part]).float().div_(255)  # [n, 3, H, W]
            change_colours_(x, params[part], [rows[i] for i in piece])
            out.index_copy_(0, order[part], x.sub_(self.mean).div_(self.std))
        return out


@cache
def _triton_kernels(device: torch.device) -> Callable[..., Tensor] | None:
    """Triton's implementation, or None if it is not installed or cannot compile (it needs a C compiler)."""
    try:
        from passreid_models.pretrain.photometric_triton import photometric

        statistics = torch.zeros(3, device=device), torch.ones(3, device=device)
        view, params = torch.zeros(1, 3, 2, 2, dtype=torch.uint8, device=device), torch.zeros(1, NUM_PARAMS)
        photometric(view, params.to(device, non_blocking=True), *statistics, SOLARIZE_THRESHOLD)
    except Exception as e:  # of the compiler, the driver or Triton itself: its versions raise different ones
        _logger.warning(f"colours are changed without Triton, which takes longer: {type(e).__name__}: {e}")
        return None
    return photometric


def _pieces(rows: list[list[float]], view_numel: int, whole: bool) -> list[list[int]]:
    """Indices of the views of each piece, which share jitter order, grayscale and solarisation unless ``whole``."""
    kinds = [() if whole else (*row[STEPS], row[GRAY], row[SOLARIZE]) for row in rows]
    limit = max(1, (GPU_PIECE if whole else CPU_PIECE) // max(1, view_numel))
    pieces: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: (kinds[i], rows[i][BLUR])):  # blurred views side by side
        if pieces and len(pieces[-1]) < limit and kinds[pieces[-1][0]] == kinds[i]:
            pieces[-1].append(i)
        else:
            pieces.append([i])
    return pieces


def change_colours_(x: Tensor, params: Tensor, rows: list[list[float]]) -> None:
    """Jitter, grayscale, blur and solarise views ``[n, 3, H, W]`` in [0, 1], in place.

    Args:
        x: The views.
        params: ``[n, NUM_PARAMS]`` on the device of ``x``.
        rows: ``params`` as lists, which choose the views of an operation.
    """
    factors = params[:, :4, None, None, None].unbind(1)  # each [n, 1, 1, 1]
    for column in range(STEPS.start, STEPS.stop):
        for jitter in {int(row[column]) for row in rows} - {-1}:
            _apply(x, [row[column] == jitter for row in rows], _JITTER[jitter], factors[jitter])
    _apply(x, [row[GRAY] > 0 for row in rows], grayscale_)
    reach = math.ceil(3 * max(row[BLUR] for row in rows))
    _apply(x, [row[BLUR] > 0 for row in rows], partial(blur_, reach=reach), params[:, BLUR])
    _apply(x, [row[SOLARIZE] > 0 for row in rows], solarize_)


def _apply(x: Tensor, mask: list[bool], operation: Callable[..., None], *args: Tensor) -> None:
    """Apply an operation to the rows of ``x`` in ``mask``: in place if they are contiguous, else on a copy of them."""
    index = [i for i, chosen in enumerate(mask) if chosen]
    if not index:
        return
    first, end = index[0], index[-1] + 1
    if end - first == len(index):
        operation(x[first:end], *(a[first:end] for a in args))
        return
    rows = torch.tensor(index).to(x.device, non_blocking=True)
    y = x.index_select(0, rows)
    operation(y, *(a.index_select(0, rows) for a in args))
    x.index_copy_(0, rows, y)


# ---- Operations on x [n, 3, H, W] in [0, 1], in place; factor [n, 1, 1, 1]


def brightness_(x: Tensor, factor: Tensor) -> None:
    """Blend with black, as torchvision's ``adjust_brightness``."""
    x.mul_(factor).clamp_(max=1)


def contrast_(x: Tensor, factor: Tensor) -> None:
    """Blend with the mean of the grayscale image, as torchvision's ``adjust_contrast``."""
    mean = rgb_to_grayscale(x.mean(dim=(2, 3), keepdim=True))  # [n, 1, 1, 1]
    x.mul_(factor).add_(mean.mul_(1 - factor)).clamp_(0, 1)


def saturation_(x: Tensor, factor: Tensor) -> None:
    """Blend with the grayscale image, as torchvision's ``adjust_saturation``."""
    gray = rgb_to_grayscale(x)  # [n, 1, H, W]
    x.mul_(factor).add_(gray.mul_(1 - factor)).clamp_(0, 1)


def hue_(x: Tensor, turns: Tensor) -> None:
    """Turn the hue of HSV, as torchvision's ``adjust_hue``, without its six cases.

    With chroma C = max - min, the hue in sixths of a turn is ``±(g + b - r + max - 2 min) / C``, with the sign of
    ``g - b``; and each channel is ``min + C * clip(2 - d, 0, 1)``, d the distance of the hue to that of the channel.
    """
    r, g, b = x.unbind(1)  # [n, H, W]
    low, high = x.amin(1), x.amax(1)
    chroma = high - low
    hue = (g + b).sub_(r).add_(high).sub_(low, alpha=2)
    hue.div_(chroma.clamp(min=1e-12)).copysign_(g - b)  # 0 for a gray pixel
    hue = hue.div_(6).add_(turns[:, 0])[:, None]  # [n, 1, H, W], turns
    for channel, channel_hue in enumerate((0, 1 / 3, 2 / 3)):
        d = hue[:, 0] - channel_hue
        d.sub_(d.round()).abs_().mul_(-6).add_(2).clamp_(0, 1)
        torch.addcmul(low, chroma, d, out=x[:, channel])


def grayscale_(x: Tensor) -> None:
    """Set all three channels to the gray value."""
    x.copy_(rgb_to_grayscale(x))


def solarize_(x: Tensor) -> None:
    """Invert values of 128/255 and more."""
    x.copy_(solarize(x, SOLARIZE_THRESHOLD))


def blur_(x: Tensor, radius: Tensor, reach: int) -> None:
    """Gaussian blur, cut off at three sigma; the border is replicated, as in PIL.

    PIL's GaussianBlur, the published one, is three box blurs. From radius 0.5 on the two differ by 0.4 to 0.7 of 255
    levels on average on persons, 0.8 to 1.1 on noise; at single pixels by up to 4, and up to 22 in the 4 pixels next to
    the border. Below 0.5, PIL's blurs more (radius 0.3: by 0.1 levels on persons, 10 on noise).

    Args:
        x: The views.
        radius: Standard deviations ``[n]`` in pixels.
        reach: Three times the largest standard deviation, rounded up.
    """
    offset = torch.arange(reach + 1, device=x.device)[:, None]  # [reach + 1, 1]
    kernel = torch.exp(offset**2 / (-2 * radius**2)) * (offset <= (3 * radius).ceil())  # [reach + 1, n]
    kernel = (kernel / (2 * kernel.sum(0) - kernel[0]))[:, :, None, None, None]
    for dim in (2, 3):
        size = x.shape[dim]
        padded = F.pad(x, (0, 0, reach, reach) if dim == 2 else (reach, reach, 0, 0), mode="replicate")
        torch.mul(x, kernel[0], out=x)
        for k in range(1, reach + 1):
            pair = padded.narrow(dim, reach - k, size) + padded.narrow(dim, reach + k, size)
            x.addcmul_(pair, kernel[k])


_JITTER: dict[int, Callable[..., None]] = {
    BRIGHTNESS: brightness_,
    CONTRAST: contrast_,
    SATURATION: saturation_,
    HUE: hue_,
}
