"""Schedules as pure functions of the step or epoch: a resumed run reads the value that it would have had."""

import math


def cosine(step: int, total: int, start: float, end: float) -> float:
    """Half a cosine from ``start`` at step 0 towards ``end`` at step ``total`` (which is not reached)."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / max(total, 1)))


def warmup_cosine(step: int, total: int, warmup: int, peak: float, end: float) -> float:
    """Linear warm-up from 0 over ``warmup`` steps, the last of which is at ``peak``, then ``cosine`` to ``end``."""
    if step < warmup:
        return peak * step / max(warmup - 1, 1)
    return cosine(step - warmup, total - warmup, peak, end)


def linear_epochs(epoch: int, warmup: int, start: float, end: float) -> float:
    """From ``start`` to ``end`` over ``warmup`` epochs, the last of which is at ``end``, then constant."""
    if epoch >= warmup or warmup < 2:
        return end if epoch >= warmup else start
    return start + (end - start) * epoch / (warmup - 1)


def warmup_cosine_epochs(epoch: int, epochs: int, warmup: int, base: float, start: float, end: float) -> float:
    """Linear warm-up from ``start``, then the cosine of the whole run from ``base`` to ``end``, as timm's schedulers.

    The cosine is that of ``epoch / epochs``: after the warm-up it goes on below ``base``, at its own height.
    """
    if epoch < warmup:
        return start + (base - start) * epoch / warmup
    return cosine(epoch, epochs, base, end)
