"""A model on a dataset: descriptors, then the metrics of its ranking, as a table and as JSON.

    dataset = open_dataset("Market-1501-v15.09.15")
    print(evaluate_dataset(dataset, make_embedder("pass_vit_small_patch16.lup_market1501"), rerank=True))

Junk images are left out before anything is computed, as the published code does: without re-ranking they would not
count anyway, with it they would be neighbours.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from passreid_models.checkpoints.names import find_model
from passreid_models.data.datasets import ReIDDataset, open_dataset
from passreid_models.device import process_group
from passreid_models.embed import Embedder
from passreid_models.evaluation.extract import extract
from passreid_models.evaluation.feature_cache import FeatureCache, weights_key
from passreid_models.evaluation.pictures import draw_evaluation
from passreid_models.evaluation.report import Evaluation, Retrieved, percent
from passreid_models.figure import require_matplotlib
from passreid_models.runtime import atomic_file, on_first, world

_logger = logging.getLogger(__name__)

__all__ = ["Evaluation", "evaluate_dataset", "evaluate_model", "make_embedder", "score"]


def evaluate_model(
    data: str | Path,
    model: str,
    *,
    device: str | torch.device | None = None,
    rerank: bool = False,
    per_camera: bool = False,
    cache: bool | str | Path = True,
    json_file: str | Path | None = None,
    pictures: str | Path | None = None,
    **options: Any,
) -> Evaluation | None:
    """What ``passreid eval`` does; under ``torchrun`` its processes share the images.

    Args:
        data: As ``open_dataset`` takes it.
        model: As ``make_embedder`` takes it.
        device: As of ``process_group``.
        rerank: Also after k-reciprocal re-ranking.
        per_camera: Also mAP and Rank-1 for the queries of each camera.
        cache: As in ``evaluate_dataset``.
        json_file: Where ``Evaluation.to_dict()`` is written to.
        pictures: Folder for those of ``pictures.draw_evaluation``.
        **options: Of ``make_embedder``.

    Returns:
        The evaluation in the first process, None in the others.

    Raises:
        ValueError: If the data, the model or an option is not right, no query has a match, or pictures are wanted and
            matplotlib is not installed.
        FileNotFoundError: If the data or the weights are not there.
    """
    if pictures is not None:
        require_matplotlib("pictures")
    with process_group(device) as own_device:
        dataset = open_dataset(data).require("query", "gallery")
        embed = make_embedder(model, device=own_device, **options)
        found = evaluate_dataset(dataset, embed, name=model, rerank=rerank, per_camera=per_camera, cache=cache)
    if found and json_file is not None:
        with atomic_file(json_file) as temporary:
            temporary.write_text(json.dumps(found.to_dict(), indent=2, allow_nan=False) + "\n")
    if found and pictures is not None:
        draw_evaluation(found, pictures)
    return found


def make_embedder(
    model: str,
    *,
    size: tuple[int, int] | None = None,
    fusion: str | None = None,
    flip: bool = False,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Embedder:
    """The Embedder of a model, at another size of the images if need be.

    Args:
        model: As of ``Embedder``: any name that ``find_model`` takes.
        size: Height and width of the images instead of the weights' own; positions are resized as ``"auto"`` says.
        fusion: As in ``Embedder``, and so are the others.
        flip: Likewise.
        batch_size: Likewise.
        device: Likewise.
        dtype: Likewise.

    Raises:
        ValueError: If there is no such model, or it does not take ``size``.
    """
    network = find_model(model).create(num_classes=0, img_size=size, global_pool=fusion)
    return Embedder(network, device, dtype, batch_size, fusion, flip)


def evaluate_dataset(
    dataset: ReIDDataset,
    embed: Embedder,
    *,
    name: str = "",
    rerank: bool = False,
    per_camera: bool = False,
    cache: bool | str | Path = True,
) -> Evaluation | None:
    """Evaluate a model; in a process group, call it in every process.

    Args:
        dataset: With queries and gallery.
        embed: The model; its descriptors are compared by their cosine, or as they come where they are not normalised.
        name: What the report calls the model.
        rerank: Also after k-reciprocal re-ranking.
        per_camera: Also mAP and Rank-1 for the queries of each camera.
        cache: Take known descriptors from the package's cache, or that folder, and leave new ones there.

    Returns:
        The evaluation in the first process, None in the others.

    Raises:
        ValueError: If there are no queries or no gallery, or no query has a match.
    """
    store = None
    if cache:
        folder = None if cache is True else cache
        store = FeatureCache(embed, dataset.recipe or str(dataset.root), folder)
    retrieved = _retrieve(dataset, embed, store, progress=True)
    if world()[0]:
        return None
    model = {
        "name": name or type(embed.model).__name__,
        "size": "x".join(map(str, embed.input_size[1:])),
        "fusion": embed.model.global_pool,
        "neck": embed.model.neck,
        "flip": embed.flip,
        "dtype": str(embed.dtype).removeprefix("torch."),
        "width": embed.dim,
        "weights": store.key if store else weights_key(embed),
    }
    reranked = retrieved.reranked() if rerank else None
    return Evaluation(dataset, model, retrieved, retrieved.metrics(), retrieved.roc(), reranked, per_camera)


def score(
    model: nn.Module,
    dataset: ReIDDataset,
    device: str | torch.device | None = None,
) -> dict[str, float]:
    """mAP and Rank-1 of a model in training, in percent, the same in every process: call it in all of them.

    Args:
        model: Gives descriptors; also inside ``DistributedDataParallel`` or compiled. It is copied, and stays as it is.
        dataset: With queries and gallery.
        device: As in ``Embedder``.

    Returns:
        ``mAP`` and ``rank1``.

    Raises:
        ValueError: If there are no queries or no gallery, or no query has a match.
    """
    while (inner := getattr(model, "module", getattr(model, "_orig_mod", None))) is not None:
        model = inner
    retrieved = _retrieve(dataset, Embedder(model, device), None, progress=False)
    if retrieved.unreadable:
        _logger.warning(f"{len(retrieved.unreadable)} images cannot be read, the first: {retrieved.unreadable[0]}")
    scores = on_first(lambda: percent(retrieved.metrics()))
    return {key: scores[key] for key in ("mAP", "rank1")}


def _retrieve(dataset: ReIDDataset, embed: Embedder, cache: FeatureCache | None, progress: bool) -> Retrieved:
    """Descriptors of the queries and the gallery, without junk and what cannot be read."""
    dataset.require("query", "gallery")
    rows_q, rows_g = (np.flatnonzero(split.pids != -1) for split in (dataset.query, dataset.gallery))
    used = [dataset.query.paths[i] for i in rows_q] + [dataset.gallery.paths[i] for i in rows_g]
    files = {path: row for row, path in enumerate(dict.fromkeys(used))}  # a query can be in the gallery
    features = extract(embed, list(files), cache, progress)
    readable = features.readable
    at = np.array([files[path] for path in used], dtype=np.int64)
    at_q, at_g = at[: len(rows_q)], at[len(rows_q) :]
    rows_q, rows_g = rows_q[readable[at_q]], rows_g[readable[at_g]]
    at_q, at_g = at_q[readable[at_q]], at_g[readable[at_g]]
    rows = np.full(len(dataset.gallery) + 1, -1)  # new row of each row of the gallery, and of none
    rows[rows_g] = np.arange(len(rows_g))
    x = features.descriptors
    if embed.device.type == "cuda":
        x = x.to(embed.device)
    return Retrieved(
        query=dataset.query.take(rows_q),
        gallery=dataset.gallery.take(rows_g),
        query_features=x[torch.from_numpy(at_q)],
        gallery_features=x[torch.from_numpy(at_g)],
        own=rows[dataset.own[rows_q]],
        has_cameras=dataset.has_cameras,
        metric="cosine" if embed.l2_normalize else "euclidean",
        unreadable=list(features.errors.values()),
        images=len(files),
        cached=features.cached,
    )
