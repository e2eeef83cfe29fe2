"""The only walk over a model's layers: put a quantized form in place, measure, restore.

What a plug-in's function is given says what it is a format of: weights (`weight_OI`), inputs of linear maps
(`activations_TI`), or keys and values of attention (`cached_TD`). A chain may hold all of them:
"int8+int8_activations+kv_fp8".
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from stillknows.errors import UserError
from stillknows.lazy import Tensor, nn, no_grad, torch
from stillknows.model.architecture import MatrixRole, placed
from stillknows.model.layers import Linear, linears
from stillknows.model.parameters import restored
from stillknows.progress import log
from stillknows.registry import Bound, bind
from stillknows.specs import chained
from stillknows.variants.activations import CACHED, INPUTS, attention_name, head_width, rounded_cache, rounded_inputs
from stillknows.variants.calibrate import Statistics, statistics

Chain = tuple[Bound, ...]  # formats, applied from left to right
WEIGHTS = "weight_OI"  # what a format of weights is given
UNREACHED = 0.1  # share of a model's matrices that a format may leave as they are
GROUPS = (128, 64, 32, 16)  # weights that usually share a scale


class Stored(NamedTuple):
    """How files keep a matrix: the name of the storage type, and what they keep besides the codes, by name.

    int2 … int8: `scale` and, on a grid that is not symmetric, `zero`, [blocks of outputs, blocks of inputs]; values are
        (code − zero)·scale.
    fp8: `scale` of the matrix, of each output [O, 1] or of each tile of 128 × 128.
    mxfp4, nvfp4: `scale` [O, blocks of inputs]; nvfp4 also the `global_scale` that scales are divided by.
    nf4, fp4: `scales` [blocks of 64 weights]; where they are in 8 bits too, their places 0..255 in the table of such
        scales, with the `largest` of each 256 and the `mean`.
    llm.int8: `largest` [O].
    Q4_0 and the other types of ggml: the fields of its blocks. F16: nothing.
    """

    type: str
    parts: Mapping[str, Tensor]


class Quantized(NamedTuple):
    """A weight matrix in a format: the values that it stands for, [O, I] in the input's type, and the codes kept,
    [O, I], whole numbers with a sign (int8 where they fit and time counts, else int32). Two weights with equal codes in
    equal blocks cannot be told apart up to the block's scale.

    `stored` says how a file keeps it; None for formats that no file of another project holds.
    """

    values_OI: Tensor
    codes_OI: Tensor
    stored: Stored | None = None


def parse_variant(spec: str) -> tuple[Bound, ...]:
    """Parse "rtn:bits=4" or a chain "bf16+rtn:bits=4", applied from left to right. Raises UserError."""
    chain = tuple(bind("transform", part, "deployment") for part in chained(spec))
    if any(map(is_calibrated, chain)) and any(map(is_placed, chain)):
        raise UserError(f"{spec}: a file format cannot be chained with a calibrated one", "audit them one by one")
    return chain


def is_calibrated(link: Bound) -> bool:
    """Tell whether a format looks at calibration inputs."""
    return any(name in Statistics._fields for name in link.plugin.needs)


def is_placed(link: Bound) -> bool:
    """Tell whether a format goes by a matrix's place: a file format, which embedding and output layer have too."""
    return "place" in link.plugin.needs


def links_of(chain: Chain, need: str) -> list[Bound]:
    """Return the links that are formats of weights ("weight_OI"), of activations (INPUTS) or of the cache (CACHED).

    Raises UserError for a link that is none of these: skipped, it would be measured as if it were not there.
    """
    for link in chain:
        if not any(known in link.plugin.needs for known in (WEIGHTS, INPUTS, CACHED)):
            raise UserError(
                f"{link.spec} is a format of nothing that is known here: it asks for {', '.join(link.plugin.needs)}",
                f"a format asks for {WEIGHTS}, {INPUTS} or {CACHED}",
            )
    return [link for link in chain if need in link.plugin.needs]


def quantize(
    weight_OI: Tensor, chain: Chain, inputs: Statistics | None = None, place: MatrixRole | None = None
) -> Quantized:
    """Apply a chain's formats of weights to one matrix in float32; the codes are the last one's, or the bits as given.

    Args:
        inputs: statistics of what the matrix is multiplied with, for links that look at them.
        place: where the matrix stands, for links that go by it.

    Raises UserError for weights that a format makes infinite.
    """
    given = {"place": place, **({} if inputs is None else inputs._asdict())}
    values_OI = weight_OI.float()
    result = Quantized(values_OI, values_OI.contiguous().view(torch.int32))
    for link in links_of(chain, WEIGHTS):
        needed = {name: given[name] for name in link.plugin.needs if name != WEIGHTS}
        result = link(weight_OI=result.values_OI, **needed)
        _require_finite(result.values_OI, weight_OI, link)
    return result._replace(values_OI=result.values_OI.to(weight_OI.dtype))


def _require_finite(values_OI: Tensor, weight_OI: Tensor, link: Bound) -> None:
    if not all(bool(extreme.isfinite()) for extreme in values_OI.aminmax()):  # NaN if any value is
        raise UserError(
            f"{link.spec} makes infinity of weights as large as {float(weight_OI.abs().max()):.3g}",
            "leave that format out: no file of it holds this model",
        )


def matrices(model: nn.Module, chain: Chain) -> Iterator[tuple[Linear, MatrixRole | None]]:
    """Yield what a chain applies to: the linear maps; for file formats embedding and output layer too, with places.
    Layers that share their weights are yielded once, as the first of them."""
    everything = placed(model) if any(map(is_placed, chain)) else ((layer, None) for layer in linears(model))
    seen: set[int] = set()
    yield from ((layer, place) for layer, place in everything if _is_new(layer, seen))


def _is_new(layer: Linear, seen: set[int]) -> bool:
    """Tell whether no layer with these weights was seen before, and note that one was."""
    number, known = id(layer.module.weight), len(seen)
    seen.add(number)
    return len(seen) > known


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
        other = parse_variant("+".join(specs))
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
    if share > UNREACHED:
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


def forms(model: nn.Module, chain: Chain, ids_NL: Tensor | None = None) -> Iterator[tuple[Linear, Quantized]]:
    """Yield each of `matrices` with its form in a format; a form is to be written before the next one is asked for.

    Args:
        ids_NL: calibration tokens, for chains that look at them.
    """
    if not links_of(chain, WEIGHTS):
        return
    if not any(map(is_calibrated, chain)):
        yield from ((layer, quantize(layer.read(), chain, place=place)) for layer, place in matrices(model, chain))
        return
    if ids_NL is None:
        raise ValueError("a calibrated format needs calibration tokens")
    seen: set[int] = set()
    for block in statistics(model, ids_NL):
        new = ((layer, inputs) for layer, inputs in block.values() if _is_new(layer, seen))
        yield from ((layer, quantize(layer.read(), chain, inputs)) for layer, inputs in new)


@contextlib.contextmanager
def compressed(model: nn.Module, chain: Chain, ids_NL: Tensor | None = None) -> Iterator[None]:
    """Run a block with a chain in place; afterwards the model is as before, its weights bit by bit.

    The model's `matrices` are quantized; then what linear maps and attention are given is rounded as it flows.
    """
    with contextlib.ExitStack() as stack:
        with torch.no_grad():
            for layer, form in forms(model, chain, ids_NL):
                stack.enter_context(restored({layer.name: layer.read()}))
                layer.write(form.values_OI)
        stack.enter_context(_running(model, chain))
        yield


@contextlib.contextmanager
def _running(model: nn.Module, chain: Chain) -> Iterator[None]:
    """Round activations, keys and values while the block runs."""
    with contextlib.ExitStack() as stack:
        if inputs := links_of(chain, INPUTS):
            stack.enter_context(rounded_inputs((layer.module for layer in linears(model)), inputs))
        if cached := links_of(chain, CACHED):
            stack.enter_context(rounded_cache(model, cached))
        yield


def weights(model: nn.Module, *chains: Chain) -> dict[str, Tensor]:
    """Return copies of the weights that any of the chains applies to, by layer, [O, I] each, on the CPU.

    Without a chain: of all that formats can apply to, which is more by the embedding and the output layer. A matrix
    that these share is there under both names.
    """
    wider = not chains or any(is_placed(link) for chain in chains for link in chain)
    layers = [layer for layer, _ in placed(model)] if wider else [*linears(model)]
    found = {layer.name: layer.read().detach().to("cpu", copy=True) for layer in layers}
    if wider:
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        name = next(name for name, module in model.named_modules() if module is embedding)
        found.setdefault(name, found[layers[-1].name])
    return found
