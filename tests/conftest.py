"""Fixtures that several test files share."""

import socket

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """Run torch in one thread: for models this small, more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args: object) -> None:
        raise AssertionError(f"asked the network for {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
