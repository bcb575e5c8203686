"""Tests mirror the package: ``tests/<room>/test_<module>.py``; shared helpers are here and in conftest.py."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
"""Inputs and outputs of the official code."""
