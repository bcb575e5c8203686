"""Last layer and loss in one, a chunk of samples at a time: memory never holds the logits of the whole batch.

The cross-entropies are linear in the student's log-probabilities, so that their gradient is known in the forward
pass: for view v, (n_v softmax(z_v) - sum over i != v of q_i) / T, with n_v the number of global views i != v. Each
chunk adds its share of the loss and of the gradients of features and prototypes; its logits are then freed.

Shapes: B batch, b samples of a chunk, G global views, V student views, C bottleneck width, K prototypes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def chunked_cross_entropies(
    features: Tensor,
    prototypes: tuple[Tensor, Tensor | None],
    teacher_features: Tensor,
    teacher_prototypes: tuple[Tensor, Tensor | None],
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    chunk: int,
    weight: float = 1.0,
    scratch: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropies of one kind of token over all pairs of a global view and another view.

    Args:
        features: Student features ``[V, B, C]``, the G global views first.
        prototypes: Student prototypes: directions ``[K, C]`` of any length and their gains ``[K]``, or the prototypes
            themselves and None. Logits and gradient are scaled for weight normalisation, which costs less than a
            normalised copy of ``[K, C]``.
        teacher_features: Teacher features ``[G, B, C]``.
        teacher_prototypes: Teacher prototypes in the same form.
        center: Centre of the teacher's logits ``[K]``.
        student_temp: Temperature of the student's softmax.
        teacher_temp: Temperature of the teacher's softmax.
        chunk: Samples per chunk.
        weight: Weight of each pair in the sum.
        scratch: Result of ``scratch_like``, which calls one after another can share.

    Returns:
        Weighted sum over the pairs, which can be differentiated once, and the pairs' cross-entropies ``[G, V]`` without
        gradient.

    Raises:
        ValueError: If ``chunk`` is less than 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be 1 sample or more, got {chunk}")
    scratch = scratch_like(prototypes[0]) if scratch is None else scratch
    with torch.autocast(features.device.type, enabled=False):
        teacher = (teacher_features.detach(), *(x if x is None else x.detach() for x in teacher_prototypes), center)
        options = student_temp, teacher_temp, chunk, weight, scratch
        return _CrossEntropies.apply(features, *prototypes, *teacher, *options)


def scratch_like(prototypes: Tensor) -> Tensor:
    """Memory ``[3, K, C]`` in autocast's type for copies and gradient of prototypes ``[K, C]``; empty in float32."""
    device_type = prototypes.device.type
    in_autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if in_autocast else torch.float32
    return torch.empty(0 if dtype == torch.float32 else 3, *prototypes.shape, dtype=dtype, device=prototypes.device)


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
        scratch: Tensor,
    ) -> tuple[Tensor, Tensor]:
        dtype = scratch.dtype
        # contiguous: for a transposed chunk torch would copy the prototypes once per sample
        x_BVC, y_BGC = (x.transpose(0, 1).to(dtype).contiguous() for x in (features, teacher_features))
        if len(scratch):
            w_KC, u_KC, product_KC = scratch[0].copy_(prototypes), scratch[1].copy_(teacher_prototypes), scratch[2]
        else:
            w_KC, u_KC, product_KC = prototypes.float(), teacher_prototypes.float(), None
        scales_K = weight_norm_scales(prototypes, gains)
        teacher_scales_K = weight_norm_scales(teacher_prototypes, teacher_gains)
        size, num_views, num_global = x_BVC.shape[0], x_BVC.shape[1], y_BGC.shape[1]
        mask_GV = torch.ones(num_global, num_views, device=features.device).fill_diagonal_(0)
        total_GV = torch.zeros_like(mask_GV)
        needs_grad = any(ctx.needs_input_grad[:3])
        true_scale = weight / (student_temp * size)
        # float16 loses digits below 6e-5, and a probability of 1 / 65536 is less: scaled up here, back in backward
        scale = 32.0 if dtype == torch.float16 else true_scale
        grad_x_BVC = torch.zeros(x_BVC.shape, device=features.device) if needs_grad else None
        grad_w_KC: Tensor | None = None
        dots_K = torch.zeros_like(scales_K)  # sum of logit x gradient
        for start in range(0, size, chunk):
            b = slice(start, start + chunk)
            z_bGK = _logits(y_BGC[b], u_KC).mul_(teacher_scales_K).sub_(center)
            q_bGK = F.softmax(z_bGK.div_(teacher_temp), dim=-1)
            z_bVK = _logits(x_BVC[b], w_KC).mul_(scales_K / student_temp)
            log_p_bVK = F.log_softmax(z_bVK, dim=-1)
            total_GV -= torch.bmm(q_bGK, log_p_bVK.transpose(1, 2)).sum(0)
            if grad_x_BVC is not None:
                grad_bVK = log_p_bVK.exp_().mul_(scale * mask_GV.sum(0)[:, None])
                grad_bVK.baddbmm_(mask_GV.T.expand(len(q_bGK), -1, -1), q_bGK, alpha=-scale)
                if gains is not None:
                    dots_K += z_bVK.mul_(grad_bVK).sum((0, 1))
                grad_z = grad_bVK.mul_(scales_K).to(dtype).flatten(0, 1)
                grad_x_BVC[b] = (grad_z @ w_KC).unflatten(0, (-1, num_views))
                x = x_BVC[b].flatten(0, 1)
                if grad_w_KC is not None and dtype == torch.float32:
                    grad_w_KC.addmm_(grad_z.T, x)
                else:
                    product = torch.mm(grad_z.T, x, out=product_KC)
                    grad_w_KC = product.float() if grad_w_KC is None else grad_w_KC.add_(product)
        ctx.grads = (grad_x_BVC, grad_w_KC, dots_K.mul_(student_temp), prototypes.detach(), scales_K, gains)
        ctx.scale = true_scale / scale
        pairs = total_GV / size
        pairs = pairs.triu(1) + pairs.tril(-1)
        ctx.mark_non_differentiable(pairs)
        return weight * pairs.sum(), pairs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        grad_x_BVC, grad_w_KC, dots_K, prototypes, scales_K, gains = ctx.grads
        ctx.grads = (None,) * 6  # scaled in place below, so a second backward must not use them
        if grad_x_BVC is None:
            raise RuntimeError("the chunked loss can be differentiated once: retain_graph is not supported")
        scale = grad.float() * ctx.scale
        grad_gains = None
        if gains is not None:  # the loss does not depend on the length of a direction: no gradient along it
            radial_K = dots_K * (scales_K / gains).square()  # divided by the squared length
            grad_w_KC.addcmul_(prototypes, radial_K[:, None], value=-1)
            grad_gains = dots_K * scale / gains if ctx.needs_input_grad[2] else None
        if scale.device.type != "cpu" or scale != 1:  # comparing it would wait for a GPU
            grad_x_BVC.mul_(scale)
            grad_w_KC.mul_(scale)
        return grad_x_BVC.transpose(0, 1), grad_w_KC, grad_gains, *[None] * 9


def _logits(features: Tensor, prototypes: Tensor) -> Tensor:
    """Logits ``[b, V, K]`` in float32 of features ``[b, V, C]`` and prototypes ``[K, C]``."""
    rows = features.flatten(0, 1)
    if rows.device.type == "cpu" and rows.dtype == torch.float32 and len(rows) <= 8:  # twice as fast, for so few
        return (prototypes @ rows.T).T.contiguous().unflatten(0, features.shape[:2])
    return (features @ prototypes.T).float()


def weight_norm_scales(prototypes: Tensor, gains: Tensor | None) -> Tensor:
    """Factors ``[K]`` of the logits of directions ``[K, C]`` under weight normalisation; 1 without gains."""
    if gains is None:
        return prototypes.new_ones(len(prototypes), dtype=torch.float32)
    return gains / torch.linalg.vector_norm(prototypes, dim=1)
