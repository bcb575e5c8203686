"""Fixtures that several test files share."""

import os
import socket
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a test process per core: more threads only wait for each other

import pytest
from hypothesis import HealthCheck, Phase, configuration, settings

configuration.set_hypothesis_home_dir(tempfile.gettempdir())  # not the checkout
COMMON = dict(database=None, deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("short", max_examples=2, derandomize=True, phases=[Phase.generate], **COMMON)
settings.register_profile("long", max_examples=300, **COMMON)
settings.load_profile("short")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args: object) -> None:
        raise AssertionError(f"asked the network for {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
