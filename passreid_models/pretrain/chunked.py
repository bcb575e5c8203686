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
    prototypes: tuple[Tensor, Tensor | None],
    teacher_features: Tensor,
    teacher_prototypes: tuple[Tensor, Tensor | None],
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    chunk: int,
    weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Cross-entropies of one kind of token between all pairs of a global view and another view.

    Args:
        features: Of the student, ``[V, B, C]``, the G global views first.
        prototypes: Of the student: directions ``[K, C]`` of any length and their gains ``[K]``, or prototypes as they
            are and None. Weight normalisation is applied to the logits and to the gradient, since a normalised copy of
            ``[K, C]`` costs more than they.
        teacher_features: ``[G, B, C]``.
        teacher_prototypes: Likewise.
        center: ``[K]``.
        student_temp: Temperature of the student's softmax.
        teacher_temp: Temperature of the teacher's softmax.
        chunk: Samples at a time.
        weight: Of each pair in the sum.

    Returns:
        The weighted sum over the pairs, to be differentiated once, and the pairs ``[G, V]`` without gradient.

    Raises:
        ValueError: If ``chunk`` is less than 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be 1 sample or more, got {chunk}")
    kind = features.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    with torch.autocast(kind, enabled=False):
        teacher = (teacher_features.detach(), *(x if x is None else x.detach() for x in teacher_prototypes), center)
        return _CrossEntropies.apply(features, *prototypes, *teacher, student_temp, teacher_temp, chunk, weight, dtype)


class _CrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        prototypes: Tensor,
        gains: Tensor | None,
        teacher_features: Tensor,
        teacher_prototypes: Tensor,
        teacher_gains: Tensor | None,
        center: Tensor,
        student_temp: float,
        teacher_temp: float,
        chunk: int,
        weight: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        # contiguous: of a transposed chunk torch would make a copy of the prototypes for each sample
        x_BVC, y_BGC = (x.transpose(0, 1).to(dtype).contiguous() for x in (features, teacher_features))
        w_KC, u_KC = prototypes.to(dtype), teacher_prototypes.to(dtype)
        scales_K = weight_norm_scales(prototypes, gains)
        teacher_scales_K = weight_norm_scales(teacher_prototypes, teacher_gains)
        size, num_views, num_global = x_BVC.shape[0], x_BVC.shape[1], y_BGC.shape[1]
        mask_GV = torch.ones(num_global, num_views, device=features.device).fill_diagonal_(0)
        total_GV = torch.zeros_like(mask_GV)
        wanted = any(ctx.needs_input_grad[:3])
        # the gradient's own factor, but for float16: below 6e-5 it loses digits, and 1 / 65536 is less
        own = weight / (student_temp * size)
        factor = 32.0 if dtype == torch.float16 else own
        grad_x_BVC = torch.zeros(x_BVC.shape, device=features.device) if wanted else None
        grad_w_KC: Tensor | None = None
        dots_K = torch.zeros_like(scales_K)  # of each logit with its gradient
        for start in range(0, size, chunk):
            b = slice(start, start + chunk)
            z_bGK = (y_BGC[b] @ u_KC.T).float().mul_(teacher_scales_K).sub_(center)
            q_bGK = F.softmax(z_bGK.div_(teacher_temp), dim=-1)
            z_bVK = (x_BVC[b] @ w_KC.T).float().mul_(scales_K / student_temp)
            log_p_bVK = F.log_softmax(z_bVK, dim=-1)
            total_GV -= torch.bmm(q_bGK, log_p_bVK.transpose(1, 2)).sum(0)
            if grad_x_BVC is not None:
                grad_bVK = log_p_bVK.exp_().mul_(factor * mask_GV.sum(0)[:, None])
                grad_bVK.baddbmm_(mask_GV.T.expand(len(q_bGK), -1, -1), q_bGK, alpha=-factor)
                if gains is not None:
                    dots_K += z_bVK.mul_(grad_bVK).sum((0, 1))
                grad_z = grad_bVK.mul_(scales_K).to(dtype).flatten(0, 1)
                grad_x_BVC[b] = (grad_z @ w_KC).unflatten(0, (-1, num_views))
                x = x_BVC[b].flatten(0, 1)
                if grad_w_KC is None:
                    grad_w_KC = (grad_z.T @ x).float()
                elif dtype == torch.float32:
                    grad_w_KC.addmm_(grad_z.T, x)
                else:
                    grad_w_KC += grad_z.T @ x
        ctx.grads = (grad_x_BVC, grad_w_KC, dots_K.mul_(student_temp), prototypes.detach(), scales_K, gains)
        ctx.scale = own / factor
        pairs = total_GV / size
        pairs = pairs.triu(1) + pairs.tril(-1)
        ctx.mark_non_differentiable(pairs)
        return weight * pairs.sum(), pairs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        grad_x_BVC, grad_w_KC, dots_K, prototypes, scales_K, gains = ctx.grads
        ctx.grads = (None,) * 6  # scaled in place below: a second backward must not find them
        if grad_x_BVC is None:
            raise RuntimeError("the lean loss can be differentiated once: retain_graph is not supported")
        scale = grad.float() * ctx.scale
        grad_gains = None
        if gains is not None:  # of a direction's length nothing depends: its part of the gradient is taken away
            share_K = dots_K * (scales_K / gains).square()  # over the squared length
            grad_w_KC.addcmul_(prototypes, share_K[:, None], value=-1)
            grad_gains = dots_K * scale / gains if ctx.needs_input_grad[2] else None
        if scale.device.type != "cpu" or scale != 1:  # a GPU would be waited for to know
            grad_x_BVC.mul_(scale)
            grad_w_KC.mul_(scale)
        return grad_x_BVC.transpose(0, 1), grad_w_KC, grad_gains, *[None] * 9


def weight_norm_scales(prototypes: Tensor, gains: Tensor | None) -> Tensor:
    """What weight normalisation multiplies the logits of directions ``[K, C]`` with: ``[K]``."""
    if gains is None:
        return prototypes.new_ones(len(prototypes), dtype=torch.float32)
    return gains / torch.linalg.vector_norm(prototypes, dim=1)
