"""Where a run begins: the backbone and heads of student and teacher, random or from weights."""

import logging
import re
from typing import Any

import timm
import torch

from passreid_models.checkpoint import CheckpointError, StateDict, read_checkpoint, unwrap_checkpoint
from passreid_models.convert import IMAGENET
from passreid_models.ssl.config import TrainConfig
from passreid_models.ssl.network import PASSNetwork
from passreid_models.training.init import checkpoint_file, load_backbone, ready_to_train

_logger = logging.getLogger(__name__)


def make_networks(config: TrainConfig, device: torch.device) -> tuple[PASSNetwork, PASSNetwork]:
    """Student and teacher on ``device``, equal but for the student's stochastic depth.

    Raises:
        ValueError: If ``config.init`` names no weights, or those of another architecture.
        CheckpointError: If the weights do not fit.
    """
    torch.manual_seed(config.seed)
    student, teacher = (_make_network(config, drop_path, device) for drop_path in (config.drop_path, 0.0))
    if config.init:
        file = checkpoint_file(config.init)
        checkpoint = read_checkpoint(file) if file else {}
        start = load_backbone(config.model, config.init, file, **_shape(config))
        student.backbone.load_state_dict(start.state_dict())
        statistics = {k: start.pretrained_cfg[k] for k in ("mean", "std")}  # of views, probe and export
        for backbone in (student.backbone, teacher.backbone):
            backbone.pretrained_cfg = {**backbone.pretrained_cfg, **statistics}
        _load_heads(student, config, checkpoint)
    teacher.load_state_dict(student.state_dict())
    return student.train(), teacher.requires_grad_(False).train()


def make_backbone(config: TrainConfig, drop_path: float = 0.0) -> Any:
    """Random weights, and the preprocessing of pre-training."""
    backbone = timm.create_model(config.model, drop_path_rate=drop_path, **_shape(config))
    mean, std = IMAGENET  # whatever the default weights of the architecture are for
    backbone.pretrained_cfg = {**backbone.pretrained_cfg, "mean": mean, "std": std, "interpolation": "bicubic"}
    return backbone


def _make_network(config: TrainConfig, drop_path: float, device: torch.device) -> PASSNetwork:
    backbone = make_backbone(config, drop_path)
    ready_to_train(backbone, device, config.grad_checkpointing)
    network = PASSNetwork(
        backbone, config.num_prototypes, config.hidden_dim, config.bottleneck_dim, config.norm_last_layer
    )
    return network.to(device)


def _shape(config: TrainConfig) -> dict[str, Any]:
    return {"img_size": config.size, "num_parts": config.num_parts, "num_classes": 0, "neck": ""}


def _load_heads(network: PASSNetwork, config: TrainConfig, checkpoint: Any) -> None:
    """Projection heads of a checkpoint file that holds some of the same shape; else they stay new, which is said."""
    given = _find_heads(unwrap_checkpoint(checkpoint)[0]) if checkpoint else {}
    heads = network.heads
    if not given:
        _logger.info(f"{config.init} holds no projection heads: they begin at random")
        return
    wanted = _find_heads({f"heads.{k}": v for k, v in heads.state_dict().items()})
    if {k: v.shape for k, v in given.items()} != {k: v.shape for k, v in wanted.items()}:
        raise CheckpointError(
            f"init: the projection heads of {checkpoint_file(config.init)} have other shapes than those of "
            f"num_prototypes={config.num_prototypes}, hidden_dim={config.hidden_dim}, "
            f"bottleneck_dim={config.bottleneck_dim} and {config.num_parts} parts: give the file's, or "
            "`passreid convert` it first, to begin with new heads"
        )
    heads.load_state_dict(given)


def _find_heads(tensors: StateDict) -> StateDict:
    """Heads of the official layouts and of ours, as ``0.mlp.*`` (CLS), ``1.mlp.*`` (PART 1) and so on."""
    found = {}
    for key, value in tensors.items():
        key = re.sub(r"parametrizations\.weight\.original0", "weight_g", key)
        key = re.sub(r"parametrizations\.weight\.original1", "weight_v", key)
        if m := re.search(r"(?:^|\.)heads\.(\d+)\.((?:mlp|last_layer)\..+)", key):
            found[f"{m[1]}.{m[2]}"] = value
        elif m := re.search(r"(?:^|\.)head\.(mlp|last_layer)(?:_(cls|pt\d+))?\.(.+)", key):
            kind = 0 if m[2] in (None, "cls") else int(m[2][2:])
            found[f"{kind}.{m[1]}.{m[3]}"] = value
    return found
