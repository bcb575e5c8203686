"""Fixtures of the re-ID tests: a dataset, an exported model, and a cache of their own."""

from pathlib import Path

import pytest
import timm
import torch

from passreid_models import save_pretrained
from tests.tiny_reid import write_persons


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Generated persons in the Market-1501 layout, in a folder ``market``; tests that change it copy it first."""
    return write_persons(tmp_path_factory.mktemp("persons") / "market")


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """Exported model with random weights."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    torch.manual_seed(0)
    save_pretrained(timm.create_model("test_pass_vit"), folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Empty cache of the package, one for each test."""
    monkeypatch.setenv("PASSREID_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
