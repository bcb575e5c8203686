"""Names of models with weights, resolved in one place for ``--model`` and ``--init``."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
from torch import nn

from passreid_models.architectures import ARCHITECTURES
from passreid_models.checkpoints import zoo
from passreid_models.checkpoints.convert import Converted, convert_state_dict, published_descriptor
from passreid_models.checkpoints.fields import run_of
from passreid_models.checkpoints.hub import download_hub
from passreid_models.checkpoints.local_dir import exported_folder, model_of, read_config
from passreid_models.checkpoints.read import read_checkpoint
from passreid_models.runtime import did_you_mean

__all__ = ["NamedModel", "find_model", "run_checkpoints"]


@dataclass(frozen=True)
class NamedModel:
    """A model with weights, before they are loaded.

    Args:
        name: Name for ``timm.create_model``; empty for a checkpoint file.
        architecture: Registered architecture; empty for a checkpoint file, whose ``own_model`` has to read it.
        settings: Size and fusion of the descriptor, as far as known.
        provenance: Provenance of an exported model.
        file: Checkpoint file, or None.
    """

    name: str = ""
    architecture: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    file: Path | None = None

    def create(self, architecture: str = "", **model_args: Any) -> nn.Module:
        """Create the model with its weights.

        Args:
            architecture: Registered architecture for a checkpoint file; by default that of its run or of its tensors.
            **model_args: Arguments of ``timm.create_model``; None keeps the weights' own.

        Raises:
            CheckpointError: If the weights cannot be read or do not fit.
            FileNotFoundError: If the weights are not available.
        """
        if self.file is None:
            return timm.create_model(self.name, pretrained=True, **model_args)
        if not architecture:
            architecture, own_args = self.own_model
            model_args = {**own_args, **{k: v for k, v in model_args.items() if v is not None}}
        cfg = {"state_dict": self.converted, "file": str(self.file)}
        return timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=cfg, **model_args)

    @cached_property
    def checkpoint(self) -> Any:
        """Content of the checkpoint file, read once; an empty dictionary without a file."""
        return read_checkpoint(self.file) if self.file else {}

    @cached_property
    def converted(self) -> Converted:
        """Tensors of the checkpoint file in timm's keys, converted once."""
        return convert_state_dict(self.checkpoint, file=self.file or "")

    @property
    def run(self) -> dict[str, Any]:
        """The checkpoint, if it is one of a run of this package; else an empty dictionary."""
        return run_of(self.checkpoint, self.file or "")

    @property
    def own_model(self) -> tuple[str, dict[str, Any]]:
        """Architecture and arguments of the model in a checkpoint file, by its run or else by its tensors."""
        assert self.file is not None
        converted, run = self.converted, self.converted.run
        name, args = model_of(converted.architecture, run.get("model"), None, self.file)
        if run:
            args = {"num_parts": converted.architecture.num_parts, **published_descriptor(converted)}
        return name, {"img_size": converted.architecture.img_size, **args}


def find_model(name: str, architecture: str = "") -> NamedModel:
    """Find the model of a name: first as a registered name, then as a file or folder, then as a bare tag.

        pass_vit_tiny_patch16               an architecture, with its bundled weights
        pass_vit_small_patch16.lup          an architecture and a tag
        synth                               a tag that one architecture has
        hf-hub:org/name, local-dir:FOLDER   a Hub repository, an exported folder
        runs/mine, runs/mine/export         a run (its export, else its newest checkpoint), an exported folder
        runs/mine/checkpoints/step_...pt    a checkpoint of a run
        transformer_120.pth                 a checkpoint in any published layout

    Args:
        name: Name in one of these forms.
        architecture: Architecture of a bare tag, needed if several have it.

    Raises:
        ValueError: If no model has this name, or several have it; the message lists the choices.
        FileNotFoundError: If the Hub does not have the repository.
    """
    scheme, _, rest = name.partition(":")
    if scheme in ("hf-hub", "hf_hub") and rest:
        snapshot = download_hub(rest, "config.json").parent  # the weights, of the same commit, when a model is made
        return _exported(f"hf-hub:{rest.partition('@')[0]}@{snapshot.name}", snapshot)
    path = Path(rest if scheme == "local-dir" else name)
    if name in ARCHITECTURES:
        return _tagged(name, name, next((w for w in zoo.list_weights(name) if w.bundled_file), None))
    first, _, tag = name.partition(".")
    if weight := zoo.find_weight(first, tag):
        return _tagged(name, first, weight)
    if path.name == "model.safetensors" and exported_folder(path.parent) == path.parent:
        path = path.parent  # its config.json has the statistics
    if name and (folder := exported_folder(path)):
        return _exported(f"local-dir:{folder}", folder)
    if path.is_file():
        return NamedModel(file=path)
    if name and path.is_dir():
        if checkpoints := run_checkpoints(path):
            return NamedModel(file=checkpoints[-1])
        raise ValueError(
            f"{path} holds no model: expected a folder with config.json and model.safetensors, a run, or a checkpoint "
            "file"
        )
    tags = list(dict.fromkeys(w.tag for w in zoo.list_weights()))
    if first in ARCHITECTURES or name in tags:
        weight = zoo.get_weight(name, "" if first in ARCHITECTURES else architecture)
        return _tagged(weight.name, weight.architecture, weight)
    tag = name.rpartition(".")[2]
    close = difflib.get_close_matches(tag, tags, n=len(tags))
    similar = [t for t in tags if t in close or (tag and t.startswith(tag))]
    examples = f"tags such as {', '.join(similar)}" if similar else "their tags"
    raise ValueError(
        f"unknown model {name!r}; known: {', '.join(ARCHITECTURES)}, {examples} (`passreid weights list` has all), a "
        f"folder with config.json, a run, or a checkpoint file{did_you_mean(name, known_names())}"
    )


def known_names() -> list[str]:
    """Names of models that need no folder: architectures, ``architecture.tag`` and tags."""
    weights = zoo.list_weights()
    return list(dict.fromkeys([*ARCHITECTURES, *(w.name for w in weights), *(w.tag for w in weights)]))


def _tagged(name: str, architecture: str, weight: zoo.Weight | None) -> NamedModel:
    return NamedModel(name, architecture, {"size": weight.input_size, "fusion": weight.fusion} if weight else {})


def _exported(name: str, folder: Path) -> NamedModel:
    config = read_config(folder)
    settings = {"size": tuple(config["pretrained_cfg"]["input_size"][1:]), "fusion": config.get("fusion")}
    return NamedModel(
        name, config["architecture"], {k: v for k, v in settings.items() if v}, config.get("provenance", {})
    )


def run_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; half-written ones have other names."""
    files = (run / "checkpoints").glob("step_*.pt") if (run / "checkpoints").is_dir() else ()
    return sorted(path for path in files if re.fullmatch(r"step_\d+\.pt", path.name))
