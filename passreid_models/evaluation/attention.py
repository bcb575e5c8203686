"""Attention of the CLS and part tokens to the patches of images, and the similarity of parts: computed and drawn.

    maps = attention_maps("pass_vit_tiny_patch16", ["a.jpg", "b.jpg"])
    maps.last.mean(1)[0, 2]             # [h, w]: PART 2 of a.jpg in the last block, mean over heads
    maps.tokens[0] @ maps.tokens[1].T   # [T, T]: cosines of the tokens of a.jpg and b.jpg

Shapes: B images, P parts, T = 1 + P tokens (CLS, PART 1 ..), h x w patches, D embedding width.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from passreid_models.data.images import ImageLike, open_image
from passreid_models.embed import Embedder, finite_advice
from passreid_models.figure import check_picture, shorten
from passreid_models.layers import attention_weights
from passreid_models.runtime import atomic_buffer

__all__ = ["AttentionMaps", "attention_maps", "draw_parts"]

MAX_IMAGES = 64
WIDTH, GAP, LABEL, CELL = 80, 4, 14, 30  # of an image, between images, of a line of text, of a similarity; in pixels
TITLE = 140  # pixels that the longest title takes
HEAT = np.array([(0, 0, 40), (120, 20, 110), (235, 85, 45), (255, 220, 70)])  # from no attention to the most


class AttentionMaps(NamedTuple):
    """Attention of each CLS and PART to the patches, float32 on the CPU; what is missing to 1 goes to CLS and parts."""

    last: Tensor
    """Softmax of the last block by heads, ``[B, heads, T, h, w]``."""
    rollout: Tensor
    """Attention rollout through all blocks, ``[B, T, h, w]``: the product of ``(I + A) / 2``, A the mean over heads
    (arXiv 2005.00928)."""
    tokens: Tensor
    """Output tokens before the neck, L2-normalised, ``[B, T, D]``: their products are cosines."""


def attention_maps(
    model: str | os.PathLike[str] | nn.Module | Embedder, images: ImageLike | Sequence[ImageLike]
) -> AttentionMaps:
    """Compute which patches CLS and each PART attend to, from the queries and keys of the model itself.

    Args:
        model: Model, as the Embedder takes it, or an Embedder; it is not changed.
        images: Images, as the Embedder takes them.

    Raises:
        ImageError: If an image cannot be read.
        ValueError: If the model is not of this package, its blocks are not timm's ``Block`` with ``Attention``, or its
            attention is not finite.
    """
    embed = model if isinstance(model, Embedder) else Embedder(model)
    network = embed.model
    if not all(isinstance(b, Block) and type(b.attn) is Attention for b in network.blocks):
        raise ValueError("attention maps need a model of timm's Block with Attention, and at least one of them")
    with torch.inference_mode():
        batches = [
            _maps(network, x.to(embed.device, embed.dtype)) for x in embed.preprocess(images).split(embed.batch_size)
        ]
    maps = AttentionMaps(*(torch.cat(tensors).float().cpu() for tensors in zip(*batches, strict=True)))
    if not all(x.isfinite().all() for x in maps):
        raise ValueError(f"the attention is not finite: {finite_advice(embed.dtype)}")
    return maps


def _maps(network: Any, x: Tensor) -> AttentionMaps:
    num_prefix, grid = network.num_prefix_tokens, network.patch_embed.grid_size
    x = network.norm_pre(network._pos_embed(network.patch_embed(x)))
    identity = torch.eye(x.shape[1], device=x.device, dtype=x.dtype)
    rollout = identity.expand(len(x), -1, -1)
    for block in network.blocks:
        weights = attention_weights(block.attn, block.norm1(x))  # [B, heads, T + N, T + N]
        rollout = (identity + weights.mean(1)) / 2 @ rollout
        x = block(x)
    last, rollout = (a[..., :num_prefix, num_prefix:].unflatten(-1, grid) for a in (weights, rollout))
    return AttentionMaps(last, rollout, F.normalize(network.norm(x)[:, :num_prefix], dim=-1))


def draw_parts(
    model: str | os.PathLike[str] | nn.Module, images: Sequence[str | Path], picture: str | Path, **options: Any
) -> None:
    """Draw a row for each image: CLS and each PART in the last block and by rollout, and cosines with the first image.

    Each map runs from 0 to its own largest value, which is written below it. Rows of the cosines are the tokens of the
    image, columns those of the first.

    Args:
        model: Model, as the Embedder takes it.
        images: Image files, 64 at most.
        picture: Picture file to write.
        **options: Options of the Embedder, such as ``device``.

    Raises:
        ImageError: If an image cannot be read.
        ValueError: If there is no image or there are too many, or the suffix is not of a picture; and as
            ``attention_maps``.
    """
    check_picture(picture)
    if not 0 < len(images) <= MAX_IMAGES:
        raise ValueError(f"attention is drawn for 1 to {MAX_IMAGES} images, not {len(images):,}")
    maps = attention_maps(Embedder(model, **options), images)
    with atomic_buffer(picture) as buffer:
        _sheet([open_image(image) for image in images], [Path(image).stem for image in images], maps).save(buffer)


def _sheet(images: list[Image.Image], names: list[str], maps: AttentionMaps) -> Image.Image:
    num_tokens, h, w = maps.rollout.shape[1:]
    height, step = WIDTH * h // w, WIDTH + GAP
    groups = {"last block, mean of heads": maps.last.mean(1), "rollout": maps.rollout}
    span = max(num_tokens * step, TITLE) + 2 * GAP
    starts = [step + 2 * GAP + i * span for i in range(len(groups) + 1)]
    labels = ["CLS", *(f"PART {k}" for k in range(1, num_tokens))]
    row_height = max(height, CELL * num_tokens) + LABEL + GAP
    sheet = Image.new(
        "RGB",
        (starts[-1] + max(4 * CELL // 3 + CELL * num_tokens, TITLE), 2 * LABEL + len(images) * row_height),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for x, title in zip(starts, [*groups, "cosine with the first image"], strict=True):
        draw.text((x, 0), title, fill="black")
    for t, label in enumerate(labels):
        for start in starts[:-1]:
            draw.text((start + t * step, LABEL), label, fill="black")
        draw.text((starts[-1] + CELL * (t + 1), LABEL), label.replace("PART ", "P"), fill="black")
    for row, (image, name) in enumerate(zip(images, names, strict=True)):
        y = 2 * LABEL + row * row_height
        image = image.resize((WIDTH, height))
        sheet.paste(image, (GAP, y))
        draw.text((GAP, y + height), shorten(draw, name, WIDTH), fill="black")
        for start, group in zip(starts, groups.values(), strict=False):
            for t, values in enumerate(group[row].numpy()):
                x, largest = start + t * step, values.max()
                sheet.paste(_heated(image, values / (largest or 1)), (x, y))
                draw.text((x, y + height), f"max {100 * largest:.1f} %", fill="black")
        for i, line in enumerate((maps.tokens[row] @ maps.tokens[0].T).tolist()):
            draw.text((starts[-1], y + CELL * i + CELL // 3), labels[i].replace("PART ", "P"), fill="black")
            for j, cosine in enumerate(line):
                x, shade = starts[-1] + CELL * (j + 1), 1 - max(0, cosine)
                frame = (x, y + CELL * i, x + CELL - 2, y + CELL * (i + 1) - 2)
                draw.rectangle(frame, fill=tuple(round(c + (255 - c) * shade) for c in (30, 90, 160)))
                draw.text((x + 3, y + CELL * i + CELL // 3), f"{cosine:.2f}", fill="white" if shade < 0.5 else "black")
    return sheet


def _heated(image: Image.Image, values: np.ndarray) -> Image.Image:
    """Gray image below a map ``[h, w]`` of 0 to 1, which covers it more where it is hotter; a patch has one colour."""
    positions = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(values, positions, channel) for channel in HEAT.T], -1).astype(np.uint8)
    heat, cover = (
        Image.fromarray(x).resize(image.size, Image.Resampling.NEAREST)
        for x in (colours, (255 * (0.35 + 0.35 * values)).astype(np.uint8))
    )
    return Image.composite(heat, image.convert("L").convert("RGB"), cover)
