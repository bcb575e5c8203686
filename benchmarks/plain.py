"""A plain implementation of PASS (arXiv 2203.03931) and of its evaluation, which the other benchmarks compare with.

It is a direct, unoptimised transcription of the paper: attention written out, one backbone call for the global views
and one for each area, a cross-entropy for every pair of views, Python loops over the parameters, views by torchvision
on PIL images. It is correct: it gives the golden values of the tests.

Shapes: B batch, V views, P parts, N patches, D width, K prototypes. Views are lists of ``[B, 3, H, W]``, the local ones
area by area. The second half, in numpy on full matrices, is mAP and CMC, re-ranking, and Jaccard distances for
clustering; Q queries, G gallery images, N of both.
"""

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision import transforms as T

AREAS = ((0.0, 0.5), (0.25, 0.75), (0.5, 1.0))  # rows, as fractions of the height
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STUDENT_TEMPERATURE, CENTER_MOMENTUM, CLIP = 0.1, 0.9, 3.0


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(d // self.heads)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))


class DropPath(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0 or not self.training:
            return x
        mask = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.p
        return x * mask / (1 - self.p)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Backbone(nn.Module):
    """ViT with a CLS token and part tokens, each with its own position embedding."""

    def __init__(self, dim: int, depth: int, heads: int, size: tuple[int, int], parts: int, drop_path: float) -> None:
        super().__init__()
        self.grid = (size[0] // 16, size[1] // 16)
        self.patch_embed = nn.Conv2d(3, dim, 16, stride=16)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.cls_pos = nn.Parameter(torch.zeros(1, 1, dim))
        self.part_tokens = nn.ParameterList(torch.zeros(1, 1, dim) for _ in range(parts))
        self.part_pos = nn.ParameterList(torch.zeros(1, 1, dim) for _ in range(parts))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], dim))
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.Sequential(*(Block(dim, heads, rate) for rate in rates))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for token in (self.cls_token, self.pos_embed, *self.part_tokens, *self.part_pos):
            nn.init.trunc_normal_(token, std=0.02)
        self.apply(init_linear)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        if grid == self.grid:
            return self.pos_embed
        positions = self.pos_embed.transpose(1, 2).unflatten(2, self.grid)
        positions = F.interpolate(positions, size=grid, mode="bicubic", antialias=True, align_corners=False)
        return positions.flatten(2).transpose(1, 2)

    def forward(self, x: Tensor, parts: Sequence[int]) -> Tensor:
        """Output tokens of CLS and of these ``parts``: ``[B, 1 + len(parts), D]``."""
        x = self.patch_embed(x)
        grid = (x.shape[2], x.shape[3])
        tokens = [self.cls_token + self.cls_pos] + [self.part_tokens[k] + self.part_pos[k] for k in parts]
        tokens = [token.expand(x.shape[0], -1, -1) for token in tokens]
        x = torch.cat([*tokens, x.flatten(2).transpose(1, 2) + self.positions(grid)], dim=1)
        return self.norm(self.blocks(x))[:, : len(tokens)]


class Head(nn.Module):
    def __init__(self, dim: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.mlp.apply(init_linear)
        self.last_layer = weight_norm(nn.Linear(bottleneck, prototypes, bias=False))
        gain = self.last_layer.parametrizations.weight.original0
        gain.data.fill_(1)
        gain.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class PlainNetwork(nn.Module):
    """Backbone and one head per token kind (CLS, PART 1 .. P); by default ViT-S at the published sizes."""

    def __init__(
        self,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        size: tuple[int, int] = (256, 128),
        hidden: int = 2048,
        bottleneck: int = 256,
        prototypes: int = 65536,
        parts: int = 3,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        self.parts = parts
        self.backbone = Backbone(dim, depth, heads, size, parts, drop_path)
        self.heads = nn.ModuleList(Head(dim, hidden, bottleneck, prototypes) for _ in range(1 + parts))

    def forward(self, global_views: Sequence[Tensor], local_views: Sequence[Tensor] = ()) -> list[Sequence[Tensor]]:
        """Logits ``[B, K]`` of each view, global ones first, for each token kind."""
        tokens = self.backbone(torch.cat(list(global_views)), range(self.parts))
        features = [[tokens[:, t]] for t in range(1 + self.parts)]
        if local_views:
            per_area = len(local_views) // self.parts
            for k in range(self.parts):
                area_views = list(local_views[k * per_area : (k + 1) * per_area])
                tokens = self.backbone(torch.cat(area_views), [k])
                features[0].append(tokens[:, 0])
                features[1 + k].append(tokens[:, 1])
        batch = global_views[0].shape[0]
        return [head(torch.cat(x)).split(batch) for head, x in zip(self.heads, features, strict=True)]


def init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def plain_loss(
    student: Sequence[Sequence[Tensor]],
    teacher: Sequence[Sequence[Tensor]],
    centers: Sequence[Tensor],
    temperature: float,
) -> Tensor:
    """Mean cross-entropy over the pairs (teacher global view i, student view v), v != i, of every token kind."""
    total, terms = 0, 0
    for views, targets, center in zip(student, teacher, centers, strict=True):
        for i, target in enumerate(targets):
            for v, view in enumerate(views):
                if v == i:
                    continue
                q = F.softmax((target - center) / temperature, dim=-1)
                log_p = F.log_softmax(view / STUDENT_TEMPERATURE, dim=-1)
                total = total + torch.sum(-q * log_p, dim=-1).mean()
                terms += 1
    return total / terms


class PlainStep:
    """Training step on prepared views; returns the loss. ``dtype`` is autocast's, None for float32."""

    def __init__(
        self,
        student: PlainNetwork,
        teacher: PlainNetwork,
        lr: float = 5e-4,
        weight_decay: float = 0.04,
        momentum: float = 0.996,
        temperature: float = 0.04,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.student, self.teacher, self.momentum, self.temperature, self.dtype = (
            student, teacher, momentum, temperature, dtype
        )  # fmt: skip
        teacher.load_state_dict(student.state_dict())
        for p in teacher.parameters():
            p.requires_grad = False
        for module in teacher.modules():
            if isinstance(module, DropPath):
                module.p = 0.0
        trained = [p for p in student.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)
        self.device = trained[0].device
        prototypes = student.heads[0].last_layer.out_features
        self.centers = [torch.zeros(prototypes, device=self.device) for _ in student.heads]
        fp16 = dtype == torch.float16 and self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type) if fp16 else None

    def __call__(self, global_views: Sequence[Tensor], local_views: Sequence[Tensor]) -> float:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            with torch.no_grad():
                targets = self.teacher(global_views)
            outputs = self.student(global_views, local_views)
            loss = plain_loss(outputs, targets, self.centers, self.temperature)
        if not math.isfinite(loss.item()):
            raise SystemExit(f"the loss is {loss.item()}")
        self.optimizer.zero_grad()
        if self.scaler is None:
            loss.backward()
            self.clip()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            self.clip()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        with torch.no_grad():
            for new, old in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                old.mul_(self.momentum).add_((1 - self.momentum) * new)
            for t, target in enumerate(targets):
                mean = torch.cat(list(target)).float().mean(dim=0)
                self.centers[t] = self.centers[t] * CENTER_MOMENTUM + mean * (1 - CENTER_MOMENTUM)
        return loss.item()

    def clip(self) -> None:
        for p in self.student.parameters():
            if p.grad is not None:
                coefficient = CLIP / (p.grad.norm(2) + 1e-6)
                if coefficient < 1:
                    p.grad.mul_(coefficient)


class PlainViews:
    """Make the 2 global views and the 3 local ones of each area of a PIL image, as normalised tensors."""

    def __init__(self, size: tuple[int, int] = (256, 128)) -> None:
        half = (size[0] // 2, size[1] // 2)
        self.global_transforms = [
            self.transform(size, (0.4, 1.0), blur=1.0),
            self.transform(size, (0.4, 1.0), blur=0.1, solarize=0.2),
        ]
        self.local_transform = self.transform(half, (0.1, 0.8), blur=0.5)

    @staticmethod
    def transform(size: tuple[int, int], scale: tuple[float, float], blur: float, solarize: float = 0.0) -> T.Compose:
        steps = [
            T.RandomResizedCrop(size, scale=scale, interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(0.5),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            T.RandomGrayscale(0.2),
            T.RandomApply([T.Lambda(gaussian_blur)], p=blur),
        ]
        if solarize:
            steps.append(T.RandomSolarize(128, p=solarize))
        return T.Compose([*steps, T.ToTensor(), T.Normalize(MEAN, STD)])

    def __call__(self, image: Image.Image) -> tuple[list[Tensor], list[Tensor]]:
        width, height = image.size
        areas = [image.crop((0, round(top * height), width, round(bottom * height))) for top, bottom in AREAS]
        return (
            [transform(image) for transform in self.global_transforms],
            [self.local_transform(area) for area in areas for _ in range(3)],
        )


def gaussian_blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def plain_evaluate(
    query: np.ndarray,
    gallery: np.ndarray,
    query_pids: np.ndarray,
    gallery_pids: np.ndarray,
    query_camids: np.ndarray,
    gallery_camids: np.ndarray,
    max_rank: int = 50,
) -> tuple[float, np.ndarray]:
    """mAP and CMC by the Market-1501 protocol, as TransReID and related code compute them."""
    distances = squared_distances(unit(query), unit(gallery))  # [Q, G]
    order = np.argsort(distances, axis=1)
    matches = (gallery_pids[order] == query_pids[:, None]).astype(np.int32)
    precisions, curves = [], []
    for q in range(len(query)):
        pids = gallery_pids[order[q]]
        same_camera = (pids == query_pids[q]) & (gallery_camids[order[q]] == query_camids[q])
        valid = ~same_camera & (pids != -1)
        hits = matches[q][valid]
        if not hits.any():
            continue
        num_hits = hits.cumsum()
        precisions.append((num_hits / np.arange(1, len(hits) + 1) * hits).sum() / hits.sum())
        curve = np.ones(max_rank)
        curve[: len(num_hits)] = num_hits[:max_rank] > 0
        curves.append(curve)
    return float(np.mean(precisions)), np.mean(curves, axis=0).astype(np.float32)


def plain_rerank(query: np.ndarray, gallery: np.ndarray, k1: int, k2: int, lambda_value: float) -> np.ndarray:
    """Distances ``[Q, G]`` after k-reciprocal re-ranking (arXiv 1701.08398)."""
    x = unit(np.concatenate([query, gallery]))
    distances = squared_distances(x, x)
    distances /= distances.max(axis=1, keepdims=True)  # [N, N]
    ranks = own_first(distances)
    v = encodings(ranks, k1 + 1, round(k1 / 2) + 1, k2, distances)
    blend = lambda_value * distances[: len(query)] + (1 - lambda_value) * jaccard(v, len(query))
    return blend[:, len(query) :]


def plain_jaccard(features: np.ndarray, k1: int, k2: int) -> np.ndarray:
    """Jaccard distances ``[N, N]`` as the code of Cluster Contrast computes them."""
    x = unit(features)
    distances = squared_distances(x, x)
    v = encodings(own_first(distances, max(k1, k2)), k1, round(k1 / 2) + 1, k2, distances)
    del distances
    return jaccard(v, len(v)).clip(min=0)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True).clip(min=1e-12)


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (2 - 2 * (a @ b.T)).clip(min=0)


def own_first(distances: np.ndarray, k: int | None = None) -> np.ndarray:
    """Indices of the ``k`` nearest of each image, itself first."""
    ranks = []
    for i, row in enumerate(distances):
        order = np.argsort(row, kind="stable")
        ranks.append(np.concatenate([[i], order[order != i]])[:k])
    return np.array(ranks)


def encodings(ranks: np.ndarray, k: int, half: int, k2: int, distances: np.ndarray) -> np.ndarray:
    """Encodings ``[N, N]``: weights of the expanded k-reciprocal neighbours, averaged over the ``k2`` nearest."""
    v = np.zeros_like(distances)
    sets = [reciprocal(ranks, i, k) for i in range(len(ranks))]
    half_sets = [reciprocal(ranks, i, half) for i in range(len(ranks))]
    for i, own in enumerate(sets):
        expanded = own
        for j in own:
            if len(np.intersect1d(half_sets[j], own)) > 2 / 3 * len(half_sets[j]):
                expanded = np.append(expanded, half_sets[j])
        expanded = np.unique(expanded)
        weights = np.exp(-distances[i, expanded])
        v[i, expanded] = weights / weights.sum()
    if k2 == 1:
        return v
    averaged = np.zeros_like(v)
    for i in range(len(v)):
        averaged[i] = v[ranks[i, :k2]].mean(axis=0)
    return averaged


def reciprocal(ranks: np.ndarray, i: int, k: int) -> np.ndarray:
    near = ranks[i, :k]
    return near[(ranks[near, :k] == i).any(axis=1)]


def jaccard(v: np.ndarray, count: int) -> np.ndarray:
    """Jaccard distances ``[count, N]`` between the first ``count`` encodings and all."""
    distances = np.empty((count, len(v)), dtype=v.dtype)
    nonzero_rows = [np.flatnonzero(column) for column in v.T]  # of each column
    for i in range(count):
        sums = np.zeros(len(v), dtype=v.dtype)
        for j in np.flatnonzero(v[i]):
            rows = nonzero_rows[j]
            sums[rows] += np.minimum(v[i, j], v[rows, j])
        distances[i] = 1 - sums / (2 - sums)
    return distances
