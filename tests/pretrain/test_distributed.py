"""Two processes with half of a batch each take the step that one process takes with the whole batch."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from passreid_models.pretrain.loss import PASSLoss
from passreid_models.pretrain.network import PASSNetwork
from passreid_models.runtime import all_reduce_mean, on_first, share_first, world

PATHS = ("plain", "chunked")
BATCH, TEMPERATURE = 6, 0.05

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")


def network(seed: int) -> PASSNetwork:
    torch.manual_seed(seed)
    return PASSNetwork(timm.create_model("test_pass_vit"), num_prototypes=32, hidden_dim=16, bottleneck_dim=8)


def step(path: str, samples: slice) -> dict[str, Tensor]:
    """Loss, gradients and new centres of one step with these samples of the batch, alone or in a process group."""
    generator = torch.Generator().manual_seed(0)
    global_views = torch.randn(2, BATCH, 3, 64, 32, generator=generator)[:, samples]
    local_views = torch.randn(6, BATCH, 3, 32, 16, generator=generator)[:, samples]  # two of each area
    net, teacher, criterion = network(1), network(2), PASSLoss(32)
    criterion.centers.normal_(std=0.1, generator=generator)
    student = DistributedDataParallel(net) if world()[1] > 1 else net
    with torch.no_grad():
        seen_by_teacher = teacher(global_views)
    seen_by_student = student(global_views, local_views)
    if path == "chunked":
        loss, _ = criterion.chunked(seen_by_student, seen_by_teacher, TEMPERATURE, chunk=2)
        criterion.update_centers(seen_by_teacher)
    else:
        loss = criterion(seen_by_student.logits(), seen_by_teacher.logits(), TEMPERATURE)
        criterion.update_centers(seen_by_teacher.logits())
    loss.backward()
    gradients = {k: p.grad for k, p in net.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), "centers": criterion.centers, **gradients}


def refuse() -> None:
    raise ValueError(f"refused by process {world()[0]}")


def raised(function: Callable[..., Any], *args: Any) -> str:
    try:
        function(*args)
    except ValueError as e:
        return str(e)
    return ""


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    steps = {path: step(path, half) for path in PATHS}
    x = torch.tensor([1.0 + 4 * rank])
    means = {"world": world(), "mean": all_reduce_mean(x), "argument": x}
    shared = [torch.tensor(10 + rank), torch.tensor([[rank + 0.5, -0.0]])]
    share_first(shared)
    firsts = {"result": on_first(lambda: {"rank": world()[0]}), "error": raised(on_first, refuse), "shared": shared}
    torch.save({**steps, "means": means, "firsts": firsts}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[dict]:
    """Results of two processes, for both paths."""
    folder = tmp_path_factory.mktemp("gloo")
    multiprocessing.set_forkserver_preload(["timm", "passreid_models.pretrain.loss"])  # imported once, not twice
    mp.start_processes(work, (folder,), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module", params=PATHS)
def joint(request) -> tuple[str, dict[str, Tensor]]:
    """The path, and the results of one process with the whole batch."""
    return request.param, step(request.param, slice(None))


def assert_same(ours: Tensor, expected: Tensor, name: str) -> None:
    error = (ours - expected).abs().max() / expected.abs().max()
    assert error <= 1e-6, f"{name}: {error:.1e} of the largest entry"


def test_the_mean_of_the_losses_is_the_loss_of_the_joint_batch(processes, joint):
    path, expected = joint
    losses = [p[path]["loss"] for p in processes]
    assert abs(losses[0] - losses[1]) > 1e-3  # the halves differ, or this would prove nothing
    torch.testing.assert_close(sum(losses) / 2, expected["loss"], rtol=1e-6, atol=0)


def test_every_gradient_is_that_of_the_joint_batch_in_both_processes(processes, joint):
    path, expected = joint
    names = expected.keys() - {"loss", "centers"}
    assert len(names) > 50
    for process in processes:
        assert process[path].keys() == expected.keys()
        for name in names:
            assert expected[name].any(), name
            assert_same(process[path][name], expected[name], name)


def test_the_gradients_of_a_half_alone_are_others(joint):
    path, expected = joint
    half = step(path, slice(BATCH // 2))
    for name in expected:
        assert (half[name] - expected[name]).abs().max() > 1e-4 * expected[name].abs().max(), name


def test_the_centers_are_those_of_the_joint_batch_in_both_processes(processes, joint):
    path, expected = joint
    for process in processes:
        assert_same(process[path]["centers"], expected["centers"], "centers")


def test_the_mean_over_processes_leaves_its_argument_as_it_is(processes):
    for rank, process in enumerate(processes):
        means = process["means"]
        assert means["world"] == (rank, 2)
        assert means["mean"].tolist() == [3.0]
        assert means["argument"].tolist() == [1.0 + 4 * rank]


def test_all_processes_have_what_the_first_returned_raised_and_held(processes):
    for firsts in (process["firsts"] for process in processes):
        assert firsts["result"] == {"rank": 0}
        assert firsts["error"] == "refused by process 0"
        count, row = firsts["shared"]
        assert count.item() == 10
        assert row.tolist() == [[0.5, 0.0]]
        assert row.signbit().tolist() == [[False, True]]


def test_a_single_process_is_its_own_world():
    x = torch.arange(3.0)
    assert world() == (0, 1)
    assert torch.equal(all_reduce_mean(x), torch.arange(3.0))
