"""Export: a model as a file for ONNX Runtime, torch.export or torchscript, or as a folder of Roboflow's reid.

model.onnx, model.pt2, model.pt     images in, descriptors out, for any batch size; metadata inside
model.onnx.json ...                 the metadata, the SHA-256 of the file, and its parity with the Embedder
FOLDER/reid_config.json             what ``reid.ReIDModel.from_pretrained`` reads, and the same metadata
FOLDER/weights.safetensors          the state dict of the timm model
"""

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from passreid_models.architectures import IMAGENET
from passreid_models.checkpoints.load import has_own_weights
from passreid_models.checkpoints.local_dir import check_free
from passreid_models.checkpoints.zoo import list_weights
from passreid_models.embed import WHOLE, Embedder
from passreid_models.runtime import atomic_file, atomic_folder, buffered, check_file, sha256, write_json
from passreid_models.synthetic import SyntheticPersons

__all__ = ["FORMATS", "INPUTS", "Parity", "export_model"]

FORMATS = {"onnx": ".onnx", "pt2": ".pt2", "torchscript": ".pt", "roboflow-reid": ""}  # and the suffix of the file
INPUTS = ("normalized", "imagenet", "uint8")
BATCHES = (1, 2, 7)  # a batch of 1 as the example would fix the batch size
LIMIT = 1e-4  # largest difference of a float32 export
MIN_COSINE = 0.999  # of a float16 export
SHAPES = {"images": {0: torch.export.Dim("batch", max=2**20)}}  # torch 2.6 refuses an open range


@dataclass(frozen=True)
class Parity:
    """Differences between the descriptors of an export and the Embedder's, over batches of 1, 2 and 7 drawn persons.

    Descriptors that are longer than 1 are divided by the length of the longest before they are compared.
    """

    max_difference: float
    mean_difference: float
    min_cosine: float

    def __str__(self) -> str:
        batches = f"{', '.join(map(str, BATCHES[:-1]))} and {BATCHES[-1]}"
        return (
            f"parity with PyTorch, batches of {batches}: difference {self.max_difference:.1e} at most, "
            f"{self.mean_difference:.1e} on average; cosine {self.min_cosine:.7f} at least"
        )


class DescriptorNetwork(nn.Module):
    """A model with the input and the output of an export: images ``[B, ...]`` to float32 descriptors ``[B, C]``."""

    scale: Tensor
    shift: Tensor

    def __init__(self, embed: Embedder, input: str, l2: bool, half: bool) -> None:
        super().__init__()
        self.model = embed.model.half() if half else embed.model
        self.is_nhwc, self.l2, self.dtype = input == "uint8", l2, torch.float16 if half else torch.float32
        (mean, std), (own_mean, own_std) = host_statistics(embed, input), host_statistics(embed, "normalized")
        self.register_buffer("scale", (std / own_std).float()[:, None, None])
        self.register_buffer("shift", ((mean - own_mean) / own_std).float()[:, None, None])
        self.is_normalized = bool((mean == own_mean).all() and (std == own_std).all())

    def forward(self, images: Tensor) -> Tensor:
        if self.is_nhwc:
            images = images.permute(0, 3, 1, 2)
        if not self.is_normalized:
            images = images.float() * self.scale + self.shift
        descriptors = self.model(images.to(self.dtype)).float()
        return F.normalize(descriptors, dim=-1) if self.l2 else descriptors


def export_model(
    model: str | os.PathLike[str] | nn.Module | Embedder,
    path: str | Path,
    format: str | None = None,
    *,
    input: str = "normalized",
    half: bool = False,
    l2: bool | None = None,
) -> Parity:
    """Export a model, and compare its descriptors with the Embedder's before the file is kept.

    Args:
        model: A model as ``Embedder`` takes it, or an Embedder, for a fusion of its own.
        path: File to write, with metadata in ``PATH.json`` beside it; a new or empty folder for ``roboflow-reid``.
        format: ``onnx``, ``pt2`` (``torch.export``), ``torchscript`` or ``roboflow-reid``; by default by the suffix.
        input: Images that the export takes, resized: ``normalized``, float ``[B, C, H, W]``, by the model's own mean
            and std; ``imagenet``, the same by those of ImageNet; ``uint8``, RGB ``[B, H, W, 3]`` from 0 to 255.
        half: Store weights and compute in float16; normalised images are float16, descriptors stay float32.
        l2: Whether descriptors are L2-normalised; by default as the Embedder's are.

    Returns:
        Differences between the exported model and the Embedder.

    Raises:
        ValueError: If a library is missing, the format cannot hold the model, or the descriptors differ: by more than
            1e-4, or in float16 by a cosine below 0.999.
        OSError: If the file or its JSON cannot be written, or the folder of ``roboflow-reid`` is not empty.
    """
    path = Path(path)
    format = check_output(path, format)
    if input not in INPUTS:
        raise ValueError(f"input must be one of {', '.join(INPUTS)}, got {input!r}")
    if isinstance(model, Embedder) and model.flip:
        raise ValueError("an export gives the descriptor of one image: make the Embedder without flip")
    if isinstance(model, Embedder) and model.dtype != torch.float32:
        raise ValueError(f"the Embedder has rounded its weights to {model.dtype}: make it in float32, and give half")
    embed = Embedder(model.model if isinstance(model, Embedder) else model, "cpu")
    if embed.crop != WHOLE:
        raise ValueError(
            f"hosts resize images to the whole, and this model crops them: crop_mode, crop_pct are {embed.crop}"
        )
    embed.model.reset_classifier(0)
    embed.l2_normalize = embed.l2_normalize if l2 is None else l2
    if input != "normalized" and embed.input_size[0] != 3:
        raise ValueError(f"images have {embed.input_size[0]} channels here: export them with input='normalized'")
    pixels = _drawn_pixels(embed)
    mean, std = host_statistics(embed, input)
    images = pixels if input == "uint8" else ((pixels / 255 - mean) / std).permute(0, 3, 1, 2).float()
    mean, std = host_statistics(embed, "normalized")
    expected = embed(((pixels / 255 - mean) / std).permute(0, 3, 1, 2).float(), progress=False)
    metadata = _metadata(embed, input, half)
    if format == "roboflow-reid":
        return _export_roboflow(embed, path, input, half, metadata, images, expected)

    images = images.half() if half and images.is_floating_point() else images
    network = DescriptorNetwork(embed, input, embed.l2_normalize, half).eval()
    with atomic_file(path) as temporary:
        with torch.inference_mode(False), torch.no_grad(), _quiet():
            WRITERS[format](network, images[:2].contiguous(), temporary, metadata)
            parity = _compare(LOADERS[format](temporary), images, expected, half)
        beside = {**metadata, "format": format, "sha256": sha256(temporary), "parity": asdict(parity)}
        write_json(_json_of(path), beside)  # before the model is renamed: on a full disk there is neither
    return parity


def host_statistics(embed: Embedder, input: str) -> tuple[Tensor, Tensor]:
    """Mean and std ``[C]``, float64, by which the host normalises pixels from 0 to 1 (``uint8``: from 0 to 255)."""
    channels, cfg = embed.input_size[0], embed.model.pretrained_cfg
    if input == "uint8":
        return torch.zeros(channels, dtype=torch.float64), torch.full((channels,), 1 / 255, dtype=torch.float64)
    mean, std = IMAGENET if input == "imagenet" else (cfg["mean"], cfg["std"])
    repeats = -(-channels // len(mean))
    return (
        torch.tensor(list(mean) * repeats, dtype=torch.float64)[:channels],
        torch.tensor(list(std) * repeats, dtype=torch.float64)[:channels],
    )


def check_output(path: Path, format: str | None) -> str:
    """Check that the output can be written, before the work begins, and return its format, by the suffix if None.

    Raises:
        ValueError: If the suffix is not that of the format, or a library is missing.
        OSError: If a file cannot be written there, or the folder of ``roboflow-reid`` is not empty.
    """
    if format is None:
        format = next((name for name, suffix in FORMATS.items() if suffix and suffix == path.suffix), None)
    if format not in FORMATS:
        suffixes = ", ".join(filter(None, FORMATS.values()))
        raise ValueError(f"{path}: give a format ({', '.join(FORMATS)}) or a suffix ({suffixes})")
    if FORMATS[format] and path.suffix != FORMATS[format]:
        raise ValueError(f"{path}: a file of {format} ends in {FORMATS[format]}")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if format == "onnx" and not find_spec(name)]
    if format == "onnx" and torch.__version__ < "2.8":
        missing.append("torch 2.8 or newer")
    if missing:
        raise ValueError(f'ONNX needs {", ".join(missing)}: pip install ".[export]" in a clone of passreid-models')
    if format == "roboflow-reid":
        check_free(path)
    else:
        check_file(path)
        check_file(_json_of(path))
    return format


def _json_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _drawn_pixels(embed: Embedder) -> Tensor:
    """Drawn persons at the model's size, uint8 ``[7, H, W, C]``."""
    channels, *size = embed.input_size
    persons = SyntheticPersons(max(BATCHES), 1, 1, size=(size[0], size[1]))
    pixels = torch.from_numpy(np.stack([np.asarray(persons[i][0]) for i in range(len(persons))]))
    return pixels[..., [i % 3 for i in range(channels)]]


def _metadata(embed: Embedder, input: str, half: bool) -> dict[str, Any]:
    from passreid_models import __version__

    model, (channels, *size) = embed.model, embed.input_size
    cfg = model.pretrained_cfg
    mean, std = (x.tolist() for x in host_statistics(embed, input))
    is_own = has_own_weights(model)
    return {
        "model": f"{cfg['architecture']}.{cfg['tag']}" if is_own and cfg.get("tag") else cfg["architecture"],
        "weights_sha256": embed.fingerprint["weights"],
        "license": (is_own and cfg.get("license")) or "other",
        "input": input,
        "input_dtype": "uint8" if input == "uint8" else "float16" if half else "float32",
        "input_shape": ["batch", *size, channels] if input == "uint8" else ["batch", channels, *size],
        "mean": None if input == "uint8" else mean,
        "std": None if input == "uint8" else std,
        "resize": "squash",
        "interpolation": cfg["interpolation"],
        "output_shape": ["batch", embed.dim],
        "fusion": model.global_pool,
        "neck": model.neck,
        "l2_normalize": embed.l2_normalize,
        "precision": "float16" if half else "float32",
        "package": f"passreid-models {__version__}",
    }


def _compare(run: Callable[[Tensor], Tensor], images: Tensor, expected: Tensor, half: bool) -> Parity:
    """Compare descriptors with the expected ones ``[7, C]``; raise ValueError if they differ too much."""
    scale = expected.norm(dim=1).max().clamp_min(1)
    actual = torch.cat([run(images[:batch]).float() for batch in BATCHES])
    expected = torch.cat([expected[:batch] for batch in BATCHES])
    difference = (actual - expected).abs() / scale
    cosine = F.cosine_similarity(actual.double(), expected.double())
    parity = Parity(difference.max().item(), difference.mean().item(), cosine.min().item())
    # the condition holds for NaN neither
    if not (parity.min_cosine >= MIN_COSINE if half else parity.max_difference <= LIMIT):
        allowed = f"a cosine of {MIN_COSINE}" if half else f"a difference of {LIMIT:g}"
        raise ValueError(f"nothing is written: the export differs by more than {allowed}: {parity}")
    return parity


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the exporters say of their own insides."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ---- Formats


def _write_onnx(network: nn.Module, example: Tensor, path: Path, metadata: dict[str, Any]) -> None:
    program: Any = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["descriptors"],
        dynamic_shapes=SHAPES,
    )
    values = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    program.model.metadata_props.update(values)
    program.save(path, external_data=False)


def _load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["descriptors"], {"images": images.numpy()})[0])


def _write_pt2(network: nn.Module, example: Tensor, path: Path, metadata: dict[str, Any]) -> None:
    program = torch.export.export(network, (example,), dynamic_shapes=SHAPES)
    with buffered(path) as buffer:
        torch.export.save(program, buffer, extra_files={"passreid.json": json.dumps(metadata)})


def _load_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()


def _write_torchscript(network: nn.Module, example: Tensor, path: Path, metadata: dict[str, Any]) -> None:
    traced = torch.jit.trace(network, example, check_trace=False)
    with buffered(path) as buffer:
        torch.jit.save(traced, buffer, _extra_files={"passreid.json": json.dumps(metadata)})


def _load_torchscript(path: Path) -> Callable[[Tensor], Tensor]:
    return torch.jit.load(str(path))


WRITERS = {"onnx": _write_onnx, "pt2": _write_pt2, "torchscript": _write_torchscript}
LOADERS = {"onnx": _load_onnx, "pt2": _load_pt2, "torchscript": _load_torchscript}


def _export_roboflow(
    embed: Embedder, folder: Path, input: str, half: bool, metadata: dict[str, Any], images: Tensor, expected: Tensor
) -> Parity:
    """Write the folder that ``reid.ReIDModel.from_pretrained`` takes; its cosine distance normalises descriptors."""
    interpolation = metadata["interpolation"]
    if input != "normalized" or half:
        raise ValueError("roboflow-reid normalises images itself, in float32: export without an input and without half")
    if embed.input_size[0] != 3 or interpolation not in ("bilinear", "bicubic", "nearest"):
        raise ValueError(
            "roboflow-reid has RGB images and bilinear, bicubic or nearest interpolation alone; this model has "
            f"{embed.input_size[0]} channels and {interpolation}"
        )
    if not embed.l2_normalize:
        raise ValueError("roboflow-reid compares by cosine, and these descriptors are not normalised: export with l2")
    state = {name: tensor.contiguous() for name, tensor in embed.model.state_dict().items()}
    name = _name_of_default(embed.model)
    config = {
        "architecture": f"timm:{name}",
        "preprocessing": {
            "input_size": embed.input_size[1:],
            "mean": metadata["mean"],
            "std": metadata["std"],
            "interpolation": interpolation,
            "to_rgb": True,
            "resize_mode": "stretch",
        },
    }
    with atomic_folder(folder) as new:
        save_file(state, new / "weights.safetensors", {"format": "pt", "passreid": json.dumps(metadata)})
        model = timm.create_model(name, num_classes=0).eval()
        model.load_state_dict(load_file(new / "weights.safetensors"))
        with torch.inference_mode():
            parity = _compare(lambda images: F.normalize(model(images)), images, expected, half)
        write_json(new / "reid_config.json", {**config, "passreid": {**metadata, "parity": asdict(parity)}})
    return parity


def _name_of_default(model: Any) -> str:
    """Name that gives this model without further arguments; raise ValueError if none does."""
    architecture, size = model.pretrained_cfg["architecture"], tuple(model.patch_embed.img_size)
    form = (model.global_pool, model.neck, size)
    tags = [w.name for w in list_weights(architecture) if (w.fusion, w.model_neck, w.input_size) == form]
    for name in (architecture, *tags):
        if _shape(timm.create_model(name, num_classes=0)) == _shape(model):
            return name
    raise ValueError(
        f"roboflow-reid makes models by name alone, and no name of {architecture} gives this one: fusion "
        f"{model.global_pool}, neck {model.neck or 'none'}, {size[0]}x{size[1]} pixels, {len(model.blocks)} blocks"
    )


def _shape(model: Any) -> tuple[Any, ...]:
    tensors = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return tensors, model.global_pool, model.neck, model.patch_embed.img_size, model.blocks[0].attn.num_heads
