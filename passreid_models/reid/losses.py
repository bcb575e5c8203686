"""Losses of re-ID: batch-hard triplet loss with labels, cluster contrast without.

Shapes: B batch, C descriptor width, K identities or clusters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ClusterMemory", "batch_hard_triplet"]


def batch_hard_triplet(features: Tensor, pids: Tensor, margin: float | None = None) -> Tensor:
    """Triplet loss of the farthest positive and the nearest negative of each anchor (arXiv 1703.07737).

    Distances are Euclidean; features are not normalised. An anchor without another image of its identity is its own
    positive, at distance 0.

    Args:
        features: ``[B, C]``.
        pids: Identities ``[B]``, two or more of them.
        margin: None for the soft margin ``log(1 + exp(d_ap - d_an))``; else ``max(0, d_ap - d_an + margin)``.

    Returns:
        Mean over the anchors.

    Raises:
        ValueError: If all images are of one identity, so that there is no negative.
    """
    same = pids[:, None] == pids  # [B, B]
    if same.all():
        raise ValueError("a batch of one identity has no negatives for the triplet loss")
    squares = features.square().sum(1)
    distances = (squares[:, None] + squares - 2 * features @ features.T).clamp(min=1e-12).sqrt()
    positive = distances.where(same, -torch.inf).amax(1)
    negative = distances.where(~same, torch.inf).amin(1)
    if margin is None:
        return F.softplus(positive - negative).mean()
    return F.relu(positive - negative + margin).mean()


class ClusterMemory(nn.Module):
    """Contrast of images with the centroids of their clusters (Cluster Contrast, arXiv 2103.11568).

    ``loss = cross_entropy(normalize(features) @ memory.T / temp, labels)``; ``update`` then moves the centroids of the
    batch's clusters: with ``hard`` towards the least similar sample of the cluster, with ``mean`` towards every sample
    in turn.

    Examples:
        >>> memory = ClusterMemory(centroids)
        >>> loss = memory(features, labels)
        >>> memory.update(features, labels)
    """

    def __init__(self, centroids: Tensor, temp: float = 0.05, momentum: float = 0.2, mode: str = "hard") -> None:
        """
        Args:
            centroids: L2-normalised ``[K, C]``.
            temp: Temperature.
            momentum: Weight of the *old* centroid.
            mode: ``hard`` or ``mean``.

        Raises:
            ValueError: If the mode is neither.
        """
        super().__init__()
        if mode not in ("hard", "mean"):
            raise ValueError(f"mode must be 'hard' or 'mean', got {mode!r}")
        self.temp, self.momentum, self.mode = temp, momentum, mode
        self.centroids: Tensor
        self.register_buffer("centroids", centroids.clone())

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """
        Args:
            features: Descriptors ``[B, C]``.
            labels: Clusters ``[B]``, 0 .. K - 1.
        """
        return F.cross_entropy(F.normalize(features, dim=1) @ self.centroids.T / self.temp, labels)

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Update the centroids of the batch's clusters; under DDP, pass the samples of all processes."""
        features = F.normalize(features.float(), dim=1)
        if self.mode == "mean":
            for x, k in zip(features, labels.tolist(), strict=True):
                self._move(k, x)
            return
        for k in labels.unique().tolist():
            samples = features[labels == k]
            self._move(k, samples[(samples @ self.centroids[k]).argmin()])

    def _move(self, k: int, x: Tensor) -> None:
        self.centroids[k] = F.normalize(self.momentum * self.centroids[k] + (1 - self.momentum) * x, dim=0)
