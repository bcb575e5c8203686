"""Mutations of files: bytes, JSON, texts, zip files, pickles, safetensors headers and state dicts.

Each is a function of a ``random.Random``, so that a seed, or a property-based test that draws its numbers, decides all.
"""

import json
import math
import pickle
import pickletools
import struct
import warnings
import zipfile
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

LARGE = (0, 1, -1, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64, -(2**63), 10**11, 10**30)
TEXTS = ("", " ", "x", "\0", "a\nb", "\r", "\x1b[31m", "é", "\u202e", "\ud800", "💥", "../../x", "/dev/null/x", "~",
         "%s", "{}", "-1", "nan", "1e999", "x" * 800, "None", "[" * 2000)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0.5, -0.0, 1e308, math.nan, math.inf, -math.inf, [], {}, [[]], {"": None}, [1, 2], [0.5] * 3,
    ["a"] * 3, [math.nan] * 3, {"a": {"b": [1]}}, *LARGE, *TEXTS,
)  # fmt: skip


def mutate_bytes(rng: Random, data: bytes) -> bytes:
    """Flip, replace, cut, repeat or insert bytes, in one to three places."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, length = rng.randrange(len(content) + 1), rng.choice((1, 1, 4, 8, 64, 1000))
        kind = rng.randrange(8)
        if kind == 0:
            del content[at:]
        elif kind == 1:
            del content[at : at + length]
        elif kind == 2:
            content[at:at] = content[at : at + length]
        elif kind == 3:
            content[at:at] = bytes(rng.randrange(256) for _ in range(min(length, 8)))
        elif kind == 4:
            content[at : at + length] = bytes((rng.choice((0, 0xFF, 0x20, 0x5B)),)) * length
        elif kind == 5:
            size = rng.choice((2, 4, 8))
            content[at : at + size] = (rng.choice(LARGE) % 2 ** (8 * size)).to_bytes(size, "little")
        elif content:
            content[at % len(content)] ^= 1 << rng.randrange(8)
    return bytes(content)


def mutate_text(rng: Random, text: str) -> bytes:
    """Replace words, lines and characters of a text, or its encoding."""
    lines = text.split("\n")
    for _ in range(rng.choice((1, 1, 2))):
        i = rng.randrange(len(lines))
        kind = rng.randrange(6)
        if kind == 0:
            lines[i] = rng.choice(TEXTS)
        elif kind == 1:
            lines.insert(i, lines[rng.randrange(len(lines))])
        elif kind == 2:
            del lines[i]
            lines = lines or [""]
        else:
            at = rng.randrange(len(lines[i]) + 1)
            end = at if kind == 3 else min(len(lines[i]), at + rng.choice((1, 4, 20)))
            lines[i] = lines[i][:at] + rng.choice(("", '"', ",", ";", "\t", ":", "-", "'", *TEXTS)) + lines[i][end:]
    encoding = rng.choice(("utf-8",) * 6 + ("utf-8-sig", "utf-16", "utf-32", "latin-1"))
    content = rng.choice(("\n", "\n", "\n", "\r\n", "\r")).join(lines).encode(encoding, "replace")
    return mutate_bytes(rng, content) if rng.random() < 0.2 else content


def mutate_value(rng: Random, value: Any) -> Any:
    """Replace, remove, add or wrap one entry of nested lists and dictionaries; the argument stays as it is."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        copy: Any = dict(value) if isinstance(value, dict) else list(value)
        key = rng.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
        kind = rng.random()
        if kind < 0.12:
            del copy[key]
        elif kind < 0.2 and isinstance(copy, dict):
            copy[rng.choice(TEXTS)] = copy[key] if rng.random() < 0.5 else rng.choice(VALUES)
        else:
            copy[key] = mutate_value(rng, copy[key])
        return copy
    kind = rng.random()
    if kind < 0.1:
        return [value]
    if kind < 0.2 and isinstance(value, int | float):
        return rng.choice((-value, value + 1, value * 1000, str(value), float(value)))
    if kind < 0.23:
        return nested(rng.choice((100, 600)))
    return rng.choice(VALUES)


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def mutate_json(rng: Random, value: Any) -> bytes:
    """JSON of a mutated value; sometimes its bytes are mutated too, or it is no JSON."""
    if rng.random() < 0.05:
        return rng.choice((b"", b"[" * 10**5, b"null", b"\xff\xfe", b'{"a": 1' + b"0" * 10**5 + b"}", b'{"a":1,"a":2}'))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = mutate_value(rng, value)
    content = json.dumps(value).encode()
    return mutate_bytes(rng, content) if rng.random() < 0.15 else content


# ------------------------------------------------------------------------------------------------------------ pickles


GLOBALS = (
    b"os\nsystem\n", b"builtins\neval\n", b"torch\nload\n", b"collections\nOrderedDict\n", b"torch\nFloatStorage\n",
    b"torch._utils\n_rebuild_tensor_v2\n", b"torch._utils\n_rebuild_parameter\n", b"argparse\nNamespace\n",
    b"torch\nSize\n", b"torch.serialization\n_get_layout\n", b"numpy\ndtype\n",
    b"torch._tensor\n_rebuild_from_type_v2\n",
)  # fmt: skip


class _Call:
    """Pickled as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.parts = function, args

    def __reduce__(self) -> Any:
        return self.parts


def running_pickle(rng: Random, marker: Path) -> bytes:
    """Pickle that makes a file when code is run from it."""
    import builtins
    import os
    import subprocess

    code, command = f"open({str(marker)!r}, 'w')", f"touch '{marker}'"
    call = rng.choice(
        (
            _Call(os.system, command), _Call(builtins.eval, code), _Call(builtins.exec, code),
            _Call(builtins.open, str(marker), "w"), _Call(subprocess.Popen, ["touch", str(marker)]),
            _Call(Path.touch, marker), _Call(os.mkdir, str(marker)), _Call(torch.save, {}, str(marker)),
            _Call(builtins.getattr, _Call(builtins.__import__, "os"), "system"),
        )
    )  # fmt: skip
    state = rng.choice((call, {"state_dict": call}, {"model": {"cls_token": call}}, [call], {"epoch": 1, "args": call}))
    content = pickle.dumps(state, rng.choice((0, 1, 2, 3, 4, 5)))
    return mutate_pickle(rng, content) if rng.random() < 0.3 else content


def mutate_pickle(rng: Random, content: bytes) -> bytes:
    """Replace arguments of opcodes, or opcodes; at random, a stream of opcodes of its own."""
    if rng.random() < 0.15:
        codes = [op.code.encode("latin-1") for op in pickletools.opcodes if op.arg is None or rng.random() < 0.5]
        return b"\x80\x02" + b"".join(rng.choice(codes) + b"\x01" * rng.randrange(3) for _ in range(40)) + b"."
    if rng.random() < 0.1:
        deep = b"\x80\x02" + b"]" * 10**5 + b"a" * 10**5 + b"."
        return rng.choice((deep, b"(" * 10**6 + b".", b"\x8e" + b"\xff" * 8))
    try:
        ops = list(pickletools.genops(content))
    except Exception:  # it may be mutated already
        return mutate_bytes(rng, content)
    i = rng.randrange(len(ops))
    op, _, start = ops[i]
    end = ops[i + 1][2] if i + 1 < len(ops) else len(content)
    number, text = rng.choice(LARGE), rng.choice(TEXTS).encode("utf-8", "replace")
    name = op.name
    if "INT" in name or name.startswith("LONG"):
        new = b"\x8a\x10" + (number % 2**127).to_bytes(16, "little")
    elif "UNICODE" in name or "STRING" in name:
        new = b"X" + struct.pack("<I", len(text)) + text
    elif name == "GLOBAL":
        new = b"c" + rng.choice(GLOBALS)
    elif "FLOAT" in name:
        new = b"G" + struct.pack(">d", rng.choice((math.nan, math.inf, -1.0, 1e308)))
    else:
        new = rng.choice((b"", b"0", b"N", b"}", b"]", b")", b"R", b"b", b"2", content[start:end] * 2))
    return content[:start] + new + content[end:]


def rewrite_zip(content: bytes, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Zip file with other content of some entries, by the end of their names, and checksums that match."""
    out = BytesIO()
    with zipfile.ZipFile(BytesIO(content)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for info in old.infolist():
            found = next((data for name, data in entries.items() if info.filename.endswith(name)), None)
            new.writestr(info.filename, old.read(info) if found is None else found)
    return out.getvalue()


def mutate_zip(rng: Random, content: bytes) -> bytes:
    """Mutate the pickle, an entry, a size in a header, or the compression of a zip file of torch."""
    with zipfile.ZipFile(BytesIO(content)) as file:
        infos = file.infolist()
        pkl = next(file.read(info) for info in infos if info.filename.endswith("data.pkl"))
        info = rng.choice(infos)
        entry = file.read(info)
    kind = rng.randrange(6)
    if kind < 3:
        return rewrite_zip(content, {"/data.pkl": mutate_pickle(rng, pkl)})
    if kind == 3:
        return rewrite_zip(content, {info.filename: mutate_bytes(rng, entry)})
    if kind == 4:
        bomb = {info.filename: entry + bytes(rng.choice((0, 1, 10**7)))}
        return rewrite_zip(content, bomb, zipfile.ZIP_DEFLATED)
    at = content.rfind(b"PK\x01\x02", 0, max(8, rng.randrange(len(content) + 1)))  # sizes in the central directory
    at = content.find(b"PK\x01\x02") if at < 0 else at
    field = at + rng.choice((8, 10, 16, 20, 24, 28, 30, 42))
    return content[:field] + (rng.choice(LARGE) % 2**32).to_bytes(4, "little") + content[field + 4 :]


# -------------------------------------------------------------------------------------------------------- safetensors


def mutate_safetensors(rng: Random, content: bytes) -> bytes:
    """Mutate a field of the header, its length, or the bytes of a safetensors file."""
    kind = rng.random()
    if kind < 0.25:
        return mutate_bytes(rng, content)
    length = int.from_bytes(content[:8], "little")
    if kind < 0.35:
        return (rng.choice((length + rng.choice((-1, 1, 8)), *LARGE)) % 2**64).to_bytes(8, "little") + content[8:]
    header = json.loads(content[8 : 8 + length])
    name = rng.choice(sorted(header))
    entry = dict(header[name])
    if kind < 0.5 and "dtype" in entry:
        dtypes = ("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "C64", "F4", "", 5)
        entry["dtype"] = rng.choice(dtypes)
    elif kind < 0.65 and entry.get("shape"):
        shape = list(entry["shape"])
        shape[rng.randrange(len(shape))] = rng.choice((*LARGE, 1, 7))
        entry["shape"] = rng.choice((shape, shape[::-1], [1, *entry["shape"]], []))
    elif kind < 0.75 and "data_offsets" in entry:
        entry["data_offsets"] = [v + rng.choice((0, 4, -4, *LARGE)) for v in entry["data_offsets"]]
    elif kind < 0.85:
        new = rng.choice((*TEXTS, "blocks.999999999.x", "module." + name, "blocks.0." + name, "pos_embed"))
        header = {new if key == name else key: value for key, value in header.items()}
        name = new
    else:
        header = mutate_value(rng, header)
        name = ""
    if name:
        header[name] = entry
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


# -------------------------------------------------------------------------------------------------------- state dicts


def mutate_tensor(rng: Random, x: Tensor) -> Any:
    """A tensor of another dtype, layout, rank, size or range, or something else."""
    x = x.detach().clone()
    number = torch.tensor(rng.choice((math.nan, math.inf, -math.inf, 1e38, 0.0, -1e-45)))
    kind = rng.randrange(16)
    if kind == 0:
        dtypes = (torch.int32, torch.int8, torch.bool, torch.float64, torch.float16, torch.bfloat16, torch.complex64)
        return x.to(rng.choice((*dtypes, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8)))
    if kind == 1:
        return x.to_sparse()
    if kind == 2 and x.ndim == 2:
        return rng.choice((x.to_sparse_csr, x.to_sparse_csc))()
    if kind == 3:
        return x[None] if rng.random() < 0.5 else x.flatten()
    if kind == 4:
        return x[:0] if x.ndim else x[None][:0]
    if kind == 5:
        return torch.zeros(1).expand(rng.choice((10**6, 10**9, 10**11)))
    if kind == 6:
        return torch.zeros(1).expand(10**5, *x.shape)
    if kind == 7 and x.ndim:
        return torch.zeros(*x.shape[:-1], rng.choice((1, 7, x.shape[-1] + 1)))
    if kind == 8 and x.is_floating_point() and x.numel():
        x.view(-1)[rng.randrange(x.numel())] = number
        return x
    if kind == 9:
        return x.new_full(x.shape, number) if x.is_floating_point() else x
    if kind == 10 and x.ndim >= 2:
        return x.transpose(0, 1)
    if kind == 11:
        return torch.tensor(rng.choice((0.0, math.nan)))
    if kind == 12 and x.is_floating_point():
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # it is deprecated
            return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)
    if kind == 13:
        return torch.empty(x.shape, device="meta")
    if kind == 14:
        return torch.nn.Parameter(x) if x.is_floating_point() else x
    return rng.choice(VALUES)


def mutate_state(rng: Random, state: dict[str, Any]) -> dict[Any, Any]:
    """Mutate tensors, names and the order of a state dict."""
    state = dict(state)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(list(state))
        kind = rng.random()
        if kind < 0.55:
            state[name] = mutate_tensor(rng, state[name]) if isinstance(state[name], Tensor) else rng.choice(VALUES)
        elif kind < 0.65:
            del state[name]
        elif kind < 0.75:
            prefix = rng.choice(("module.", "base.", "teacher.", "ema.", "module.module."))
            state[prefix + str(name)] = state[name] if rng.random() < 0.5 else mutate_tensor(rng, torch.zeros(3))
        elif kind < 0.9:
            new: Any = rng.choice(
                ("blocks.999999999.x", "blocks.-1.x", "blocks.1e9.attn.qkv.weight", "part_token9", "part9_pos", 5, None,
                 "part_token99999999", "bottleneck_pt7.weight", "classifier.weight", "head.weight", "fc_norm.bn.weight",
                 "pos_embed", "reg_token", "patch_embed.conv.0.weight", "norm.weight", ("a", 1), *TEXTS[:12])
            )  # fmt: skip
            state[new] = state[name]
        else:
            state = dict(reversed(state.items()))
    return state
