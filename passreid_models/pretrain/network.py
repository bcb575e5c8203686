"""Student and teacher: a PASS backbone with one projection head for each kind of token.

Shapes: B batch, V views, P parts, T = 1 + P kinds of token, D width, C bottleneck width, K prototypes.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import timm
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from passreid_models.architectures import IMAGENET
from passreid_models.checkpoints.convert import check_tensors
from passreid_models.checkpoints.names import NamedModel
from passreid_models.checkpoints.read import CheckpointError, StateDict, unwrap_checkpoint
from passreid_models.pass_vit import PassVisionTransformer
from passreid_models.pretrain.chunked import weight_norm_scales
from passreid_models.pretrain.config import PretrainConfig
from passreid_models.pretrain.heads import ProjectionHead
from passreid_models.training.warm_start import find_weights, load_start, prepare_to_train

_logger = logging.getLogger(__name__)


class Projections(NamedTuple):
    """Features and prototypes of a batch of views, for each kind of token: CLS, PART 1 .. P."""

    features: list[Tensor]  # [V_t, B, C]: the global views, then the local views that carry the token
    prototypes: list[Tensor]  # [K, C]
    gains: list[Tensor] | None = None  # [K], lengths that the prototypes are normalised to; None: no normalisation
    versions: tuple[int, ...] = ()  # of the prototypes when the features were computed; () if not known

    def logits(self) -> list[Tensor]:
        """Logits ``[V_t, B, K]`` of each kind of token."""
        logits = [x @ w.T for x, w in zip(self.features, self.prototypes, strict=True)]
        return logits if self.gains is None else [z * s for z, (_, s) in zip(logits, self.scaled(), strict=True)]

    def weights(self) -> list[tuple[Tensor, Tensor | None]]:
        """Prototypes and gains of each kind of token."""
        if self.gains is None:
            return [(w, None) for w in self.prototypes]
        return list(zip(self.prototypes, self.gains, strict=True))

    def scaled(self) -> list[tuple[Tensor, Tensor]]:
        """Prototypes of each kind of token, and the factors ``[K]`` of their logits."""
        return [(w, weight_norm_scales(w, g)) for w, g in self.weights()]


class PASSNetwork(nn.Module):
    """Backbone and projection heads, one for CLS and one for each PART token (arXiv 2203.03931, section 3.2)."""

    def __init__(
        self,
        backbone: PassVisionTransformer,
        num_prototypes: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
        pos_resampling: str = "antialiased",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pos_resampling = pos_resampling
        self.heads = nn.ModuleList(
            ProjectionHead(backbone.embed_dim, num_prototypes, hidden_dim, bottleneck_dim, norm_last_layer)
            for _ in range(backbone.num_prefix_tokens)
        )
        parts = [backbone.patch_embed, *backbone.blocks, *(head.mlp for head in cast(list[ProjectionHead], self.heads))]
        layers = [[m for m in part.modules() if type(m) in (nn.Linear, nn.Conv2d)] for part in parts]
        self._casts = [group for group in layers if group]

    def compile_blocks(self) -> None:
        """Compile blocks and heads for training: a graph for all blocks, and one for all heads, per shape of input.

        A compiled block draws the masks of its drop path itself, so that they differ from those without compilation.
        The last block, which computes the prefix tokens alone, is not compiled.
        """
        blocks = [block for block in self.backbone.blocks[:-1] if type(block) is Block]
        rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
        for block, rate in zip(blocks, torch.tensor(rates, device=self.backbone.cls_token.device), strict=True):
            block.forward = partial(
                _train_block, torch.compile(_block, dynamic=False), block, rate if any(rates) else None
            )
        for head in cast(list[Any], self.heads):
            head.features = partial(torch.compile(ProjectionHead.features, dynamic=False), head)

    def forward(self, global_views: Tensor, local_views: Tensor | None = None) -> Projections:
        """
        Args:
            global_views: ``[G, B, 3, H, W]``; they carry every token.
            local_views: ``[A * L, B, 3, h, w]``, L views of area 1, then of area 2 and so on; a view of area k carries
                CLS and PART k. Without parts the areas do not matter.
        """
        with _weights_cast_once(self._casts):
            return self._project(global_views, local_views)

    def _project(self, global_views: Tensor, local_views: Tensor | None) -> Projections:
        tokens = self.tokens(global_views)  # [G, B, T, D]
        views = list(tokens.unbind(2))
        if local_views is not None and len(local_views):
            parts = self.backbone.num_parts
            area = None
            if parts:
                per_area = len(local_views) // parts
                area = torch.arange(parts, device=local_views.device)
                area = area.repeat_interleave(per_area * local_views.shape[1])
            local = self.tokens(local_views, area)  # [A * L, B, 2, D]
            views[0] = torch.cat([views[0], local[:, :, 0]])
            for k in range(parts):
                views[1 + k] = torch.cat([views[1 + k], local[k * per_area : (k + 1) * per_area, :, 1]])
        heads = cast(list[ProjectionHead], self.heads)
        features = [head.features(x) for head, x in zip(heads, views, strict=True)]
        prototypes, gains = zip(*(head.factors() for head in heads), strict=True)
        return Projections(features, list(prototypes), list(gains), tuple(p._version for p in prototypes))

    def tokens(self, views: Tensor, area: Tensor | None = None) -> Tensor:
        """Prefix tokens ``[V, B, T or 2, D]`` of views ``[V, B, 3, H, W]``; ``area`` ``[V * B]`` of local views."""
        tokens = self.backbone.forward_views(views.flatten(0, 1), area, self.pos_resampling)
        return tokens.unflatten(0, views.shape[:2])


class _Cast(torch.autograd.Function):
    """Cast tensors, and gradients back, in one call each."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = weights[0].dtype
        return _cast(weights, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        casts = iter(_cast([g for g in grads if g is not None], ctx.dtype))
        return None, *(g if g is None else next(casts) for g in grads)


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    casts = tuple(torch.empty_like(t, dtype=dtype) for t in tensors)
    if casts:
        torch._foreach_copy_(casts, tuple(tensors))
    return casts


@contextmanager
def _weights_cast_once(groups: Sequence[Sequence[nn.Linear | nn.Conv2d]]) -> Iterator[None]:
    """Weights of linear and convolutional layers in autocast's type, which otherwise casts them one by one.

    Args:
        groups: Layers whose weights are cast together; several, so that DDP reduces the gradients of one while the
            backward pass computes those of the next.
    """
    device_type = groups[0][0].weight.device.type
    if not torch.is_autocast_enabled(device_type):
        yield
        return
    dtype = torch.get_autocast_dtype(device_type)
    shadowed: list[tuple[nn.Linear | nn.Conv2d, str]] = []
    try:
        for layers in groups:
            names = [(layer, name) for layer in layers for name, p in layer._parameters.items() if p is not None]
            casts = _Cast.apply(dtype, *(layer._parameters[name] for layer, name in names))
            for (layer, name), weight in zip(names, casts, strict=True):
                layer.__dict__[name] = weight  # found before the parameter, which stays where state_dict looks
            shadowed += names
        yield
    finally:
        for layer, name in shadowed:
            del layer.__dict__[name]


def _block(block: Any, x: Tensor, rate: Tensor | None) -> Tensor:
    """timm's ``Block`` with the rate of its drop path as a tensor: as a number it would be a part of the graph."""
    x = x + _drop_path(block.ls1(block.attn(block.norm1(x))), rate)
    return x + _drop_path(block.ls2(block.mlp(block.norm2(x))), rate)


def _drop_path(x: Tensor, rate: Tensor | None) -> Tensor:
    if rate is None:
        return x
    kept = torch.rand(len(x), 1, 1, device=x.device) >= rate
    return x * (kept / (1 - rate)).to(x.dtype)


def _train_block(compiled: Any, block: Any, rate: Tensor | None, x: Tensor, **options: Any) -> Tensor:
    if options or not block.training:  # the batches of evaluation have many shapes
        return Block.forward(block, x, **options)
    return compiled(block, x, rate)


def make_networks(config: PretrainConfig, device: torch.device) -> tuple[PASSNetwork, PASSNetwork]:
    """Make student and teacher on ``device``, equal but for the student's drop path.

    Raises:
        ValueError: If ``config.init`` names no weights, or those of another architecture.
        CheckpointError: If the weights do not fit.
    """
    torch.manual_seed(config.seed)
    student, teacher = (_make_network(config, drop_path, device) for drop_path in (config.drop_path, 0.0))
    if config.init:
        weights = find_weights(config.init, config.model, heads=True)
        pretrained: Any = weights.create(config.model, **_model_options(config))
        load_start(student.backbone, pretrained, config.init)
        statistics = {k: pretrained.pretrained_cfg[k] for k in ("mean", "std")}  # for views, probe and export
        for backbone in (student.backbone, teacher.backbone):
            backbone.pretrained_cfg = {**backbone.pretrained_cfg, **statistics}
        _load_heads(student, config, weights)
    teacher.load_state_dict(student.state_dict())
    return student.train(), teacher.requires_grad_(False).train()


def random_backbone(config: PretrainConfig, drop_path: float = 0.0) -> Any:
    """Make a backbone with random weights and the preprocessing of pre-training."""
    backbone = timm.create_model(config.model, drop_path_rate=drop_path, **_model_options(config))
    mean, std = IMAGENET  # not those of the architecture's default weights
    backbone.pretrained_cfg = {**backbone.pretrained_cfg, "mean": mean, "std": std, "interpolation": "bicubic"}
    return backbone


def _make_network(config: PretrainConfig, drop_path: float, device: torch.device) -> PASSNetwork:
    backbone = random_backbone(config, drop_path)
    prepare_to_train(backbone, device, config.grad_checkpointing)
    network = PASSNetwork(
        backbone,
        config.num_prototypes,
        config.hidden_dim,
        config.bottleneck_dim,
        config.norm_last_layer,
        config.pos_resampling,
    )
    return network.to(device)


def _model_options(config: PretrainConfig) -> dict[str, Any]:
    return {"img_size": config.size, "num_parts": config.num_parts, "num_classes": 0, "neck": ""}


def _load_heads(network: PASSNetwork, config: PretrainConfig, weights: NamedModel) -> None:
    """Load the projection heads of a checkpoint; log that they begin at random if it holds none.

    Raises:
        CheckpointError: If their shapes differ from the network's.
    """
    saved = _find_heads(unwrap_checkpoint(weights.checkpoint)[0]) if weights.file else {}
    if not saved:
        _logger.info(f"{config.init} holds no projection heads: they begin at random")
        return
    own = _find_heads({f"heads.{k}": v for k, v in network.heads.state_dict().items()})
    if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in own.items()}:
        raise CheckpointError(
            f"init: the projection heads of {weights.file} have other shapes than those of "
            f"num_prototypes={config.num_prototypes}, hidden_dim={config.hidden_dim}, "
            f"bottleneck_dim={config.bottleneck_dim} and {config.num_parts} parts: set the file's values, or run "
            "`passreid convert` on it first to begin with new heads"
        )
    try:
        network.heads.load_state_dict(check_tensors(saved))
        if config.norm_last_layer:
            for head in network.heads:
                nn.init.ones_(cast(ProjectionHead, head).last_layer.parametrizations.weight.original0)
    except CheckpointError as e:
        raise CheckpointError(f"init: projection heads of {weights.file}: {e}") from None


def _find_heads(tensors: StateDict) -> StateDict:
    """Projection heads of the official layouts or ours, named ``0.mlp.*`` (CLS), ``1.mlp.*`` (PART 1) and so on."""
    heads = {}
    for key, value in tensors.items():
        key = re.sub(r"parametrizations\.weight\.original0", "weight_g", key)
        key = re.sub(r"parametrizations\.weight\.original1", "weight_v", key)
        if m := re.search(r"(?:^|\.)heads\.(\d+)\.((?:mlp|last_layer)\..+)", key):
            heads[f"{m[1]}.{m[2]}"] = value
        elif m := re.search(r"(?:^|\.)head\.(mlp|last_layer)(?:_(cls|pt\d+))?\.(.+)", key):
            kind = 0 if m[2] in (None, "cls") else int(m[2][2:])
            heads[f"{kind}.{m[1]}.{m[3]}"] = value
    return heads
