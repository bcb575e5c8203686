"""Result of an evaluation: ranked images and scores, as a table and as JSON."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from passreid_models.data.datasets import ReIDDataset, Split
from passreid_models.retrieval import (
    ROC,
    OpenSet,
    RetrievalMetrics,
    evaluate,
    evaluate_distances,
    open_set,
    rerank,
    roc,
    unknown_identities,
)
from passreid_models.retrieval.protocol import JUNK

__all__ = ["Evaluation", "NonFiniteError", "Retrieved", "percent"]

RANKS = (1, 5, 10)
FPRS = (1e-3, 1e-4)
FPIRS = (0.01, 0.1)


class NonFiniteError(ValueError):
    """Raised when too few descriptors are finite to rank anything."""


@dataclass(frozen=True, eq=False)
class Retrieved:
    """Queries and gallery images with their descriptors, without junk and images that have none."""

    query: Split
    gallery: Split
    query_features: Tensor  # [Q, C]
    gallery_features: Tensor  # [G, C]
    own: np.ndarray  # [Q], row in the gallery or -1
    pids: tuple[np.ndarray, np.ndarray]  # identities of all queries and gallery images, those without descriptor too
    has_cameras: bool
    metric: str
    unreadable: list[str]  # images, each with the reason
    not_finite: list[str]  # images that can be read and whose descriptor is not finite
    advice: str  # where descriptors are not finite
    images: int
    cached: int

    @property
    def not_finite_text(self) -> str:
        """How many descriptors are not finite, and what to do."""
        return f"{len(self.not_finite):,} of {self.images:,} descriptors are not finite: {self.advice}"

    @property
    def labels(self) -> dict[str, Any]:
        """Labels as keyword arguments of the metrics; cameras are None if the protocol ignores them."""
        return {
            "query_pids": self.query.pids,
            "gallery_pids": self.gallery.pids,
            "query_camids": self.query.camids if self.has_cameras else None,
            "gallery_camids": self.gallery.camids if self.has_cameras else None,
            "own": self.own,
        }

    def metrics(self) -> RetrievalMetrics:
        """mAP, mINP and CMC.

        Raises:
            NonFiniteError: If no query, or no gallery image, is left, since descriptors are not finite.
            ValueError: If none is left for another reason, or no query has a match.
        """
        for name, split in (("query", self.query), ("gallery", self.gallery)):
            if not len(split):
                if self.not_finite:
                    raise NonFiniteError(f"no {name} image can be ranked: {self.not_finite_text}")
                first = f"; the first: {self.unreadable[0]}" if self.unreadable else ""
                raise ValueError(f"no {name} image can be ranked: all are junk or cannot be read{first}")
        return evaluate(self.query_features, self.gallery_features, **self.labels, metric=self.metric)

    def reranked(self) -> RetrievalMetrics:
        """mAP, mINP and CMC after k-reciprocal re-ranking."""
        distances = rerank(self.query_features, self.gallery_features, metric=self.metric, own=self.own)
        return evaluate_distances(distances, **self.labels)

    def roc(self) -> ROC:
        """ROC of a verification over all pairs that count."""
        return roc(self.query_features, self.gallery_features, **self.labels, metric=self.metric)

    @cached_property
    def removed(self) -> np.ndarray:
        """Identities that ``open_set`` takes out of the gallery: half of the queries', if all of these are in it."""
        queries, gallery = self.pids
        return unknown_identities(queries) if np.isin(queries, gallery).all() else np.empty(0, dtype=np.int64)

    def open_set(self) -> OpenSet:
        """Open-set identification, in a gallery without the ``removed`` identities.

        Raises:
            ValueError: If there are no queries of known persons or none of unknown ones.
        """
        kept = ~np.isin(self.gallery.pids, self.removed)
        rows = np.append(np.where(kept, np.cumsum(kept) - 1, -1), -1)  # new row of each row; the last is for -1
        lost = np.setdiff1d(self.pids[1], self.gallery.pids)  # known, without a descriptor in the gallery: not counted
        is_lost = np.isin(self.query.pids, np.setdiff1d(lost, self.removed))
        labels = {
            **self.labels,
            "query_pids": np.where(is_lost, JUNK, self.query.pids),
            "gallery_pids": self.gallery.pids[kept],
            "own": rows[self.own],
        }
        if self.has_cameras:
            labels["gallery_camids"] = self.gallery.camids[kept]
        gallery = self.gallery_features[torch.from_numpy(kept).to(self.gallery_features.device)]
        return open_set(self.query_features, gallery, **labels, metric=self.metric)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Result of an evaluation, as ``passreid eval`` prints it."""

    dataset: ReIDDataset
    model: dict[str, Any]
    """Name, size, fusion, neck, flip, dtype, width of the descriptor, and the SHA-256 of the weights."""
    retrieved: Retrieved
    metrics: RetrievalMetrics
    roc: ROC
    rerank: RetrievalMetrics | None = None
    per_camera: bool = False
    open_set: OpenSet | None = None

    @property
    def unreadable(self) -> list[str]:
        """Unreadable images, each with the reason."""
        return self.retrieved.unreadable

    @property
    def not_finite(self) -> list[str]:
        """Images that can be read and whose descriptor is not finite, each with the reason."""
        return self.retrieved.not_finite

    @property
    def protocol(self) -> str:
        """Images that are left out of the ranking of a query, in words."""
        if self.retrieved.has_cameras:
            return "Market-1501: matches under the query's own camera and junk are left out"
        splits = (self.dataset.query, self.dataset.gallery)
        known = np.concatenate([split.camids[split.pids != JUNK] >= 0 for split in splits])
        cameras = "one camera" if known.all() else "some cameras unknown" if known.any() else "no cameras"
        return f"{cameras}: the query itself and junk are left out"

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values for JSON, without the descriptors; scores are in percent."""
        total, read = len(self.dataset.query), len(self.retrieved.query)
        values: dict[str, Any] = {
            "dataset": {
                "name": self.dataset.name,
                "description": self.dataset.description,
                "fingerprint": self.dataset.fingerprint,
            },
            "model": self.model,
            "protocol": self.protocol,
            "remarks": list(self.dataset.remarks.values()),
            "metric": self.retrieved.metric,
            "queries": {
                "total": total,
                "counted": self.metrics.num_queries,
                "without_match": read - self.metrics.num_queries,
            },
            "gallery": len(self.retrieved.gallery),
            "images": self.retrieved.images,
            "from_cache": self.retrieved.cached,
            "unreadable": self.unreadable,
            "not_finite": self.not_finite,
            **percent(self.metrics),
            "cmc": [round(100 * float(share), 4) for share in self.metrics.cmc],
            "eer": 100 * self.roc.eer,
            "eer_threshold": _finite(self.roc.eer_threshold),
            "verification": [self._verification(fpr) for fpr in FPRS],
        }
        if self.rerank:
            values["reranked"] = percent(self.rerank)
        if self.per_camera:
            values["cameras"] = self._cameras()
        if self.open_set:
            values["open_set"] = self._open_set(self.open_set)
        return values

    def _verification(self, fpr: float) -> dict[str, Any]:
        tpr = _finite(100 * self.roc.tpr_at(fpr))
        return {"fpr": fpr, "tpr": tpr, "threshold": None if tpr is None else _finite(self.roc.threshold(fpr))}

    def _open_set(self, result: OpenSet) -> dict[str, Any]:
        return {
            "gallery": result.num_gallery,
            "known_queries": len(result.known),
            "unknown_queries": len(result.unknown),
            "removed_identities": len(self.retrieved.removed),
            "identification": [
                {"fpir": x, "dir": _finite(100 * result.dir_at(x)), "threshold": _finite(result.threshold(x))}
                for x in FPIRS
            ],
        }

    def _cameras(self) -> list[dict[str, Any]]:
        precisions, first = np.asarray(self.metrics.average_precision), np.asarray(self.metrics.first_match)  # [Q]
        camids, rows = self.retrieved.query.camids, []
        for camid in np.unique(camids).tolist():
            counted = (camids == camid) & (first > 0)
            if counted.any():
                row = {"camera": self.dataset.camera_names[camid] or None, "queries": int(counted.sum())}
                scores = {"mAP": precisions[counted].mean(), "rank1": (first[counted] == 1).mean()}
                rows.append(row | {key: 100 * float(value) for key, value in scores.items()})
        return rows

    def __str__(self) -> str:
        values, model = self.to_dict(), self.model
        queries = values["queries"]
        kind = [model["name"], model["size"], model["fusion"], f"{model['neck']} neck" if model["neck"] else ""]
        kind += [f"width {model['width']}", "averaged with mirrored images" if model["flip"] else "", model["dtype"]]
        counts = [f"{queries['counted']:,} of {queries['total']:,} queries count"]
        counts += [f"{queries['without_match']:,} have no match"] if queries["without_match"] else []
        counts += [f"{len(self.unreadable):,} images cannot be read"] if self.unreadable else []
        counts += [self.retrieved.not_finite_text] if self.not_finite else []
        lines = [
            self.dataset.description,
            ", ".join(filter(None, [*kind, f"{values['metric']} distance"])),
            f"{self.protocol}; {', '.join(counts)}",
            *(f"remark: {remark}" for remark in values["remarks"]),
            f"{values['from_cache']:,} of {values['images']:,} descriptors came from the cache",
            "",
            f"{'':<12}{'queries':>9}{'mAP':>8}{'mINP':>8}" + "".join(f"{f'Rank-{k}':>9}" for k in RANKS),
        ]
        table = [("as ranked", {**values, "queries": queries["counted"]})]
        table += [("re-ranked", values["reranked"])] if "reranked" in values else []
        for row in values.get("cameras", []):
            table.append((f"camera {row['camera']}" if row["camera"] else "no camera", row))
        for name, row in table:
            cells = [f"{row[key]:>{width}.1f}" if key in row else " " * width for key, width in COLUMNS.items()]
            lines.append(f"{name:<12}{row.get('queries', ''):>9}{''.join(cells)}".rstrip())
        rows = [(f"EER {values['eer']:.2f} %", 100 - values["eer"], values["eer_threshold"])]
        rows += [(f"FPR {row['fpr']:g}", row["tpr"], row["threshold"]) for row in values["verification"]]
        lines += _rates("as a verification", "TPR", rows)
        if any(row["tpr"] is None for row in values["verification"]):
            lines.append(f"-: {self.roc.num_negatives:,} pairs of two identities are too few to measure it")
        if "open_set" in values:
            lines += self._open_set_lines(values["open_set"])
        return "\n".join(lines)

    def _open_set_lines(self, values: dict[str, Any]) -> list[str]:
        rows = [(f"FPIR {100 * row['fpir']:g} %", row["dir"], row["threshold"]) for row in values["identification"]]
        lines = _rates("as an open set", "DIR", rows)
        unknown = f"{values['unknown_queries']:,} queries of unknown persons"
        if any(row["dir"] is None for row in values["identification"]):
            lines.append(f"-: {unknown} are too few to measure it")
        lines.append(
            f"{values['known_queries']:,} queries of known and {unknown}, {values['gallery']:,} gallery images"
        )
        if count := values["removed_identities"]:
            lines.append(
                f"the gallery holds all persons: {count:,} of them, by seed 0, were taken out and count as unknown"
            )
        return lines


COLUMNS = {"mAP": 8, "mINP": 8, **{f"rank{k}": 9 for k in RANKS}}


def _rates(title: str, rate: str, rows: list[tuple[str, float | None, float | None]]) -> list[str]:
    """Table of rates in percent and the thresholds that belong to them."""
    lines = ["", f"{title:<21}{rate:>8}{'similarity':>12}"]
    for name, value, threshold in rows:
        cells = ["-" if x is None else f"{x:.{digits}f}" for x, digits in ((value, 1), (threshold, 4))]
        lines.append("{:<21}{:>8}{:>12}".format(name, *cells))
    return lines


def percent(metrics: RetrievalMetrics) -> dict[str, float]:
    """mAP, mINP and Rank-1, 5, 10 in percent, as ``mAP``, ``mINP``, ``rank1``, ``rank5``, ``rank10``."""
    scores = {"mAP": metrics.mAP, "mINP": metrics.mINP, **{f"rank{k}": metrics.rank(k) for k in RANKS}}
    return {key: round(100 * float(value), 4) for key, value in scores.items()}


def _finite(value: float) -> float | None:
    """Replace infinity and NaN by None, since JSON has neither."""
    return float(value) if math.isfinite(value) else None
