"""Student and teacher: a PASS backbone with one projection head for each kind of token.

Shapes: B batch, V views, P parts, T = 1 + P kinds of token, D width, C bottleneck width, K prototypes.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from passreid_models.pass_vit import PassVisionTransformer
from passreid_models.ssl.heads import ProjectionHead
from passreid_models.ssl.lean import weight_norm_scales


class Projections(NamedTuple):
    """What a network makes of a batch of views, by kind of token: CLS, PART 1 .. P."""

    features: list[Tensor]  # [V_t, B, C]: the global views, then the local views that carry the token
    prototypes: list[Tensor]  # [K, C]
    gains: list[Tensor] | None = None  # [K], lengths that the prototypes are normalised to; None: left as they are

    def logits(self) -> list[Tensor]:
        """``[V_t, B, K]`` for each kind of token."""
        logits = [x @ w.T for x, w in zip(self.features, self.prototypes, strict=True)]
        return logits if self.gains is None else [z * s for z, (_, s) in zip(logits, self.scaled(), strict=True)]

    def weights(self) -> list[tuple[Tensor, Tensor | None]]:
        """Prototypes and gains of each kind of token."""
        if self.gains is None:
            return [(w, None) for w in self.prototypes]
        return list(zip(self.prototypes, self.gains, strict=True))

    def scaled(self) -> list[tuple[Tensor, Tensor]]:
        """Prototypes of each kind of token, and what their logits are multiplied with."""
        return [(w, weight_norm_scales(w, g)) for w, g in self.weights()]


class PASSNetwork(nn.Module):
    """Backbone and projection heads, one for CLS and one for each PART token (arXiv 2203.03931, section 3.2)."""

    def __init__(
        self,
        backbone: PassVisionTransformer,
        num_prototypes: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.forward_views = backbone.forward_views
        self.heads = nn.ModuleList(
            ProjectionHead(backbone.embed_dim, num_prototypes, hidden_dim, bottleneck_dim, norm_last_layer)
            for _ in range(backbone.num_prefix_tokens)
        )

    def compile_backbone(self) -> None:
        """Compile the forward pass of the backbone, for both sizes of views."""
        # a graph for each size: with symbolic sizes torch 2.14 fails on the resampling of the positions
        self.forward_views = torch.compile(self.backbone.forward_views, dynamic=False)

    def forward(self, global_views: Tensor, local_views: Tensor | None = None) -> Projections:
        """
        Args:
            global_views: ``[G, B, 3, H, W]``; they carry every token.
            local_views: ``[A * L, B, 3, h, w]``, L views of area 1, then of area 2 and so on; a view of area k carries
                CLS and PART k. Without parts, of any areas.
        """
        tokens = self._tokens(global_views)  # [G, B, T, D]
        views = list(tokens.unbind(2))
        if local_views is not None and len(local_views):
            parts = self.backbone.num_parts
            area = None
            if parts:
                per_area = len(local_views) // parts
                area = torch.arange(parts, device=local_views.device)
                area = area.repeat_interleave(per_area * local_views.shape[1])
            local = self._tokens(local_views, area)  # [A * L, B, 2, D]
            views[0] = torch.cat([views[0], local[:, :, 0]])
            for k in range(parts):
                views[1 + k] = torch.cat([views[1 + k], local[k * per_area : (k + 1) * per_area, :, 1]])
        heads = cast(list[ProjectionHead], self.heads)
        features = [head.features(x) for head, x in zip(heads, views, strict=True)]
        prototypes, gains = zip(*(head.factors() for head in heads), strict=True)
        return Projections(features, list(prototypes), list(gains))

    def _tokens(self, views: Tensor, area: Tensor | None = None) -> Tensor:
        return self.forward_views(views.flatten(0, 1), area).unflatten(0, views.shape[:2])
