"""Tiny runs of fine-tuning and clustering, on generated persons of 64x32 pixels."""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from passreid_models.reid.config import ClusterConfig, FinetuneConfig
from passreid_models.synthetic import SyntheticPersons
from tests.tiny_runs import flat

COMMON: dict[str, Any] = dict(
    init="random", model="test_pass_vit", size=(64, 32), fusion="cat", device="cpu", dtype="float32", workers=0,
    log_steps=1, pad=2,
)  # fmt: skip
FINETUNE: dict[str, Any] = dict(COMMON, epochs=3, warmup_epochs=1, ids_per_batch=3, images_per_id=2, lr=0.01,
                                eval_epochs=2)  # fmt: skip
CLUSTER: dict[str, Any] = dict(COMMON, epochs=2, steps=3, clusters_per_batch=2, images_per_cluster=4, k1=6, k2=3,
                               min_samples=2, eps=0.7, lr=0.01, eval_epochs=1)  # fmt: skip


def write_persons(folder: Path) -> Path:
    """6 identities of 6 images under 3 cameras to train, 4 to test, in the Market-1501 layout."""
    return SyntheticPersons(10, 6, 3, size=(64, 32)).write_market1501(folder, train_ids=6)


def finetune_config(data: Path | str, out: Path, **options: Any) -> FinetuneConfig:
    return FinetuneConfig(**{**FINETUNE, "data": str(data), "out": str(out), **options})


def cluster_config(data: Path | str, out: Path, **options: Any) -> ClusterConfig:
    return ClusterConfig(**{**CLUSTER, "data": str(data), "out": str(out), **options})


def steps(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step_*.pt"))


def numbers(run: Path, keys: tuple[str, ...]) -> dict[str, Tensor]:
    """All numbers of the last checkpoint and of the exports, by name."""
    state = torch.load(steps(run)[-1], weights_only=True)
    exports = {name: safetensors.torch.load_file(run / name / "model.safetensors") for name in ("export", "best")}
    return dict(flat("", {**{k: state[k] for k in ("step", *keys)}, **exports}))


def assert_same(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(tensors[name], value)] == []
