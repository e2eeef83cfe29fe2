"""What a format leaves of an update, counted: weights before and after, and their forms in the format.

Rounding maps a weight to the value of its bin. Where original and unlearned weight share a bin, the format undoes the
change; the fewer weights leave their bins, the more of what was unlearned may come back.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stillknows.lazy import Tensor, inference_mode, nn, torch
from stillknows.model.architecture import MatrixRole
from stillknows.model.layers import Linear
from stillknows.variants.compress import Chain, matrices, quantize

Counts = NDArray[np.int64]
SLICE = 2**17  # weights tallied at once, in whole rows: what a processor's cache holds with all that is made of them
PROBED_ROWS = 4
LEAST, MOST = -2, 6  # sizes are counted by powers of 2 of a step: below 2^LEAST, between, and from 2^MOST up
EDGES = (0.0, *(2.0**power for power in range(LEAST, MOST + 1)), math.inf)


class Form(NamedTuple):
    """Rows of a matrix in a format: the values that they stand for, and the codes kept."""

    values: Tensor
    codes: Tensor


class Format(NamedTuple):
    """A format, and for file formats the place of the matrix."""

    chain: Chain
    place: MatrixRole | None = None


class Rows(NamedTuple):
    """Rows of a matrix before and after an update, in float32.

    at: which rows they are.
    is_changed: 1 for each weight that changed, else 0; `changed` counts them, and `has_changed` tells of each row
        whether it has any.
    squared: Σ (θu − θo)².
    """

    at: slice
    before: Tensor
    after: Tensor
    update: Tensor
    is_changed: Tensor
    changed: int
    has_changed: Tensor
    squared: float


Maker = Callable[[Rows], tuple[Form, Form]]  # gives the forms of rows before and after


class Tally(NamedTuple):
    """Counts and sums over weights θo of the original and θu of the unlearned model, under a format Q.

    weights: how many; `changed` of them have θu ≠ θo, `crossed` have another code in Q(θu) than in Q(θo).
    zeroed: in the zero bin, that is Q(θo) = 0; `zeroed_changed` of them are changed. No other bin counts, not fp4's
        ±.0052 either, which spans .003 to .086 of a block's largest magnitude.
    dot, update, error: Σ (Q(θu) − Q(θo))·(θu − θo), Σ (θu − θo)² and Σ (θo − Q(θo))².
    sizes: unchanged and changed weights by |θo| in steps of their row, [2, sizes], between EDGES; a row that the
        format holds exactly has no step and is left out. None where they were not asked for.
    """

    weights: int
    changed: int
    crossed: int
    zeroed: int
    zeroed_changed: int
    dot: float
    update: float
    error: float
    sizes: Counts | None

    @property
    def crossing(self) -> float:
        """The share of weights whose code changed, 0..1."""
        return self.crossed / self.weights

    @property
    def surviving(self) -> float | None:
        """⟨Q(θu) − Q(θo), θu − θo⟩ / ‖θu − θo‖²: 1 carried over on average, 0 erased; None without an update."""
        return self.dot / self.update if self.update else None

    def shares(self) -> dict[str, Any]:
        """Return what the counts and sums say; None where there is nothing to divide by.

        weights: how many there are. changed, crossing: shares of them, 0..1.
        surviving: see there.
        update_steps: root mean square of the changes of changed weights, in steps of the format. A step is the width
            of an even grid with the format's rounding error on the original: √12 times the error's root mean square.
        zero_bin, zero_bin_changed: shares of all and of the changed weights that the original's form has as 0.
        """
        step = math.sqrt(12 * self.error / self.weights)
        return {
            "weights": self.weights,
            "changed": self.changed / self.weights,
            "crossing": self.crossing,
            "surviving": self.surviving,
            "update_steps": math.sqrt(self.update / self.changed) / step if self.changed and step else None,
            "zero_bin": self.zeroed / self.weights,
            "zero_bin_changed": self.zeroed_changed / self.changed if self.changed else None,
        }

    def by_size(self) -> list[dict[str, Any]] | None:
        """Return for each size |θo|/Δ, Δ the step of the weight's row, the share of all weights that have it (0..1),
        and the share of these that are changed (None of none). `to` is None for the last, which has no upper edge.
        None where sizes were not counted."""
        if self.sizes is None:
            return None
        counts = self.sizes.sum(0)
        return [
            {
                "from": low,
                "to": None if math.isinf(high) else high,
                "weights": int(count) / self.weights,
                "changed": int(changed) / int(count) if count else None,
            }
            for (low, high), count, changed in zip(pairwise(EDGES), counts, self.sizes[1], strict=True)
        ]


def total(tallies: Iterable[Tally]) -> Tally:
    """Return the tally of several matrices taken together."""
    *counts, sizes = zip(*tallies, strict=True)
    is_counted = all(found is not None for found in sizes)
    return Tally(*map(sum, counts), sizes=sum(sizes) if is_counted else None)  # type: ignore[arg-type]


def by_layer(tallies: Mapping[str, Tally]) -> dict[str, Tally]:
    """Return the tallies of matrices taken together by layer: "model.layers.3.mlp.up_proj" is of "model.layers.3"; a
    name without a number stands for itself."""
    layers: dict[str, list[Tally]] = {}
    for name, tally in tallies.items():
        found = re.match(r".*?\.\d+(?=\.)", name)
        layers.setdefault(found[0] if found else name, []).append(tally)
    return {layer: total(parts) for layer, parts in layers.items()}


def tallies(model: nn.Module, original: Mapping[str, Tensor], chain: Chain) -> dict[str, Tally]:
    """Compare a model with the original's `compress.weights` under a format, by matrix, without a forward pass.

    A matrix that two layers share here and not in the original is compared with both of the original's.
    """
    found = {}
    for layer, place in matrices(model, chain):
        after_OI = layer.read()
        for name, before_OI in _before(model, layer, original).items():
            found |= compare(before_OI.to(after_OI.device), after_OI, {name: Format(chain, place)})
    return found


def _before(model: nn.Module, layer: Linear, original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the original's matrices, each once, of all layers that share this one's weights in a model."""
    names = [name for name in original if model.get_parameter(f"{name}.weight") is layer.module.weight]
    names.sort(key=lambda name: name != layer.name)
    distinct = {id(original[name]): name for name in reversed(names)}
    return {name: original[name] for name in distinct.values()}


@inference_mode
def compare(
    before_OI: Tensor, after_OI: Tensor, formats: Mapping[str, Format], *, sizes: bool = False
) -> dict[str, Tally]:
    """Return the tallies of one matrix [O, I], before and after an update, under formats applied to float32; `sizes`
    are counted where asked for, which takes about as long as quantizing.

    Formats that go row by row share one pass; any other has its own, since it holds its forms of the whole matrix.
    """
    inputs = before_OI.shape[1]
    rowwise = [name for name, (chain, place) in formats.items() if _is_rowwise(chain, inputs, place)]
    passes = [rowwise, *([name] for name in formats if name not in rowwise)]
    found: dict[str, list[Tally]] = {name: [] for name in formats}
    for names in filter(None, passes):
        maker = _form_rows if names is rowwise else _form_whole
        makers = {name: maker(before_OI, after_OI, formats[name]) for name in names}
        for rows in _rows(before_OI, after_OI):
            for name, forms in makers.items():
                found[name].append(_tally(rows, *forms(rows), sizes))
    return {name: total(parts) for name, parts in found.items()}


def _rows(before_OI: Tensor, after_OI: Tensor) -> Iterator[Rows]:
    """Yield a matrix in slices of rows, in float32."""
    step = max(1, SLICE // before_OI.shape[1])
    for start in range(0, len(before_OI), step):
        at = slice(start, start + step)
        before, after = (weight_OI[at].float().contiguous() for weight_OI in (before_OI, after_OI))
        update = after - before
        is_changed, squared = _marks(update), _product(update, update)
        changed = is_changed.sum(1)
        yield Rows(at, before, after, update, is_changed, int(changed.sum()), changed > 0, squared)


def _form_rows(before_OI: Tensor, after_OI: Tensor, to: Format) -> Maker:
    """Return what makes the forms of each slice by itself; rows without a change have the form that they had."""

    def forms(rows: Rows) -> tuple[Form, Form]:
        form = _form(rows.before, to)
        if rows.has_changed.all():
            return form, _form(rows.after, to)
        if not rows.changed:
            return form, form
        parts = zip(form, _form(rows.after[rows.has_changed], to), strict=True)
        return form, Form(*(whole.masked_scatter(rows.has_changed[:, None], part) for whole, part in parts))

    return forms


def _form_whole(before_OI: Tensor, after_OI: Tensor, to: Format) -> Maker:
    """Return what cuts the forms of each slice out of those of the whole matrix."""
    form = _form(before_OI.float(), to)
    form_after = form if torch.equal(before_OI, after_OI) else _form(after_OI.float(), to)
    return lambda rows: (Form(*(part[rows.at] for part in form)), Form(*(part[rows.at] for part in form_after)))


def _form(weight: Tensor, to: Format) -> Form:
    form = quantize(weight, to.chain, place=to.place)
    return Form(form.values_OI, form.codes_OI)


@functools.cache
def _is_rowwise(chain: Chain, inputs: int, place: MatrixRole | None) -> bool:
    """Tell whether a format treats each row of a matrix by itself: tried on rows of noise whose sizes differ, unless
    the format says that it does not."""
    if any(link.plugin.whole for link in chain):
        return False
    rows = torch.randn(PROBED_ROWS, inputs, generator=torch.Generator().manual_seed(0))
    rows *= torch.logspace(-1, 1, PROBED_ROWS)[:, None]
    to = Format(chain, place)
    together, alone = _form(rows, to), (_form(row, to) for row in rows.split(1))
    return all(map(torch.equal, together, map(torch.cat, zip(*alone, strict=True))))


def _tally(rows: Rows, form: Form, form_after: Form, with_sizes: bool) -> Tally:
    is_kept, weights = _marks(form.values), rows.update.numel()
    errors = _norms(rows.before - form.values)
    return Tally(
        weights=weights,
        changed=rows.changed,
        crossed=int((form_after.codes != form.codes).sum(dtype=torch.int32)),
        zeroed=weights - int(is_kept.sum()),
        zeroed_changed=rows.changed - int(torch.dot(is_kept.reshape(-1), rows.is_changed.reshape(-1))),
        dot=_product(form_after.values - form.values, rows.update),
        update=rows.squared,
        error=_sum(errors.square()),
        sizes=_sizes(rows.before, rows.is_changed, errors) if with_sizes else None,
    )


def _marks(numbers: Tensor) -> Tensor:
    """Return 1 for each number that is not 0, else 0, in float32: made and summed several times faster than booleans,
    and exactly, for a slice holds fewer than 2^24."""
    return torch.ne(numbers, 0, out=torch.empty_like(numbers))


def _sum(rows: Tensor) -> float:
    return float(rows.sum(dtype=torch.float64))


def _product(one: Tensor, other: Tensor) -> float:
    """Return the sum of the products of numbers; where a product is beyond float32, they are taken in float64."""
    found = _sum((one * other).sum(1))
    return found if math.isfinite(found) else _sum((one.double() * other.double()).sum(1))


def _norms(rows: Tensor) -> Tensor:
    """Return the norm of each row; in float64 where the square of one is beyond float32."""
    found = torch.linalg.vector_norm(rows, dim=1)
    return found if bool(found.isfinite().all()) else torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)


def _sizes(before: Tensor, is_changed: Tensor, errors: Tensor) -> Counts:
    """Count weights by the power of 2 in |θo|/Δ, which is the exponent of the quotient as a float32.

    Args:
        errors: the norm of the rounding errors of each row.
    """
    steps = (errors * math.sqrt(12 / before.shape[1])).float()
    has_step = steps > 0
    if not has_step.all():
        before, is_changed, steps = before[has_step], is_changed[has_step], steps[has_step]
    exponents = (before / steps[:, None]).abs_().view(torch.int32).bitwise_right_shift_(23)
    columns = exponents.sub_(127 + LEAST - 1).clamp_(0, len(EDGES) - 2)
    rows = columns.add_(is_changed.int(), alpha=len(EDGES) - 1).reshape(-1)
    return torch.bincount(rows, minlength=2 * (len(EDGES) - 1)).reshape(2, -1).cpu().numpy()
