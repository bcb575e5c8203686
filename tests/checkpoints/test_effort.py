"""A checkpoint file is read, converted and hashed once, by every function that loads it."""

import hashlib
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch

from passreid_models.architectures import ARCHITECTURES, Architecture
from passreid_models.checkpoints import convert, zoo
from passreid_models.checkpoints.local_dir import convert_checkpoint
from passreid_models.reid.model import ReIDModel
from tests import GOLDEN

SUPERVISED = GOLDEN / "upstream_supervised_multineck_cat.pth"
MARKET = "pass_vit_small_patch16.lup_market1501"
SMALL = dict(embed_dim=32, depth=2, num_heads=2)
ONCE = {"read": 1, "converted": 1}


@pytest.fixture
def counts(monkeypatch) -> Counter[str]:
    """Number of reads, conversions and hashes."""
    calls: Counter[str] = Counter()

    def count(module: object, function: str, name: str) -> None:
        original = getattr(module, function)

        def counted(*args: object, **kwargs: object) -> object:
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, function, counted)

    count(torch, "load", "read")
    count(convert, "_check_is_vit", "converted")
    count(hashlib, "file_digest", "hashed")
    return calls


@pytest.fixture
def small(monkeypatch) -> None:
    """ViT-S as small as the golden files."""
    monkeypatch.setitem(ARCHITECTURES, "pass_vit_small_patch16", Architecture(32, 2, 2))


def test_convert_reads_converts_and_hashes_the_file_once(tmp_path, counts):
    convert_checkpoint(SUPERVISED, tmp_path / "out", num_heads=2)
    assert counts == ONCE | {"hashed": 1}


def test_pull_reads_and_converts_the_file_once_and_hashes_it_and_its_result(tmp_path, counts, small, monkeypatch):
    monkeypatch.setenv("PASSREID_CACHE", str(tmp_path))
    monkeypatch.setitem(zoo.TRAIN_IDENTITIES, "Market-1501", 7)  # those of the golden file
    zoo.pull(MARKET, SUPERVISED)
    assert counts == ONCE | {"hashed": 2}


@pytest.mark.parametrize("key", ["file", "state_dict"])
def test_an_overlay_is_converted_once(counts, key):
    overlay = {key: str(SUPERVISED) if key == "file" else torch.load(SUPERVISED, weights_only=True)}
    timm.create_model("pass_vit_small_patch16", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)
    assert counts == ONCE


def test_a_fine_tuned_model_is_read_and_converted_once_from_its_file(counts):
    ReIDModel.load(SUPERVISED, num_heads=2)
    assert counts == ONCE


def test_a_fine_tuned_model_is_converted_once_from_its_folder(tmp_path, counts):
    convert_checkpoint(Path(SUPERVISED), tmp_path / "out", num_heads=2)
    counts.clear()
    ReIDModel.load(tmp_path / "out")
    assert counts == {"converted": 1}
