"""The only walk over a model's layers: put a quantized form in place, measure, restore.

What a plug-in's function is given says what it is a format of: weights (`weight_OI`), inputs of linear maps
(`activations_TI`), or keys and values of attention (`cached_TD`). A chain may hold all of them:
"int8+int8_activations+kv_fp8".
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from stillknows.errors import UserError
from stillknows.lazy import Tensor, nn, torch
from stillknows.model.architecture import MatrixRole, placed
from stillknows.model.layers import Linear, linears
from stillknows.model.parameters import restored
from stillknows.registry import Bound, bind
from stillknows.specs import chained
from stillknows.variants.activations import CACHED, INPUTS, rounded_cache, rounded_inputs
from stillknows.variants.calibrate import Statistics, statistics

Chain = tuple[Bound, ...]  # formats, applied from left to right
WEIGHTS = "weight_OI"  # what a format of weights is given


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
    require_together(chain, spec)
    return chain


def require_together(chain: Chain, name: str) -> None:
    """Raise UserError for formats that cannot be chained."""
    if any(map(is_calibrated, chain)) and any(map(is_placed, chain)):
        raise UserError(f"{name}: a file format cannot be chained with a calibrated one", "audit them one by one")


def rounds(link: Bound) -> bool:
    """Tell whether a transform rounds what it is given, matrix by matrix or token by token, as formats do."""
    return any(need in link.plugin.needs for need in (WEIGHTS, INPUTS, CACHED))


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
        if not rounds(link):
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
