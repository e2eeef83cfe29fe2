"""Half-quadratic quantization: an even grid whose zero is fitted to the weights, without calibration data."""

from __future__ import annotations

from typing import Annotated

from stillknows.errors import UserError
from stillknows.lazy import Tensor, torch
from stillknows.registry import Limits, register
from stillknows.variants.compress import Quantized

BITS = (1, 2, 3, 4, 5, 6, 8)  # what hqq stores
NORM = 0.7  # p of the error |w − Q(w)|^p that is made small
BETA, ROUNDS = 10.0, 20  # strength of the penalty, and rounds at most
LEAST_SPREAD, MOST_INVERSE_STEP = 1e-4, 2e4  # keep 1/Δ within float16


@register(
    "transform",
    role="deployment",
    source="Badri and Shaji 2023, Half-Quadratic Quantization; hqq 0.2.8 (CPU, float32)",
    whole=True,
)
def hqq(weight_OI: Tensor, *, bits: int = 4, group: int = 64, axis: Annotated[int, Limits(0, 1)] = 1) -> Quantized:
    """HQQ: Q(w) = Δ·(c − z), c = clamp(round(w/Δ + z)) in 0..2^N − 1, Δ from the range and z from the proximal solver.

    Args:
        weight_OI: weights [O, I].
        bits: N; 1, 2, 3, 4, 5, 6 or 8.
        group: weights that share Δ and z; 0 for a whole row (axis 1) or column (axis 0).
        axis: 1 for groups of neighbours in a row, 0 for groups of weights that lie O·I/group apart.

    Δ = (max − min)/(2^N − 1), or 1 where max − min ≤ 10⁻⁴: such a group becomes one value, and the result depends on
    the weights' absolute size. z is a real number, so 0 need not be on the grid and the error has no bound of Δ/2.
    Solved in float32 on every device (the library solves in float16 on a GPU). Raises UserError when `group` does not
    divide I or `bits` is 7 or out of range.
    """
    blocks = _grouped(weight_OI, bits, group, axis)
    least, most = blocks.amin(axis, keepdim=True), blocks.amax(axis, keepdim=True)
    top = 2**bits - 1
    spread = most - least
    inverse_step = (top / spread).where(spread > LEAST_SPREAD, 1.0).clamp_max(MOST_INVERSE_STEP)
    zero = -least * inverse_step
    if bits == 4:
        zero = zero.round()  # the library's configuration begins 4 bits at a whole zero
    zero = _fitted_zero(blocks, inverse_step, zero, top, axis)
    codes = _codes(blocks, inverse_step, zero, top)
    values = (codes - zero) * (1 / inverse_step)
    return Quantized(values.reshape(weight_OI.shape), codes.reshape(weight_OI.shape).int())


def _codes(blocks: Tensor, inverse_step: Tensor, zero: Tensor, top: int) -> Tensor:
    return torch.round(blocks * inverse_step + zero).clamp(0, top)


def _fitted_zero(blocks: Tensor, inverse_step: Tensor, zero: Tensor, top: int, axis: int) -> Tensor:
    """Return the z that makes Σ|w − Q(w)|^p small, by half-quadratic splitting.

    The error e of each weight is split off by the proximal step e = sign(r)·max(0, |r| − |r|^(p−1)/β), r = w − Q(w);
    then z = mean of c − (w − e)/Δ. Below |r| = .17 e is 0: weights of usual size get the z of least squared error. The
    rounds end when the mean |r| over the whole matrix no longer falls. As in the library, the z of that last round is
    kept, and β stays, where the description lets it grow by 1 % a round.
    """
    least_error = torch.inf
    for _ in range(ROUNDS):
        codes = _codes(blocks, inverse_step, zero, top)
        residuals = blocks - (codes - zero) / inverse_step
        magnitudes = residuals.abs()
        shrunk = (magnitudes - (1 / BETA) * magnitudes.pow(NORM - 1)).clamp_min(0) * residuals.sign()
        zero = torch.mean(codes - (blocks - shrunk) * inverse_step, axis, keepdim=True)
        error = float(magnitudes.mean())
        if not error < least_error:
            break
        least_error = error
    return zero


def _grouped(weight_OI: Tensor, bits: int, group: int, axis: int) -> Tensor:
    """Return the weights as a matrix whose groups run along `axis`."""
    if bits not in BITS:
        raise UserError(f"hqq: bits={bits} is not one of {', '.join(map(str, BITS))}")
    inputs = weight_OI.shape[1]
    if group < 0 or (group and inputs % group):
        raise UserError(
            f"hqq: groups of {group} do not divide {inputs} inputs", "use group=0 (whole rows) or a divisor"
        )
    weight_OI = weight_OI.contiguous()  # the order of sums depends on the layout
    if not group:
        return weight_OI
    return weight_OI.reshape(-1, group) if axis == 1 else weight_OI.reshape(group, -1)
