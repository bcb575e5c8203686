"""Ranking a gallery and scoring the ranking: pure functions on descriptors, identities and cameras.

All go through the queries chunk by chunk, so that memory follows ``budget_mb`` and not queries x gallery, and compute
where the descriptors are.
"""

from passreid_models.retrieval.metrics import RetrievalMetrics, evaluate, evaluate_distances
from passreid_models.retrieval.ranking import Ranking, rank
from passreid_models.retrieval.reranking import Reranked, rerank
from passreid_models.retrieval.verification import ROC, roc

__all__ = [
    "ROC",
    "Ranking",
    "Reranked",
    "RetrievalMetrics",
    "evaluate",
    "evaluate_distances",
    "rank",
    "rerank",
    "roc",
]
