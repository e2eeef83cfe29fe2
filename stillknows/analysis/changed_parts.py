"""Where an update lies: in which parts of the weights, and in how few directions. Read from two checkpoints on disk."""

from __future__ import annotations

from typing import NamedTuple

from stillknows.lazy import Tensor, nn, no_grad, torch
from stillknows.model.layers import Linear, linears
from stillknows.model.ref import ModelRef
from stillknows.model.safetensors_index import StoredWeights, stored

DIRECTIONS = 8  # of a matrix's update, in which an adapter's lies as a whole
WIDEST = 8  # times as many inputs and outputs a matrix needs, so that any other update does not fit into these
EMBEDDINGS, OUTPUT = "embeddings", "output layer"


class ChangedParts(NamedTuple):
    """What of a model differs from another.

    embeddings, blocks, output_layer: ‖θu − θo‖ / ‖θo‖ of the tokens' embeddings, of the matrices of the blocks and of
    the output layer, from 0 for no change; NaN for an output layer that is the embeddings.
    matrices: share of the blocks' matrices that differ, 0..1.
    low_rank: share of ‖θu − θo‖² of the blocks' matrices that lies in DIRECTIONS directions of each, 0..1: 1 for an
        adapter of low rank; NaN without a change, or where matrices are so small that every update does.
    """

    embeddings: float
    blocks: float
    output_layer: float
    matrices: float
    low_rank: float


def changed_parts(original: ModelRef, model: ModelRef) -> ChangedParts:
    """Compare two checkpoints of the same shapes, matrix by matrix. Raises UserError for weights that cannot be read
    one by one, or are not finite."""
    places = _places(original.skeleton)
    layers = [layer for found in places.values() for layer in found]
    before, after = (stored(ref, ref.skeleton, layers) for ref in (original, model))
    sizes = {
        part: _Sizes.of([(before[layer.name], after[layer.name]) for layer in found]) for part, found in places.items()
    }
    blocks = sizes["blocks"]
    return ChangedParts(
        sizes[EMBEDDINGS].relative,
        blocks.relative,
        sizes[OUTPUT].relative,
        blocks.changed / max(1, blocks.matrices),
        blocks.low / blocks.wide if blocks.wide else torch.nan,
    )


def _places(skeleton: nn.Module) -> dict[str, list[Linear]]:
    """Return a model's matrices by the part that they belong to; one that two parts share belongs to the first."""
    embedding, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()  # type: ignore[operator]
    names = {id(module): name for name, module in skeleton.named_modules()}
    shared = head.weight is embedding.weight
    return {
        EMBEDDINGS: [Linear(names[id(embedding)], embedding, transposed=False)],
        "blocks": list(linears(skeleton)),
        OUTPUT: [] if shared else [Linear(names[id(head)], head, transposed=False)],
    }


class _Sizes(NamedTuple):
    """Sums over matrices: how many, how many changed, Σ θo², Σ (θu − θo)², that of those that are wide enough, and what
    of it lies in few directions."""

    matrices: int
    changed: int
    before: float
    update: float
    wide: float
    low: float

    @classmethod
    def of(cls, pairs: list[tuple[StoredWeights, StoredWeights]]) -> _Sizes:
        parts = [_sizes(before.read().float(), after.read().float()) for before, after in pairs]
        return cls(*(sum(column) for column in zip(*parts, strict=True))) if parts else cls(0, 0, 0.0, 0.0, 0.0, 0.0)

    @property
    def relative(self) -> float:
        return (self.update / self.before) ** 0.5 if self.before else torch.nan


@no_grad
def _sizes(before_OI: Tensor, after_OI: Tensor) -> tuple[int, int, float, float, float, float]:
    update_OI = after_OI - before_OI
    squared = float(update_OI.square().sum())
    wide = squared if min(update_OI.shape) >= WIDEST * DIRECTIONS else 0.0
    low = float(_in_few_directions(update_OI)) if wide else 0.0
    return 1, int(squared > 0), float(before_OI.square().sum()), squared, wide, low


def _in_few_directions(update_OI: Tensor) -> Tensor:
    """Return what of ‖update‖² lies in its DIRECTIONS largest directions, nearly: a randomised range finder with two
    power iterations (arXiv 0909.4061, algorithm 4.4)."""
    random_IR = torch.randn(update_OI.shape[1], DIRECTIONS, generator=torch.Generator().manual_seed(0))
    basis_OR = torch.linalg.qr(update_OI @ random_IR)[0]
    for _ in range(2):
        basis_OR = torch.linalg.qr(update_OI @ torch.linalg.qr(update_OI.T @ basis_OR)[0])[0]
    return (basis_OR.T @ update_OI).square().sum()
