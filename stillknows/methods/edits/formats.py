"""Edits that make an update large enough for a format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

from stillknows.lazy import Tensor, nn, no_grad, torch
from stillknows.model.architecture import MatrixRole
from stillknows.progress import log
from stillknows.registry import Limits, Names, register
from stillknows.variants.compress import Chain, matrices, parse_variant, quantize
from stillknows.variants.fitting import check_fixed

FARTHER = (1.0, 1.5, 2.0, 3.0)  # floors, in units of the asked one, for weights that keep their code at it


@register("edit", source="arXiv 2605.15138 (the magnitude floor of MANSU; which weights is chosen more simply)")
@no_grad
def floor(
    model: nn.Module,
    original: Mapping[str, Tensor],
    *,
    format: Annotated[str, Names("transform", "deployment")] = "nf4",
    share: Annotated[float, Limits(0, 1)] = 0.1,
    bins: Annotated[float, Limits(0, above=True)] = 1.0,
) -> None:
    """Magnitude floor: the largest changes of each matrix become at least a bin of a format wide, and cross its edges.

    A chosen weight moves from θo in the direction in which it had moved, by at least `bins` steps of its row (a step
    is √12 times the root mean square of the row's rounding errors, the width of an even grid with these errors), and
    up to three times as far until its code is another one than θo's. Where even that changes no code (an outermost bin)
    its own change stands. All other weights are left alone.

    Published: chosen by attribution of the circuits that know the forget items; here by the size of the change.

    Args:
        format: what must not undo the update: a format of weights that looks at no calibration inputs.
        share: of each matrix's weights, the most changed, 0..1; weights without a change are never chosen.
        bins: least change, in steps of the format, > 0.
    """
    chain = parse_variant(format)
    check_fixed(model, chain, f"floor:format={format}")
    chosen = crossed = 0
    names = {id(p): name for name, p in model.named_parameters()}
    for layer, place in matrices(model, chain):
        now_OI = layer.read()
        before = original[names[id(layer.module.weight)]].to(now_OI)
        before_OI = before.T if layer.transposed else before
        is_chosen_OI = _most_changed(now_OI - before_OI, share)
        raised_OI = raise_update(before_OI, now_OI, is_chosen_OI, chain, bins, place)
        layer.write(raised_OI)
        codes_OI, before_codes_OI = (quantize(w_OI, chain, place=place).codes_OI for w_OI in (raised_OI, before_OI))
        chosen += int(is_chosen_OI.sum())
        crossed += int(((codes_OI != before_codes_OI) & is_chosen_OI).sum())
    log(f"floor: {chosen} weights were chosen, of which {crossed} change their code in {format}")


def raise_update(
    before_OI: Tensor, now_OI: Tensor, is_chosen_OI: Tensor, chain: Chain, bins: float, place: MatrixRole | None = None
) -> Tensor:
    """Return the weights with the changes of chosen ones raised, as `floor` says."""
    form = quantize(before_OI, chain, place=place)
    errors_OI = before_OI - form.values_OI
    least_O1 = bins * math.sqrt(12) * errors_OI.square().mean(1, keepdim=True).sqrt()
    update_OI = now_OI - before_OI

    def raised(is_wanted_OI: Tensor) -> tuple[Tensor, Tensor]:
        raised_OI, is_open_OI = now_OI, is_wanted_OI
        for times in FARTHER:
            moved_OI = before_OI + update_OI.sign() * torch.maximum(update_OI.abs(), times * least_O1)
            raised_OI = torch.where(is_open_OI, moved_OI, raised_OI)
            is_open_OI = is_wanted_OI & (quantize(raised_OI, chain, place=place).codes_OI == form.codes_OI)
        return raised_OI, is_open_OI

    _, is_outermost_OI = raised(is_chosen_OI)  # moving them would only stretch the scale that others share
    return raised(is_chosen_OI & ~is_outermost_OI)[0]


def _most_changed(update_OI: Tensor, share: float) -> Tensor:
    """Return where the largest magnitudes are, bool [O, I]; of equal ones at the bound all."""
    sizes = update_OI.abs()
    count = round(share * sizes.numel())
    if not count:
        return torch.zeros_like(sizes, dtype=torch.bool)
    least = sizes.flatten().kthvalue(sizes.numel() - count + 1).values
    return (sizes >= least) & (sizes > 0)
