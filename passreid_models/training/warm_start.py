"""Warm start of a run: backbone, settings and provenance of the weights that ``init`` names."""

import logging
from inspect import signature
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from passreid_models.architectures import ARCHITECTURES
from passreid_models.checkpoints.names import NamedModel, find_model
from passreid_models.checkpoints.read import AGAIN, CheckpointError
from passreid_models.pass_vit import PassVisionTransformer
from passreid_models.training.folder import RunFolder

_logger = logging.getLogger(__name__)

ANY = ("img_size", "dynamic_img_size", "dynamic_img_pad", "global_pool", "neck", "num_parts", "weight_init")
"""Arguments of a model that its training has of its own or does not need, besides rates of dropping."""
KEPT = ("method", "data", "init", "images_seen", "config", "init_provenance")
"""Entries of the provenance that runs keep of the weights they begin with."""


def find_weights(init: str, model: str, heads: bool = False) -> NamedModel:
    """Find the weights that ``init`` names, and check that they are of the architecture ``model``.

    Args:
        init: Name, as ``find_model`` takes it.
        model: Registered architecture.
        heads: Prefer the newest checkpoint of a run to its export, which has no projection heads or identities, unless
            it is damaged.

    Raises:
        ValueError: If ``init`` names no weights, or those of another architecture.
        CheckpointError: If a checkpoint cannot be read, and there is no export.
    """
    weights = _find(init, model)
    if heads and weights.name.startswith("local-dir:") and (checkpoint := RunFolder(init).latest()):
        newest = NamedModel(file=checkpoint)
        try:
            weights = newest if newest.run else weights
        except CheckpointError as e:
            export = weights.name.removeprefix("local-dir:")
            _logger.warning(f"init: {str(e).removesuffix(AGAIN)}; {export} is taken instead")
    run = weights.run
    architecture = run["config"].get("model", "") if run else weights.architecture
    if architecture not in ("", model):
        raise ValueError(f"init: {init} holds {architecture}, and model is {model}")
    return weights


def load_start(backbone: PassVisionTransformer, start: PassVisionTransformer, init: str) -> None:
    """Load the weights that a run begins with; a neck that they do not have stays new.

    Args:
        backbone: Backbone to be trained, as it is registered.
        start: Model of the weights.
        init: Their name, for errors.

    Raises:
        ValueError: If they are of a model that was made otherwise, such as with another number of heads, which no
            tensor shows.
    """
    model = start.pretrained_cfg["architecture"]
    given = {k: v for k, v in start.origin.model_args.items() if k not in ANY and "drop" not in k}
    defaults = {name: parameter.default for name, parameter in signature(VisionTransformer).parameters.items()}
    registered = {**defaults, **vars(ARCHITECTURES[model])}
    if other := {k: v for k, v in given.items() if v != registered.get(k)}:
        made = ", ".join(f"{k}={v}" for k, v in other.items())
        raise ValueError(f"init: {init} is a {model} with {made}, and training makes it without")
    new_neck = {k: v for k, v in backbone.state_dict().items() if k.startswith("fc_norm.")}
    backbone.load_state_dict({**new_neck, **start.state_dict()})


def prepare_to_train(backbone: PassVisionTransformer, device: torch.device, grad_checkpointing: bool) -> None:
    """Set gradient checkpointing, and the attention of the device, in a backbone."""
    if grad_checkpointing:
        backbone.set_grad_checkpointing()
    if device.type == "cpu":
        for block in backbone.blocks:
            block.attn.fused_attn = False  # its backward is slow on a CPU, for sequences as short as these


def settings_of(init: str, model: str = "") -> dict[str, Any]:
    """``model``, ``size`` and ``fusion`` of the weights that ``init`` names, as far as known.

    Args:
        init: Name, as ``find_model`` takes it, or ``random``.
        model: Registered architecture, if known.

    Raises:
        ValueError: If ``init`` names no weights.
    """
    if init == "random":
        return {}
    weights = _find(init, model)
    if weights.file and (weights.run or not model):
        architecture, args = weights.own_model
        if model and architecture != model:
            raise ValueError(f"init: {init} holds {architecture}, and model is {model}")
        run_settings = {"size": args["img_size"], "fusion": args.get("global_pool")} if weights.run else {}
        return {"model": architecture, **{k: v for k, v in run_settings.items() if v}}
    return {"model": weights.architecture, **weights.settings} if weights.architecture else {}


def provenance_of(init: str, model: str = "") -> dict[str, Any]:
    """Provenance of the weights that ``init`` names, including in turn that of the weights they began with.

    Args:
        init: Name, as ``find_model`` takes it; or ``random`` or empty, without provenance.
        model: Registered architecture.
    """
    provenance = {} if init in ("", "random") else _find(init, model).provenance
    return {k: v for k, v in provenance.items() if k in KEPT}


def _find(init: str, model: str) -> NamedModel:
    try:
        return find_model(init, model)
    except ValueError as e:
        raise ValueError(f"init: {e}") from None
