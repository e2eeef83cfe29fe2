"""Learning rates against the spacing of stored weights: what a step can move, and how large an update must be.

Both rest on Adam moving a weight by about its learning rate η in each step, so that updates grow with η.
"""

from __future__ import annotations

from stillknows.lazy import Tensor, torch

EXPONENTS = 256
SLICE = 2**17  # weights counted at once: what a processor's cache holds
BIAS = 127
HALF_STEP = 0.5
BFLOAT16_BITS = 8  # of a weight, the leading one included


def count_exponents(weight_OI: Tensor) -> Tensor:
    """Return how many weights have each exponent: [EXPONENTS], 2^(i − BIAS) ≤ |w| < 2^(i + 1 − BIAS)."""
    counts = torch.zeros(EXPONENTS, dtype=torch.int64, device=weight_OI.device)
    for part in weight_OI.reshape(-1).split(SLICE):
        exponents = part.float().abs().view(torch.int32).bitwise_right_shift_(23)
        counts += torch.bincount(exponents, minlength=EXPONENTS)
    return counts


def movable(exponents: Tensor, lr: float) -> float:
    """Return the share of weights, 0..1, that one step of size η moves where weights are kept as bfloat16.

    Args:
        exponents: of `count_exponents`.
        lr: η.

    Rounding to the nearest undoes a change of less than half the spacing of numbers around w, which is 2^−8 of the
    power of 2 at or below |w|: nothing beyond |w| = 2^9·η moves.
    """
    return float(exponents[_half_spacings() < lr].sum() / exponents.sum())


def rate_that_moves_half(exponents: Tensor) -> float:
    """Return the learning rate above which one step moves half of the weights, kept as bfloat16."""
    reached = exponents.cumsum(0) * 2 >= exponents.sum()
    return float(_half_spacings()[reached.nonzero()[0, 0]])


def _half_spacings() -> Tensor:
    return 2.0 ** (torch.arange(EXPONENTS, dtype=torch.float64) - BIAS - BFLOAT16_BITS)


def least_rate(lr: float, update_steps: float) -> float:
    """Return the learning rate at which an update as long would reach half a step of a format.

    Args:
        lr: η that the update was made with.
        update_steps: size of a typical change, in steps of the format.

    At half a step a weight in the middle of its bin reaches the edge, and of weights that lie anywhere in their bins
    every second crosses. Formula: η·½/update_steps, never below η.
    """
    return max(lr, lr * HALF_STEP / update_steps)
