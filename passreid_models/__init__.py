"""PASS: part-aware person re-identification ViTs for timm. Importing the package registers its models.

checkpoints   weights: files read, converted, loaded, found, kept and published
data          images and labels
embed         images in, descriptors out
retrieval     ranking and its metrics, on descriptors
gallery       named images that are kept and searched
evaluation    a model on a dataset
export        a model for other runtimes
pretrain      part-wise self-distillation: views, heads, loss, trainer
reid          fine-tuning with labels and without
training      what all trainers share
synthetic     generated persons for tests and the demo
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from passreid_models import pass_vit as _pass_vit  # noqa: F401  registers the models
from passreid_models.checkpoints import (
    CheckpointError,
    LoadReport,
    convert_checkpoint,
    list_weights,
    load_report,
    save_pretrained,
)

if TYPE_CHECKING:
    from passreid_models.embed import Embedder
    from passreid_models.evaluation import attention_maps
    from passreid_models.export import export_model
    from passreid_models.gallery import Gallery
    from passreid_models.retrieval import evaluate, rank
    from passreid_models.synthetic import SyntheticPersons

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Embedder",
    "Gallery",
    "LoadReport",
    "SyntheticPersons",
    "attention_maps",
    "convert_checkpoint",
    "evaluate",
    "export_model",
    "list_weights",
    "load_report",
    "rank",
    "save_pretrained",
]

_LATE = {
    "Embedder": "embed",
    "Gallery": "gallery",
    "SyntheticPersons": "synthetic",
    "attention_maps": "evaluation",
    "evaluate": "retrieval",
    "export_model": "export",
    "rank": "retrieval",
}
_ROOMS = ("data", "embed", "gallery", "retrieval", "evaluation", "export", "pretrain", "reid", "training", "synthetic")


def __getattr__(name: str) -> Any:
    """Import what needs more than timm when it is first asked for."""
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name in _LATE:
        return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__, *_ROOMS, "checkpoints"})
