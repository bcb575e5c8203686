"""Schedules as pure functions of the step or epoch, so that a resumed run gets the same values."""

import math


def cosine(step: int, total: int, start: float, end: float) -> float:
    """Half a cosine from ``start`` at step 0 towards ``end`` at step ``total``, one past the last step."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / max(total, 1)))


def warmup_cosine(step: int, total: int, warmup: int, peak: float, end: float) -> float:
    """Linear warm-up from 0 to ``peak`` at the last of ``warmup`` steps, then ``cosine`` to ``end``."""
    if step < warmup:
        return peak * step / max(warmup - 1, 1)
    return cosine(step - warmup, total - warmup, peak, end)


def linear_epochs(epoch: int, warmup: int, start: float, end: float) -> float:
    """Linear ramp from ``start`` to ``end`` at the last of ``warmup`` epochs, then constant."""
    return end if epoch >= warmup else start + (end - start) * epoch / max(warmup - 1, 1)


def warmup_cosine_epochs(epoch: int, epochs: int, warmup: int, base: float, start: float, end: float) -> float:
    """Linear warm-up from ``start`` to ``base``, then a cosine from ``base`` to ``end``, as in timm's schedulers.

    The cosine counts from epoch 0, warm-up included, so that it continues below ``base`` after the warm-up.
    """
    if epoch < warmup:
        return start + (base - start) * epoch / warmup
    return cosine(epoch, epochs, base, end)
