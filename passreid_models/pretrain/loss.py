"""The loss of PASS: part-wise self-distillation (arXiv 2203.03931, section 3.2; centres as in DINO).

    q_i = softmax((z_teacher_i - c) / T_teacher)                    teacher, global view i
    p_v = softmax(z_student_v / T_student)                          student, any view v
    loss = mean over all token kinds and all pairs (i, v), v != i, of -sum_k q_i log p_v

CLS is compared between all views; PART k between the global views and the local views of area k. Two global views and
three local views of each of three areas make 20 + 3 * 8 = 44 pairs.

Shapes: B batch, G global views, V views that carry the token (the global ones first), K prototypes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passreid_models.pretrain.chunked import chunked_cross_entropies, scratch_like
from passreid_models.pretrain.network import Projections
from passreid_models.runtime import all_reduce_mean


class PASSLoss(nn.Module):
    """Cross-entropy between the teacher's and the student's prototype assignments, with centred teacher outputs.

    Examples:
        >>> criterion = PASSLoss(num_prototypes=65536, num_parts=3)
        >>> loss = criterion(student_logits, teacher_logits, teacher_temp=0.04)
        >>> loss.backward()
        >>> criterion.update_centers(teacher_logits)
    """

    centers: Tensor

    def __init__(
        self, num_prototypes: int, num_parts: int = 3, student_temp: float = 0.1, center_momentum: float = 0.9
    ) -> None:
        """
        Args:
            num_prototypes: Number of prototypes, K.
            num_parts: Number of part tokens, P; 0 is DINO.
            student_temp: Temperature of the student's softmax.
            center_momentum: Share of the old centres in an update.
        """
        super().__init__()
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.register_buffer("centers", torch.zeros(1 + num_parts, num_prototypes))

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], teacher_temp: float) -> Tensor:
        """Return the loss, computed in float32 even inside autocast.

        Args:
            student: Logits ``[V, B, K]`` for CLS and each PART; V may differ between tokens.
            teacher: Logits ``[G, B, K]`` of the same global views.
            teacher_temp: Temperature of the teacher's softmax.

        Raises:
            ValueError: If the number of tokens is not 1 + P.
        """
        return mean_of_pairs(self.pairs(student, teacher, teacher_temp))

    def pairs(self, student: Sequence[Tensor], teacher: Sequence[Tensor], teacher_temp: float) -> list[Tensor]:
        """Cross-entropies ``[G, V]`` of each kind of token, 0 where a view is paired with itself."""
        self._check(student, teacher)
        with torch.autocast(student[0].device.type, enabled=False):
            terms = []
            for z, target, center in zip(student, teacher, self.centers, strict=True):
                q = F.softmax((target.detach().float() - center) / teacher_temp, dim=-1)  # [G, B, K]
                log_p = F.log_softmax(z.float() / self.student_temp, dim=-1)  # [V, B, K]
                pairs = -torch.einsum("gbk,vbk->gv", q, log_p) / z.shape[1]
                terms.append(pairs.triu(1) + pairs.tril(-1))
            return terms

    def chunked(
        self, student: Projections, teacher: Projections, teacher_temp: float, chunk: int = 8
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the same loss from features and prototypes, with the logits of ``chunk`` samples in memory at a time.

        Returns:
            The loss, and the cross-entropies that ``pairs`` returns, without gradient.
        """
        self._check(student.features, teacher.features)
        features = list(zip(student.features, teacher.features, strict=True))
        prototypes = zip(student.weights(), teacher.weights(), strict=True)
        scratch = scratch_like(student.prototypes[0])  # new memory for each kind of token would cost a CPU more
        weight = 1 / sum(len(y) * (len(x) - 1) for x, y in features)
        total, terms = torch.zeros((), device=self.centers.device), []
        for (x, y), (w, u), center in zip(features, prototypes, self.centers, strict=True):
            temps = self.student_temp, teacher_temp
            summed, pairs = chunked_cross_entropies(x, w, y, u, center, *temps, chunk, weight, scratch)
            total = total + summed
            terms.append(pairs)
        return total, terms

    @torch.no_grad()
    def update_centers(self, teacher: Sequence[Tensor] | Projections) -> None:
        """Move the centres towards the teacher's mean logits over all processes.

        Call it after the loss and, with ``Projections``, before the teacher is updated: they refer to its prototypes.

        Raises:
            ValueError: If the prototypes have changed since the teacher computed its features.
        """
        self.move_centers(mean_logits(teacher))

    @torch.no_grad()
    def move_centers(self, means: Tensor) -> None:
        """Move the centres towards the mean logits ``[1 + P, K]`` of this process, averaged over all."""
        self.centers.lerp_(all_reduce_mean(means), 1 - self.center_momentum)

    def _check(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
        if not len(student) == len(teacher) == len(self.centers):
            raise ValueError(
                f"expected outputs of {len(self.centers)} kinds of token (CLS and {len(self.centers) - 1} parts), got "
                f"{len(student)} of the student and {len(teacher)} of the teacher"
            )


@torch.no_grad()
def mean_logits(outputs: Sequence[Tensor] | Projections) -> Tensor:
    """Mean logits of the batch ``[1 + P, K]``; features suffice, since the last layer is linear."""
    if isinstance(outputs, Projections):
        if outputs.versions and outputs.versions != tuple(p._version for p in outputs.prototypes):
            raise ValueError(
                "the teacher was updated after it computed these features: call update_centers before update_teacher, "
                "or keep its logits()"
            )
        pairs = zip(outputs.features, outputs.scaled(), strict=True)
        with torch.autocast(outputs.features[0].device.type, enabled=False):
            return torch.stack([(w.float() @ x.float().mean(1).T).mean(1) * s for x, (w, s) in pairs])
    return torch.stack([z.float().mean((0, 1)) for z in outputs])


def mean_of_pairs(terms: Sequence[Tensor]) -> Tensor:
    """Mean of the cross-entropies ``[G, V]`` over all kinds of token and all pairs of different views."""
    return torch.stack([t.sum() for t in terms]).sum() / sum(map(num_pairs, terms))


def num_pairs(terms: Tensor) -> int:
    """Number of pairs of different views in cross-entropies ``[G, V]``."""
    return terms.numel() - len(terms)
