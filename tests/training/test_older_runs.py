"""Runs and caches written by an older commit resume and load.

``golden/runs_a3d87f0.tar.xz`` was written by commit a3d87f0, before modules were renamed: of each task a checkpoint
after one step (weights rounded to 64ths and moments zeroed, so that the file is small), what that commit logged when it
resumed them (``expected.jsonl``), an exported model with the cached features of its evaluation, and a listing.
"""

import json
import tarfile
from pathlib import Path

import pytest
import torch

from passreid_models import Embedder, cli
from passreid_models.data import listing
from passreid_models.evaluation.feature_cache import FeatureCache, weights_key
from tests import GOLDEN

as_written = pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="torch 2.6 draws other random numbers, and prints modules otherwise"
)
SAME_STEPS = 4  # steps to compare; later ones drift apart, since CPUs round differently


@pytest.fixture
def older(tmp_path, monkeypatch) -> Path:
    with tarfile.open(GOLDEN / "runs_a3d87f0.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PASSREID_CACHE", str(tmp_path / "cache"))
    return tmp_path


def rows(file: Path) -> list[dict[str, float]]:
    """Logged steps, without speeds and evaluations."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("images_per_s", "wait_share")} for r in records if "loss" in r]


@as_written
@pytest.mark.parametrize(("task", "command"), [("pretrain", "train"), ("finetune", "finetune"), ("cluster", "cluster")])
def test_a_run_of_an_older_commit_resumes_as_that_commit_did(older, task, command):
    assert cli.main([command, "--config", f"{task}/config.yaml", "--resume", "auto", "--max-minutes", "0"]) == 0
    resumed, expected = rows(older / task / "metrics.jsonl"), rows(older / task / "expected.jsonl")
    assert [row["step"] for row in resumed] == [row["step"] for row in expected]
    for ours, theirs in zip(resumed[:SAME_STEPS], expected[:SAME_STEPS], strict=True):
        assert ours.keys() == theirs.keys()
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert (older / task / "export" / "model.safetensors").is_file()


@as_written
def test_features_cached_by_an_older_commit_are_read(older):
    (file,) = (older / "features").iterdir()
    embed = Embedder("local-dir:export")
    cache = FeatureCache(
        embed, "synthetic:ids=8,images=6,cameras=3,seed=0,size=64x32,place=street,train_ids=4", file.parent
    )
    assert cache.file == file
    assert file.name.startswith(weights_key(embed)[:16])
    assert len(cache.load()) == 24  # queries and gallery


def test_a_listing_cached_by_an_older_commit_is_read(older):
    (file,) = (older / "listings").iterdir()
    images = listing._read(file)
    assert images is not None
    assert [images.names[i] for i in range(3)] == ["a/0.jpg", "a/1.jpg", "a/2.jpg"]
