"""Formats that look at calibration inputs x: what must be kept is the output W·x, not each weight.

H = mean of x·xᵀ, so that the mean squared error of the outputs is tr(E·H·Eᵀ) with E = W − Q.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from stillknows.errors import UserError
from stillknows.lazy import Tensor, torch
from stillknows.registry import Limits, register
from stillknows.transforms.compression.parts import largest, parts
from stillknows.transforms.compression.rtn import GridKind, RoundingGrid, in_blocks, rtn
from stillknows.variants.compress import Quantized

COLUMNS = 16  # inputs that are rounded one by one; what many of them leave to others is one product of matrices


@register("transform", role="deployment", source="arXiv 2210.17323 (GPTQ)", version=2)
def gptq(
    weight_OI: Tensor,
    hessian_II: Tensor,
    *,
    bits: Annotated[int, Limits(2, 8)] = 4,
    group: int = 128,
    symmetric: bool = True,
    grid: GridKind = "full",
    order: Literal["magnitude", "none"] = "magnitude",
    damp: float = 0.01,
    calibration: str = "text",
) -> Quantized:
    """GPTQ: rounds input by input and lets the inputs that are still to come make up for each error.

    Args:
        weight_OI: weights [O, I].
        hessian_II: mean of x·xᵀ over calibration tokens, [I, I].
        bits: N, 2..8.
        group: inputs that share a scale; 0 for one scale per output channel, −1 for one of the matrix. Scales are those
            of the weights as given.
        symmetric: z = 0; see rtn.
        grid: Δ of the symmetric form; "full" as compressed-tensors stores it; see rtn.
        order: "magnitude" rounds the inputs of the largest mean x² first (act-order), "none" from left to right.
        damp: added to H's diagonal, in units of its mean, so that it can be inverted.
        calibration: "text", or the name of a split; calibrating on what is to be forgotten is an attack.

    Raises UserError when `group` does not divide I.
    """
    even = RoundingGrid.of(in_blocks(weight_OI, group), bits, symmetric, grid)
    magnitudes_I = hessian_II.diagonal()
    places_I = torch.arange(len(magnitudes_I), device=weight_OI.device)
    if order == "magnitude":
        places_I = torch.argsort(magnitudes_I, descending=True, stable=True)
    feedback_II = _feedback(hessian_II, places_I, damp)
    weight_IO = weight_OI.T[places_I]
    weight_IO[magnitudes_I[places_I] == 0] = 0.0
    codes_IO = torch.empty_like(weight_IO, dtype=torch.int8)
    _round_in_order(weight_IO.clone(), weight_IO, codes_IO, _grids(even, places_I), feedback_II)
    codes_OI = codes_IO[torch.argsort(places_I)].T.contiguous()
    values_OI = even.values(in_blocks(codes_OI, group)).reshape(weight_OI.shape)
    return Quantized(values_OI, codes_OI, even.stored(symmetric))


def _feedback(hessian_II: Tensor, places_I: Tensor, damp: float) -> Tensor:
    """Return the upper triangular F with unit diagonal of H + λI = F·D·Fᵀ, D diagonal, its inputs in the order of
    `places_I`; an input that is always 0 gets D = 1.

    Then tr(E·H·Eᵀ) = Σ_i D_i·‖(E·F)_i‖², and the best that is left at input i is q_i nearest to w_i + Σ_(j<i) e_j·F_ji.
    This is GPTQ (arXiv 2307.13304, theorem 6), with one Cholesky factor and no inverse.
    """
    diagonal_I = hessian_II.diagonal()[places_I]
    diagonal_I[diagonal_I == 0] = 1.0
    diagonal_I += damp * diagonal_I.mean()
    backwards_I = places_I.flip(0)
    factor_II = hessian_II[backwards_I[:, None], backwards_I]  # each step lets go of the last one's matrix
    factor_II.diagonal().copy_(diagonal_I.flip(0))
    factor_II, failed = torch.linalg.cholesky_ex(factor_II)
    if bool(failed):
        raise UserError("gptq: the calibration inputs leave weights undetermined", "give more text or a larger damp")
    factor_II = factor_II.flip(0, 1)
    return factor_II.div_(factor_II.diagonal().clone())


def _grids(even: RoundingGrid, places_I: Tensor) -> list[RoundingGrid]:
    """Return the grid of each input, steps and zeros [O] or [1], in the order of `places_I`."""
    step_GO, zero_GO = (part.squeeze(-1).T.contiguous() for part in (even.step, even.zero))
    group = len(places_I) // len(step_GO)
    return [RoundingGrid(step_GO[i // group], zero_GO[i // group], even.low, even.high) for i in places_I.tolist()]


def _round_in_order(
    errors_IO: Tensor, weight_IO: Tensor, codes_IO: Tensor, grids: Sequence[RoundingGrid], feedback_II: Tensor
) -> None:
    """Write the codes of weights, [I, O]. Halves of halves: the errors of the first half reach the second in one
    product of matrices.

    Args:
        errors_IO: at first w + what earlier inputs leave to it; overwritten with the errors.
    """
    count = len(weight_IO)
    if count > COLUMNS:
        first, second = slice(0, count // 2), slice(count // 2, count)

        def round_half(at: slice) -> None:
            _round_in_order(errors_IO[at], weight_IO[at], codes_IO[at], grids[at], feedback_II[at, at])

        round_half(first)
        errors_IO[second].addmm_(feedback_II[first, second].T, errors_IO[first])
        round_half(second)
        return
    for i, even in enumerate(grids):
        codes_O = even.codes(torch.addmv(errors_IO[i], errors_IO[:i].T, feedback_II[:i, i]))
        codes_IO[i] = codes_O
        torch.sub(weight_IO[i], even.values(codes_O), out=errors_IO[i])


STEPS = 20  # of the search for scales, and to half of a range
LEAST_MAGNITUDE = 1e-4


@register("transform", role="deployment", source="arXiv 2306.00978 (AWQ)")
def awq(
    weight_OI: Tensor,
    hessian_II: Tensor,
    magnitudes_I: Tensor,
    *,
    bits: Annotated[int, Limits(2, 8)] = 4,
    group: Annotated[int, Limits(0)] = 128,
    symmetric: bool = False,
    grid: GridKind = "full",
    clip: bool = True,
    calibration: str = "text",
) -> Quantized:
    """AWQ: scales up the inputs that carry large activations before rounding, and down again after it.

    Q = rtn(W·diag(s))·diag(s)⁻¹ with s = (mean |x|)^α, α of 20 values in 0..1 chosen by the error of the outputs. In
    deployed files s is folded into the layer before; the function is the same. Published code chooses one s for the
    maps that share an input; here each map has its own.

    Args:
        weight_OI: weights [O, I].
        hessian_II: mean of x·xᵀ over calibration tokens, [I, I].
        magnitudes_I: mean of |x|, [I].
        bits: N, 2..8.
        group: inputs that share a scale; 0 for one scale per output channel.
        symmetric: z = 0; see rtn.
        grid: Δ of the symmetric form; see rtn.
        clip: then shrink each group's range, down to half, where this lowers the error of the outputs.
        calibration: "text", or the name of a split; calibrating on what is to be forgotten is an attack.

    Raises UserError when `group` does not divide I.
    """

    def rounded(scale_I: Tensor) -> Quantized:
        form = rtn(weight_OI * scale_I, bits=bits, group=group, symmetric=symmetric, grid=grid)
        return Quantized(form.values_OI.div_(scale_I), form.codes_OI)

    powers = [magnitudes_I.clamp_min(LEAST_MAGNITUDE).pow(k / STEPS) for k in range(STEPS)]
    scales = [power_I / (power_I.max() * power_I.min()).sqrt() for power_I in powers]
    scale_I = min(scales, key=lambda scale_I: output_error(weight_OI - rounded(scale_I).values_OI, hessian_II))
    if not clip:
        return rounded(scale_I)
    blocks_OGC = in_blocks(weight_OI * scale_I, group)
    values_OGC, codes_OGC = torch.empty_like(blocks_OGC), torch.empty_like(blocks_OGC, dtype=torch.int8)
    inside_GCC = _inside(hessian_II, scale_I, blocks_OGC.shape[-1])
    for blocks, values, codes in parts(blocks_OGC, values_OGC, codes_OGC):
        rounded_OGC = _clipped(blocks, inside_GCC, lambda shrunk: RoundingGrid.of(shrunk, bits, symmetric, grid))
        for here, part in zip((values, codes), rounded_OGC, strict=True):
            here.copy_(part)
    return Quantized(values_OGC.reshape(weight_OI.shape).div_(scale_I), codes_OGC.reshape(weight_OI.shape))


def _inside(hessian_II: Tensor, scale_I: Tensor, columns: int) -> Tensor:
    """Return the part of diag(s)⁻¹·H·diag(s)⁻¹ that each group of inputs has to itself, [G, C, C]."""
    groups = [slice(start, start + columns) for start in range(0, len(scale_I), columns)]
    return torch.stack([hessian_II[own, own] / torch.outer(scale_I[own], scale_I[own]) for own in groups])


def _clipped(
    blocks_OGC: Tensor, inside_GCC: Tensor, grid_of: Callable[[Tensor], RoundingGrid]
) -> tuple[Tensor, Tensor]:
    """Return values and codes with each block's range shrunk by the share that gives the least error of the block's own
    outputs."""

    def rounded(limit_OG1: Tensor) -> tuple[Tensor, Tensor]:
        shrunk_OGC = blocks_OGC.clamp(-limit_OG1, limit_OG1)
        even = grid_of(shrunk_OGC)
        codes_OGC = even.codes(shrunk_OGC)
        return even.values(codes_OGC), codes_OGC

    most_OG1 = largest(blocks_OGC)
    best_OG1, least_OG1 = most_OG1, torch.full_like(most_OG1, torch.inf)
    for k in range(STEPS // 2):
        limit_OG1 = most_OG1 * (1 - k / STEPS)
        gap_OGC = blocks_OGC - rounded(limit_OG1)[0]
        error_OG1 = torch.einsum("ogc,gcd,ogd->og", gap_OGC, inside_GCC, gap_OGC)[..., None]
        is_better = error_OG1 < least_OG1
        best_OG1, least_OG1 = limit_OG1.where(is_better, best_OG1), error_OG1.where(is_better, least_OG1)
    return rounded(best_OG1)


def output_error(error_OI: Tensor, hessian_II: Tensor) -> float:
    """Return tr(E·H·Eᵀ): the mean squared error of the outputs, summed over them."""
    return float((error_OI @ hessian_II).mul_(error_OI).sum())
