"""Warm start of a run: backbone, settings and provenance of the weights that ``init`` names."""

from pathlib import Path
from typing import Any, cast

import torch

from passreid_models.checkpoints.names import NamedModel, find_model
from passreid_models.pass_vit import PassVisionTransformer
from passreid_models.training.folder import RunFolder

DEFAULT_MODEL = "pass_vit_small_patch16"


def load_backbone(model: str, init: str, file: Path | None = None, **shape: Any) -> PassVisionTransformer:
    """Load the weights that ``init`` names into a backbone of the architecture ``model``.

    Args:
        model: Registered architecture.
        init: Name, as ``find_model`` takes it.
        file: Checkpoint to read, if ``init`` is a checkpoint or a run; its ``statistics`` go with the weights.
        **shape: Arguments of ``timm.create_model``, such as ``img_size`` and ``num_parts``.

    Raises:
        ValueError: If ``init`` names no weights, or those of another architecture.
        CheckpointError: If the weights do not fit.
    """
    weights = NamedModel(file=file) if file else _find(init, model)
    if weights.architecture not in ("", model):
        raise ValueError(f"init: {init} holds {weights.architecture}, and model is {model}")
    return cast(PassVisionTransformer, weights.create(model, **shape))


def prepare_to_train(backbone: PassVisionTransformer, device: torch.device, grad_checkpointing: bool) -> None:
    """Set gradient checkpointing, and the attention of the device, in a backbone."""
    if grad_checkpointing:
        backbone.set_grad_checkpointing()
    if device.type == "cpu":
        for block in backbone.blocks:
            block.attn.fused_attn = False  # its backward is slow on a CPU, for sequences as short as these


def settings_of(init: str, model: str = "") -> dict[str, Any]:
    """``model``, ``size`` and ``fusion`` of the weights that ``init`` names; empty for a checkpoint file.

    Args:
        init: Name, as ``find_model`` takes it, or ``random``.
        model: Registered architecture, if known.

    Raises:
        ValueError: If ``init`` names no weights.
    """
    if init == "random":
        return {}
    weights = _find(init, model)
    return {"model": weights.architecture, **weights.settings} if weights.architecture else {}


def provenance_of(init: str, model: str = "") -> dict[str, Any]:
    """Provenance of the weights that ``init`` names, including in turn that of the weights they began with.

    Args:
        init: Name, as ``find_model`` takes it; or ``random`` or empty, without provenance.
        model: Registered architecture.
    """
    provenance = {} if init in ("", "random") else _find(init, model).provenance
    return {k: v for k, v in provenance.items() if k in ("method", "data", "init", "images_seen", "init_provenance")}


def _find(init: str, model: str) -> NamedModel:
    try:
        return find_model(init, model)
    except ValueError as e:
        raise ValueError(f"init: {e}") from None


def checkpoint_file(init: str) -> Path | None:
    """``init`` itself if it is a file, else the newest checkpoint of the run ``init``, if any."""
    path = Path(init)
    return path if path.is_file() else RunFolder(path).latest()
