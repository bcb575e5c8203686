"""A gallery as one HTML page that needs no network: a map of its descriptors, with thumbnails, labels and neighbours.

gallery_page.html    the page, into which the data are written as JSON
"""

import base64
import json
import logging
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from passreid_models.data.datasets import ReIDDataset, Split, open_dataset, open_images
from passreid_models.data.images import ImageError, count
from passreid_models.embed import Embedder
from passreid_models.evaluation.pictures import thumbnail
from passreid_models.retrieval import rank
from passreid_models.runtime import atomic_file, check_file

__all__ = ["write_gallery_page"]

MAX_IMAGES = 4000  # about 3 KB each
NEIGHBOURS = 8
_logger = logging.getLogger(__name__)


def write_gallery_page(data: str | Path, file: str | Path, embed: Embedder, errors: list[str] | None = None) -> str:
    """Write a page with a map of the gallery's images: by PCA, and by UMAP where umap-learn is installed.

    Images are those of the gallery, or else of training, or else of the queries, without junk; of more than 4,000, as
    many of them at equal distances. A folder of unlabelled images will do.

    Args:
        data: Dataset, as ``open_dataset`` takes it, or a folder of images.
        file: ``.html`` file to write.
        embed: Embedder of the descriptors.
        errors: If given, the reasons for images that are left out are added to it; otherwise the first is raised.

    Returns:
        A line that describes the page.

    Raises:
        ImageError: If no image has a descriptor, or one has none and ``errors`` is None.
        OSError: If ``data`` does not exist, or the file cannot be written.
        ValueError: If the data are in no known layout, or the file is not named ``.html``.
    """
    if Path(file).suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{file}: name a page such as gallery.html")
    check_file(file)
    dataset = _open(data)
    split = next(split for split in (dataset.gallery, dataset.train, dataset.query) if len(split))
    rows = np.flatnonzero(split.pids != -1) if (split.pids != -1).any() else np.arange(len(split))
    total, rows = len(rows), rows[np.linspace(0, len(rows) - 1, min(len(rows), MAX_IMAGES)).round().astype(int)]
    failures: dict[int, str] | None = None if errors is None else {}
    features = embed([split.paths[i] for i in rows], errors=failures)
    if failures:
        assert errors is not None
        errors += failures.values()
        if len(failures) == len(rows):
            raise ImageError(f"no image of {data} has a descriptor; the first: {next(iter(failures.values()))}")
        kept = np.setdiff1d(np.arange(len(rows)), list(failures))
        rows, features = rows[kept], features[torch.from_numpy(kept)]
    shown = f"{len(rows):,} of {count(total, 'image')}" if len(rows) < total else count(total, "image")
    page = {
        "title": dataset.recipe or dataset.root.name,
        "note": f"{shown}, {embed!r}",
        "similarity": "cosine" if embed.metric == "cosine" else "negative squared distance",
        "maps": [{"name": name, "points": points} for name, points in _project(features, embed.metric).items()],
        "images": _images(dataset, split.take(rows), features, embed),
    }
    # no "<" in the data: it could end the script element that holds them
    text = json.dumps(page, separators=(",", ":")).replace("<", "\\u003c")
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    with atomic_file(file) as temporary:
        temporary.write_text(template.replace("/*DATA*/", text), encoding="utf-8")
    return f"{shown} -> {file} ({Path(file).stat().st_size / 1e6:.1f} MB)"


def _open(data: str | Path) -> ReIDDataset:
    try:
        return open_dataset(data)
    except ValueError as e:
        if not os.path.isdir(data) or not len((dataset := open_images(data)).train):
            raise
        reason = str(e).partition("; expected ")[0]
        _logger.warning(f"the page has no identities: {reason}")
        return dataset


def _images(dataset: ReIDDataset, split: Split, features: Tensor, embed: Embedder) -> list[dict[str, Any]]:
    """Name, identity (empty: none), camera (empty: unknown), JPEG and nearest neighbours of each image."""
    ranking = rank(features, features, NEIGHBOURS + 1, embed.metric)
    with ThreadPoolExecutor(embed.workers) as pool:
        jpegs = list(pool.map(_jpeg, split.paths))
    images = []
    for i, (path, pid, camid) in enumerate(zip(split.paths, split.pids.tolist(), split.camids.tolist(), strict=True)):
        pairs = zip(ranking.indices[i].tolist(), ranking.similarities[i].tolist(), strict=True)
        near = [(j, round(similarity, 4)) for j, similarity in pairs if j != i][:NEIGHBOURS]
        label, camera = dataset.pid_names[pid] if pid > 0 else "", dataset.camera_names[camid]
        images.append(dict(name=dataset.relative(path), pid=label, cam=camera, jpeg=jpegs[i], near=near))
    return images


def _jpeg(path: Path) -> str:
    file = BytesIO()
    thumbnail(path).save(file, "JPEG", quality=75)
    return base64.b64encode(file.getvalue()).decode()


def _project(features: Tensor, metric: str) -> dict[str, list[list[float]]]:
    """Coordinates of the images ``[N, 2]`` within -1 to 1, by the name of the projection."""
    x = features.double() - features.double().mean(0)
    _, s, axes = torch.linalg.svd(x, full_matrices=False)
    axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(1, keepdim=True)).sign()  # one of the two signs
    share = float((s[:2] ** 2).sum() / (s**2).sum().clamp_min(1e-30))
    points = torch.zeros(len(x), 2, dtype=torch.float64)
    points[:, : len(axes)] = x @ axes.T
    maps = {f"PCA ({100 * share:.0f} % variance)": points.numpy()}
    if (umap := _umap(features, metric)) is not None:
        maps["UMAP"] = umap
    for name, p in maps.items():
        p = p - (p.max(0) + p.min(0)) / 2
        maps[name] = p / (np.abs(p).max() or 1)
    return {name: p.round(4).tolist() for name, p in maps.items()}


def _umap(features: Tensor, metric: str) -> np.ndarray | None:
    """UMAP ``[N, 2]``; None where umap-learn is not installed, or for fewer images than it has neighbours."""
    neighbours = 15
    if len(features) <= neighbours:
        return None
    try:
        from umap import UMAP
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a seed means one thread
        return UMAP(n_neighbors=neighbours, metric=metric, random_state=0).fit_transform(features.numpy())
