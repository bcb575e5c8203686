"""Choice of a device: the same for the Embedder, the evaluation and all runs."""

import socket
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from passreid_models.device import _own_store, pick_device, process_group
from passreid_models.embed import Embedder


def test_none_and_auto_are_the_same_device_and_a_device_stays_what_it_is():
    assert pick_device() == pick_device("auto") == pick_device(None)
    assert pick_device(torch.device("cpu")) == pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_in_the_same_words_everywhere(name):
    message = rf"^device: '{name}' is not there \(.+\)$"
    with pytest.raises(ValueError, match=message):
        pick_device(name)
    with pytest.raises(ValueError, match=message):
        Embedder(nn.Identity(), device=name)
    with pytest.raises(ValueError, match=message), process_group(name):
        pass


def test_processes_that_torchrun_has_restarted_do_not_find_the_addresses_of_those_before(monkeypatch):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
    }
    for name, value in {**env, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    agent = dist.TCPStore("127.0.0.1", port, is_master=True)
    agent.set("address", "of the dead")
    assert _own_store() == {}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    options = _own_store()
    assert (options["rank"], options["world_size"]) == (0, 1)
    assert not options["store"].check(["address"])
    with process_group("cpu"):
        assert dist.get_world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "2")  # on two machines
    assert _own_store() == {}


def test_the_end_of_another_process_is_told_from_other_errors(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: None)
    lost = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"
    group = partial(process_group, "cpu")
    for error in (RuntimeError(lost), dist.DistNetworkError("reset by peer\nat line 1")):
        with pytest.raises(ChildProcessError, match=r"^another process of this run has ended.* peer\)$"), group():
            raise error
    with pytest.raises(RuntimeError, match="size mismatch"), group():
        raise RuntimeError("size mismatch")
