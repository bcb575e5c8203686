"""PASS: part-aware person re-identification ViTs for timm. Importing the package registers its models."""

from typing import TYPE_CHECKING, Any

from passreid_models import pass_vit as _pass_vit  # noqa: F401  registers the models
from passreid_models.checkpoint import CheckpointError
from passreid_models.fit import LoadReport, load_report
from passreid_models.local_dir import convert_checkpoint, save_pretrained
from passreid_models.weights import list_weights

if TYPE_CHECKING:
    from passreid_models.embed import Embedder
    from passreid_models.retrieval import evaluate, rank
    from passreid_models.synthetic import SyntheticPersons

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Embedder",
    "LoadReport",
    "SyntheticPersons",
    "convert_checkpoint",
    "evaluate",
    "list_weights",
    "load_report",
    "rank",
    "save_pretrained",
]

_LATE = {"Embedder": "embed", "SyntheticPersons": "synthetic", "evaluate": "retrieval", "rank": "retrieval"}


def __getattr__(name: str) -> Any:
    """Import what needs more than timm when it is first asked for."""
    if name in _LATE:
        from importlib import import_module

        return getattr(import_module(f"passreid_models.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
