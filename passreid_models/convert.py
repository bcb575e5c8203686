"""Checkpoints in every published layout, converted to the keys of the timm models.

    file --read_checkpoint--> object --unwrap_checkpoint--> flat tensors --convert_state_dict--> Converted
         --fit_to_model--> state dict of one model + LoadReport

Layouts: PASS and TransReID-SSL pre-training files, converted backbones, supervised ``transformer_120.pth``,
cluster-contrast ``*.pth.tar``, the conv-stem ("ICS") variants of each, and this package's own files. All functions are
pure: they return new dictionaries and leave their arguments as they are.
"""

import argparse
import logging
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import isqrt
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

_logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]
Grid = tuple[int, int]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
STATISTICS = {"imagenet": IMAGENET, "0.5": HALF}
RESIZE_METHODS = ("auto", "bicubic", "bilinear")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the model; the message names the keys."""


@dataclass(frozen=True)
class Architecture:
    """The dimensions that tell one registered model from another."""

    embed_dim: int
    depth: int
    num_heads: int
    num_parts: int = 3
    conv_stem: bool = False
    img_size: tuple[int, int] = (256, 128)


ARCHITECTURES: dict[str, Architecture] = {
    "pass_vit_tiny_patch16": Architecture(192, 12, 3),
    "pass_vit_small_patch16": Architecture(384, 12, 6),
    "pass_vit_base_patch16": Architecture(768, 12, 12),
    "pass_vit_small_ics_patch16": Architecture(384, 12, 6, conv_stem=True),
    "pass_vit_base_ics_patch16": Architecture(768, 12, 12, conv_stem=True),
    "transreid_vit_small_patch16": Architecture(384, 12, 6, num_parts=0),
    "transreid_vit_small_ics_patch16": Architecture(384, 12, 6, num_parts=0, conv_stem=True),
    "transreid_vit_base_ics_patch16": Architecture(768, 12, 12, num_parts=0, conv_stem=True),
    "test_pass_vit": Architecture(64, 3, 2, img_size=(64, 32)),
}


@dataclass
class LoadReport:
    """What became of each tensor of a checkpoint, key by key; ``print(report)`` shows a table."""

    source: str = ""
    layout: str = ""
    loaded: list[str] = field(default_factory=list)
    folded: dict[str, list[str]] = field(default_factory=dict)  # target -> the tensors that were added up
    resized: dict[str, str] = field(default_factory=dict)
    extras: dict[str, str] = field(default_factory=dict)  # known, but no part of this model: necks, classifier
    ignored: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    mismatched: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain lists and dictionaries, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LoadReport":
        """The inverse of ``to_dict``."""
        return cls(**{f.name: data[f.name] for f in fields(cls)})

    def __str__(self) -> str:
        rows = [("loaded", f"{len(self.loaded)} tensors", "")]
        rows += [("folded", k, " + ".join(v)) for k, v in self.folded.items()]
        for name in ("resized", "extras", "ignored", "mismatched"):
            rows += [(name, k, v) for k, v in _collapse(getattr(self, name)).items()]
        rows += [("missing", k, "") for k in self.missing] + [("note", n, "") for n in self.notes]
        width = max(len(key) for _, key, _ in rows if len(key) < 48)
        lines = [f"{action:<11}{key:<{width}}  {why}".rstrip() for action, key, why in rows]
        return "\n".join([f"{self.source or 'checkpoint'}: {self.layout}", *lines])


def _collapse(reasons: Mapping[str, str]) -> dict[str, str]:
    """Keys of the same reason and first name become one row: ``head.* (28)``."""
    groups: dict[tuple[str, str], list[str]] = {}
    for key, why in reasons.items():
        groups.setdefault((key.split(".")[0], why), []).append(key)
    return {keys[0] if len(keys) == 1 else f"{stem}.* ({len(keys)})": why for (stem, why), keys in groups.items()}


@dataclass(frozen=True)
class Converted:
    """A checkpoint in timm's keys, before it meets a model."""

    backbone: StateDict
    neck: StateDict  # BatchNorm over the fused vector (single) or over all tokens, T * D wide (multi)
    classifier: StateDict
    architecture: Architecture  # num_heads and img_size are conventions: tensors do not tell them
    layout: str
    task: str  # "" | pretrain | supervised | unsupervised
    neck_kind: str  # "" | single | multi
    fusion: str  # "" where the tensors do not tell
    folded: dict[str, list[str]]
    ignored: dict[str, str]


# ---------------------------------------------------------------------------------------------------------- reading


def read_checkpoint(path: str | Path) -> Any:
    """Read a safetensors file or a pickled PyTorch checkpoint, without running any code from it.

    Besides tensors, ``argparse.Namespace`` and numpy scalars are let in: the published files hold both.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is no checkpoint, is cut short, or wants to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}" + (": it is a folder" if path.is_dir() else ""))
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except SafetensorError as e:
            raise CheckpointError(f"{path} is not a whole safetensors file ({e}): download it again") from None
    try:
        with torch.serialization.safe_globals(_safe_globals()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        if blocked := re.search(r"GLOBAL (\S+)", str(e)):
            raise CheckpointError(
                f"{path} was refused: it asks to run {blocked[1]} while loading; checkpoints are opened for their "
                "tensors alone, since a pickle can run any code"
            ) from None
        if (opcode := re.search(r"Unsupported operand (\d+)", str(e))) and 140 <= int(opcode[1]) <= 151:
            raise CheckpointError(
                f"{path} was refused: pickle protocol 4 cannot be opened without letting it run code; save it again "
                "with the default protocol of torch.save, or as safetensors"
            ) from None
        raise CheckpointError(f"{path} is not a PyTorch checkpoint") from None
    except Exception as e:  # the unpickler trips over anything in a file that is no pickle
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"
        what = "is cut short or damaged: download it again" if is_zip else "is not a PyTorch checkpoint"
        raise CheckpointError(f"{path} {what} ({type(e).__name__}: {str(e)[:120].partition(chr(10))[0]})") from None


def _safe_globals() -> list[Any]:
    import numpy as np

    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    dtypes = [getattr(np.dtypes, name) for name in ("Float32DType", "Float64DType", "Int64DType")]
    return [argparse.Namespace, np.dtype, *dtypes, scalar, (scalar, "numpy.core.multiarray.scalar")]


def unwrap_checkpoint(checkpoint: Any, network: str = "teacher") -> tuple[StateDict, str]:
    """Flat tensors of one network of a checkpoint object, and what kind of wrapping they came in.

    Args:
        checkpoint: What ``read_checkpoint`` returned.
        network: ``teacher`` or ``student``, where the file holds both.

    Raises:
        CheckpointError: If there are no named tensors, or the wanted network is not there.
    """
    if network not in ("teacher", "student"):
        raise ValueError(f"network must be 'teacher' or 'student', got {network!r}")
    layout = ""
    if isinstance(checkpoint, Mapping) and ("teacher" in checkpoint or "student" in checkpoint):
        if network not in checkpoint:
            raise CheckpointError(f"the pre-training file has no {network}, only: {', '.join(map(str, checkpoint))}")
        checkpoint, layout = checkpoint[network], f"pre-training checkpoint, {network}"
    for name in ("state_dict", "model"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(name), Mapping):
            checkpoint, layout = checkpoint[name], layout or f"'{name}' of a training checkpoint"
    tensors = {k: v for k, v in checkpoint.items() if isinstance(v, Tensor)} if isinstance(checkpoint, Mapping) else {}
    if not tensors or not all(isinstance(k, str) for k in tensors):
        raise CheckpointError(f"expected a dictionary of named tensors, got {_describe(checkpoint)}")
    return tensors, layout


def _describe(obj: Any) -> str:
    if isinstance(obj, Mapping):
        return f"a dictionary with the keys {', '.join(map(str, list(obj)[:6])) or '(none)'}"
    return f"a {type(obj).__name__}"


# ------------------------------------------------------------------------------------------------------- converting

_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|backbone|base)\.)+")
_BACKBONE = re.compile(r"(?:cls_token|reg_token|pos_embed|patch_embed\.|blocks\.|norm\.|fc_norm\.)")
_IGNORED = {
    r"head\.(mlp|last_layer)": "projection head of the pre-training",
    r"fc\.": "unused ImageNet head",
    r"(sie_embed|cam_embed|view_embed)": "camera or view embedding: descriptors here are camera-free",
    r"(b1|b2)\.|classifier_\d": "jigsaw branch",
}


def convert_state_dict(checkpoint: Any, network: str = "teacher") -> Converted:
    """Convert a checkpoint of any published layout to timm's keys.

    Token and position of CLS and of each part are added up (exact for features); the positions of the patches stay on
    the grid of the file.

    Args:
        checkpoint: A checkpoint object or a flat state dict.
        network: ``teacher`` or ``student``, where the file holds both.

    Raises:
        CheckpointError: If it is no checkpoint of this family, or holds NaN or infinite values.
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
        elif why := next((why for pattern, why in _IGNORED.items() if re.match(pattern, key)), None):
            ignored[key] = why
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
        if lost := [name for name in ("cls_pos", *names) if name not in source]:
            raise CheckpointError(f"part tokens without their counterpart: {', '.join(lost)} missing")
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
    lost = [key for key in ("blocks.0.attn.qkv.weight", "cls_token", stem) if key not in source]
    if not lost:
        return
    what = "a ResNet" if "layer1.0.conv1.weight" in source else "no vision transformer of this family"
    raise CheckpointError(f"this is {what}: it has {', '.join(list(source)[:3])}, but no {', '.join(lost)}")


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
    """Dimensions that the tensors show; renames the projection of a conv stem in passing."""
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
    """BatchNorms of the tokens as one BatchNorm over all of them, in the form of the model's neck."""
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


def guess_grid(num_patches: int) -> Grid | None:
    """Grid of a person image with that many patches: twice or three times as high as wide; else None."""
    for ratio in (2, 3):
        width = round((num_patches / ratio) ** 0.5)
        if width and ratio * width * width == num_patches:
            return ratio * width, width
    return None


def architecture_name(found: Architecture) -> str | None:
    """The registered model with these tensors, if there is one."""
    key = (found.embed_dim, found.depth, found.num_parts, found.conv_stem)
    for name, a in ARCHITECTURES.items():
        if (a.embed_dim, a.depth, a.num_parts, a.conv_stem) == key:
            return name
    return None


# ---------------------------------------------------------------------------------------------------------- fitting


def resize_pos_embed(pos_embed: Tensor, old: Grid, new: Grid, method: str = "auto") -> tuple[Tensor, str]:
    """Resample patch positions ``[1, h * w, D]`` to another grid.

    Args:
        pos_embed: Positions of the patches alone.
        old: Rows and columns of the given grid.
        new: Rows and columns of the wanted grid.
        method: ``bicubic`` (antialiased), ``bilinear`` (as in the published 384x128 fine-tuning), or ``auto``:
            bilinear from 16x8 to 24x8, bicubic elsewhere.

    Returns:
        Positions ``[1, new_h * new_w, D]`` and the method used (``""`` when the grids are equal).
    """
    if method not in RESIZE_METHODS:
        raise ValueError(f"the positions are resized by one of {RESIZE_METHODS}, got {method!r}")
    if old == new:
        return pos_embed, ""
    if method == "bilinear" or (method == "auto" and (old, new) == ((16, 8), (24, 8))):
        grid = pos_embed.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=new, mode="bilinear", align_corners=False)
        return grid.permute(0, 2, 3, 1).flatten(1, 2), "bilinear"
    return resample_abs_pos_embed(pos_embed.float(), list(new), list(old), num_prefix_tokens=0), "bicubic antialiased"


def fit_to_model(
    converted: Converted,
    expected: Mapping[str, Tensor],
    grid: Grid,
    declared: Grid | None = None,
    resize: str = "auto",
    free: tuple[str, ...] = (),
) -> tuple[StateDict, LoadReport]:
    """Choose and resize the tensors that a model takes, and account for all others.

    Args:
        converted: The checkpoint.
        expected: State dict of the model, for its keys and shapes.
        grid: Patch grid of the model, rows and columns.
        declared: Patch grid that the checkpoint's config states; guessed from the number of patches when it does
            not fit.
        resize: See ``resize_pos_embed``.
        free: Beginnings of keys that may be missing or differ: a new classifier, an input conv of other channels.

    Raises:
        CheckpointError: If a tensor is missing or has another shape, naming the keys and the architecture that fits.
    """
    report = LoadReport(layout=converted.layout, folded=dict(converted.folded), ignored=dict(converted.ignored))
    given = dict(converted.backbone)
    if "head." in free:  # timm discards the classifier of other classes
        for key in [k for k in given if k.startswith("head.")]:
            del given[key]
            report.extras[key] = "classifier of other classes"
    if any(k.startswith("fc_norm.") for k in expected):
        given.update(converted.neck)
    else:
        report.extras.update(dict.fromkeys(converted.neck, f"{converted.neck_kind} neck, not held by this model"))
    report.extras.update(dict.fromkeys(converted.classifier, "identity classifier of the training set"))
    if "pos_embed" in given and given["cls_token"].shape == expected["cls_token"].shape:
        count = given["pos_embed"].shape[1]
        old = declared if declared and declared[0] * declared[1] == count else guess_grid(count)
        if old is None:
            side = isqrt(count)
            is_square = count - side * side in (0, 1)  # 1: with CLS
            square = f" (a ViT for {side * 16}x{side * 16} images)" if is_square else ""
            wanted = f"; declared is {declared[0]}x{declared[1]}" if declared else ""
            raise CheckpointError(f"pos_embed has {count} positions{square}, no grid of person images{wanted}")
        given["pos_embed"], method = resize_pos_embed(given["pos_embed"], old, grid, resize)
        if method:
            report.resized["pos_embed"] = f"{old[0]}x{old[1]} -> {grid[0]}x{grid[1]}, {method}"

    chosen = {}
    for key, tensor in expected.items():
        if key not in given:
            if not key.startswith(free):
                report.missing.append(key)
        elif given[key].shape != tensor.shape and not key.startswith(free):
            report.mismatched[key] = f"{_shape(given[key])} in the file, {_shape(tensor)} in the model"
        else:
            chosen[key] = given[key]
    unexpected = [k for k in given if k not in expected]
    for key in [k for k in unexpected if k.startswith(("head.", "fc_norm."))]:
        unexpected.remove(key)
        report.extras[key] = "classifier or neck, not held by this model"
    report.loaded = list(chosen)
    if report.missing or report.mismatched or unexpected:
        raise CheckpointError(_explain(report, unexpected, converted, expected))
    return chosen, report


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _explain(report: LoadReport, unexpected: list[str], converted: Converted, expected: Mapping[str, Tensor]) -> str:
    def few(keys: list[str]) -> str:
        return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")

    problems = []
    if report.missing:
        problems.append(f"missing {few(report.missing)}")
    if report.mismatched:
        problems.append("mismatched " + few([f"{k} ({v})" for k, v in report.mismatched.items()]))
    if unexpected:
        problems.append(f"without a place in the model: {few(unexpected)}")
    found = converted.architecture
    width, parts = expected["cls_token"].shape[-1], expected["reg_token"].shape[1] if "reg_token" in expected else 0
    described = f"the file is {found.embed_dim} wide and {found.depth} deep, with {found.num_parts} part tokens"
    described += " and a conv stem" if found.conv_stem else ""
    same = (found.embed_dim, found.num_parts) == (width, parts) and len(report.missing) + len(unexpected) == 0
    name = architecture_name(found)
    advice = f": use {name}" if name and not same else ""
    return f"the checkpoint does not fit the model: {'; '.join(problems)}; {described}{advice}"


def pretrained_filter_fn(
    state_dict: Any, model: nn.Module, resize: str = "auto", infer_statistics: bool = True
) -> StateDict:
    """timm's ``pretrained_filter_fn``: any published layout to the state dict of ``model``; keeps the LoadReport.

    With ``infer_statistics`` the mean/std and interpolation of a raw official file are written to
    ``model.pretrained_cfg``, since they belong to the weights; where its layout does not tell them, a warning says so.

    Raises:
        CheckpointError: If the checkpoint does not fit.
    """
    converted = convert_state_dict(state_dict)
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    stem: Any = model.patch_embed
    declared = tuple(s // p for s, p in zip(cfg["input_size"][1:], stem.patch_size, strict=True))
    free: tuple[str, ...] = ()
    if model.num_classes != cfg["num_classes"]:
        free += ("head.",)
    if model.in_chans != cfg["input_size"][0]:
        free += (cfg["first_conv"] + ".weight",)
    chosen, report = fit_to_model(converted, model.state_dict(), stem.grid_size, declared, resize, free)
    if "head.weight" in model.state_dict() and "head.weight" not in chosen:
        report.notes.append("head: a new classifier, initialised at random")
    if infer_statistics and converted.task:  # a raw official file: what it was trained with is known
        mean, std = IMAGENET if converted.task == "pretrain" else HALF
        if tuple(cfg["mean"]) != mean:
            report.notes.append(f"mean/std set to {mean[0]}.., as for every {converted.layout}")
        cfg.update(mean=mean, std=std, interpolation="bilinear" if converted.task == "supervised" else "bicubic")
    elif infer_statistics and converted.folded:  # a raw official backbone, pre-trained or fine-tuned
        _logger.warning(
            f"the file does not tell its mean/std; those of the model's cfg are kept: {cfg['mean']}, {cfg['std']} "
            "(pretrained_cfg_overlay=dict(mean=..., std=...) sets them)"
        )
    model._load_report = report  # type: ignore[assignment]
    return chosen


def load_report(model: nn.Module) -> LoadReport:
    """What the last pretrained load of ``model`` did, key by key.

    Raises:
        ValueError: If the model was made without pretrained weights.
    """
    report = getattr(model, "_load_report", None) or getattr(getattr(model, "model", None), "_load_report", None)
    if report is None:
        raise ValueError("this model was made without pretrained weights: there is no load to report")
    return report
