"""Fixtures of the pre-training tests: a folder for runs, training images, and a cache of their own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny_runs import write_images


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Folder for the runs of a module."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module", autouse=True)
def cache(home) -> Iterator[Path]:
    """Cache of the package, one for each module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PASSREID_CACHE", str(home / "cache"))
        yield home / "cache"


@pytest.fixture(scope="module")
def data(home) -> Path:
    """16 training images; tests that change them copy them first."""
    return write_images(home / "images")
