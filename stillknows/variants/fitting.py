"""Whether a format fits the shapes of a model's layers; where its group is too wide, a format that fits."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from stillknows.errors import UserError
from stillknows.lazy import nn, no_grad, torch
from stillknows.model.architecture import MatrixRole
from stillknows.model.layers import linears
from stillknows.progress import log
from stillknows.registry import Bound, bind
from stillknows.variants.activations import CACHED, INPUTS, attention_name, head_width
from stillknows.variants.calibrate import Statistics
from stillknows.variants.compress import WEIGHTS, Chain, is_calibrated, links_of, matrices, quantize

MAX_UNREACHED = 0.1  # share of a model's weights that a format may leave as they are
GROUPS = (128, 64, 32, 16)  # weights that usually share a scale


def check(model: nn.Module, chain: Chain, name: str) -> None:
    """Raise UserError when a layer's shape does not allow the format, or when it would leave most of a mixture of
    experts as it is; it names the usual group that would fit. Looks at shapes only; needs no weights."""
    try:
        _check(model, chain, name)
    except UserError as error:
        other = _with_usual_group(model, chain, chain)
        if other is None:
            raise
        raise UserError(str(error).partition("\n")[0], f"use {_spec(other)}") from error


def fitted(model: nn.Module, chain: Chain, name: str, *, exact: bool) -> tuple[str, Chain]:
    """Return a format's name and chain. Where its group does not divide the inputs of all layers, it takes the largest
    usual one that does. Raises UserError as `check` does.

    exact: a link that is spelled with options is meant as it is.
    """
    free = [link for link in chain if not (exact and ":" in link.spec)]
    other = None if _fits(model, chain) else _with_usual_group(model, chain, free)
    if other is None:
        check(model, chain, name)
        return name, chain
    log(f"{name} becomes {_spec(other)}: its groups do not divide the inputs of every layer")
    return _spec(other), other


def _spec(chain: Chain) -> str:
    return "+".join(link.spec for link in chain)


def _fits(model: nn.Module, chain: Chain) -> bool:
    try:
        _check(model, chain, "")
    except UserError:
        return False
    return True


def _with_usual_group(model: nn.Module, chain: Chain, free: Sequence[Bound]) -> Chain | None:
    """Return the chain with the largest usual group that fits in the place of larger ones in its `free` links; None
    where none does."""
    for group in GROUPS:
        wide = [link for link in free if link.options.get("group", 0) > group]
        specs = [link.respelled(group=group) if link in wide else link.spec for link in chain]
        other = tuple(bind("transform", spec) for spec in specs)
        if specs != [link.spec for link in chain] and _fits(model, other):
            return other
    return None


@no_grad
def _check(model: nn.Module, chain: Chain, name: str) -> None:
    _check_reach(model, chain, name)
    tried: set[tuple[int, MatrixRole | None]] = set()
    for layer, place in matrices(model, chain):
        outputs, inputs = layer.read().shape
        if (inputs, place) in tried:
            continue
        tried.add((inputs, place))
        try:
            _try_shape(inputs, chain, place)
        except UserError as error:
            raise UserError(f"{name}: layer {layer.name} {(outputs, inputs)}: {error}") from error
    _check_cache(model, links_of(chain, CACHED), name)


def _check_reach(model: nn.Module, chain: Chain, name: str) -> None:
    """Refuse formats of weights where many weights are in no linear map, as experts are that lie in one tensor."""
    if all(link.plugin.name == "full" for link in links_of(chain, WEIGHTS)):
        return
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    apart = {id(module.weight) for module in (*tables, model.get_output_embeddings())}  # type: ignore[operator]
    reached = {id(layer.module.weight) for layer in linears(model)}
    matrices = {key: p for key, p in model.named_parameters() if p.ndim > 1 and id(p) not in apart}
    left = {key: p.numel() for key, p in matrices.items() if id(p) not in reached}
    share = sum(left.values()) / max(1, sum(p.numel() for p in matrices.values()))
    if share > MAX_UNREACHED:
        largest = max(left, key=left.__getitem__)
        raise UserError(
            f"{name}: {share:.0%} of the weights are in no linear map, most of them in {largest}, as in mixtures of "
            "experts that keep theirs in one tensor; formats do not reach them here: they would stay as they are",
            "audit it in full precision, or give the quantized files that are deployed",
        )


def check_fixed(model: nn.Module, chain: Chain, name: str) -> None:
    """Raise UserError unless the chain gives codes of these weights that depend on nothing else; see `check`."""
    if not links_of(chain, WEIGHTS) or any(map(is_calibrated, chain)):
        raise UserError(f"{name}: this needs a format of weights alone", "give one such as nf4 or rtn")
    check(model, chain, name)


def _check_cache(model: nn.Module, links: Sequence[Bound], name: str) -> None:
    if not links:
        return
    try:
        attention_name(model)
        for link in links:
            link(**{CACHED: torch.zeros(1, head_width(model))})
    except UserError as error:
        raise UserError(f"{name}: keys and values: {error}") from error


def _try_shape(inputs: int, chain: Chain, place: MatrixRole | None) -> None:
    """Quantize one row of zeros; for formats that solve for their weights, a row that has a shape and no numbers."""
    for link in links_of(chain, INPUTS):
        link(**{INPUTS: torch.zeros(1, inputs)})
    if not any(map(is_calibrated, chain)):
        quantize(torch.zeros(1, inputs), chain, place=place)
        return
    row = torch.zeros(1, inputs, device="meta")
    with contextlib.suppress(NotImplementedError, RuntimeError):  # the first step that needs numbers: shapes are right
        quantize(row, chain, Statistics(torch.zeros(inputs, inputs, device="meta"), row[0]))
