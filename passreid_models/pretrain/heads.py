"""Projection head from the ViT's output tokens to prototypes (DINO's head, arXiv 2104.14294, appendix C)."""

from typing import Any, cast

import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class ProjectionHead(nn.Module):
    """Three-layer MLP, L2 normalisation, and a weight-normalised linear layer to ``num_prototypes`` logits.

    State dicts with the ``weight_g`` and ``weight_v`` of torch's older weight norm load as they are.
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
    ) -> None:
        """
        Args:
            in_dim: Width of a token, D.
            num_prototypes: Number of prototypes, K.
            hidden_dim: Width of the two hidden layers.
            bottleneck_dim: Width of the normalised features, C.
            norm_last_layer: Keep the gains of the prototypes at 1.
        """
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in (m for m in self.mlp if isinstance(m, nn.Linear)):
            trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.last_layer = weight_norm(nn.Linear(bottleneck_dim, num_prototypes, bias=False))
        gain = self.last_layer.parametrizations.weight.original0
        nn.init.ones_(gain)
        gain.requires_grad_(not norm_last_layer)

    @property
    def prototypes(self) -> Tensor:
        """Prototypes ``[K, C]``, whose lengths are the gains."""
        return self.last_layer.weight

    def factors(self) -> tuple[Tensor, Tensor]:
        """Prototypes before weight normalisation: directions ``[K, C]`` of any length, and gains ``[K]``."""
        weight = cast(Any, self.last_layer).parametrizations.weight
        return weight.original1, weight.original0[:, 0]

    def features(self, x: Tensor) -> Tensor:
        """Map tokens ``[..., D]`` to features ``[..., C]`` of length 1."""
        return F.normalize(self.mlp(x), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``[..., D]`` to logits ``[..., K]``."""
        return self.last_layer(self.features(x))
