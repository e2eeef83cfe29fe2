"""Models taken apart: what the output layer reads and does, and which linear maps a decoder has."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from weakref import WeakSet

from stillknows.errors import UserError, is_out_of_memory
from stillknows.lazy import Tensor, nn, torch
from stillknows.model.lengths import restart_rotations


class OutputLayer:
    """hidden [*, D] -> logits [*, V], as the model itself computes them after its last layer.

    It is the model's own forward pass with a stand-in for the decoder, so that all that a family adds to the linear map
    (scaling, soft-capping, a further layer) is its own code. Raises UserError for a model without an output layer.
    """

    def __init__(self, model: nn.Module) -> None:
        from stillknows.model.given import Given

        linear: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
        if linear is None:
            raise UserError(f"{type(model).__name__} has no output layer that stillknows could read")
        self.linear = linear
        self.vocabulary = int(linear.weight.shape[0])  # type: ignore[arg-type, union-attr, index]
        self.given = Given(decoder(model))
        self.head = copy.copy(model)  # shares everything but the decoder
        self.head._modules = {
            name: self.given if part is decoder(model) else part for name, part in model._modules.items()
        }

    def __call__(self, hidden: Tensor) -> Tensor:
        self.given.hidden_BLD = hidden.reshape(1, -1, hidden.shape[-1])
        ids_BL = torch.zeros(self.given.hidden_BLD.shape[:2], dtype=torch.long, device=hidden.device)
        try:
            logits_BLV = self.head(input_ids=ids_BL, use_cache=False).logits
        finally:
            self.given.hidden_BLD = None
        return logits_BLV.reshape(*hidden.shape[:-1], -1)

    def frozen(self) -> OutputLayer:
        """Return a copy with its own weights, which stay as they are while the model is trained."""
        own = copy.deepcopy(self)
        own.head.requires_grad_(False)
        return own


def decoder(model: nn.Module) -> nn.Module:
    """Return the part of a model that makes its last hidden states.

    Raises UserError for a model without such a part.
    """
    named: nn.Module = model.base_model  # type: ignore[assignment]
    if named is not model:
        return named
    parts = [part for part in model.children() if hasattr(part, "get_input_embeddings")]
    if len(parts) != 1:
        raise UserError(f"{type(model).__name__} has no decoder that stillknows could read")
    return parts[0]


def hidden_states(model: nn.Module, ids_BL: Tensor) -> Tensor:
    """Return what the output layer reads, [B, L, D]. No mask: causality hides the padding at the right."""
    restart_rotations(model)
    return decoder(model)(input_ids=ids_BL, use_cache=False).last_hidden_state


_CHECKED: WeakSet[nn.Module] = WeakSet()


def output_layer(model: nn.Module) -> OutputLayer:
    """Return the model's output layer, which is checked when a model is first asked for it; see `_check`."""
    layer = OutputLayer(model)
    if model not in _CHECKED:
        _check(model, layer)
        _CHECKED.add(model)
    return layer


def _check(model: nn.Module, layer: OutputLayer) -> None:
    """Compare an output layer with the model's own logits on a few tokens.

    Raises UserError for an architecture that cannot be read as a causal language model, whose logits depend on more
    than its last hidden states, or that looks at tokens to the right.
    """
    name = type(model).__name__
    ids = torch.arange(1, 5, device=next(model.parameters()).device)[None] % layer.vocabulary
    with torch.no_grad(), _readable(name):
        own = layer(hidden_states(model, ids)).float()
        theirs = model(input_ids=ids, use_cache=False).logits.float()
        ids[:, -1] = 0  # as long as before: another length would round otherwise, and formats of activations with it
        changed = layer(hidden_states(model, ids)).float()
    if theirs.isnan().any():
        raise UserError(f"{name}: what it says of four tokens is NaN", "its weights are too large: use another model")
    if own.shape != theirs.shape or not torch.allclose(own, theirs, rtol=1e-3, atol=1e-3):
        raise UserError(f"{name} computes its logits in a way that stillknows does not know")
    if not torch.allclose(own[:, :-1], changed[:, :-1], rtol=1e-3, atol=1e-3):
        raise UserError(f"{name} is not causal: what it says of a token depends on later ones")


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """Run a block that reads a model; what goes wrong in its own code is a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        problem = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{name} cannot be read as a causal language model: {problem}") from error


class Linear(NamedTuple):
    """A linear map inside the decoder. `transposed` marks GPT-2's Conv1D, which stores [I, O]."""

    name: str
    module: nn.Module
    transposed: bool

    def read(self) -> Tensor:
        """Return the weights [O, I]; a view of the module's own storage."""
        weight: Tensor = self.module.weight.data  # type: ignore[union-attr]
        return weight.T if self.transposed else weight

    def write(self, weight_OI: Tensor) -> None:
        """Put weights [O, I] into the module, in place."""
        self.read().copy_(weight_OI)


def linears(model: nn.Module) -> Iterator[Linear]:
    """Yield the decoder's linear maps in order: what 4- and 8-bit back ends quantize.

    Embeddings and the output layer are left out, as bitsandbytes, GPTQ and AWQ leave them.
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield Linear(name, module, transposed=False)
        elif isinstance(module, Conv1D):
            yield Linear(name, module, transposed=True)


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the decoder's blocks in order: of the lists of modules beside the tokens' embedding, the one that holds
    most linear maps. A model that reads pictures or sound too has other lists elsewhere.

    Raises UserError for an architecture without such a list.
    """
    whole, embedding = decoder(model), model.get_input_embeddings()  # type: ignore[operator]
    path = next((name for name, part in whole.named_modules() if part is embedding), "").split(".")
    for depth in reversed(range(len(path))):
        beside = whole.get_submodule(".".join(path[:depth]))
        lists = [list(part) for part in beside.modules() if isinstance(part, nn.ModuleList)]
        if lists:
            return max(lists, key=lambda found: sum(isinstance(m, nn.Linear) for part in found for m in part.modules()))
    raise UserError(f"{type(model).__name__} has no list of decoder blocks")


def layer_number(model: nn.Module, layer: float) -> int:
    """Return the number of a decoder block, from 1; a `layer` below 1 is a share of the depth.

    Raises UserError for a block that the model lacks.
    """
    return block_number(layer, len(blocks(model)))


def block_number(layer: float, depth: int) -> int:
    """Return which of `depth` blocks is meant; see `layer_number`."""
    number = max(1, round(layer * depth)) if 0 < layer < 1 else layer
    if number not in range(1, depth + 1):
        raise UserError(f"layer={layer:g} does not exist", f"give 1 to {depth}, or a share of the depth below 1")
    return int(number)


def matching(names: Iterable[str], patterns: str) -> list[str]:
    """Return the names that match one of the patterns, which "|" separates. Raises UserError for one without match."""
    names = list(names)
    for pattern in patterns.split("|"):
        if not fnmatch.filter(names, pattern):
            raise UserError(f"no tensor is called {pattern!r}", f"names look like {names[0]}")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split("|"))]


@contextlib.contextmanager
def block_output(block: nn.Module | None) -> Iterator[list[Tensor]]:
    """Run a block of code and collect what a decoder block puts out meanwhile, [B, L, D] for each forward pass."""
    seen: list[Tensor] = []
    if block is None:
        yield seen
        return

    def look(module: nn.Module, given: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = block.register_forward_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


@contextlib.contextmanager
def changed_output(block: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Run a block of code with what a decoder block puts out, [B, L, D], changed."""

    def changed(module: nn.Module, given: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = block.register_forward_hook(changed)
    try:
        yield
    finally:
        handle.remove()
