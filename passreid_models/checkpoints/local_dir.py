"""The folder layout that ``local-dir:`` and the Hub use, written from a model or from an official checkpoint.

FOLDER/model.safetensors    the state dict of the timm model
FOLDER/config.json          timm's config; beside it fusion, neck, l2_normalize and the provenance
FOLDER/extras.safetensors   tensors that belong to the checkpoint, not to the model: necks, classifier
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import timm
from timm.models import save_for_hf
from torch import Tensor, nn

from passreid_models.architectures import ARCHITECTURES, STATISTICS, Architecture, architecture_name
from passreid_models.checkpoints.convert import convert_state_dict, published_descriptor
from passreid_models.checkpoints.load import LoadReport, load_report
from passreid_models.checkpoints.read import CheckpointError, read_checkpoint, unwrap_checkpoint
from passreid_models.runtime import atomic_folder, sha256

__all__ = ["convert_checkpoint", "save_pretrained"]


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    extras: Mapping[str, Tensor] | None = None,
    info: Mapping[str, Any] | None = None,
    half: bool = False,
    overwrite: bool = False,
) -> None:
    """Write ``model`` so that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` gives it back.

    Args:
        model: A registered model, not a ``features_only`` wrapper.
        folder: Is written whole or not at all.
        extras: Tensors for ``extras.safetensors``.
        info: Further top-level entries of ``config.json``.
        half: Store floating-point tensors as float16.
        overwrite: Replace an older folder.

    Raises:
        FileExistsError: If the folder is there, not empty, and not to be overwritten.
    """
    folder = Path(folder)
    if not overwrite:
        _check_free(folder)
    m = cast(Any, model)
    registered = ARCHITECTURES[m.pretrained_cfg["architecture"]]
    img_size = tuple(m.patch_embed.img_size)
    actual = Architecture(
        m.embed_dim, len(m.blocks), m.blocks[0].attn.num_heads, m.num_parts, registered.conv_stem, img_size
    )
    differing = {k: v for k, v in asdict(actual).items() if v != getattr(registered, k)}
    model_args = {**m._overrides, **differing, "img_size": list(img_size), "global_pool": m.global_pool, "neck": m.neck}
    descriptor = {"fusion": m.global_pool, "neck": m.neck, "l2_normalize": m.neck != "multi"}
    with atomic_folder(folder, overwrite) as new:
        save_for_hf(
            deepcopy(m).half() if half else m,
            str(new),
            model_config={**descriptor, **(info or {})},
            model_args=model_args,
            safe_serialization=True,
        )
        config = json.loads((new / "config.json").read_text())
        config["pretrained_cfg"]["input_size"] = [m.in_chans, *img_size]  # timm < 1.0.31 keeps that of the tag
        if not getattr(m, "_has_own_cfg", False):  # weights of another make than the tag's: claim nothing for them
            config["pretrained_cfg"].update(license="other")
            config["pretrained_cfg"].pop("tag", None)
            config["pretrained_cfg"].pop("description", None)
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if extras:
            tensors = {k: v.contiguous() for k, v in extras.items()}
            safetensors.torch.save_file(tensors, new / "extras.safetensors")


def convert_checkpoint(
    source: str | Path,
    folder: str | Path,
    name: str | None = None,
    *,
    network: str = "teacher",
    fusion: str | None = None,
    neck: str | None = None,
    mean_std: str | None = None,
    interpolation: str | None = None,
    img_size: tuple[int, int] | None = None,
    pos_embed_resize: str = "auto",
    num_heads: int | None = None,
    info: Mapping[str, Any] | None = None,
) -> LoadReport:
    """Convert an official checkpoint to a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads.

    What is None is read off the tensors, or set by the convention of the layout.

    Args:
        source: A checkpoint in any published layout.
        folder: Output; must not exist or be empty.
        name: Registered model, with a tag or without.
        network: ``teacher`` or ``student``, where the file holds both.
        fusion: Fusion of the descriptor (``global_pool``).
        neck: ``single`` or ``multi`` to put the file's neck into the model, ``''`` to leave it in the extras; by
            default unsupervised models keep it (their feature is taken after it) and supervised ones do not.
        mean_std: ``imagenet`` or ``0.5``.
        interpolation: PIL resampling of test images.
        img_size: Height and width in pixels, when they shall differ from the file's.
        pos_embed_resize: See ``fit.resize_pos_embed``.
        num_heads: Attention heads; tensors do not show them. Needed when the width is no multiple of 64.
        info: Further top-level entries of ``config.json``.

    Returns:
        What became of each tensor.

    Raises:
        CheckpointError: If the file cannot be read or is no checkpoint of this family.
        FileExistsError: If the folder is not empty.
        ValueError: If an argument has an unknown value.
    """
    source, folder = Path(source), Path(folder)
    _check_free(folder)
    if mean_std is not None and mean_std not in STATISTICS:
        raise ValueError(f"mean_std must be one of {tuple(STATISTICS)}, got {mean_std!r}")
    checkpoint = read_checkpoint(source)
    try:
        tensors, _ = unwrap_checkpoint(checkpoint, network)
        converted = convert_state_dict(checkpoint, network)
    except CheckpointError as e:
        raise CheckpointError(f"{source}: {e}") from None
    found, notes = converted.architecture, []
    name, overrides = model_of(found, name, num_heads, source)
    if fusion is None:
        fusion = converted.fusion or "cat"
        if not converted.fusion and converted.task == "unsupervised":
            notes.append("fusion: the tensors do not tell, 'cat' assumed")
    if neck is None:
        neck = published_descriptor(converted)["neck"]
    if mean_std is None:
        mean_std = "0.5" if converted.task in ("supervised", "unsupervised") else "imagenet"
        if not converted.task:
            notes.append("mean/std: the tensors do not tell, ImageNet's assumed")
    mean, std = STATISTICS[mean_std]
    interpolation = interpolation or ("bilinear" if converted.task == "supervised" else "bicubic")
    settings = {"mean": mean, "std": std, "interpolation": interpolation}

    base = {} if "." in name else {"tag": None, "file": None, "url": None, "license": "other", "description": None}
    try:
        model = timm.create_model(
            name,
            pretrained=True,
            pretrained_cfg_overlay={**base, **settings, "state_dict": tensors, "input_size": (3, *found.img_size)},
            img_size=img_size or found.img_size,
            global_pool=fusion,
            neck=neck,
            pos_embed_resize=pos_embed_resize,
            **overrides,
        )
    except CheckpointError as e:
        raise CheckpointError(str(e).replace("the given state dict", str(source))) from None
    model._has_own_cfg = "." in name  # a tag is named by who knows that the file is its: pull
    report = load_report(model)
    report.source, report.layout = str(source), converted.layout
    report.notes += notes
    tensors = {**converted.backbone, **converted.neck, **converted.classifier}
    extras = {k: tensors[k] for k in report.extras}
    provenance = {
        "source": source.name,
        "source_sha256": sha256(source),
        "layout": converted.layout,
        "network": network,
    }
    kept = {"provenance": provenance, "load_report": replace(report, source=source.name).to_dict()}
    save_pretrained(model, folder, extras, {**(info or {}), **kept})
    return report


def model_of(found: Architecture, name: str | None, num_heads: int | None, source: Path) -> tuple[str, dict[str, Any]]:
    """Registered model for the tensors, and what must be overridden: all dimensions, when none fits as it is."""
    overrides: dict[str, Any] = {} if num_heads is None else {"num_heads": num_heads}
    if num_heads is not None and (num_heads < 1 or found.embed_dim % num_heads):
        raise ValueError(f"{source} is {found.embed_dim} wide, which cannot be split over {num_heads} heads")
    if name is not None:
        if name.split(".")[0] not in ARCHITECTURES:
            raise ValueError(f"unknown model {name!r}; known: {', '.join(ARCHITECTURES)}")
        return name, overrides
    if known := architecture_name(found):
        return known, overrides
    if num_heads is None and found.embed_dim % 64:
        raise ValueError(f"{source} is {found.embed_dim} wide, which no registered model is: give the number of heads")
    name = next(
        n for n, a in ARCHITECTURES.items() if (a.num_parts > 0, a.conv_stem) == (found.num_parts > 0, found.conv_stem)
    )
    dims = {"embed_dim": found.embed_dim, "depth": found.depth, "num_heads": num_heads or found.num_heads}
    return name, {**dims, "num_parts": found.num_parts}


def _check_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: name another")


def exported_folder(path: Path) -> Path | None:
    """The folder of ``save_pretrained`` at ``path``: itself, or the export of a run."""
    return next((p for p in (path, path / "export") if (p / "config.json").is_file()), None)
