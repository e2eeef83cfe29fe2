"""Edits that change what a layer puts out for some inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, NamedTuple

from stillknows.errors import UserError
from stillknows.lazy import Tensor, nn, no_grad, torch
from stillknows.model.architecture import placed
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.forward import answer_states
from stillknows.model.layers import Linear, block_output, blocks, layer_number
from stillknows.registry import Limits, register

CHUNK = 4096
TOLERANCE = 0.01  # of the shift that the edit has made where it was to make it


@register("edit", source="arXiv 2502.07218 (LUNAR)")
@no_grad
def lunar(
    model: nn.Module,
    forget: Sequence[EncodedAnswer],
    retain: Sequence[EncodedAnswer],
    refusals: Sequence[Sequence[EncodedAnswer]],
    *,
    coefficient: float = 2.0,
    layer: float = 0.72,
    damping: Annotated[float, Limits(0, above=True)] = 1e-3,
) -> None:
    """Redirection: one matrix W is solved for, so that block l's states on forget items move by c·r towards refusing.

    r is the mean state while the model reads refusals as answers to the forget questions, minus that while it reads
    the true answers (published: questions that an aligned model refuses, minus forget questions). W, by which the
    block's feed-forward layer writes, becomes the least squares solution W + c·r·sᵀ(Σ_f aaᵀ + Σ_r aaᵀ + λ·I)⁻¹ with
    s = Σ_f a: its inputs a at the forget items' answer tokens are to give c·r more, those at all tokens of the retain
    items the same as before. Published code descends to it instead, with AdamW from W.

    Args:
        refusals: for each forget item, refusals as answers to its question.
        coefficient: c, in lengths of r.
        layer: l, number of the block from 1, or a share of the depth below 1; published: 22 of 32 counted from 0.
        damping: λ, in means of the diagonal of the sums of aaᵀ, > 0.

    Raises UserError for an architecture whose blocks do more to what a feed-forward layer puts out than add it.
    """
    number = layer_number(model, layer)
    block, written = blocks(model)[number - 1], _written_by(model, number)
    refusing_TD = torch.cat([seen.states_TD for item in refusals for seen in _look(model, item, block, written.module)])
    known = [(seen.states_TD, seen.inputs_TI) for seen in _look(model, forget, block, written.module)]
    known_TD, known_TI = (torch.cat(parts) for parts in zip(*known, strict=True))
    shift_D = coefficient * (refusing_TD.mean(0) - known_TD.mean(0))
    gram_II = known_TI.T @ known_TI
    for kept_LI in _chunks(seen.inputs_LI for seen in _look(model, retain, block, written.module)):
        gram_II.addmm_(kept_LI.T, kept_LI)
    gram_II.diagonal().add_(damping * gram_II.diagonal().mean())
    answering_I = torch.linalg.solve(gram_II, known_TI.sum(0))
    [before] = _look(model, forget[:1], block, written.module)
    before_OI = written.read().clone()
    written.write(before_OI + torch.outer(shift_D, answering_I).to(before_OI))
    [after] = _look(model, forget[:1], block, written.module)
    expected_TD = torch.outer(before.inputs_TI @ answering_I, shift_D)
    if (after.states_TD - before.states_TD - expected_TD).norm() > TOLERANCE * expected_TD.norm():
        written.write(before_OI)
        raise UserError(
            f"{type(model).__name__} does more to what its feed-forward layers put out than add it",
            "lunar does not know this architecture; choose rmu",
        )


class _Seen(NamedTuple):
    """Of one item: what a block put out where its answer is predicted, and what one of the block's maps was given
    there and at all L tokens."""

    states_TD: Tensor
    inputs_TI: Tensor
    inputs_LI: Tensor


def _look(model: nn.Module, items: Iterable[EncodedAnswer], block: nn.Module, module: nn.Module) -> Iterator[_Seen]:
    """Read the items one by one; in float64, as sums of many products are to be solved for."""
    for item in items:
        with _inputs(module) as given, block_output(block) as put_out:
            columns_T = answer_states(model, [item]).places.columns_T
        states_LD, inputs_LI = put_out[0][0].double(), given[0][0].double()
        yield _Seen(states_LD[columns_T], inputs_LI[columns_T], inputs_LI)


def _chunks(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """Join tensors by their rows, to at least CHUNK of them: products of [L, I] are made in few large steps."""
    waiting: list[Tensor] = []
    for part in parts:
        waiting.append(part)
        if sum(map(len, waiting)) >= CHUNK:
            yield torch.cat(waiting)
            waiting = []
    if waiting:
        yield torch.cat(waiting)


@contextlib.contextmanager
def _inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        yield seen
    finally:
        handle.remove()


def _written_by(model: nn.Module, number: int) -> Linear:
    """Return the map by which a block's feed-forward layer writes."""
    for layer, place in placed(model):
        if place.role == "down" and place.layer == number - 1:
            return layer
    raise UserError(f"lunar: block {number} of {type(model).__name__} has no feed-forward output that it knows")
