"""Conversion of checkpoints in every published layout to timm's keys.

    file --read.py--> flat tensors --convert.py--> Converted --load.py--> state dict of one model + LoadReport

Layouts: PASS and TransReID-SSL pre-training files, converted backbones, supervised ``transformer_120.pth``,
cluster-contrast ``*.pth.tar``, the conv-stem ("ICS") variants of each, and this package's own files. Public functions
are pure: they return new dictionaries and leave their arguments unchanged.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from passreid_models.architectures import Architecture
from passreid_models.checkpoints.read import CheckpointError, StateDict, read_checkpoint, unwrap_checkpoint

Grid = tuple[int, int]


@dataclass(frozen=True)
class Converted:
    """A checkpoint under timm's keys, not yet fitted to a model."""

    backbone: StateDict
    neck: StateDict  # BatchNorm over the fused vector (single) or over all tokens, T * D wide (multi)
    classifier: StateDict
    architecture: Architecture  # num_heads and img_size by convention: tensors do not show them
    layout: str
    task: str  # "" | pretrain | supervised | unsupervised
    neck_kind: str  # "" | single | multi
    fusion: str  # "" if the tensors do not show it
    folded: dict[str, list[str]]
    ignored: dict[str, str]


_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|backbone|base)\.)+")
_BACKBONE = re.compile(r"(?:cls_token|reg_token|pos_embed|patch_embed\.|blocks\.|norm\.|fc_norm\.)")
_IGNORED = {
    r"head\.(mlp|last_layer)": "projection head of the pre-training",
    r"fc\.": "unused ImageNet head",
    r"(sie_embed|cam_embed|view_embed)": "camera or view embedding: descriptors here are camera-free",
    r"(b1|b2)\.|classifier_\d": "jigsaw branch",
}


def convert_file(path: str | Path, network: str = "teacher") -> Converted:
    """Read a checkpoint file and convert it; errors name the file.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it cannot be read or is not a checkpoint of this family.
    """
    checkpoint = read_checkpoint(path)
    try:
        return convert_state_dict(checkpoint, network)
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from None


def convert_state_dict(checkpoint: Any, network: str = "teacher") -> Converted:
    """Convert a checkpoint of any published layout to timm's keys.

    The positions of CLS and parts are added to their tokens (exact for features); patch positions keep the file's grid.

    Args:
        checkpoint: A checkpoint object or a flat state dict.
        network: ``teacher`` or ``student``, if the file holds both.

    Raises:
        CheckpointError: If it is not a checkpoint of this family, or holds NaN or infinite values.
    """
    tensors, wrapping = unwrap_checkpoint(checkpoint, network)
    source = {_WRAPPERS.sub("", k): v for k, v in tensors.items()}
    _check_is_vit(source)
    if bad := [k for k, v in source.items() if v.is_floating_point() and not v.isfinite().all()]:
        raise CheckpointError(f"NaN or infinite values in {len(bad)} tensors, the first: {', '.join(bad[:3])}")

    backbone: StateDict = {}
    classifier: StateDict = {}
    bottlenecks: StateDict = {}
    parts: dict[int, list[str]] = {}
    ignored: dict[str, str] = {}
    for key, value in source.items():
        if part := re.fullmatch(r"part(?:_token)?(\d+)(_pos)?", key):
            parts.setdefault(int(part[1]), []).append(key)
        elif key == "cls_pos":
            pass
        elif reason := next((reason for pattern, reason in _IGNORED.items() if re.match(pattern, key)), None):
            ignored[key] = reason
        elif key.startswith("bottleneck"):
            bottlenecks[key] = value
        elif key == "classifier.weight":
            classifier["classifier.weight"] = value
        elif key.startswith("head."):
            backbone[key] = value  # the classifier of a timm model
        elif _BACKBONE.match(key):
            backbone[_rename_stem(key)] = value
        else:
            ignored[key] = "not a part of the model"

    folded = {}
    if "cls_pos" in source:
        backbone["cls_token"] = source["cls_token"].float() + source["cls_pos"].float()
        folded["cls_token"] = ["cls_token", "cls_pos"]
    if parts:
        names = [name for k in sorted(parts) for name in (f"part_token{k}", f"part{k}_pos")]
        if missing := [name for name in ("cls_pos", *names) if name not in source]:
            raise CheckpointError(f"part tokens without their counterpart: {', '.join(missing)} missing")
        pairs = [source[a].float() + source[b].float() for a, b in zip(names[::2], names[1::2], strict=True)]
        backbone["reg_token"] = torch.cat(pairs, dim=1)
        folded["reg_token"] = names

    architecture = _read_architecture(backbone)
    neck, neck_kind = _convert_necks(bottlenecks, architecture.num_parts, ignored)
    pos_embed = backbone.get("pos_embed")
    if "cls_pos" not in source and "reg_token" not in source and pos_embed is not None:
        count = pos_embed.shape[1]
        if guess_grid(count) is None and guess_grid(count - 1) is not None:  # TransReID-SSL: CLS has position 0
            backbone["cls_token"] = backbone["cls_token"].float() + pos_embed[:, :1].float()
            backbone["pos_embed"] = pos_embed[:, 1:]
            folded["cls_token"] = ["cls_token", "pos_embed[:, :1]"]

    has_heads = any(k.startswith(("head.mlp", "head.last_layer")) for k in ignored)
    supervised = bool(classifier) or any(k.startswith("base.") for k in tensors)
    task = "supervised" if supervised else "unsupervised" if neck else "pretrain" if has_heads else ""
    widths = {2 * architecture.embed_dim: "cat", architecture.embed_dim: "mean"}
    fused = classifier.get("classifier.weight") if classifier else None
    fused = neck.get("fc_norm.bn.weight") if fused is None and neck_kind == "single" else fused
    fusion = widths.get(fused.shape[-1], "") if fused is not None else ""
    if not architecture.num_parts:
        fusion = "token"
    kind = {"supervised": "supervised re-ID model", "unsupervised": "unsupervised re-ID model"}.get(task, "")
    own = "passreid-models file" if "reg_token" in source or "patch_embed.proj.conv.0.weight" in source else ""
    layout = kind or wrapping or ("pre-training checkpoint" if task == "pretrain" else own or "backbone")
    return Converted(backbone, neck, classifier, architecture, layout, task, neck_kind, fusion, folded, ignored)


def _check_is_vit(source: StateDict) -> None:
    stem = "patch_embed.proj.conv.0.weight" if "patch_embed.proj.conv.0.weight" in source else "patch_embed.proj.weight"
    missing = [key for key in ("blocks.0.attn.qkv.weight", "cls_token", stem) if key not in source]
    if not missing:
        return
    network = "a ResNet" if "layer1.0.conv1.weight" in source else "no vision transformer of this family"
    raise CheckpointError(f"this is {network}: it has {', '.join(list(source)[:3])}, but no {', '.join(missing)}")


def _rename_stem(key: str) -> str:
    """``patch_embed.conv.1.IN.*`` -> ``patch_embed.proj.conv.1.instance_norm.*``; other keys as they are."""
    if not key.startswith("patch_embed.conv."):
        return key
    return (
        key.replace("patch_embed.conv.", "patch_embed.proj.conv.")
        .replace(".IN.", ".instance_norm.")
        .replace(".BN.", ".batch_norm.")
    )


def _read_architecture(backbone: StateDict) -> Architecture:
    """Read the dimensions off the tensors, and rename the projection of a conv stem in ``backbone``."""
    conv_stem = "patch_embed.proj.conv.0.weight" in backbone
    if conv_stem and "patch_embed.proj.weight" in backbone:
        for name in ("weight", "bias"):
            backbone[f"patch_embed.proj.proj.{name}"] = backbone.pop(f"patch_embed.proj.{name}")
    embed_dim = backbone["cls_token"].shape[-1]
    depth = 1 + max(int(k.split(".")[1]) for k in backbone if k.startswith("blocks."))
    num_parts = backbone["reg_token"].shape[1] if "reg_token" in backbone else 0
    size = guess_grid(backbone["pos_embed"].shape[1]) if "pos_embed" in backbone else None
    img_size = (16 * size[0], 16 * size[1]) if size else (256, 128)
    return Architecture(embed_dim, depth, max(1, embed_dim // 64), num_parts, conv_stem, img_size)


def _convert_necks(bottlenecks: StateDict, num_parts: int, ignored: dict[str, str]) -> tuple[StateDict, str]:
    """Merge the BatchNorms of the tokens into one, under the keys of the model's neck; return it and its kind."""
    names = sorted({k.split(".")[0] for k in bottlenecks})  # bottleneck, bottleneck_1.. or bottleneck_pt1..
    if not names:
        return {}, ""
    if len(names) not in (1, 1 + num_parts) or names[0] != "bottleneck":
        ignored.update(dict.fromkeys(bottlenecks, "necks that do not match the tokens"))
        return {}, ""
    neck = {}
    for stat in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        values = [bottlenecks[f"{name}.{stat}"] for name in names if f"{name}.{stat}" in bottlenecks]
        if len(values) != len(names):
            raise CheckpointError(f"{', '.join(names)}: {stat} missing in {len(names) - len(values)} of {len(names)}")
        neck[f"fc_norm.bn.{stat}"] = values[0] if stat == "num_batches_tracked" else torch.cat(values)
    return neck, "single" if len(names) == 1 else "multi"


def published_descriptor(converted: Converted) -> dict[str, str]:
    """Fusion (``global_pool``) and neck of the published descriptor, as far as the layout shows them.

    Unsupervised features are taken after the neck, supervised ones before it.
    """
    settings = {"neck": converted.neck_kind if converted.task == "unsupervised" else ""}
    if converted.fusion:
        settings["global_pool"] = converted.fusion
    return settings


def guess_grid(num_patches: int) -> Grid | None:
    """Grid of a person image with this many patches, two or three times as high as wide; None if there is none."""
    for ratio in (2, 3):
        width = round((num_patches / ratio) ** 0.5)
        if width and ratio * width * width == num_patches:
            return ratio * width, width
    return None
