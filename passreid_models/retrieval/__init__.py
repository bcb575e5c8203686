"""Ranking of a gallery, re-ranking and metrics: pure functions on descriptors, identities and cameras.

Descriptors are tensors or arrays. All functions process the queries in chunks, so that memory depends on ``budget_mb``
and not on queries x gallery, and compute on the device of the descriptors.
"""

from passreid_models.retrieval.identification import OpenSet, open_set, unknown_identities
from passreid_models.retrieval.metrics import RetrievalMetrics, evaluate, evaluate_distances
from passreid_models.retrieval.ranking import Ranking, rank
from passreid_models.retrieval.reranking import Reranked, rerank
from passreid_models.retrieval.verification import ROC, roc

__all__ = [
    "ROC",
    "OpenSet",
    "Ranking",
    "Reranked",
    "RetrievalMetrics",
    "evaluate",
    "evaluate_distances",
    "open_set",
    "rank",
    "rerank",
    "roc",
    "unknown_identities",
]
