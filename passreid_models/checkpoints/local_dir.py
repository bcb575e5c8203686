"""Exported folders, for ``local-dir:`` and the Hub, written from a model or from an official checkpoint.

FOLDER/model.safetensors    the state dict of the timm model
FOLDER/config.json          timm's config; beside it fusion, neck, l2_normalize and the provenance
FOLDER/extras.safetensors   tensors that belong to the checkpoint, not to the model: necks, classifier
"""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import timm
import torch
from timm.layers import to_2tuple
from timm.models import save_for_hf
from torch import Tensor, nn

from passreid_models.architectures import ARCHITECTURES, STATISTICS, Architecture, architecture_name
from passreid_models.checkpoints.convert import Converted, convert_file
from passreid_models.checkpoints.fields import check_config
from passreid_models.checkpoints.load import LoadReport, has_own_weights, load_report
from passreid_models.checkpoints.read import has_checksum
from passreid_models.runtime import atomic_folder, did_you_mean, read_bytes, sha256, unwrap

__all__ = ["convert_checkpoint", "save_pretrained"]

FILES = ("model.safetensors", "config.json", "extras.safetensors")
DESCRIPTOR = ("fusion", "neck", "l2_normalize")  # entries of our config.json
MAX_CONFIG_BYTES = 2**24
CLAIMS = ("tag", "description", "origin_url")  # of a pretrained cfg: whose weights they are


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    extras: Mapping[str, Tensor] | None = None,
    info: Mapping[str, Any] | None = None,
    half: bool = False,
    overwrite: bool = False,
) -> None:
    """Write ``model`` so that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads it again.

    Tag, licence and description of the weights that it was made with are kept if all tensors are still theirs.

    Args:
        model: A registered model, compiled or in ``DistributedDataParallel`` too; not a ``features_only`` wrapper.
        folder: Output; written whole or not at all.
        extras: Tensors for ``extras.safetensors``.
        info: Further top-level entries of ``config.json``; its ``model_args`` replace those that JSON cannot hold.
        half: Store floating-point tensors as float16.
        overwrite: Replace the files of an older folder; its README.md, the model card, and files of others stay.

    Raises:
        FileExistsError: If the folder exists and is not empty, without ``overwrite``, or is a file.
        ValueError: If the model was made with a layer's class and ``info`` does not give its name.
    """
    folder = Path(folder)
    if not overwrite:
        check_free(folder)
    m = cast(Any, unwrap(model))
    is_own = has_own_weights(m)
    if not is_own:  # for good, since the file may now be replaced by these weights
        m.origin = replace(m.origin, file="")
    _write(m, folder, is_own, extras, info, half, overwrite)


def _write(
    m: Any,
    folder: Path,
    is_own: bool,
    extras: Mapping[str, Tensor] | None,
    info: Mapping[str, Any] | None,
    half: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a model as ``save_pretrained`` does; ``is_own`` says that tag and licence are those of its weights."""
    registered = ARCHITECTURES[m.pretrained_cfg["architecture"]]
    img_size = tuple(m.patch_embed.img_size)
    actual = Architecture(
        m.embed_dim, len(m.blocks), m.blocks[0].attn.num_heads, m.num_parts, registered.conv_stem, img_size
    )
    differing = {k: v for k, v in asdict(actual).items() if v != getattr(registered, k)}
    patch_size = tuple(m.patch_embed.patch_size)
    if patch_size != to_2tuple(m.origin.model_args.get("patch_size", 16)):
        differing["patch_size"] = list(patch_size)
    info = dict(info or {})
    model_args = {
        **m.origin.model_args,
        **differing,
        "img_size": list(img_size),
        "global_pool": m.global_pool,
        "neck": m.neck,
        **info.pop("model_args", {}),
    }
    if classes := [k for k, v in model_args.items() if callable(v)]:
        raise ValueError(
            f"{' and '.join(classes)}: made with a class, which config.json cannot hold: give timm's name of it, "
            f"save_pretrained(..., info={{'model_args': {{'{classes[0]}': NAME}}}}), or None if it is the default"
        )
    descriptor = dict(zip(DESCRIPTOR, (m.global_pool, m.neck, m.neck != "multi"), strict=True))
    with atomic_folder(folder, overwrite, FILES) as new:
        is_contiguous = all(x.is_contiguous() for x in m.state_dict().values())  # not in channels_last
        saved = m if is_contiguous and not half else deepcopy(m).to(memory_format=torch.contiguous_format)
        save_for_hf(
            saved.half() if half else saved,
            str(new),
            model_config={**descriptor, **info},
            model_args=model_args,
            safe_serialization=True,
        )
        config = json.loads((new / "config.json").read_text(encoding="utf-8"))
        config["model_args"].pop("num_classes", None)  # of timm 1.0.31; it stands at the root, and transformers adds it
        config["pretrained_cfg"]["input_size"] = [m.in_chans, *img_size]  # timm < 1.0.31 keeps that of the tag
        if not is_own:
            config["pretrained_cfg"].update(license="other")
            for key in CLAIMS:
                config["pretrained_cfg"].pop(key, None)
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if extras:
            tensors = {k: v.contiguous() for k, v in extras.items()}
            safetensors.torch.save_file(tensors, new / "extras.safetensors")


def convert_checkpoint(
    source: str | Path,
    folder: str | Path,
    name: str | None = None,
    *,
    network: str = "teacher",
    fusion: str | None = None,
    neck: str | None = None,
    mean_std: str | None = None,
    interpolation: str | None = None,
    img_size: tuple[int, int] | None = None,
    pos_embed_resize: str = "auto",
    num_heads: int | None = None,
) -> LoadReport:
    """Convert an official checkpoint to a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads.

    An argument that is None is read off the tensors, or follows the convention of the layout; a checkpoint of a run
    states it.

    Args:
        source: A checkpoint in any published layout, or of a run of this package.
        folder: Output; must not exist or be empty.
        name: Registered architecture; ``zoo.pull`` takes the file of a tag.
        network: ``teacher`` or ``student``, if the file holds both.
        fusion: Fusion of the descriptor (``global_pool``).
        neck: ``single`` or ``multi`` to put the file's neck into the model, ``''`` to leave it in the extras; by
            default unsupervised models keep it (their feature is taken after it) and supervised ones do not.
        mean_std: ``imagenet`` or ``0.5``.
        interpolation: PIL resampling of test images.
        img_size: Height and width in pixels, if they differ from the file's.
        pos_embed_resize: See ``load.resize_pos_embed``.
        num_heads: Attention heads; tensors do not show them. Needed if the width is not a multiple of 64.

    Returns:
        Report of what became of each tensor.

    Raises:
        CheckpointError: If the file cannot be read or is not a checkpoint of this family.
        FileExistsError: If the folder is not empty.
        ValueError: If an argument has an unknown value.
    """
    source, folder = Path(source), Path(folder)
    check_free(folder)
    if mean_std is not None and mean_std not in STATISTICS:
        raise ValueError(f"mean_std must be one of {tuple(STATISTICS)}, got {mean_std!r}")
    if "." in (name or ""):  # whose licence and accuracy another file has not
        raise ValueError(
            f"expected an architecture without a tag, got {name} (`passreid weights pull TAG --from FILE` takes the "
            "file of a published tag)"
        )
    converted = convert_file(source, network)
    run, notes = converted.run, []
    name, model_args = model_of(converted.architecture, name or run.get("model"), num_heads, source)
    statistics: dict[str, Any] = {"interpolation": "bilinear" if converted.task == "supervised" else "bicubic"}
    if run:
        model_args["num_parts"] = converted.architecture.num_parts
    if "statistics" in run:
        statistics |= run["statistics"]
    elif mean_std is None:
        mean_std = "0.5" if converted.task in ("supervised", "unsupervised") else "imagenet"
        if not converted.task:
            notes.append("mean/std: the tensors do not show them, ImageNet's assumed")
    if mean_std is not None:
        statistics |= dict(zip(("mean", "std"), STATISTICS[mean_std], strict=True))
    if interpolation is not None:
        statistics["interpolation"] = interpolation
    return write_converted(
        converted,
        folder,
        name,
        source=source,
        source_sha256=sha256(source),
        network=network,
        fusion=fusion,
        neck=neck,
        statistics=statistics,
        notes=notes,
        **{"img_size": img_size, "pos_embed_resize": pos_embed_resize, **model_args},
    )


def write_converted(
    converted: Converted,
    folder: Path,
    name: str,
    *,
    source: Path,
    source_sha256: str,
    fusion: str | None,
    neck: str | None,
    statistics: Mapping[str, Any],
    network: str = "teacher",
    notes: Sequence[str] = (),
    **model_args: Any,
) -> LoadReport:
    """Write a converted checkpoint as ``save_pretrained`` writes a model, with extras, provenance and LoadReport.

    Args:
        converted: The checkpoint.
        folder: Output; must not exist or be empty.
        name: Registered model; with a tag, the weights get the tag's licence and description.
        source: File of the checkpoint.
        source_sha256: SHA-256 of that file.
        fusion: Fusion of the descriptor (``global_pool``); None for that of the tag or the layout.
        neck: Neck of the model; ``''`` for none, None for that of the tag or the layout.
        statistics: ``mean``, ``std`` and ``interpolation`` of its images.
        network: Network of the file that was converted, ``teacher`` or ``student``.
        notes: Notes to add to the report.
        **model_args: Further arguments of ``timm.create_model``.

    Returns:
        Report of what became of each tensor.

    Raises:
        CheckpointError: If the tensors do not fit the model.
    """
    size = converted.architecture.img_size
    is_tag = "." in name  # the caller has checked that the file is the tag's
    cfg = {**statistics, "input_size": (3, *size), "file": str(source)}
    model_args = {**model_args, "img_size": model_args.get("img_size") or size, "global_pool": fusion, "neck": neck}
    model = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay={**cfg, "state_dict": converted},
        **model_args,
    )
    report = load_report(model)
    advice = "" if has_checksum(source) else "; a file of this format has no checksum, so that damage does not show"
    report.notes += [*notes, f"SHA-256 of the file: {source_sha256}{advice}"]
    tensors = {**converted.backbone, **converted.neck, **converted.classifier}
    extras = {k: tensors[k] for k in report.extras}
    provenance = {
        "source": source.name,
        "source_sha256": source_sha256,
        "layout": converted.layout,
        "network": network,
    }
    info = {"provenance": provenance, "load_report": replace(report, source=source.name).to_dict()}
    _write(model, folder, is_tag, extras, info)
    return report


def model_of(
    architecture: Architecture, name: str | None, num_heads: int | None, source: Path
) -> tuple[str, dict[str, Any]]:
    """Registered model for the tensors, and the arguments to override: all dimensions if no model fits as it is."""
    width, overrides = architecture.embed_dim, {} if num_heads is None else {"num_heads": num_heads}
    if num_heads is not None and (num_heads < 1 or width % num_heads):
        raise ValueError(f"{source} is {width} wide, which cannot be split over {num_heads} heads")
    if name is not None:
        if name.split(".")[0] not in ARCHITECTURES:
            nearest = did_you_mean(name, ARCHITECTURES)
            raise ValueError(f"unknown model {name!r}; known: {', '.join(ARCHITECTURES)}{nearest}")
        return name, overrides
    if registered := architecture_name(architecture):
        return registered, overrides
    if num_heads is None and width % 64:
        raise ValueError(f"{source} is {width} wide, which no registered model is: give the number of heads")
    kind = (architecture.num_parts > 0, architecture.conv_stem)
    name = next(n for n, a in ARCHITECTURES.items() if (a.num_parts > 0, a.conv_stem) == kind)
    dims = {"embed_dim": width, "depth": architecture.depth, "num_heads": num_heads or architecture.num_heads}
    return name, {**dims, "num_parts": architecture.num_parts}


def check_free(folder: Path) -> None:
    """Raise FileExistsError unless ``folder`` is missing or an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: name another")


def exported_folder(path: Path) -> Path | None:
    """Exported folder at ``path``: the path itself, or the export of a run; None if there is neither."""
    return next((p for p in (path, path / "export") if (p / "config.json").is_file()), None)


def read_config(folder: Path) -> dict[str, Any]:
    """Read and check the ``config.json`` of an exported folder.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not JSON, not of a model of this package, or a field has an impossible value.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json")
    content = read_bytes(file, MAX_CONFIG_BYTES)
    try:
        config = json.loads(content.decode())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file} cannot be read as JSON: {e}") from None
    check_config(config, file)
    return cast(dict[str, Any], config)


def stated_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width in pixels that a ``config.json`` states; timm before 1.0.31 saves a tag's ``input_size``."""
    img_size = config.get("model_args", {}).get("img_size")
    height, width = to_2tuple(img_size or config["pretrained_cfg"]["input_size"][1:])
    return height, width


def is_ours(config: Mapping[str, Any]) -> bool:
    """Whether this package wrote a ``config.json`` last, after whose check the claims of a tag hold for the weights.

    timm's own save does not keep the descriptor's entries, and that of transformers adds its version.
    """
    return config.keys() >= set(DESCRIPTOR) and "transformers_version" not in config
