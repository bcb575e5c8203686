"""Fixture of the data tests: a cache of their own."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Empty cache of the package, one for each test."""
    monkeypatch.setenv("PASSREID_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
