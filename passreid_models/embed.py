"""Images in, descriptors out: files, folders, PIL images, arrays, tensors, and boxes of a video frame."""

import csv
import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from tqdm import tqdm

from passreid_models.architectures import DEFAULT_MODEL
from passreid_models.checkpoints.names import find_model
from passreid_models.data.images import ImageError, ImageLike, find_images, open_image, reason
from passreid_models.device import pick_device
from passreid_models.runtime import atomic_file, check_file, check_workers, hash_tensors, num_cores, unwrap

__all__ = ["Embedder", "finite_advice", "has_direction", "is_not_finite", "save_features"]

NOT_FINITE = "the descriptor is not finite"  # or zero, as after an underflow
FORMATS = (".safetensors", ".npz", ".csv")
MAX_NAMES = 99_000_000  # bytes; the header of a safetensors file, which holds them, has 100 MB
PREFETCH = 2  # batches that are decoded ahead of the model
MAX_BOX_COLUMNS = 8  # longer rows have another order: MOT's begin with frame and track
WHOLE = ("squash", 1.0)  # crop_mode and crop_pct of a model that resizes images to the whole
_logger = logging.getLogger(__name__)


class Embedder:
    """Descriptors of person images by a PASS model.

    Interpolation, statistics and crop of the preprocessing come from the model's pretrained cfg, the size from the
    model. Models of this package crop nothing; one that does is used as it says, with a warning.

    Examples:
        >>> embed = Embedder("pass_vit_small_patch16")
        >>> descriptors = embed(["a.jpg", "folder/", pil_image, array])  # [N, 768]
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module = DEFAULT_MODEL,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int = 64,
        fusion: str | None = None,
        flip: bool = False,
        workers: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        """
        Args:
            model: Name of a model with weights: an architecture, ``architecture.tag``, ``tag``, ``hf-hub:ORG/NAME``, an
                exported folder, a run, or a checkpoint file; or a model, compiled or in ``DistributedDataParallel``
                too, which is left as it is.
            device: Device, as ``pick_device`` takes it; by default the accelerator, if there is one.
            dtype: Dtype of weights and activations, such as ``torch.bfloat16``; descriptors are always float32.
            batch_size: Images per batch.
            fusion: ``cat``, ``mean``, ``parts`` or ``token`` instead of the weights' own.
            flip: Average with the mirrored image's descriptor.
            workers: Threads that decode images; one per core, 8 at most, by default.
            size: Height and width of the images instead of the weights' own; positions are resized (of a model that is
                given, by its ``set_input_size``).

        Raises:
            ValueError: If ``batch_size`` is less than 1, ``workers`` too many for the cores, the model is not of
                this package or is unpooled, ``size`` is no multiple of 16, or the device is not available.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        if size is not None and [length % 16 == 0 < length for length in np.ravel(size)] != [True, True]:
            raise ValueError(f"size must be height and width in multiples of 16, got {size}")
        self.workers = check_workers(workers or 0) or min(8, num_cores())
        self.device, self.dtype = pick_device(device), dtype or torch.float32
        if isinstance(model, nn.Module):
            network: Any = deepcopy(unwrap(model))
        else:
            network = find_model(os.fspath(model)).create(num_classes=0, img_size=size, global_pool=fusion)
        if not hasattr(network, "forward_parts"):
            raise ValueError(f"{type(network).__name__} is no PASS model: it has no part tokens to embed with")
        if not hasattr(network, "pretrained_cfg"):
            raise ValueError("the model has no pretrained_cfg, its preprocessing: make it with timm.create_model")
        if fusion is not None and not network.global_pool and network.neck:
            raise ValueError("the model is unpooled and holds no neck, which a fusion would need: create it with one")
        if fusion is not None:
            network.reset_classifier(0, fusion)
        if size is not None and tuple(size) != tuple(network.patch_embed.img_size):
            network.set_input_size(size)
        if not network.global_pool:
            raise ValueError("the model is unpooled (global_pool='') and gives no descriptors: choose a fusion")
        # before they are rounded: descriptors of one network in two dtypes can be compared
        self._weights = "" if self.dtype == torch.float32 else _hash_weights(network)
        self.model: Any = network.eval().requires_grad_(False).to(self.device, self.dtype)
        self.batch_size, self.flip = batch_size, flip
        self.input_size: tuple[int, int, int] = (self.model.in_chans, *self.model.patch_embed.img_size)
        # the cfg of a model made with img_size= has another size
        self.data_config = resolve_data_config({"input_size": self.input_size}, model=self.model)
        if self.crop != WHOLE:  # timm's default where a config.json says nothing is the middle, 0.875 of each side
            _logger.warning(
                f"{self.name} crops images, which cuts off heads and feet: crop_mode {self.crop[0]}, crop_pct "
                f"{self.crop[1]:g}; if it was not trained so, its configuration needs crop_mode squash and crop_pct 1"
            )
        self.transform = create_transform(**self.data_config)
        # the published unsupervised multi-neck feature is compared unnormalised
        self.l2_normalize = self.model.neck != "multi"

    @property
    def dim(self) -> int:
        """Width C of a descriptor."""
        return self.model.head_hidden_size

    @property
    def metric(self) -> str:
        """Metric that descriptors are compared by: ``cosine``, or ``euclidean`` if they are not L2-normalised."""
        return "cosine" if self.l2_normalize else "euclidean"

    @property
    def name(self) -> str:
        """Architecture and tag of the model."""
        cfg = self.model.pretrained_cfg
        return ".".join(filter(None, (cfg["architecture"], cfg.get("tag"))))

    @property
    def crop(self) -> tuple[str, float]:
        """``crop_mode`` and ``crop_pct`` of the model; ``("squash", 1.0)`` where images are resized to the whole."""
        return self.data_config["crop_mode"], self.data_config["crop_pct"]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that two Embedders must share for their descriptors to be comparable, as JSON has it.

        ``weights`` is the SHA-256 of the network's float32 tensors, without the classifier's. Name, device, dtype,
        ``flip`` and ``batch_size`` may differ; code of your own, such as a subclass or a hook, is not seen.
        """
        self._weights = self._weights or _hash_weights(self.model)
        return {
            "weights": self._weights,
            "heads": [block.attn.num_heads for block in self.model.blocks],
            "fusion": self.model.global_pool,
            "neck": self.model.neck,
            "size": list(self.input_size[1:]),
            "mean": list(self.data_config["mean"]),
            "std": list(self.data_config["std"]),
            "interpolation": self.data_config["interpolation"],
            "crop": list(self.crop),
        }

    def __repr__(self) -> str:
        size = "x".join(map(str, self.input_size[1:]))
        return f"Embedder({self.name}, {size}, fusion={self.model.global_pool}, width={self.dim}, device={self.device})"

    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        parts: bool = False,
        bgr: bool = False,
        errors: dict[int, str] | None = None,
        progress: bool = True,
    ) -> Any:
        """Compute the descriptors of images, in the order given.

        Args:
            images: One image or many: paths; folders (their images, recursively, in the order of ``find_images``); PIL
                images; uint8 arrays ``[H, W, 3]`` or ``[H, W]``; uint8 tensors ``[3, H, W]``; float tensors
                ``[3, H, W]`` or ``[B, 3, H, W]``, which are taken as preprocessed.
            parts: Return the part tokens too.
            bgr: Arrays have the channel order of OpenCV.
            errors: If given, an image that is unreadable, or whose descriptor is zero or not finite, gets a row of NaN
                and an entry ``{row: reason}`` here; otherwise it raises.
            progress: Show a bar, on a terminal, if it takes more than a few seconds.

        Returns:
            Descriptors, float32 ``[N, C]`` on the CPU, L2-normalised except with a multi neck; with ``parts``
            a pair of these and the L2-normalised parts ``[N, P, D]``.

        Raises:
            ImageError: If an image cannot be read, or its descriptor or a part asked for is not finite, and ``errors``
                is None.
            ValueError: If the model has no parts that could be returned.
            FileNotFoundError: If a folder holds no image.
        """
        if parts and not self.model.num_parts:
            raise ValueError(f"{self.name} has no part tokens")
        items = self.items(images)
        descriptors = torch.empty(len(items), self.dim)
        part_tokens = torch.empty(len(items) if parts else 0, self.model.num_parts, self.model.embed_dim)
        bar = tqdm(total=len(items), unit="img", delay=3, disable=None if progress else True)
        row = 0
        with bar, torch.inference_mode():
            for batch in self._batches(items, bgr):
                block, part_block = descriptors[row : row + len(batch)], part_tokens[row : row + len(batch)]
                good = [i for i, x in enumerate(batch) if isinstance(x, Tensor)]
                if good and (errors is not None or len(good) == len(batch)):
                    x = torch.stack([x for x in batch if isinstance(x, Tensor)])
                    block[good], tokens, finite = self._forward(x, parts)
                    if parts:
                        part_block[good] = tokens
                    for i in (i for i, is_finite in zip(good, finite.tolist(), strict=True) if not is_finite):
                        advice = finite_advice(self.dtype)
                        batch[i] = ImageError(f"{_name(items[row + i])}: {NOT_FINITE}: {advice}")
                for i, failure in enumerate(batch):
                    if isinstance(failure, ImageError):
                        if errors is None:
                            raise failure
                        errors[row + i] = str(failure)
                        block[i] = torch.nan
                        part_block[i : i + 1] = torch.nan
                row += len(batch)
                bar.update(len(batch))
        return (descriptors, part_tokens) if parts else descriptors

    def preprocess(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Decode, resize and normalise images, given as in a call: the model's input, float32 ``[N, 3, H, W]``, CPU.

        Raises:
            ImageError: If an image cannot be read.
            FileNotFoundError: If a folder holds no image.
        """
        items = self.items(images)
        rows = torch.empty(len(items), *self.input_size)
        for i, x in enumerate(x for batch in self._batches(items, bgr=False) for x in batch):
            if isinstance(x, ImageError):
                raise x
            rows[i] = x
        return rows

    def crops(
        self,
        frame: np.ndarray | Image.Image,
        boxes: Any,
        *,
        bgr: bool = False,
        parts: bool = False,
        errors: dict[int, str] | None = None,
    ) -> Any:
        """Compute the descriptors of the persons in a video frame.

        Args:
            frame: ``[H, W, 3]`` uint8 or a PIL image.
            boxes: ``[N, 4]`` x1, y1, x2, y2 in pixels; clipped to the frame. Up to four more columns, such as the
                scores, classes and numbers of detectors and trackers, are ignored.
            bgr: The frame has the channel order of OpenCV.
            parts: Return the part tokens too.
            errors: If given, a box without a pixel inside the frame, or whose descriptor is zero or not finite, gets a
                row of NaN and an entry ``{row: reason}`` here; otherwise it raises.

        Returns:
            As for a call of the Embedder.

        Raises:
            ValueError: If the boxes are not ``[N, 4]`` to ``[N, 8]``, or one has no pixel inside the frame and
                ``errors`` is None.
        """
        image = open_image(frame, bgr)
        corners = np.asarray(boxes.detach().cpu() if isinstance(boxes, Tensor) else boxes, dtype=float)
        if corners.size and (corners.ndim != 2 or not 4 <= corners.shape[1] <= MAX_BOX_COLUMNS):
            raise ValueError(
                f"boxes must be [N, 4], x1, y1, x2, y2, with up to {MAX_BOX_COLUMNS - 4} more columns; got the shape "
                f"{corners.shape}"
            )
        corners = corners[:, :4] if corners.size else np.empty((0, 4))
        limits = np.array([image.width, image.height] * 2)
        with np.errstate(invalid="ignore"):
            pixels = np.nan_to_num(np.clip(np.round(corners), 0, limits)).astype(int)
        has_pixels = ~np.isnan(corners).any(1) & (pixels[:, 0] < pixels[:, 2]) & (pixels[:, 1] < pixels[:, 3])
        items: list[Image.Image | ImageError] = [
            image.crop(tuple(box))
            if has_pixels[i]
            else ImageError(
                f"box {i} {corners[i].tolist()} has no pixel inside the frame of {image.width}x{image.height}; boxes "
                "are x1, y1, x2, y2"
            )
            for i, box in enumerate(pixels.tolist())
        ]
        if errors is None and not has_pixels.all():
            raise next(item for item in items if isinstance(item, ImageError))
        return self(items, parts=parts, errors=errors, progress=False)  # type: ignore[arg-type]

    def items(self, images: ImageLike | Sequence[ImageLike]) -> list[Any]:
        """Single images, one for each descriptor: the files of folders, the rows of batched tensors.

        Args:
            images: As for a call of the Embedder.

        Raises:
            FileNotFoundError: If a folder holds no image.
        """
        return list(self._flatten([images] if isinstance(images, ImageLike) else images))

    def _forward(self, x: Tensor, with_parts: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return descriptors, parts, and whether those of each image are finite, bool ``[B]``."""
        x = x.to(self.device, self.dtype, non_blocking=True)
        tokens = self.model.forward_tokens(x)
        descriptors = self.model.forward_head(tokens, pre_logits=True)
        part_rows = slice(1, 1 + self.model.num_parts)
        parts = tokens[:, part_rows]
        if self.flip:
            mirrored = self.model.forward_tokens(x.flip(-1))
            descriptors = (descriptors + self.model.forward_head(mirrored, pre_logits=True)) / 2
            parts = parts + mirrored[:, part_rows]
        descriptors, parts = descriptors.float(), parts.float()
        finite = has_direction(descriptors)
        if with_parts:
            finite &= has_direction(parts).all(dim=1)
        if self.l2_normalize:
            descriptors = F.normalize(descriptors, dim=-1)
        return descriptors.cpu(), F.normalize(parts, dim=-1).cpu(), finite.cpu()

    def _flatten(self, images: Any) -> Iterator[Any]:
        """Yield single images: the files of folders, the rows of batched tensors."""
        for image in images:
            if isinstance(image, str | os.PathLike) and os.path.isdir(image):
                yield from find_images(image)
            elif isinstance(image, Tensor) and image.ndim == 4:
                yield from image
            else:
                yield image

    def _batches(self, items: list[Any], bgr: bool) -> Iterator[list[Tensor | ImageError]]:
        """Yield preprocessed batches; threads decode the next ones while the model works."""
        pending: deque[list[Future[Tensor | ImageError]]] = deque()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="passreid-decode")
        try:
            for start in range(0, len(items), self.batch_size):
                batch = items[start : start + self.batch_size]
                pending.append([pool.submit(self._load, item, bgr) for item in batch])
                if len(pending) > PREFETCH:
                    yield [future.result() for future in pending.popleft()]
            while pending:
                yield [future.result() for future in pending.popleft()]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, item: Any, bgr: bool) -> Tensor | ImageError:
        if isinstance(item, ImageError):  # a box outside its frame
            return item
        channels = self.input_size[0]
        try:
            if isinstance(item, Tensor) and item.is_floating_point():
                if tuple(item.shape) != self.input_size:
                    expected = "x".join(map(str, self.input_size))
                    raise ValueError(f"float tensors are taken as preprocessed, {expected}; got {tuple(item.shape)}")
                return item.float().cpu()
            if channels != 3:
                raise ValueError(f"the model takes images of {channels} channels: give float tensors, preprocessed")
            return self.transform(open_image(item, bgr))
        except Exception as e:  # Pillow's decoders raise OSError, SyntaxError, struct.error ...
            return ImageError(f"{_name(item)}: {reason(e)}")


def _hash_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    hash_tensors(digest, {k: v.float() for k, v in model.state_dict().items() if not k.startswith("head.")})
    return digest.hexdigest()


def _name(item: Any) -> str:
    return os.fspath(item) if isinstance(item, str | os.PathLike) else f"a {type(item).__name__}"


def has_direction(x: Tensor) -> Tensor:
    """Whether the length of each vector ``[..., C]`` is finite and not 0, bool ``[...]``: others have no cosine."""
    length = torch.linalg.vector_norm(x, dim=-1)
    return length.isfinite() & (length > 0)


def is_not_finite(error: str) -> bool:
    """Whether an entry of the Embedder's ``errors`` is of an image that can be read, whose descriptor is not finite."""
    return f": {NOT_FINITE}: " in error


def finite_advice(dtype: torch.dtype) -> str:
    """Advice to a user whose descriptors are not finite in this dtype."""
    if dtype == torch.float16:
        return "compute in float32 or bfloat16 (--dtype)"
    return f"{str(dtype).removeprefix('torch.')} overflows, or weights or pixels are not finite; try other weights"


def save_features(path: str | Path, names: Sequence[str], descriptors: Tensor, parts: Tensor | None = None) -> None:
    """Write descriptors with the names of their images; the suffix chooses the format.

    ``.safetensors``: tensors ``descriptors`` ``[N, C]`` and ``parts`` ``[N, P, D]``, ``names`` a JSON list in the
    metadata. ``.npz``: the same as arrays. ``.csv``: one row per image, the name first, without parts.

    Raises:
        ValueError: If the suffix is none of these, parts are given for a CSV file, the names are too long for the
            metadata of a safetensors file, or there is not one name per row.
    """
    path = Path(path)
    check_format(path, parts is not None)
    check_names(path, names)
    tensors = {"descriptors": descriptors.contiguous()} | ({} if parts is None else {"parts": parts.contiguous()})
    for key, tensor in tensors.items():
        if len(tensor) != len(names):
            raise ValueError(f"{len(names)} names for {len(tensor)} rows of {key}")
    with atomic_file(path) as temporary:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(tensors, temporary, metadata={"names": json.dumps(list(names))})
        elif path.suffix == ".npz":
            arrays: dict[str, Any] = {key: tensor.numpy() for key, tensor in tensors.items()}
            np.savez(temporary, names=np.array(names, dtype=str), **arrays)
        else:
            with temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                writer = csv.writer(file)
                writer.writerow(["name", *(f"f{i}" for i in range(descriptors.shape[1]))])
                # row by row, since a Python float takes 8 times as much
                rows = (row.tolist() for row in descriptors.numpy())
                writer.writerows([name, *map(repr, row)] for name, row in zip(names, rows, strict=True))


def check_format(path: Path, parts: bool) -> None:
    """Raise ValueError or OSError if ``save_features`` cannot write this file; called before the work begins."""
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: features are written as one of {', '.join(FORMATS)}")
    if parts and path.suffix == ".csv":
        raise ValueError(f"{path}: parts do not fit into a CSV file, use .safetensors or .npz")
    check_file(path)


def check_names(path: Path, names: Sequence[str]) -> None:
    """Raise ValueError if the metadata of this file cannot hold the names; called before the work begins."""
    if path.suffix == ".safetensors" and len(json.dumps(json.dumps(list(names)))) > MAX_NAMES:
        raise ValueError(
            f"{path}: a safetensors file has 100 MB for names, and those of {len(names):,} images take more; use .npz"
        )
