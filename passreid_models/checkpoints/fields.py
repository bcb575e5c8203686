"""Checks of the values that files state, before they are believed: a ``config.json``, a checkpoint of a run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from passreid_models.architectures import ARCHITECTURES
from passreid_models.checkpoints.read import CheckpointError


def check_config(config: Any, file: str | Path) -> None:
    """Check the fields of a ``config.json`` that make a model: known architecture, types and ranges.

    Raises:
        ValueError: The message begins with ``file`` and the field.
    """
    is_config = isinstance(config, dict) and isinstance(config.get("pretrained_cfg"), dict)
    if not is_config or config.get("architecture") not in list(ARCHITECTURES):
        raise ValueError(f"{file} is not the config of a model of this package")
    check_fields({"model_args": {}, "provenance": {}, **config}, {"model_args": OBJECT, "provenance": OBJECT}, file)
    cfg = config["pretrained_cfg"]
    check_fields(cfg, _PRETRAINED_CFG, f"{file}: pretrained_cfg")
    for name in ("mean", "std"):  # timm takes one value for all channels; of three it makes those of fewer or more
        if len(cfg[name]) not in (1, 3, cfg["input_size"][0]):
            raise ValueError(
                f"{file}: pretrained_cfg: {name}: {len(cfg[name])} values for {cfg['input_size'][0]} channels"
            )
    if "num_classes" in config:
        check_fields(config, {"num_classes": _CLASSES}, file)
    args = config.get("model_args", {})
    check_fields(args, {k: check for k, check in _MODEL_ARGS.items() if k in args}, f"{file}: model_args")


Check = tuple[str, Callable[[Any], bool]]


def check_fields(values: Mapping[str, Any], checks: Mapping[str, Check], where: str | Path) -> None:
    """Check values by name against the text of what is expected and a predicate.

    Raises:
        ValueError: The message begins with ``where`` and the name.
    """
    for name, (expected, is_valid) in checks.items():
        if name not in values:
            raise ValueError(f"{where} has no {name}")
        if not is_valid(values[name]):
            shown = repr(values[name])
            shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
            raise ValueError(f"{where}: {name}: expected {expected}, got {shown}")


def whole(low: int, high: int) -> Check:
    return f"a whole number from {low:,} to {high:,}", lambda v: type(v) is int and low <= v <= high


def several(count: int | tuple[int, int], check: Check) -> Check:
    low, high = count if isinstance(count, tuple) else (count, count)

    def are_valid(values: Any) -> bool:
        return isinstance(values, list | tuple) and low <= len(values) <= high and all(map(check[1], values))

    return f"{low if low == high else f'{low} to {high}'} values, each {check[0]}", are_valid


def _either(one: Check, other: Check) -> Check:
    return f"{one[0]}, or {other[0]}", lambda v: one[1](v) or other[1](v)


def _number(low: float, high: float) -> Check:
    return f"a number from {low:g} to {high:g}", lambda v: type(v) in (int, float) and low <= v <= high


OBJECT: Check = ("an object", lambda v: isinstance(v, dict))
_CHANNELS, _CLASSES, PIXELS = whole(1, 64), whole(0, 100_000), whole(16, 4096)
_INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "hamming", "box")
_PRETRAINED_CFG: dict[str, Check] = {
    "input_size": (
        f"channels, height and width, the latter {PIXELS[0]}",
        lambda v: isinstance(v, list | tuple) and len(v) == 3 and _CHANNELS[1](v[0]) and several(2, PIXELS)[1](v[1:]),
    ),
    "mean": several((1, 64), _number(-100, 100)),
    "std": several((1, 64), _number(1e-6, 100)),
    "interpolation": (f"one of {', '.join(_INTERPOLATIONS)}", lambda v: v in _INTERPOLATIONS),
}


def are_statistics(values: Any) -> bool:
    """Whether a dictionary has mean, std or interpolation that a pretrained cfg can have, and nothing else."""
    known = ("mean", "std", "interpolation")
    return isinstance(values, dict) and all(k in known and _PRETRAINED_CFG[k][1](v) for k, v in values.items())


_MODEL_ARGS: dict[str, Check] = {
    "embed_dim": whole(1, 16_384),
    "depth": whole(1, 1_000),
    "num_heads": whole(1, 1_024),
    "num_parts": whole(0, 1_000),
    "in_chans": _CHANNELS,
    "num_classes": _CLASSES,
    "img_size": _either(several(2, PIXELS), PIXELS),
    "patch_size": _either(several(2, whole(4, 64)), whole(4, 64)),
    "mlp_ratio": _number(0.01, 32),
}


def run_of(checkpoint: Any, file: str | Path) -> dict[str, Any]:
    """The checkpoint, with its entries checked, if it is one of a run of this package; else an empty dictionary.

    Raises:
        CheckpointError: As ``check_run`` does.
    """
    config = checkpoint.get("config") if isinstance(checkpoint, dict) and "step" in checkpoint else None
    if not isinstance(config, dict) or config.get("model") not in list(ARCHITECTURES) or "size" not in config:
        return {}
    check_run(checkpoint, file)
    return cast(dict[str, Any], checkpoint)


def check_run(checkpoint: Mapping[str, Any], file: str | Path) -> None:
    """Check the entries of a run's checkpoint: their types, and the settings that make its model.

    Raises:
        CheckpointError: The message begins with ``file`` and the entry.
    """
    try:
        check_fields(checkpoint, {name: check for name, check in _RUN.items() if name in checkpoint}, file)
        config = checkpoint["config"]
        check_fields(config, {k: check for k, check in _RUN_CONFIG.items() if k in config}, f"{file}: config")
    except ValueError as e:
        raise CheckpointError(str(e)) from None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_scores(value: Any) -> bool:
    return isinstance(value, dict) and (not value or type(value.get("mAP")) in (int, float))


def _are_tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


_RUN: dict[str, Check] = {
    "config": OBJECT,
    "step": whole(0, 2**53),
    "skipped": whole(0, 2**53),
    "images_seen": whole(0, 2**53),
    "num_images": whole(1, 2**53),
    "world_size": whole(1, 10**6),
    "fingerprint": ("a text", _is_text),
    "dtype": ("a text", _is_text),
    "identities": ("texts", lambda v: isinstance(v, list | tuple) and all(map(_is_text, v))),
    "statistics": ("mean, std and interpolation", are_statistics),
    "before": ("scores", _is_scores),
    "origin": OBJECT,
    **dict.fromkeys(("scaler", "optimizer"), ("an object", lambda v: v is None or isinstance(v, dict))),
    **dict.fromkeys(("student", "teacher", "model"), ("tensors by name", _are_tensors)),
    **dict.fromkeys(("centers", "labels", "centroids"), ("a tensor", lambda v: isinstance(v, Tensor))),
}
_RUN_CONFIG: dict[str, Check] = {
    "model": (f"one of {', '.join(ARCHITECTURES)}", lambda v: v in list(ARCHITECTURES)),
    "size": several(2, PIXELS),
    "init": ("a text", _is_text),
}
