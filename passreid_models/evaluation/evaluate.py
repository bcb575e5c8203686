"""Evaluation of a model on a dataset: descriptors, and the metrics of their ranking.

    dataset = open_dataset("Market-1501-v15.09.15")
    print(evaluate_dataset(dataset, Embedder("pass_vit_small_patch16.lup_market1501"), rerank=True))

Junk is left out before anything is computed, as in the published code: without re-ranking it would not count anyway,
with re-ranking it would be among the neighbours.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from passreid_models.data.datasets import ReIDDataset, open_dataset
from passreid_models.device import process_group
from passreid_models.embed import Embedder, finite_advice, is_not_finite
from passreid_models.evaluation.extract import extract
from passreid_models.evaluation.feature_cache import FeatureCache, has_own_code
from passreid_models.evaluation.pictures import draw_evaluation
from passreid_models.evaluation.report import Evaluation, Retrieved, percent
from passreid_models.retrieval.k_reciprocal import sparse
from passreid_models.retrieval.protocol import JUNK, no_match
from passreid_models.runtime import check_file, on_first, require, world, write_json

_logger = logging.getLogger(__name__)

__all__ = ["Evaluation", "evaluate_dataset", "evaluate_model", "score"]


def evaluate_model(
    data: str | Path,
    model: str,
    *,
    device: str | torch.device | None = None,
    rerank: bool = False,
    per_camera: bool = False,
    open_set: bool = False,
    cache: bool | str | Path = True,
    progress: bool = True,
    json_file: str | Path | None = None,
    pictures: str | Path | None = None,
    **options: Any,
) -> Evaluation | None:
    """Evaluate a model by its name, as ``passreid eval`` does; under ``torchrun`` the processes share the images.

    Args:
        data: Dataset, as ``open_dataset`` takes it.
        model: Name of a model, as ``find_model`` takes it.
        device: Device, as ``process_group`` takes it.
        rerank: Also evaluate after k-reciprocal re-ranking.
        per_camera: Also give mAP and Rank-1 for the queries of each camera.
        open_set: Also give the rates of open-set identification, as of ``retrieval.open_set``.
        cache: Cache of descriptors, as in ``evaluate_dataset``.
        progress: Show a bar, on a terminal.
        json_file: File to write ``Evaluation.to_dict()`` to.
        pictures: Folder for the pictures of ``pictures.draw_evaluation``.
        **options: Options of the Embedder, such as ``size``.

    Returns:
        The evaluation in the first process, None in the others.

    Raises:
        ValueError: If the data, the model or an option is invalid, no query has a match, or matplotlib is missing for
            ``pictures`` or scipy for ``rerank``.
        FileNotFoundError: If the data or the weights do not exist.
        OSError: If ``json_file`` or ``pictures`` cannot be written.
    """
    if pictures is not None:
        require("matplotlib.figure", "viz", "pictures")
    if rerank:
        sparse()
    files = [Path(file) for file in (json_file, pictures and Path(pictures) / "ranking.png") if file is not None]
    with process_group(device) as own_device:
        on_first(lambda: list(map(check_file, files)))
        dataset = open_dataset(data).require("query", "gallery")
        embed = Embedder(model, own_device, **options)
        evaluation = evaluate_dataset(
            dataset,
            embed,
            name=embed.name if embed.name.partition(".")[0] == model else model,  # with the tag of bundled weights
            rerank=rerank,
            per_camera=per_camera,
            open_set=open_set,
            cache=cache,
            progress=progress,
        )
    if evaluation and json_file is not None:
        write_json(json_file, evaluation.to_dict(), allow_nan=False)
    if evaluation and pictures is not None:
        draw_evaluation(evaluation, pictures)
    return evaluation


def evaluate_dataset(
    dataset: ReIDDataset,
    embed: Embedder,
    *,
    name: str = "",
    rerank: bool = False,
    per_camera: bool = False,
    open_set: bool = False,
    cache: bool | str | Path = True,
    progress: bool = True,
) -> Evaluation | None:
    """Evaluate a model; in a process group, call it in every process.

    Args:
        dataset: Dataset with queries and gallery.
        embed: The model; descriptors are compared by cosine, or by Euclidean distance if they are not normalised.
        name: Name of the model in the report.
        rerank: Also evaluate after k-reciprocal re-ranking.
        per_camera: Also give mAP and Rank-1 for the queries of each camera.
        open_set: Also give the rates of open-set identification, as of ``retrieval.open_set``.
        cache: Read and keep descriptors in the package's cache (True), or in this folder; not those of a model with
            code of your own, such as a subclass or a hook, which may change unseen.
        progress: Show a bar, on a terminal.

    Returns:
        The evaluation in the first process, None in the others.

    Raises:
        NonFiniteError: If nothing can be ranked, since descriptors are not finite.
        ValueError: If there are no queries or no gallery, or no query has a match.
    """
    pids = np.unique(dataset.query.pids[dataset.query.pids != JUNK])
    if open_set and len(pids) == 1 and pids[0] in dataset.gallery.pids:
        raise ValueError("open_set: expected queries of two persons or more, half of whom are taken for unknown ones")
    store = None
    if cache and not has_own_code(embed):
        folder = None if cache is True else cache
        place = dataset.root / dataset.parts[0] if dataset.name == "CSV" else dataset.root
        store = FeatureCache(embed, dataset.recipe or str(place), folder)
    retrieved = _retrieve(dataset, embed, store, progress)
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
        "weights_sha256": embed.fingerprint["weights"],
    }
    metrics, curve = retrieved.metrics(), retrieved.roc()  # first: their errors name the reason
    identification, reranked = retrieved.open_set() if open_set else None, retrieved.reranked() if rerank else None
    return Evaluation(dataset, model, retrieved, metrics, curve, reranked, per_camera, identification)


def score(
    model: nn.Module,
    dataset: ReIDDataset,
    device: str | torch.device | None = None,
) -> dict[str, float]:
    """mAP and Rank-1 of a model in training, in percent, the same in every process: call it in all of them.

    Args:
        model: Model of descriptors, as the Embedder takes it; it is copied, not changed.
        dataset: Dataset with queries and gallery.
        device: Device, as ``pick_device`` takes it.

    Returns:
        ``mAP`` and ``rank1``.

    Raises:
        NonFiniteError: If nothing can be ranked, since descriptors are not finite.
        ValueError: If there are no queries or no gallery, or no query has a match.
    """
    retrieved = _retrieve(dataset, Embedder(model, device), None, progress=False)
    if retrieved.unreadable:
        _logger.warning(f"{len(retrieved.unreadable)} images cannot be read, the first: {retrieved.unreadable[0]}")
    if retrieved.not_finite:
        _logger.warning(f"{retrieved.not_finite_text}; the first: {retrieved.not_finite[0].partition(': ')[0]}")
    scores = on_first(lambda: percent(retrieved.metrics()))
    return {key: scores[key] for key in ("mAP", "rank1")}


def _retrieve(dataset: ReIDDataset, embed: Embedder, cache: FeatureCache | None, progress: bool) -> Retrieved:
    """Descriptors of queries and gallery, without junk and images that have none."""
    if not dataset.require("query", "gallery").matches.any():
        raise ValueError(no_match(dataset.has_cameras))
    rows_q, rows_g = (np.flatnonzero(split.pids != -1) for split in (dataset.query, dataset.gallery))
    paths = [dataset.query.paths[i] for i in rows_q] + [dataset.gallery.paths[i] for i in rows_g]
    files = {path: row for row, path in enumerate(dict.fromkeys(paths))}  # once each: a query can be in the gallery
    features = extract(embed, list(files), cache, progress)
    readable = features.readable
    positions = np.array([files[path] for path in paths], dtype=np.int64)
    positions_q, positions_g = positions[: len(rows_q)], positions[len(rows_q) :]
    pids = dataset.query.pids[rows_q], dataset.gallery.pids[rows_g]
    rows_q, rows_g = rows_q[readable[positions_q]], rows_g[readable[positions_g]]
    positions_q, positions_g = positions_q[readable[positions_q]], positions_g[readable[positions_g]]
    rows = np.full(len(dataset.gallery) + 1, -1)  # new row of each row of the gallery; the last is for -1
    rows[rows_g] = np.arange(len(rows_g))
    x, failures = features.descriptors, features.errors.values()
    if embed.device.type == "cuda":
        x = x.to(embed.device)
    return Retrieved(
        query=dataset.query.take(rows_q),
        gallery=dataset.gallery.take(rows_g),
        query_features=x[torch.from_numpy(positions_q)],
        gallery_features=x[torch.from_numpy(positions_g)],
        own=rows[dataset.own[rows_q]],
        pids=pids,
        has_cameras=dataset.has_cameras,
        metric=embed.metric,
        unreadable=[error for error in failures if not is_not_finite(error)],
        not_finite=[error for error in failures if is_not_finite(error)],
        advice=finite_advice(embed.dtype),
        images=len(files),
        cached=features.cached,
    )
