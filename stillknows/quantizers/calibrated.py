"""Formats that look at calibration inputs x: what must be kept is the output W·x, not each weight.

H = mean of x·xᵀ, so that the mean squared error of the outputs is tr(E·H·Eᵀ) with E = W − Q.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from stillknows.errors import UserError
from stillknows.formats.compress import Quantized
from stillknows.quantizers.rtn import Grid, GridKind, in_blocks, rtn
from stillknows.registry import register

COLUMNS = 16  # inputs that are rounded one by one; what many of them leave to others is one product of matrices


@register("quantizer", source="arXiv 2210.17323 (GPTQ)", version=2)
def gptq(
    weight_OI: Tensor,
    hessian_II: Tensor,
    *,
    bits: int = 4,
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
        group: inputs that share a scale; 0 for one scale per output channel. Scales are those of the weights as given.
        symmetric: z = 0; see rtn.
        grid: Δ of the symmetric form; "full" as compressed-tensors stores it; see rtn.
        order: "magnitude" rounds the inputs of the largest mean x² first (act-order), "none" from left to right.
        damp: added to H's diagonal, in units of its mean, so that it can be inverted.
        calibration: "text", or the name of a split; calibrating on what is to be forgotten is an attack.

    Raises UserError when `group` does not divide I or `bits` is out of range.
    """
    even = Grid.of(in_blocks(weight_OI, group), bits, symmetric, grid)
    magnitudes_I = hessian_II.diagonal()
    places_I = torch.arange(len(magnitudes_I), device=weight_OI.device)
    if order == "magnitude":
        places_I = torch.argsort(magnitudes_I, descending=True, stable=True)
    weight_IO = weight_OI.masked_fill(magnitudes_I == 0, 0.0).T[places_I]
    feedback_II = _feedback(hessian_II[places_I[:, None], places_I], damp)
    codes_IO, _ = _round_in_order(weight_IO.clone(), weight_IO, _grids(even, places_I), feedback_II)
    codes_OI = codes_IO[torch.argsort(places_I)].T.contiguous()
    values_OI = even.values(in_blocks(codes_OI, group)).reshape(weight_OI.shape)
    return Quantized(values_OI, codes_OI.to(torch.int8), even.stored(symmetric))


def _feedback(hessian_II: Tensor, damp: float) -> Tensor:
    """Return the upper triangular F with unit diagonal of H + λI = F·D·Fᵀ, D diagonal; an input that is always 0 gets
    D = 1.

    Then tr(E·H·Eᵀ) = Σ_i D_i·‖(E·F)_i‖², and the best that is left at input i is q_i nearest to w_i + Σ_(j<i) e_j·F_ji.
    This is GPTQ (arXiv 2307.13304, theorem 6), with one Cholesky factor and no inverse.
    """
    hessian_II = hessian_II.clone()
    diagonal_I = hessian_II.diagonal()
    diagonal_I[diagonal_I == 0] = 1.0
    diagonal_I += damp * diagonal_I.mean()
    lower_II, failed = torch.linalg.cholesky_ex(hessian_II.flip(0, 1))
    if bool(failed):
        raise UserError("gptq: the calibration inputs leave weights undetermined", "give more text or a larger damp")
    upper_II = lower_II.flip(0, 1)
    return upper_II / upper_II.diagonal()


def _grids(even: Grid, places_I: Tensor) -> list[Grid]:
    """Return the grid of each input, steps and zeros [O] or [1], in the order of `places_I`."""
    step_GO, zero_GO = (part.squeeze(-1).T.contiguous() for part in (even.step, even.zero))
    group = len(places_I) // len(step_GO)
    return [Grid(step_GO[i // group], zero_GO[i // group], even.low, even.high) for i in places_I.tolist()]


def _round_in_order(
    target_IO: Tensor, weight_IO: Tensor, grids: Sequence[Grid], feedback_II: Tensor
) -> tuple[Tensor, Tensor]:
    """Return codes and errors of the weights, [I, O]; the target, w + what earlier inputs leave to it, is used up.

    Halves of halves: the errors of the first half reach the second in one product of matrices.
    """
    count = len(weight_IO)
    if count > COLUMNS:
        half = count // 2
        first = _round_in_order(target_IO[:half], weight_IO[:half], grids[:half], feedback_II[:half, :half])
        target_IO[half:].addmm_(feedback_II[:half, half:].T, first[1])
        second = _round_in_order(target_IO[half:], weight_IO[half:], grids[half:], feedback_II[half:, half:])
        codes_IO, errors_IO = (torch.cat(parts) for parts in zip(first, second, strict=True))
        return codes_IO, errors_IO
    codes_IO, errors_IO = torch.empty_like(weight_IO), torch.empty_like(weight_IO)
    for i, even in enumerate(grids):
        codes_IO[i] = even.codes(torch.addmv(target_IO[i], errors_IO[:i].T, feedback_II[:i, i]))
        errors_IO[i] = weight_IO[i] - even.values(codes_IO[i])
    return codes_IO, errors_IO


STEPS = 20  # of the search for scales, and to half of a range
LEAST_MAGNITUDE = 1e-4


@register("quantizer", source="arXiv 2306.00978 (AWQ)")
def awq(
    weight_OI: Tensor,
    hessian_II: Tensor,
    magnitudes_I: Tensor,
    *,
    bits: int = 4,
    group: int = 128,
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

    Raises UserError when `group` does not divide I or `bits` is out of range.
    """

    def rounded(scale_I: Tensor) -> Quantized:
        form = rtn(weight_OI * scale_I, bits=bits, group=group, symmetric=symmetric, grid=grid)
        return Quantized(form.values_OI / scale_I, form.codes_OI)

    powers = [magnitudes_I.clamp_min(LEAST_MAGNITUDE).pow(k / STEPS) for k in range(STEPS)]
    scales = [power_I / (power_I.max() * power_I.min()).sqrt() for power_I in powers]
    scale_I = min(scales, key=lambda scale_I: output_error(weight_OI - rounded(scale_I).values_OI, hessian_II))
    if not clip:
        return rounded(scale_I)
    clipped = _clipped(weight_OI * scale_I, hessian_II / torch.outer(scale_I, scale_I), bits, group, symmetric, grid)
    return Quantized(clipped.values_OI / scale_I, clipped.codes_OI)


def _clipped(
    weight_OI: Tensor, hessian_II: Tensor, bits: int, group: int, symmetric: bool, grid: GridKind
) -> Quantized:
    """Round with each block's range shrunk by the share that gives the least error of the block's own outputs."""
    blocks_OGC = in_blocks(weight_OI, group)
    _, groups, columns = blocks_OGC.shape
    inside_GCC = torch.stack(
        [hessian_II[i : i + columns, i : i + columns] for i in range(0, groups * columns, columns)]
    )
    least_OG1 = torch.full_like(blocks_OGC[..., :1], torch.inf)
    values_OGC, codes_OGC = torch.empty_like(blocks_OGC), torch.empty_like(blocks_OGC)
    for k in range(STEPS // 2):
        limit = blocks_OGC.abs().amax(-1, keepdim=True) * (1 - k / STEPS)
        shrunk = blocks_OGC.clamp(-limit, limit)
        even = Grid.of(shrunk, bits, symmetric, grid)
        codes = even.codes(shrunk)
        gap = blocks_OGC - even.values(codes)
        error = torch.einsum("ogc,gcd,ogd->og", gap, inside_GCC, gap)[..., None]
        better = error < least_OG1
        least_OG1 = torch.where(better, error, least_OG1)
        values_OGC = torch.where(better, even.values(codes), values_OGC)
        codes_OGC = torch.where(better, codes, codes_OGC)
    return Quantized(values_OGC.reshape(weight_OI.shape), codes_OGC.reshape(weight_OI.shape).to(torch.int8))


def output_error(error_OI: Tensor, hessian_II: Tensor) -> float:
    """Return tr(E·H·Eᵀ): the mean squared error of the outputs, summed over them."""
    return float(((error_OI @ hessian_II) * error_OI).sum())
