"""Models taken apart: what the output layer reads and does, and which linear maps a decoder has."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from stillknows.errors import UserError
from stillknows.lazy import Tensor, nn, torch


class OutputLayer:
    """hidden [*, D] -> logits [*, V], as the model itself computes them after its last layer.

    Covers what families add to the linear map: soft-capping (Gemma 2), scaling (Cohere, Granite).
    """

    def __init__(self, model: nn.Module) -> None:
        config = model.config.get_text_config()  # type: ignore[union-attr]
        self.linear: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        self.cap = getattr(config, "final_logit_softcapping", None)
        self.scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        self.vocabulary = int(self.linear.weight.shape[0])  # type: ignore[union-attr]

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.linear(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if not self.cap else self.cap * torch.tanh(logits / self.cap)

    def frozen(self) -> OutputLayer:
        """Return a copy with its own weights, which stay as they are while the model is trained."""
        copy = object.__new__(OutputLayer)
        copy.__dict__.update(self.__dict__)
        linear = nn.Linear(*reversed(self.linear.weight.shape), bias=self.linear.bias is not None, device="meta")  # type: ignore
        state = {key: value.detach().clone() for key, value in self.linear.state_dict().items()}
        linear.load_state_dict(state, assign=True)
        copy.linear = linear.requires_grad_(False)
        return copy


def hidden_states(model: nn.Module, ids_BL: Tensor) -> Tensor:
    """Return what the output layer reads, [B, L, D]. No mask: causality hides the fillers at the right."""
    return model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state  # type: ignore[operator]


def output_layer(model: nn.Module) -> OutputLayer:
    """Return the model's output layer after checking it against the model's own logits on a few tokens.

    Raises UserError for an architecture whose logits are made in a way that this project does not know, or that looks
    at tokens to the right.
    """
    layer = OutputLayer(model)
    ids = torch.arange(1, 5, device=next(model.parameters()).device)[None] % layer.vocabulary
    with torch.no_grad():
        own = layer(hidden_states(model, ids)).float()
        theirs = model(input_ids=ids, use_cache=False).logits.float()
        ids[:, -1] = 0  # as long as before: another length would round otherwise, and formats of activations with it
        changed = layer(hidden_states(model, ids)).float()
    if own.shape != theirs.shape or not torch.allclose(own, theirs, rtol=1e-3, atol=1e-3):
        raise UserError(f"{type(model).__name__} computes its logits in a way that stillknows does not know")
    if not torch.allclose(own[:, :-1], changed[:, :-1], rtol=1e-3, atol=1e-3):
        raise UserError(f"{type(model).__name__} is not causal: what it says of a token depends on later ones")
    return layer


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
    """Return the decoder's blocks in order: the list of modules that holds most of its linear maps.

    Raises UserError for an architecture without such a list.
    """
    lists = [list(m) for m in model.base_model.modules() if isinstance(m, nn.ModuleList)]  # type: ignore[union-attr]
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of decoder blocks")
    return max(lists, key=lambda found: sum(isinstance(part, nn.Linear) for m in found for part in m.modules()))


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
