"""Device, dtype and process group of a process."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(days=1)  # the other processes wait while the first clusters, millions of images for hours


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """Pick the device of this process, and check it.

    Args:
        device: A torch device; ``auto`` or None for CUDA, else MPS, else the CPU. ``cuda`` is this process's own GPU.

    Raises:
        ValueError: If the device is not available.
    """
    name = str(device or "auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if name == "cuda":
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device: {name!r} is not there ({str(e).partition(chr(10))[0]})") from None
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Dtype of autocast; ``auto`` is bfloat16 if the device supports it, else float16 on CUDA and float32 elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and _cpu_has_bf16():
        return torch.bfloat16
    return torch.float32


def _cpu_has_bf16() -> bool:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # from torch 2.9 on
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@contextmanager
def process_group(name: str | torch.device | None = None) -> Iterator[torch.device]:
    """Yield the device of this process; under torchrun, inside a process group.

    After an error NCCL's group is left as it is: its end would wait for the other processes, which wait for this one.
    ``cli.run`` then ends this process, and torchrun the others.

    Args:
        name: Device, as ``pick_device`` takes it.

    Raises:
        ChildProcessError: If another process of the group has ended or cannot be reached.
    """
    device = pick_device(name)
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend, is_done = "nccl" if device.type == "cuda" else "gloo", False
    try:
        dist.init_process_group(backend, timeout=TIMEOUT, **_own_store())
        yield device
        is_done = True
    except RuntimeError as e:
        if not (isinstance(e, dist.DistError) or "gloo/" in str(e)):
            raise
        text = str(e).rpartition("Last error:")[2].strip()  # NCCL's cause is there, others' at the beginning
        reason = text.partition("\n")[0].partition(". ")[0]
        raise ChildProcessError(f"another process of this run has ended or cannot be reached ({reason})") from None
    finally:
        if dist.is_initialized() and (is_done or backend == "gloo"):
            if backend == "gloo":
                # torch 2.8 waits for gloo's thread with the GIL held, which the thread needs to end its last work
                time.sleep(0.1)
            dist.destroy_process_group()


def _own_store() -> dict[str, Any]:
    """Options of ``init_process_group`` after a restart by torchrun on one machine.

    torchrun keeps one store for all its attempts, in which a process may find the address of one that has died (pytorch
    issue 135712). Several machines count the attempts differently.
    """
    attempt, size = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ["WORLD_SIZE"]
    if attempt == "0" or os.environ.get("LOCAL_WORLD_SIZE") != size:
        return {}
    from torch.distributed.rendezvous import rendezvous

    store, rank, world_size = next(rendezvous("env://", timeout=TIMEOUT))
    return {"store": dist.PrefixStore(f"attempt_{attempt}", store), "rank": rank, "world_size": world_size}
