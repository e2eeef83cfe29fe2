"""What a run will take, told before any weights are loaded: memory by what holds it, operations, time, files.

Memory is counted, not tried: weights, gradients and the optimizer's averages by their numbers, what a forward pass
keeps for the backward pass by the shapes of linear layers, at the longest items that one batch can hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from stillknows.errors import UserError
from stillknows.formatting import number
from stillknows.lazy import nn
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.layers import linears
from stillknows.model.logprobs import CHUNK_LOGITS, LARGE_CHUNK
from stillknows.training import machine, precision
from stillknows.training.objective_inputs import InputSpec
from stillknows.training.range_test import STEPS as RANGE_STEPS
from stillknows.unlearning.execution import Work
from stillknows.unlearning.method import Method

FLOAT = 4  # bytes
PROCESS = 500 * 2**20  # bytes of Python with its libraries, where the system does not tell
# Numbers kept for the backward pass, for each input and output of a linear layer: norms, residuals and activation
# functions keep theirs too, and what is freed is not all given back at once. Measured, see docs/your-models.md.
KEPT = 1.9
LOGITS = 4  # of a chunk in float32: logits, their logarithms, and the gradients of both
AVERAGES = {"": 2.0, "sophia": 2.0, "adafactor": 0.01, "adamw8bit": 0.51}  # numbers of an optimizer for each weight
MIB, RECORD_SIZE = 2**20, 2**14


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    memory: bytes by what holds them while training takes most of it. saving: bytes when the result is read back.
    free: bytes that the machine has left; None where it does not tell. steps: the most that are taken. flops: of all of
    them, an estimate as in `cost.CostMeter`. seconds: at the speed that was measured here. files: bytes by name.
    """

    memory: Mapping[str, int]
    saving: int
    free: int | None
    steps: int
    flops: float
    seconds: float
    files: Mapping[str, int]

    @property
    def peak(self) -> int:
        """The most bytes that the process holds at once."""
        return max(sum(self.memory.values()), self.saving)

    @property
    def fits(self) -> bool:
        """Whether the machine has so much, as far as it tells."""
        return self.free is None or self.peak - self.memory["process"] <= self.free

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON has it."""
        return asdict(self) | {"peak": self.peak, "fits": self.fits}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / MIB:,.0f}" for name, size in self.memory.items() if size)
        free = "" if self.free is None else f"; {self.free / MIB:,.0f} MiB are free"
        files = ", ".join(f"{name} ({size / MIB:,.1f} MiB)" for name, size in self.files.items())
        return (
            f"memory: {self.peak / MIB:,.0f} MiB ({parts}){free}\n"
            f"time: about {number(self.seconds / 60, digits=1)} minutes for at most {self.steps} steps, "
            f"{self.flops:.2g} operations\n"
            f"files: {files}"
        )


def speed(skeleton: nn.Module, device: str) -> float:
    """Return the operations a second that this machine makes on the model's widest linear layer; it takes a second."""
    widest = max((layer.read() for layer in linears(skeleton)), key=lambda weight_OI: weight_OI.numel())
    return machine.flops_per_second(widest.shape[1], widest.shape[0], device)


def of_run(work: Work, skeleton: nn.Module, device: str, save: str, rate: float) -> Estimate:
    """Return what a run will take, given everything of it but the weights.

    skeleton: the model on the meta device. rate: the operations a second that it is worked through at.
    """
    settings, terms = work.settings, work.method.terms
    weights = FLOAT * sum(p.numel() for p in skeleton.parameters())
    trained = _trained(work.method, skeleton)
    process = (machine.process_memory() or PROCESS) if device == "cpu" else 0
    memory = {
        "process": process,
        "weights": weights,
        "gradients": trained * (3 if _has(work.method, "perturbation", "gradient_merge") else 1),
        "optimizer": int(trained * _averages(work.method)) + (trained // 2) * (settings.weights == "compensated"),
        "copies": _copies(work, skeleton, weights, trained),
        "activations": max((_activations(work, k, skeleton, device) for k in range(len(terms))), default=0),
    }
    steps = settings.steps(len(work.forget)) + RANGE_STEPS * work.find_rate if terms else 0
    flops = steps * _step_flops(work, skeleton)
    whole = weights if settings.weights == "float32" else weights // 2
    files = {"adapter_model.safetensors": trained} if save == "adapter" else {"model.safetensors": whole}
    return Estimate(
        memory,
        process + 2 * weights,
        machine.free_memory(device),
        steps,
        flops,
        flops / rate,
        {**files, "run.json": RECORD_SIZE},
    )


def require_room(estimate: Estimate, work: Work, skeleton: nn.Module, device: str) -> None:
    """Raise UserError for a run that takes more memory than is free, with the option under which it would fit."""
    if estimate.fits:
        return
    needed, free = (f"{size / MIB:,.0f} MiB" for size in (estimate.peak, estimate.free or 0))
    raise UserError(f"this run takes {needed} of memory, and {free} are free", _smaller(work, skeleton, device))


def _smaller(work: Work, skeleton: nn.Module, device: str) -> str:
    """Say under which option a run would fit."""

    def fits(other: Work) -> bool:
        return of_run(other, skeleton, device, "model", rate=1.0).fits

    parts = 2 * work.settings.accumulate
    while parts <= work.settings.batch_size:
        if fits(work._replace(settings=replace(work.settings, accumulate=parts))):
            return f"set `accumulate` {parts}: the same steps, in smaller passes"
        parts *= 2
    return "add lora to `method` and raise `accumulate`, take a smaller model, or a machine with more memory"


def _has(method: Method, *roles: str) -> bool:
    return any(part.plugin.role in roles for part in method.step_plugins)


def _trained(method: Method, skeleton: nn.Module) -> int:
    """Return the bytes of what is trained: all weights, or the factors of an adapter."""
    adapter = next((part for part in method.step_plugins if part.plugin.role == "adapter"), None)
    if adapter is None:
        return FLOAT * sum(p.numel() for p in skeleton.parameters())
    rank = int(adapter.options.get("rank", 0))
    return FLOAT * rank * sum(sum(layer.read().shape) for layer in linears(skeleton))


def _averages(method: Method) -> float:
    names = [part.plugin.name for part in method.step_plugins if part.plugin.role == "optimizer"]
    return AVERAGES.get(names[0] if names else "", 2.0)


def _copies(work: Work, skeleton: nn.Module, weights: int, trained: int) -> int:
    """Return the bytes of weights that are kept in memory beside the model's own while it is trained."""
    method, count = work.method, weights * work.method.needs("reinforced")
    count += trained * (_has(method, "perturbation") + bool(work.settings.retain_floor))
    count += trained * 5 // 4 * _has(method, "mask")
    teachers = {
        spec.field for term in method.terms for need in term.plugin.needs if (spec := InputSpec.of(need)).teacher
    }
    if teachers & {"kl", "logits"}:
        head: Any = skeleton.get_output_embeddings()  # type: ignore[operator]
        count += FLOAT * head.weight.numel()
    return count


def _activations(work: Work, k: int, skeleton: nn.Module, device: str) -> int:
    """Return what is kept between the forward and the backward pass of a term's largest batch."""
    term, settings = work.method.terms[k], work.settings
    items = work.forget if term.plugin.role == "forget" else work.retain
    size = settings.batch_size if k == 0 else settings.retain_batch_size or settings.batch_size
    length = max((len(item.ids) for item in items), default=0)
    rows = -(-min(size, max(1, len(items))) // settings.accumulate)
    rows = -(-rows // precision.passes(skeleton, [length] * rows, device))
    passes = _passes(term.plugin.needs)
    answer = max((len(item.ids) - item.start for item in items), default=0)
    per_token = KEPT * sum(sum(layer.read().shape) for layer in linears(skeleton))
    head: Any = skeleton.get_output_embeddings()  # type: ignore[operator]
    chunk = min(rows * answer * head.weight.shape[0], CHUNK_LOGITS.get(device, LARGE_CHUNK))
    merged = sum(layer.read().numel() for layer in linears(skeleton)) if _has(work.method, "adapter") else 0
    return int(FLOAT * (passes * (rows * length * per_token + merged) + LOGITS * chunk))


def _passes(needs: Iterable[str]) -> int:
    """Return how often a term runs the model over a batch: over the items, and over each kind of other answer."""
    asked = {spec.companion for need in needs if not (spec := InputSpec.of(need)).teacher or spec.field == "kl"}
    return max(1, len(asked))


def _step_flops(work: Work, skeleton: nn.Module) -> float:
    """Return the operations of a step: 6 for each weight and token that goes through the model."""
    settings, tokens = work.settings, 0.0
    for k, term in enumerate(work.method.terms):
        items = work.forget if term.plugin.role == "forget" else work.retain
        size = settings.batch_size if k == 0 else settings.retain_batch_size or settings.batch_size
        again = 1 + sum(part.plugin.name == "sam" for part in work.method.step_plugins) * (term.plugin.role == "forget")
        tokens += again * _passes(term.plugin.needs) * min(size, len(items)) * _mean_length(items)
    return 6.0 * tokens * int(skeleton.num_parameters(exclude_embeddings=True))  # type: ignore[operator]


def _mean_length(items: Sequence[EncodedAnswer]) -> float:
    return sum(len(item.ids) for item in items) / max(1, len(items))
