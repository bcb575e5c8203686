"""Fitting of a converted checkpoint to a model: resizes positions, reports every tensor, never loads only a part."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from passreid_models.architectures import HALF, IMAGENET, architecture_name
from passreid_models.checkpoints.convert import (
    Converted,
    Grid,
    convert_file,
    convert_state_dict,
    guess_grid,
    shape_text,
)
from passreid_models.checkpoints.read import CheckpointError, StateDict
from passreid_models.runtime import few, unwrap

_logger = logging.getLogger(__name__)
RESIZE_METHODS = ("auto", "bicubic", "bilinear")
SHOWN = 4  # keys of a kind in an error


@dataclass
class LoadReport:
    """Report of a load: what became of each tensor of the checkpoint; ``print(report)`` shows a table."""

    source: str = ""
    layout: str = ""
    loaded: list[str] = field(default_factory=list)
    folded: dict[str, list[str]] = field(default_factory=dict)  # key of the model -> keys of the file, added up
    resized: dict[str, str] = field(default_factory=dict)
    extras: dict[str, str] = field(default_factory=dict)  # known, but not part of this model: necks, classifier
    ignored: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    mismatched: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and dictionaries, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LoadReport":
        """Inverse of ``to_dict``."""
        return cls(**{f.name: data[f.name] for f in fields(cls)})

    def __str__(self) -> str:
        rows = [("loaded", f"{len(self.loaded)} tensors", "")]
        rows += [("folded", k, " + ".join(v)) for k, v in self.folded.items()]
        for name in ("resized", "extras", "ignored", "mismatched"):
            rows += [(name, k, v) for k, v in _collapse(getattr(self, name)).items()]
        rows += [("missing", k, "") for k in self.missing] + [("note", n, "") for n in self.notes]
        width = max(len(key) for _, key, _ in rows if len(key) < 48)
        lines = [f"{action:<11}{key:<{width}}  {reason}".rstrip() for action, key, reason in rows]
        return "\n".join([f"{self.source or 'checkpoint'}: {self.layout}", *lines])


@dataclass(frozen=True)
class Origin:
    """Origin of a model, for ``save_pretrained`` and ``load_report``: ``model.origin`` of a PASS model.

    Args:
        model_args: Arguments of ``timm.create_model`` for the same model, besides those of its tag.
        file: File of the weights that tag and licence of ``model.pretrained_cfg`` belong to; empty if there is none.
        load_report: Report of the last pretrained load; None without one.
    """

    model_args: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""
    load_report: LoadReport | None = None


def _collapse(reasons: Mapping[str, str]) -> dict[str, str]:
    """Merge keys with the same reason and first name into one row, such as ``head.* (28)``."""
    groups: dict[tuple[str, str], list[str]] = {}
    for key, reason in reasons.items():
        groups.setdefault((key.split(".")[0], reason), []).append(key)
    return {keys[0] if len(keys) == 1 else f"{stem}.* ({len(keys)})": reason for (stem, reason), keys in groups.items()}


def resize_pos_embed(pos_embed: Tensor, old: Grid, new: Grid, method: str = "auto") -> tuple[Tensor, str]:
    """Resample patch positions ``[1, h * w, D]`` to another grid.

    Args:
        pos_embed: Positions of the patches alone.
        old: Rows and columns of the present grid.
        new: Rows and columns of the new grid.
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
    """Select and resize the tensors of a model, and report all others.

    Args:
        converted: The checkpoint.
        expected: State dict of the model, for its keys and shapes.
        grid: Patch grid of the model, rows and columns.
        declared: Patch grid that the checkpoint's config states; guessed from the number of patches if it does
            not match.
        resize: See ``resize_pos_embed``.
        free: Prefixes of keys that may be missing or of another shape: new classifier, input conv of other channels.

    Raises:
        CheckpointError: If a tensor is missing or has another shape, naming the keys and the architecture that fits.
    """
    report = LoadReport(layout=converted.layout, folded=dict(converted.folded), ignored=dict(converted.ignored))
    tensors = dict(converted.backbone)
    if "head." in free:  # timm discards the classifier of other classes
        for key in [k for k in tensors if k.startswith("head.")]:
            del tensors[key]
            report.extras[key] = "classifier of other classes"
    if any(k.startswith("fc_norm.") for k in expected):
        tensors.update(converted.neck)
    else:
        report.extras.update(dict.fromkeys(converted.neck, f"{converted.neck_kind} neck, not held by this model"))
    report.extras.update(dict.fromkeys(converted.classifier, "identity classifier of the training set"))
    if "pos_embed" in tensors and tensors["cls_token"].shape == expected["cls_token"].shape:
        count = tensors["pos_embed"].shape[1]
        old = declared if declared and declared[0] * declared[1] == count else guess_grid(count)
        if old is None:
            side = isqrt(count)
            is_square = count - side * side in (0, 1)  # 1: with CLS
            square = f" (a ViT for {side * 16}x{side * 16} images)" if is_square else ""
            config_grid = f"; the config declares {declared[0]}x{declared[1]}" if declared else ""
            raise CheckpointError(f"pos_embed has {count} positions{square}, no grid of person images{config_grid}")
        tensors["pos_embed"], method = resize_pos_embed(tensors["pos_embed"], old, grid, resize)
        if method:
            report.resized["pos_embed"] = f"{old[0]}x{old[1]} -> {grid[0]}x{grid[1]}, {method}"

    state = {}
    for key, tensor in expected.items():
        if key not in tensors:
            if not key.startswith(free):
                report.missing.append(key)
        elif tensors[key].shape != tensor.shape and not key.startswith(free):
            report.mismatched[key] = f"{shape_text(tensors[key])} in the file, {shape_text(tensor)} in the model"
        else:
            state[key] = tensors[key]
    unexpected = [k for k in tensors if k not in expected]
    for key in [k for k in unexpected if k.startswith(("head.", "fc_norm."))]:
        unexpected.remove(key)
        report.extras[key] = "classifier or neck, not held by this model"
    report.loaded = list(state)
    if report.missing or report.mismatched or unexpected:
        raise CheckpointError(_explain(report, unexpected, converted, expected))
    return state, report


def _explain(report: LoadReport, unexpected: list[str], converted: Converted, expected: Mapping[str, Tensor]) -> str:
    problems = []
    if report.missing:
        problems.append(f"missing {few(report.missing, SHOWN)}")
    if report.mismatched:
        problems.append("mismatched " + few([f"{k} ({v})" for k, v in report.mismatched.items()], SHOWN))
    if unexpected:
        problems.append(f"without a place in the model: {few(unexpected, SHOWN)}")
    arch = converted.architecture
    width, parts = expected["cls_token"].shape[-1], expected["reg_token"].shape[1] if "reg_token" in expected else 0
    depth = sum(k.endswith(".attn.qkv.weight") for k in expected)
    has_conv_stem = "patch_embed.proj.conv.0.weight" in expected
    dimensions = f"the file is {arch.embed_dim} wide and {arch.depth} deep, with {arch.num_parts} part tokens"
    dimensions += " and a conv stem" if arch.conv_stem else ""
    fits = (arch.embed_dim, arch.depth, arch.num_parts, arch.conv_stem) == (width, depth, parts, has_conv_stem)
    name = architecture_name(arch)
    advice = f": use {name}" if name and not fits else ""
    if report.missing and all(k.startswith("fc_norm.") for k in report.missing):
        advice = ": the file has no such neck, use neck=''"
    elif arch.embed_dim == width and arch.num_parts not in (0, parts) and not arch.conv_stem:
        advice = f": use {name} with num_parts={arch.num_parts}" if name else f": use num_parts={arch.num_parts}"
    return f"the checkpoint does not fit the model: {'; '.join(problems)}; {dimensions}{advice}"


def pretrained_filter_fn(
    state_dict: Any,
    model: nn.Module,
    resize: str = "auto",
    keep: tuple[str, ...] = (),
    converted: Converted | None = None,
    is_assumed: bool = False,
) -> StateDict:
    """timm's ``pretrained_filter_fn``: any published layout to the state dict of ``model``; stores the LoadReport.

    Mean, std and interpolation of a raw official file belong to its weights, so they are written to
    ``model.pretrained_cfg``, except those named in ``keep``. If the layout does not show them, a warning is logged.

    Args:
        state_dict: A checkpoint object or a flat state dict.
        model: A ``PassVisionTransformer`` with its ``pretrained_cfg``.
        resize: See ``resize_pos_embed``.
        keep: Entries of the pretrained cfg to leave as they are.
        converted: The converted checkpoint, if there is one; ``state_dict`` is then ignored.
        is_assumed: Whether the statistics in the pretrained cfg are an assumption, for which the layout may do better.

    Raises:
        CheckpointError: If the checkpoint does not fit.
    """
    converted = converted or convert_state_dict(state_dict)
    network: Any = model
    cfg: dict[str, Any] = network.pretrained_cfg
    state, report = _fit(converted, network, resize)
    if "head.weight" in model.state_dict() and "head.weight" not in state:
        report.notes.append("head: a new classifier, initialised at random")
    if statistics := converted.run.get("statistics"):
        cfg.update({k: v for k, v in statistics.items() if k not in keep})
    elif converted.task:  # a raw official file: its layout shows how it was trained
        mean, std = IMAGENET if converted.task == "pretrain" else HALF
        interpolation = "bilinear" if converted.task == "supervised" else "bicubic"
        preprocessing = {"mean": mean, "std": std, "interpolation": interpolation}
        cfg.update({k: v for k, v in preprocessing.items() if k not in keep})
        if "mean" not in keep:
            report.notes.append(f"mean/std set to {mean[0]}.., as for every {converted.layout.partition(',')[0]}")
    elif (is_assumed or converted.folded) and "mean" not in keep:  # a backbone, pre-trained or fine-tuned
        _logger.warning(
            f"the file does not state its mean, std and fusion: {cfg['mean']}, {cfg['std']} and "
            f"{network.global_pool or 'none'} are taken (pretrained_cfg_overlay=dict(mean=..., std=...) and "
            "global_pool set them; a folder with a config.json states them)"
        )
    network.origin = replace(network.origin, load_report=report)
    return state


def _fit(converted: Converted, network: Any, resize: str = "auto") -> tuple[StateDict, LoadReport]:
    cfg, stem = network.pretrained_cfg, network.patch_embed
    size = converted.architecture.img_size if converted.run else cfg["input_size"][1:]
    declared = tuple(s // p for s, p in zip(size, stem.patch_size, strict=True))
    free: tuple[str, ...] = ()
    if network.num_classes != cfg["num_classes"]:
        free += ("head.",)
    if network.in_chans != cfg["input_size"][0] and cfg["first_conv"]:
        free += (cfg["first_conv"] + ".weight",)
    return fit_to_model(converted, network.state_dict(), stem.grid_size, declared, resize, free)


def has_own_weights(model: Any) -> bool:
    """Whether tag and licence of ``model.pretrained_cfg`` are those of its tensors: all are as the file gives them.

    The file is read again, and its tensors are rounded to the model's dtype. A new or trained tensor, a classifier too,
    is not the file's; nor is any if the file is gone.
    """
    file, size = model.origin.file, tuple(model.pretrained_cfg["input_size"][1:])
    if not file:
        return False
    try:
        own, _ = _fit(convert_file(file, size=size), model)
    except (CheckpointError, OSError):
        return False
    state = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[k].to(v.dtype), v.cpu()) for k, v in state.items())


def load_report(model: nn.Module) -> LoadReport:
    """Return the report of the last pretrained load of ``model``.

    Raises:
        ValueError: If the model was made without pretrained weights.
    """
    model = unwrap(model)
    origin = getattr(getattr(model, "model", model), "origin", Origin())  # features_only wraps the model
    if origin.load_report is None:
        raise ValueError("this model was made without pretrained weights: there is no load to report")
    return origin.load_report
