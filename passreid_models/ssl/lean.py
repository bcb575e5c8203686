"""Last layer and loss in one, a few samples at a time: the logits of all views are never held together.

The cross-entropies are linear in the student's log-probabilities, so that their gradient is known in the forward
pass: for view v, (n_v softmax(z_v) - sum over i != v of q_i) / T, with n_v the number of global views i != v. A chunk
of samples gives its share of the loss and of the gradients of features and prototypes, and its logits are gone.

Shapes: B batch, b samples of a chunk, G global views, V student views, C bottleneck width, K prototypes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def lean_cross_entropies(
    features: Tensor,
    prototypes: Tensor,
    teacher_features: Tensor,
    teacher_prototypes: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Cross-entropies of one kind of token between all pairs of a global view and another view.

    Args:
        features: Of the student, ``[V, B, C]``, the G global views first.
        prototypes: Of the student, ``[K, C]``.
        teacher_features: ``[G, B, C]``.
        teacher_prototypes: ``[K, C]``.
        center: ``[K]``.
        student_temp: Temperature of the student's softmax.
        teacher_temp: Temperature of the teacher's softmax.
        chunk: Samples at a time.

    Returns:
        The sum over the pairs, to be differentiated once, and the pairs ``[G, V]`` without gradient.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be 1 sample or more, got {chunk}")
    kind = features.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    with torch.autocast(kind, enabled=False):
        teacher = (teacher_features.detach(), teacher_prototypes.detach(), center)
        return _CrossEntropies.apply(features, prototypes, *teacher, student_temp, teacher_temp, chunk, dtype)


class _CrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        prototypes: Tensor,
        teacher_features: Tensor,
        teacher_prototypes: Tensor,
        center: Tensor,
        student_temp: float,
        teacher_temp: float,
        chunk: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        x_BVC, y_BGC = (x.transpose(0, 1).to(dtype) for x in (features, teacher_features))
        w_KC, u_KC = prototypes.to(dtype), teacher_prototypes.to(dtype)
        size, num_views, num_global = x_BVC.shape[0], x_BVC.shape[1], y_BGC.shape[1]
        mask_GV = torch.ones(num_global, num_views, device=features.device).fill_diagonal_(0)
        total_GV = torch.zeros_like(mask_GV)
        wanted = any(ctx.needs_input_grad[:2])
        factor = 32.0 if dtype == torch.float16 else 1.0  # below 6e-5 float16 loses digits, and 1 / 65536 is less
        grad_x_BVC = torch.zeros(x_BVC.shape, device=features.device) if wanted else None
        grad_w_KC = torch.zeros(prototypes.shape, device=features.device) if wanted else None
        for rows in torch.arange(size).split(chunk):
            b = slice(int(rows[0]), int(rows[-1]) + 1)
            q_bGK = F.softmax(((y_BGC[b] @ u_KC.T).float() - center) / teacher_temp, dim=-1)
            log_p_bVK = F.log_softmax((x_BVC[b] @ w_KC.T).float().div_(student_temp), dim=-1)
            total_GV -= torch.bmm(q_bGK, log_p_bVK.transpose(1, 2)).sum(0)
            if grad_x_BVC is not None and grad_w_KC is not None:
                grad_bVK = log_p_bVK.exp_().mul_(factor * mask_GV.sum(0)[:, None])
                grad_bVK.baddbmm_(mask_GV.T.expand(len(rows), -1, -1), q_bGK, alpha=-factor)
                grad_z = grad_bVK.to(dtype).flatten(0, 1)
                grad_x_BVC[b] = (grad_z @ w_KC).unflatten(0, (len(rows), num_views)).float()
                grad_w_KC += grad_z.T @ x_BVC[b].flatten(0, 1)
        ctx.grads = (grad_x_BVC, grad_w_KC)
        ctx.scale = 1 / (student_temp * size * factor)
        pairs = (total_GV.triu(1) + total_GV.tril(-1)) / size
        ctx.mark_non_differentiable(pairs)
        return pairs.sum(), pairs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        grad_x_BVC, grad_w_KC = ctx.grads
        ctx.grads = (None, None)  # scaled in place below: a second backward must not find them
        if grad_x_BVC is None:
            raise RuntimeError("the lean loss can be differentiated once: retain_graph is not supported")
        scale = grad.float() * ctx.scale
        return grad_x_BVC.mul_(scale).transpose(0, 1), grad_w_KC.mul_(scale), *[None] * 7
