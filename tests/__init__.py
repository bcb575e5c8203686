"""Tests mirror the package: ``tests/<room>/test_<module>.py``; what several of them use stands here and in conftest."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
"""Inputs and outputs of the official code."""
