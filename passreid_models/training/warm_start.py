"""Where a run begins: the backbone that a tag, a folder, a run or a checkpoint file holds."""

import json
from pathlib import Path
from typing import Any

import timm
import torch

from passreid_models.architectures import ARCHITECTURES
from passreid_models.checkpoints.local_dir import exported_folder
from passreid_models.checkpoints.read import read_checkpoint
from passreid_models.checkpoints.zoo import find_weight
from passreid_models.pass_vit import PassVisionTransformer
from passreid_models.training.folder import RunFolder

DEFAULT_MODEL = "pass_vit_small_patch16"


def load_backbone(model: str, init: str, file: Path | None = None, **shape: Any) -> PassVisionTransformer:
    """The backbone that ``init`` names, as ``model``.

    Args:
        model: Registered architecture.
        init: A tag (``architecture.tag`` or ``tag``), an exported folder, a run, or a checkpoint file.
        file: The checkpoint to read, where ``init`` is that or a run; its ``statistics`` go with the weights.
        **shape: Arguments of ``timm.create_model``, such as ``img_size`` and ``num_parts``.

    Raises:
        ValueError: If ``init`` names no weights, or those of another architecture.
        CheckpointError: If the weights do not fit.
    """
    path = Path(init)
    if file is None and (folder := exported_folder(path)):
        found = timm.create_model(f"local-dir:{folder}", pretrained=True, **shape)
        if (other := found.pretrained_cfg["architecture"]) != model:
            raise ValueError(f"init: {init} holds {other}, and model is {model}")
        return found
    if file is not None or path.is_file():
        checkpoint = read_checkpoint(file or path)
        statistics = checkpoint.get("statistics", {}) if isinstance(checkpoint, dict) else {}  # a run's own
        overlay = {"file": str(file or path), **statistics}
        return timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, **shape)
    architecture, _, tag = init.rpartition(".")
    if path.is_dir() or "/" in init or architecture not in ("", model):
        raise ValueError(
            f"init: expected weights of {model}: a tag, a folder with config.json, a run, or a checkpoint file; "
            f"got {init!r}"
        )
    return timm.create_model(f"{model}.{tag}", pretrained=True, **shape)


def ready_to_train(backbone: PassVisionTransformer, device: torch.device, grad_checkpointing: bool) -> None:
    """Set how a backbone computes its gradients on a device."""
    if grad_checkpointing:
        backbone.set_grad_checkpointing()
    if device.type == "cpu":
        for block in backbone.blocks:
            block.attn.fused_attn = False  # its backward is slow on a CPU, for sequences as short as these


def described(init: str, model: str = "") -> dict[str, Any]:
    """What ``init`` tells of itself, of ``model``, ``size`` and ``fusion``; nothing of a checkpoint file.

    Args:
        init: As of ``load_backbone``.
        model: Registered architecture, where that is known.
    """
    if folder := exported_folder(Path(init)):
        config = _read_config(folder)
        if not {"architecture", "pretrained_cfg"} <= config.keys() or config["architecture"] not in ARCHITECTURES:
            raise ValueError(f"init: {folder}/config.json is not that of a model of this package")
        size = tuple(config["pretrained_cfg"]["input_size"][1:])
        found = {"model": config["architecture"], "size": size, "fusion": config.get("fusion")}
        return {k: v for k, v in found.items() if v}
    name, _, tag = init.rpartition(".")
    if Path(init).exists() or name not in ("", *ARCHITECTURES):
        return {}
    architecture = name or model or DEFAULT_MODEL
    if weight := find_weight(architecture, tag):
        return {"model": architecture, "size": weight.input_size, "fusion": weight.fusion}
    return {"model": name} if name else {}


def provenance_of(init: str) -> dict[str, Any]:
    """Method, data and init of an exported folder: a chain that goes back to where its weights began."""
    folder = exported_folder(Path(init)) if init else None
    provenance = _read_config(folder).get("provenance", {}) if folder else {}
    return {k: v for k, v in provenance.items() if k in ("method", "data", "init", "images_seen", "init_provenance")}


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text())
    except ValueError as e:
        raise ValueError(f"init: {folder}/config.json cannot be read as JSON: {e}") from None


def checkpoint_file(init: str) -> Path | None:
    """The checkpoint that ``init`` is, or the newest of the run that it is."""
    path = Path(init)
    return path if path.is_file() else RunFolder(path).latest()
