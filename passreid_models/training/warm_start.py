"""Warm start of a run: the backbone of the weights that ``init`` names, what they tell, and where they come from."""

from pathlib import Path
from typing import Any, cast

import torch

from passreid_models.checkpoints.names import NamedModel, find_model
from passreid_models.pass_vit import PassVisionTransformer
from passreid_models.training.folder import RunFolder

DEFAULT_MODEL = "pass_vit_small_patch16"


def load_backbone(model: str, init: str, file: Path | None = None, **shape: Any) -> PassVisionTransformer:
    """The backbone that ``init`` names, as ``model``.

    Args:
        model: Registered architecture.
        init: As of ``find_model``.
        file: The checkpoint to read, where ``init`` is that or a run; its ``statistics`` go with the weights.
        **shape: Arguments of ``timm.create_model``, such as ``img_size`` and ``num_parts``.

    Raises:
        ValueError: If ``init`` names no weights, or those of another architecture.
        CheckpointError: If the weights do not fit.
    """
    weights = NamedModel(file=file) if file else _find(init, model)
    if weights.architecture not in ("", model):
        raise ValueError(f"init: {init} holds {weights.architecture}, and model is {model}")
    return cast(PassVisionTransformer, weights.create(model, **shape))


def ready_to_train(backbone: PassVisionTransformer, device: torch.device, grad_checkpointing: bool) -> None:
    """Set how a backbone computes its gradients on a device."""
    if grad_checkpointing:
        backbone.set_grad_checkpointing()
    if device.type == "cpu":
        for block in backbone.blocks:
            block.attn.fused_attn = False  # its backward is slow on a CPU, for sequences as short as these


def described(init: str, model: str = "") -> dict[str, Any]:
    """The ``model``, ``size`` and ``fusion`` of the weights that ``init`` names; nothing of a checkpoint file.

    Args:
        init: As of ``find_model``, or ``random``.
        model: Registered architecture, where that is known.

    Raises:
        ValueError: If ``init`` names no weights.
    """
    if init == "random":
        return {}
    weights = _find(init, model)
    return {"model": weights.architecture, **weights.settings} if weights.architecture else {}


def provenance_of(init: str, model: str = "") -> dict[str, Any]:
    """Method, data and init of an exported model: a chain that goes back to where its weights began.

    Args:
        init: As of ``find_model``; or ``random`` or empty, which have none.
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
    """The checkpoint that ``init`` is, or the newest of the run that it is."""
    path = Path(init)
    return path if path.is_file() else RunFolder(path).latest()
