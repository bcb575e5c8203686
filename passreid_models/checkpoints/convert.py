"""Conversion of checkpoints in every published layout to timm's keys.

    file --read.py--> flat tensors --convert.py--> Converted --load.py--> state dict of one model + LoadReport

Layouts: PASS and TransReID-SSL pre-training files, converted backbones, supervised ``transformer_120.pth``,
cluster-contrast ``*.pth.tar``, the conv-stem ("ICS") variants of each, and this package's own files. Public functions
are pure: they return new dictionaries and leave their arguments unchanged.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from passreid_models.architectures import Architecture
from passreid_models.checkpoints.fields import run_of
from passreid_models.checkpoints.read import AVERAGE, CheckpointError, StateDict, read_checkpoint, unwrap_checkpoint

Grid = tuple[int, int]


@dataclass(frozen=True)
class Converted:
    """A checkpoint under timm's keys, not yet fitted to a model.

    Attributes:
        backbone: Tensors of the backbone.
        neck: BatchNorm over the fused vector (single) or over all tokens, T * D wide (multi); may be empty.
        classifier: Weights of the classifier; may be empty.
        architecture: Dimensions; ``num_heads`` and ``img_size`` by convention, since tensors do not show them.
        layout: Layout of the file, in words.
        task: ``pretrain``, ``supervised`` or ``unsupervised``; empty if the tensors do not show it.
        neck_kind: ``single`` or ``multi``; empty without a neck.
        fusion: Fusion of the descriptor; empty if the tensors do not show it.
        folded: Keys of the file that were added up, by the key that holds their sum.
        ignored: Keys of the file that have no place in a model, with the reason.
        run: ``model``, ``fusion``, ``neck`` and ``statistics`` that a run of this package states; else empty.
    """

    backbone: StateDict
    neck: StateDict
    classifier: StateDict
    architecture: Architecture
    layout: str
    task: str
    neck_kind: str
    fusion: str
    folded: dict[str, list[str]]
    ignored: dict[str, str]
    run: Mapping[str, Any] = field(default_factory=dict)


_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|backbone|base)\.)+")
_ANCHOR = "blocks.0.attn.qkv.weight"
_BACKBONE = re.compile(r"(?:cls_token|reg_token|pos_embed|patch_embed\.|blocks\.|norm\.|norm_pre\.|fc_norm\.)")
_HEADS = r"\d+\.(?:mlp|last_layer)\."  # as pre-training names them
_WEIGHTS = re.compile(rf"{_BACKBONE.pattern}|part|cls_pos|bottleneck|classifier\.|head\.weight|head\.bias|{_HEADS}")
_TOKEN = re.compile(r"cls_token|cls_pos|reg_token|pos_embed|part_token\d+|part\d+_pos")
_RANKS = {
    r"(classifier|head)\.weight": 2,
    r"(bottleneck\w*|fc_norm\.bn)\.(weight|bias|running_mean|running_var)|head\.bias": 1,
}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_IGNORED = {
    r"head\.(mlp|last_layer)": "projection head of the pre-training",
    r"fc\.": "unused ImageNet head",
    r"(sie_embed|cam_embed|view_embed)": "camera or view embedding: descriptors here are camera-free",
    r"classifier_\d": "classifier of a part",
}
_REFUSED = {
    r"(b1|b2)\.": "the jigsaw branch of TransReID (JPM), which holds the trained last block",
    r"fcneck\.": "the reduction of TransReID (REDUCE_FEAT_DIM), which makes the descriptor",
}


def convert_file(path: str | Path, network: str = "teacher", size: tuple[int, int] | None = None) -> Converted:
    """Read a checkpoint file and convert it as ``convert_state_dict`` does; errors name the file.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it cannot be read or is not a checkpoint of this family.
    """
    return convert_state_dict(read_checkpoint(path), network, path, size)


def convert_state_dict(
    checkpoint: Any, network: str = "teacher", file: str | Path = "", size: tuple[int, int] | None = None
) -> Converted:
    """Convert a checkpoint of any published layout to timm's keys.

    The positions of CLS and parts are added to their tokens (exact for features); patch positions keep the file's grid.

    Args:
        checkpoint: A checkpoint object or a flat state dict.
        network: ``teacher`` or ``student``, if the file holds both.
        file: File of the checkpoint, with which errors begin.
        size: Height and width in pixels that its config states; by default those of the run, or else a guess.

    Raises:
        CheckpointError: If it is not a checkpoint of this family, the student is asked for and nothing in the file is
            called so, its tensors are not dense, finite and of floating point, or their shapes are not those of one
            network.
    """
    run = run_of(checkpoint, file)
    try:
        converted = _convert(checkpoint, network, tuple(run["config"]["size"]) if run else size)
    except CheckpointError as e:
        raise CheckpointError(f"{file}: {e}" if file else str(e)) from None
    if not run:
        return converted
    entries = {**run["config"], "statistics": run.get("statistics")}
    stated = {k: entries[k] for k in ("model", "fusion", "neck", "statistics") if entries.get(k) is not None}
    return replace(converted, run=stated, fusion=stated.get("fusion") or converted.fusion)


def _convert(checkpoint: Any, network: str, size: tuple[int, int] | None) -> Converted:
    tensors, wrapping = unwrap_checkpoint(checkpoint, network)
    tensors, prefix, ignored = _one_network(tensors, network)
    if network == "student" and not re.search("student", wrapping + prefix, re.IGNORECASE):
        raise CheckpointError("the file holds no network that is called student")
    source = _strip_wrappers(check_tensors(tensors))
    _check_is_vit(source)
    _check_shapes(source)
    for pattern, what in _REFUSED.items():
        if found := next((key for key in source if re.match(pattern, key)), None):
            raise CheckpointError(f"{found} is of {what}: models here have none")

    backbone: StateDict = {}
    classifier: StateDict = {}
    bottlenecks: StateDict = {}
    parts: dict[int, list[str]] = {}
    for key, value in source.items():
        if part := re.fullmatch(r"part(?:_token)?(\d+)(_pos)?", key):
            parts.setdefault(int(part[1]), []).append(key)
        elif key == "cls_pos":
            pass
        elif reason := next((reason for pattern, reason in _IGNORED.items() if re.match(pattern, key)), None):
            ignored[key] = reason
        elif key.startswith("bottleneck"):
            bottlenecks[key] = value
        elif key == "classifier.weight":
            classifier["classifier.weight"] = value
        elif key.startswith("head."):
            backbone[key] = value  # the classifier of a timm model
        elif _BACKBONE.match(key):
            backbone[_rename_stem(key)] = value
        else:
            ignored[key] = "not a part of the model"

    folded = {}
    if "cls_pos" in source:
        backbone["cls_token"] = source["cls_token"].float() + source["cls_pos"].float()
        folded["cls_token"] = ["cls_token", "cls_pos"]
    if parts:
        names = [name for k in sorted(parts) for name in (f"part_token{k}", f"part{k}_pos")]
        if missing := [name for name in ("cls_pos", *names) if name not in source]:
            raise CheckpointError(f"part tokens without their counterpart: {', '.join(missing)} missing")
        pairs = zip(names[::2], names[1::2], strict=True)
        backbone["reg_token"] = torch.cat([source[token].float() + source[pos].float() for token, pos in pairs], dim=1)
        folded["reg_token"] = names

    pos_embed = backbone.get("pos_embed")
    if "cls_pos" not in source and "reg_token" not in source and pos_embed is not None:
        stem = backbone.get("patch_embed.proj.weight", torch.empty(0))
        is_plain = stem.ndim == 4 and stem.numel() and "patch_embed.proj.conv.0.weight" not in backbone
        height, width = stem.shape[2:] if is_plain else (16, 16)
        count, expected = pos_embed.shape[1], (size[0] // height) * (size[1] // width) if size else 0
        guesses = guess_grid(count), guess_grid(count - 1)
        if size is None and count > 3 and guesses[0] and guesses[1]:
            raise CheckpointError(
                f"pos_embed has {count} positions: those of a stride of 11 pixels, which models here do not have, or "
                f"{guesses[0][0]}x{guesses[0][1]} without CLS, of which a config.json beside the file would tell"
            )
        if count != expected and guesses[0] is None and guesses[1] is not None:  # TransReID-SSL: CLS has position 0
            backbone["cls_token"] = backbone["cls_token"].float() + pos_embed[:, :1].float()
            backbone["pos_embed"] = pos_embed[:, 1:]
            folded["cls_token"] = ["cls_token", "pos_embed[:, :1]"]
    elif size is None and "cls_pos" in source and pos_embed is not None and pos_embed.shape[1] == 22 * 11:
        raise CheckpointError(
            "pos_embed has 242 positions: those of a stride of 11 pixels, which models here do not have, or 22x11, of "
            "which a config.json beside the file would tell"
        )
    architecture = _read_architecture(backbone, size)
    neck, neck_kind = _convert_necks(bottlenecks, architecture.num_parts, ignored)

    has_heads = any(k.startswith(("head.mlp", "head.last_layer")) for k in ignored)
    supervised = bool(classifier) or any(re.match(r"((module|_orig_mod)\.)*base\.", k) for k in tensors)
    task = "supervised" if supervised else "unsupervised" if neck else "pretrain" if has_heads else ""
    widths = {2 * architecture.embed_dim: "cat", architecture.embed_dim: "mean"}
    fused = classifier.get("classifier.weight") if classifier else None
    fused = neck.get("fc_norm.bn.weight") if fused is None and neck_kind == "single" else fused
    fusion = widths.get(fused.shape[-1], "") if fused is not None else ""
    if not architecture.num_parts:
        fusion = "token"
    kind = {"supervised": "supervised re-ID model", "unsupervised": "unsupervised re-ID model"}.get(task, "")
    own = "passreid-models file" if "reg_token" in source or "patch_embed.proj.conv.0.weight" in source else ""
    if ", not its " in wrapping:
        kind = ", ".join(filter(None, (kind, wrapping)))
    layout = kind or wrapping or ("pre-training checkpoint" if task == "pretrain" else own or "backbone")
    layout += f", keys of {prefix!r}" if prefix else ""
    return Converted(backbone, neck, classifier, architecture, layout, task, neck_kind, fusion, folded, ignored)


def _one_network(tensors: StateDict, network: str) -> tuple[StateDict, str, dict[str, str]]:
    """Tensors of one network without the prefix of another trainer, such as ``model.``; the prefix; what is left out.

    Raises:
        CheckpointError: If several networks have such prefixes, and none or more than one is the teacher or an average.
    """
    prefixes = [k.removesuffix(_ANCHOR) for k in tensors if k.endswith(_ANCHOR)]
    prefixes = [p for p in prefixes if f"{p}cls_token" in tensors] or prefixes  # the decoder of an MAE has none
    if not any(_WRAPPERS.sub("", p) for p in prefixes):
        return tensors, "", {}
    named = [p for p in prefixes if network in p.lower() or (network == "teacher" and AVERAGE.search(p))]
    chosen = prefixes if len(prefixes) == 1 else named
    if len(chosen) != 1:
        names = ", ".join(repr(p) if p else "no prefix" for p in prefixes)
        raise CheckpointError(
            f"it holds {len(prefixes)} networks, with keys of {names}; expected one, or one that is called "
            f"{'teacher or ema' if network == 'teacher' else network}"
        )
    prefix = chosen[0].removesuffix("base.")  # beside the backbone of a supervised model stand neck and classifier
    taken = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    others = {k: f"not among the keys of {prefix!r}" for k in tensors if not k.startswith(prefix)}
    return taken, prefix, others


def _strip_wrappers(tensors: StateDict) -> StateDict:
    """Tensors without the prefixes of wrappers.

    Raises:
        CheckpointError: If two keys become one, and their tensors differ.
    """
    source: StateDict = {}
    keys: dict[str, str] = {}
    for key, value in tensors.items():
        name = _WRAPPERS.sub("", key)
        if name in source and not (source[name].shape == value.shape and bool((source[name] == value).all())):
            raise CheckpointError(
                f"the keys {keys[name]} and {key} are one without their prefixes, and their tensors differ"
            )
        source[name], keys[name] = value, key
    return source


def check_held(tensors: StateDict) -> None:
    """Check that each tensor is one of a network, and that its values are there; a file can declare what it lacks.

    Raises:
        CheckpointError: If a tensor is sparse, empty of data or larger than its storage, or a weight is quantised.
    """
    for key, value in tensors.items():
        if value.layout != torch.strided or value.is_meta:
            kind = "without values" if value.is_meta else str(value.layout).removeprefix("torch.")
            raise CheckpointError(f"{key} is {kind}; expected a dense tensor")
        held = value.untyped_storage().nbytes()
        if value.numel() * value.element_size() > held:
            raise CheckpointError(f"{key} is declared as {shape_text(value)}, and the file holds {held:,} bytes of it")
    names = {key: _WRAPPERS.sub("", key) for key in tensors}
    weights = [k for k, name in names.items() if _WEIGHTS.match(name) and not name.endswith("num_batches_tracked")]
    if wrong := [key for key in weights if tensors[key].dtype not in _DTYPES]:
        types = f"{wrong[0]} is {str(tensors[wrong[0]].dtype).removeprefix('torch.')}"
        raise CheckpointError(
            f"{len(wrong)} tensors are not of floating point of 16 bits or more, {types}: are these quantised weights?"
        )


def check_tensors(tensors: StateDict) -> StateDict:
    """Check each tensor before it is computed with, and return all.

    Raises:
        CheckpointError: As ``check_held`` does, or if a value is not finite.
    """
    check_held(tensors)
    if bad := [key for key, value in tensors.items() if value.dtype in _DTYPES and not value.isfinite().all()]:
        raise CheckpointError(f"NaN or infinite values in {len(bad)} tensors, the first: {', '.join(bad[:3])}")
    return tensors


def _check_shapes(source: StateDict) -> None:
    """Compare the shapes with one another: equal blocks without a gap, one width for blocks, tokens and positions.

    The dimensions that ``_read_architecture`` reads off the tensors are then those of data that the file holds.

    Raises:
        CheckpointError: If a shape is not that of the others; the message names the key.
    """
    width = source[_ANCHOR].shape[-1] if source[_ANCHOR].ndim else 0
    if width == 0 or source[_ANCHOR].shape != (3 * width, width):
        raise CheckpointError(f"{_ANCHOR} is {shape_text(source[_ANCHOR])}; expected 3DxD, D being the width")
    blocks = {int(k.split(".")[1]) for k in source if re.match(r"blocks\.\d+\.", k)}
    if stray := sorted(blocks - set(range(len(blocks)))):
        gap = min(set(range(len(blocks))) - blocks)
        raise CheckpointError(f"there are tensors of block {stray[-1]}, and none of block {gap}")
    if lacking := [i for i in sorted(blocks) if f"blocks.{i}.attn.qkv.weight" not in source]:
        raise CheckpointError(f"there is no blocks.{lacking[0]}.attn.qkv.weight")
    for key, value in source.items():
        first = source.get(re.sub(r"^blocks\.\d+\.", "blocks.0.", key), value)
        if value.shape != first.shape:
            raise CheckpointError(f"{key} is {shape_text(value)}, and that of blocks.0 {shape_text(first)}")
        if _TOKEN.fullmatch(key):
            several = key in ("pos_embed", "reg_token")
            count = value.shape[1] if several and value.ndim == 3 else 1
            if value.shape != (1, count, width) or count == 0:
                raise CheckpointError(f"{key} is {shape_text(value)}; expected 1x{'N' if several else 1}x{width}")
        ranks = next((ranks for pattern, ranks in _RANKS.items() if re.fullmatch(pattern, key)), None)
        if ranks is not None and value.ndim != ranks:
            raise CheckpointError(f"{key} is {shape_text(value)}; expected {ranks} dimension{'s'[: ranks > 1]}")


def shape_text(tensor: torch.Tensor) -> str:
    """Shape of a tensor for a message, such as ``3x128``."""
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _check_is_vit(source: StateDict) -> None:
    stem = "patch_embed.proj.conv.0.weight" if "patch_embed.proj.conv.0.weight" in source else "patch_embed.proj.weight"
    missing = [key for key in ("blocks.0.attn.qkv.weight", "cls_token", stem) if key not in source]
    if not missing:
        return
    network = "a ResNet" if "layer1.0.conv1.weight" in source else "no vision transformer of this family"
    raise CheckpointError(f"this is {network}: it has {', '.join(list(source)[:3])}, but no {', '.join(missing)}")


def _rename_stem(key: str) -> str:
    """``patch_embed.conv.1.IN.*`` -> ``patch_embed.proj.conv.1.instance_norm.*``; other keys as they are."""
    if not key.startswith("patch_embed.conv."):
        return key
    return (
        key.replace("patch_embed.conv.", "patch_embed.proj.conv.")
        .replace(".IN.", ".instance_norm.")
        .replace(".BN.", ".batch_norm.")
    )


def _read_architecture(backbone: StateDict, size: tuple[int, int] | None) -> Architecture:
    """Read the dimensions off the tensors, and rename the projection of a conv stem in ``backbone``."""
    conv_stem = "patch_embed.proj.conv.0.weight" in backbone
    if conv_stem and "patch_embed.proj.weight" in backbone:
        for name in ("weight", "bias"):
            backbone[f"patch_embed.proj.proj.{name}"] = backbone.pop(f"patch_embed.proj.{name}")
    embed_dim = backbone["cls_token"].shape[-1]
    depth = 1 + max(int(k.split(".")[1]) for k in backbone if k.startswith("blocks."))
    num_parts = backbone["reg_token"].shape[1] if "reg_token" in backbone else 0
    grid = guess_grid(backbone["pos_embed"].shape[1]) if "pos_embed" in backbone else None
    size = size or ((16 * grid[0], 16 * grid[1]) if grid else (256, 128))
    return Architecture(embed_dim, depth, max(1, embed_dim // 64), num_parts, conv_stem, size)


def _convert_necks(bottlenecks: StateDict, num_parts: int, ignored: dict[str, str]) -> tuple[StateDict, str]:
    """Merge the BatchNorms of the tokens into one, under the keys of the model's neck; return it and its kind."""
    # bottleneck, bottleneck_1.. or bottleneck_pt1.., of CLS and the parts in their order
    names = sorted({k.split(".")[0] for k in bottlenecks}, key=lambda name: (int(re.sub(r"\D", "", name) or 0), name))
    if not names:
        return {}, ""
    if len(names) not in (1, 1 + num_parts) or names[0] != "bottleneck":
        ignored.update(dict.fromkeys(bottlenecks, "necks that do not match the tokens"))
        return {}, ""
    neck = {}
    for stat in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        values = [bottlenecks[f"{name}.{stat}"] for name in names if f"{name}.{stat}" in bottlenecks]
        if len(values) != len(names):
            raise CheckpointError(f"{', '.join(names)}: {stat} missing in {len(names) - len(values)} of {len(names)}")
        neck[f"fc_norm.bn.{stat}"] = values[0] if stat == "num_batches_tracked" else torch.cat(values)
    return neck, "single" if len(names) == 1 else "multi"


def published_descriptor(converted: Converted) -> dict[str, str]:
    """Fusion (``global_pool``) and neck of the published descriptor, as far as the layout shows them.

    Unsupervised features are taken after the neck, supervised ones before it.
    """
    settings = {"neck": converted.neck_kind if converted.task == "unsupervised" else ""}
    if "fc_norm.bn.weight" in converted.backbone and not converted.classifier:  # of our own unsupervised runs
        settings["neck"] = converted.run.get("neck", "")
    if converted.fusion:
        settings["global_pool"] = converted.fusion
    return settings


def guess_grid(num_patches: int) -> Grid | None:
    """Grid of a person image with this many patches, two or three times as high as wide; None if there is none."""
    for ratio in (2, 3):
        width = round((num_patches / ratio) ** 0.5)
        if width and ratio * width * width == num_patches:
            return ratio * width, width
    return None
