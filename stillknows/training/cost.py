"""What work with a model costs: time, tokens, floating-point operations, memory."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from stillknows.lazy import nn, torch
from stillknows.model.layers import decoder

TRAINED, FORWARD = 6, 2  # operations per weight and token: forward and backward pass, forward pass alone


class CostMeter:
    """Counts, from the start of a with block to its end, what goes through a model and through copies made of it.

    tokens, forward_tokens: tokens read with and without gradients, padding included, since they cost as much.
    flops: 6·N·tokens + 2·N·forward_tokens, with N the weights without the embedding of tokens (arXiv 2001.08361). An
        estimate: attention over the context is left out, the output layer counts at every position, and a pass that
        trains few weights counts as one that trains all.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.weights = int(model.num_parameters(exclude_embeddings=True))  # type: ignore[operator]
        self.counts = {TRAINED: 0, FORWARD: 0}
        self.ended: float | None = None

    def __enter__(self) -> CostMeter:
        counts = self.counts  # a plain function is shared with copies of the model, a bound method is copied with it

        def count(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            ids_BL = given[0] if given else named["input_ids"]
            counts[TRAINED if torch.is_grad_enabled() else FORWARD] += ids_BL.numel()

        self.started, self.ended = time.perf_counter(), None
        self.handle = decoder(self.model).register_forward_pre_hook(count, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.handle.remove()
        self.ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time from the start of the block to its end, or until now inside it."""
        return (self.ended or time.perf_counter()) - self.started

    @property
    def tokens(self) -> int:
        return self.counts[TRAINED]

    @property
    def forward_tokens(self) -> int:
        return self.counts[FORWARD]

    @property
    def flops(self) -> float:
        return float(self.weights * sum(each * count for each, count in self.counts.items()))


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes in use so far: by tensors on an accelerator, else by this process as a whole.

    None where the system does not tell (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
