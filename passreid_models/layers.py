"""Layers that PASS adds to timm's Vision Transformer: token fusion, the last block, necks, and the conv stem.

Shapes: B batch, P parts, T = 1 + P prefix tokens, D embedding width.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, DropPath, LayerNorm, Mlp, PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import Block, LayerScale
from torch import Tensor, nn
from torch.nn.modules.module import (  # torch 2.6 has no function for them
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

GLOBAL_HOOKS = (_global_forward_hooks, _global_forward_pre_hooks, _global_backward_hooks, _global_backward_pre_hooks)
PER_TOKEN = (LayerNorm, nn.LayerNorm, Mlp, nn.Linear, nn.GELU, nn.Dropout, nn.Identity, LayerScale, DropPath)


def fuse_tokens(tokens: Tensor, fusion: str) -> Tensor:
    """Fuse prefix tokens ``[B, T, D]`` into one descriptor per image.

    Args:
        tokens: CLS in row 0, then the part tokens.
        fusion: ``cat`` ``[g, m]`` ``[B, 2D]``, ``mean`` ``(g + m) / 2`` ``[B, D]``, ``parts`` all tokens
            ``[B, T * D]``, ``token`` CLS alone ``[B, D]``; g is CLS, m the mean part.
    """
    if fusion == "token":
        return tokens[:, 0]
    if fusion == "parts":
        return tokens.flatten(1)
    g = tokens[:, 0]
    m = tokens[:, 1:].mean(dim=1)
    if fusion == "cat":
        return torch.cat([g, m], dim=1)
    return (g + m) / 2


def fused_width(fusion: str, embed_dim: int, num_parts: int) -> int:
    """Width of a descriptor; ``''`` (unpooled) counts as one token."""
    return embed_dim * {"cat": 2, "mean": 1, "parts": 1 + num_parts, "token": 1, "": 1}[fusion]


def resample_positions(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int], rule: str) -> Tensor:
    """Resample position embeddings ``[1, H * W, D]`` to the patch grid of a view.

    Args:
        pos_embed: Position embeddings of the patches.
        old: Their rows and columns.
        new: Rows and columns of the view.
        rule: ``antialiased`` (bicubic; as they are where the grids are equal), or ``official``, that of the published
            pre-training: bicubic without antialiasing, by a scale of (n + 0.1) / N, at the native size too, which
            shifts the positions by up to a tenth of a patch.
    """
    if rule == "official":
        grid = pos_embed.reshape(1, *old, -1).permute(0, 3, 1, 2)
        scale = [(n + 0.1) / size for n, size in zip(new, old, strict=True)]
        return F.interpolate(grid, scale_factor=scale, mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    return resample_abs_pos_embed(pos_embed, list(new), list(old), num_prefix_tokens=0)


def prefix_block(block: Any, x: Tensor, num_prefix: int) -> Tensor:
    """Prefix tokens ``[B, T, D]`` of a block's output ``block(x)[:, :T]``, where no other token is read.

    Keys and values are those of all tokens; queries, projection, MLP and drop path are computed for the prefix alone. A
    block that is not timm's ``Block`` with its ``Attention`` and layers ``PER_TOKEN`` besides, or has a hook in it,
    computes all tokens.

    Args:
        block: Block of a Vision Transformer.
        x: Input tokens ``[B, T + N, D]``.
        num_prefix: Number of prefix tokens, T.
    """
    mixing = {Block: block, Attention: getattr(block, "attn", None)}
    if not is_per_token(block, mixing) or block.attn.gate is not None:
        return block(x)[:, :num_prefix]
    prefix = x[:, :num_prefix]
    prefix = prefix + block.drop_path1(block.ls1(_prefix_attention(block.attn, block.norm1(x), num_prefix)))
    return prefix + block.drop_path2(block.ls2(block.mlp(block.norm2(prefix))))


def is_per_token(module: nn.Module, mixing: Mapping[type, Any] = {}) -> bool:
    """Whether each layer is one of ``PER_TOKEN``, unchanged: without hooks or a ``forward`` that replaces its class's.

    Args:
        module: A layer with those inside it.
        mixing: Layers that may mix tokens, by the class that they must have.
    """
    return all((type(m) in PER_TOKEN or m is mixing.get(type(m))) and not is_hooked(m) for m in module.modules())


def is_hooked(module: nn.Module) -> bool:
    """Whether a module itself has a hook, one on all modules too, or a ``forward`` that replaces its class's."""
    m: Any = module
    hooks = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    return bool(hooks) or "forward" in m.__dict__ or any(GLOBAL_HOOKS)


def attention_weights(attn: Any, x: Tensor) -> Tensor:
    """Attention of all tokens to all: the softmax in timm's ``Attention``, ``[B, heads, T + N, T + N]``.

    Args:
        attn: Attention layer of a block; its ``qkv`` may be another module, such as one with an adapter.
        x: Input tokens of the layer ``[B, T + N, D]``.
    """
    q, k, _ = attn.qkv(x).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return _softmax(attn, attn.q_norm(q), attn.k_norm(k))


def _prefix_attention(attn: Any, x: Tensor, num_prefix: int) -> Tensor:
    """Attention of the prefix tokens to all tokens, ``attn(x)[:, :T]``."""
    q, k, v = _queries_keys_values(attn, x, num_prefix)
    if attn.fused_attn:
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop.p if attn.training else 0.0)
    else:
        out = attn.attn_drop(_softmax(attn, q, k)) @ v
    return attn.proj_drop(attn.proj(attn.norm(out.transpose(1, 2).flatten(2))))


def _queries_keys_values(attn: Any, x: Tensor, num_queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the first tokens ``[B, heads, num_queries, d]``, keys and values of all ``[B, heads, T + N, d]``."""
    width, heads = attn.attn_dim, attn.num_heads
    w_q, w_kv = attn.qkv.weight.split([width, 2 * width])
    b_q, b_kv = (None, None) if attn.qkv.bias is None else attn.qkv.bias.split([width, 2 * width])
    q = F.linear(x[:, :num_queries], w_q, b_q).unflatten(2, (heads, -1)).transpose(1, 2)
    k, v = F.linear(x, w_kv, b_kv).unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    return attn.q_norm(q), attn.k_norm(k), v


def _softmax(attn: Any, q: Tensor, k: Tensor) -> Tensor:
    return (q * attn.scale @ k.transpose(-2, -1)).softmax(dim=-1)


@torch.fx.wrap
def normalize(x: Tensor) -> Tensor:
    """L2 normalisation of ``[..., D]``, in float32 for 16-bit types; NaN where the length overflows, and not zeros."""
    wide = x if x.dtype == torch.float64 else x.float()
    overflows = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).isinf()
    return F.normalize(wide, dim=-1).masked_fill(overflows, torch.nan).to(x.dtype)


class SingleNeck(nn.Module):
    """BatchNorm and L2 normalisation of the fused vector ``[B, C]``: the feature of the published USL models."""

    def __init__(self, width: int, fusion: str, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.fusion = fusion  # of the vectors that its statistics are of
        self.bn = nn.BatchNorm1d(width, device=device, dtype=dtype)
        self.bn.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return normalize(self.bn(x))


class MultiNeck(nn.Module):
    """BatchNorm and L2 normalisation of each token, then fusion: the feature of the published UDA models.

    The T BatchNorms of width D are computed as one of width T * D.
    """

    def __init__(self, num_tokens: int, embed_dim: int, fusion: str, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.fusion = fusion
        self.bn = nn.BatchNorm1d(num_tokens * embed_dim, device=device, dtype=dtype)
        self.bn.bias.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        normed = normalize(self.bn(tokens.flatten(1)).reshape(tokens.shape))
        return fuse_tokens(normed, self.fusion)


class IBN(nn.Module):
    """InstanceNorm on the first half of the channels, BatchNorm on the other (IBN-a, arXiv 1807.09441)."""

    def __init__(self, channels: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        half = channels // 2
        self.instance_norm = nn.InstanceNorm2d(half, affine=True, device=device, dtype=dtype)
        self.batch_norm = nn.BatchNorm2d(channels - half, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.split([self.instance_norm.num_features, self.batch_norm.num_features], dim=1)
        return torch.cat([self.instance_norm(a.contiguous()), self.batch_norm(b.contiguous())], dim=1)


class ConvStem(PatchEmbed):
    """Patch embedding by a convolutional stem with IBN: the "ICS" variant of TransReID-SSL (arXiv 2111.12084).

    Only the projection differs from ``PatchEmbed``: a 7x7 conv of stride 2, two 3x3 convs, then a conv of
    stride 8. The patch size stays 16.
    """

    def __init__(
        self, img_size: Any = None, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768, **kwargs: Any
    ) -> None:
        super().__init__(img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, **kwargs)
        if self.patch_size != (16, 16):
            raise ValueError(f"the conv stem has patches of 16x16 pixels, got patch_size={patch_size}")
        dd: dict[str, Any] = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        conv = nn.Sequential(
            nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False, **dd),
            IBN(64, **dd),
            nn.ReLU(inplace=True),
            nn.Conv2d(64, 64, 3, padding=1, bias=False, **dd),
            IBN(64, **dd),
            nn.ReLU(inplace=True),
            nn.Conv2d(64, 64, 3, padding=1, bias=False, **dd),
            nn.BatchNorm2d(64, **dd),
            nn.ReLU(inplace=True),
        )
        proj = nn.Conv2d(64, embed_dim, 8, stride=8, bias=kwargs.get("bias", True), **dd)
        self.proj = nn.Sequential(OrderedDict(conv=conv, proj=proj))

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        if patch_size is not None and patch_size not in (16, (16, 16), [16, 16]):
            raise ValueError(f"the conv stem has patches of 16x16 pixels, got patch_size={patch_size}")
        super().set_input_size(img_size=img_size)
