"""Reading of checkpoint files as flat tensors, without running code from them."""

import argparse
import errno
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

StateDict = dict[str, Tensor]
AVERAGE = re.compile(r"(?<![a-zA-Z])(?i:ema|swa|avg|averaged?)(?![a-zA-Z])|(?<=[a-z])(?:EMA|Ema)(?![a-z])")
PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)  # errors of a file system that answers again later
AGAIN = "; download or copy it again"  # the end of messages about a damaged file


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the model; the message names the keys."""


def read_checkpoint(path: str | Path) -> Any:
    """Read a safetensors file or a pickled PyTorch checkpoint, without running code from it.

    Besides tensors, ``argparse.Namespace`` and numpy scalars are allowed: the published files hold both.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is not a checkpoint, is cut short, or would run code.
        OSError: If it cannot be read now, such as from a server that does not answer.
        RuntimeError: If memory does not suffice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}" + (": it is a folder" if path.is_dir() else ""))
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (SafetensorError, KeyError, RuntimeError) as e:
            if _is_memory(e):
                raise
            raise CheckpointError(f"{path} is not a whole safetensors file ({e}): download it again") from None
    _check_zip(path)
    try:
        with torch.serialization.safe_globals(_safe_globals()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        if blocked := re.search(r"GLOBAL (\S+)", str(e)):
            raise CheckpointError(
                f"{path} was refused: it asks to run {blocked[1]} while loading; checkpoints are opened for their "
                "tensors alone, since a pickle can run any code"
            ) from None
        if (opcode := re.search(r"Unsupported operand (\d+)", str(e))) and 140 <= int(opcode[1]) <= 151:
            raise CheckpointError(
                f"{path} was refused: pickle protocol 4 cannot be opened without letting it run code; save it again "
                "with the default protocol of torch.save, or as safetensors"
            ) from None
        raise CheckpointError(f"{path} is not a PyTorch checkpoint") from None
    except Exception as e:  # the unpickler raises anything on a file that is not a pickle
        if _is_memory(e):
            raise
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"
        if not is_zip:
            raise CheckpointError(f"{path} is not a PyTorch checkpoint") from None
        cause = f"{type(e).__name__}: {str(e)[:120].partition(chr(10))[0]}"
        raise CheckpointError(f"{path} is cut short or damaged ({cause}){AGAIN}") from None


def _is_memory(error: Exception) -> bool:
    """Whether memory did not suffice, which is not the file's fault."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def _check_zip(path: Path) -> None:
    """Check what torch does not in a zip file: that its entries are not larger than the file, and their CRC-32.

    Raises:
        CheckpointError: If it is a bomb, or an entry is damaged.
        OSError: If it cannot be read now.
    """
    try:
        with zipfile.ZipFile(path) as file:
            is_bomb = path.stat().st_size < sum(entry.file_size for entry in file.infolist())
            damaged = None if is_bomb else file.testzip()
    except OSError as e:
        if e.errno in PASSING:
            raise OSError(e.errno, e.strerror, str(path)) from None
        return
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):  # torch.load says what it is
        return
    if is_bomb:
        raise CheckpointError(
            f"{path} was refused: its entries are larger than the file, which torch.save does not write"
        )
    if damaged:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} does not match{AGAIN}")


def has_checksum(path: Path) -> bool:
    """Whether the format of a checkpoint file holds checksums, by which a flipped bit is found."""
    return zipfile.is_zipfile(path)


def _safe_globals() -> list[Any]:
    import numpy as np

    scalar = np.float32(0).__reduce__()[0]
    dtypes = [getattr(np.dtypes, name) for name in ("Float32DType", "Float64DType", "Int64DType")]
    return [
        argparse.Namespace,
        np.dtype,
        *dtypes,
        *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    ]


def unwrap_checkpoint(checkpoint: Any, network: str = "teacher") -> tuple[StateDict, str]:
    """Flat tensors of one network of a checkpoint object, and a description of their wrapping.

    Args:
        checkpoint: Object from ``read_checkpoint``.
        network: ``teacher`` or ``student``, if the file holds both.

    Raises:
        CheckpointError: If there are no named tensors, or ``network`` is not in the file.
    """
    if network not in ("teacher", "student"):
        raise ValueError(f"network must be 'teacher' or 'student', got {network!r}")
    layout = ""
    if isinstance(checkpoint, Mapping) and ("teacher" in checkpoint or "student" in checkpoint):
        if network not in checkpoint:
            raise CheckpointError(f"the pre-training file has no {network}, only: {', '.join(map(str, checkpoint))}")
        checkpoint, layout = checkpoint[network], f"pre-training checkpoint, {network}"
    for name in ("state_dict", "model"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(name), Mapping):
            others = [
                key for key, value in checkpoint.items() if AVERAGE.search(str(key)) and isinstance(value, Mapping)
            ]
            layout = layout or f"'{name}' of a training checkpoint"
            layout += f", not its {', '.join(map(repr, others))}" if others else ""
            checkpoint = checkpoint[name]
    entries = checkpoint.items() if isinstance(checkpoint, Mapping) else ()
    tensors = {k: v.detach() for k, v in entries if isinstance(v, Tensor)}  # without the history of Parameters
    if not tensors or not all(isinstance(k, str) for k in tensors):
        raise CheckpointError(f"expected a dictionary of named tensors, got {_describe(checkpoint)}")
    return tensors, layout


def _describe(obj: Any) -> str:
    if isinstance(obj, Mapping):
        return f"a dictionary with the keys {', '.join(map(str, list(obj)[:6])) or '(none)'}"
    return f"a {type(obj).__name__}"
