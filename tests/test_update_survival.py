"""What a format leaves of an update, counted by hand, and for every format against whole matrices in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from stillknows.analysis import update_survival
from stillknows.analysis.update_survival import EDGES, Format, Tally, by_layer, compare, tallies, total
from stillknows.errors import UserError
from stillknows.model.architecture import MatrixRole
from stillknows.variants.compress import parse_variant, quantize, weights

PLACE = MatrixRole("query", 0, 2, 1, "llama", 0)
# Rounded on grids of step 1 and 2: codes 7, 1, 0, −3 in either row. Three weights change, and the −3.6 crosses to −4.
BEFORE = torch.tensor([[7, 1, 0.2, -3.2], [14, 2, 0.4, -6.4]])
AFTER = torch.tensor([[7, 1, 0.4, -3.6], [14, 2, 0.6, -6.4]])


def counted(before: Tensor, after: Tensor, spec: str, place: MatrixRole | None = None, *, sizes: bool = False) -> Tally:
    return compare(before, after, {spec: Format(parse_variant(spec), place)}, sizes=sizes)[spec]


@pytest.mark.parametrize("slice_size", [3, 8, update_survival.SLICE])
def test_a_matrix_by_hand(slice_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_survival, "SLICE", slice_size)
    found = counted(BEFORE, AFTER, "rtn:group=0")
    assert found[:5] == (8, 3, 1, 2, 2)
    assert found[5:8] == pytest.approx((0.4, 0.24, 0.4), rel=1e-5)
    shares = found.shares()
    assert (shares["changed"], shares["crossing"]) == (3 / 8, 1 / 8)
    assert (shares["zero_bin"], shares["zero_bin_changed"]) == (2 / 8, 2 / 3)
    assert shares["surviving"] == pytest.approx(0.4 / 0.24, rel=1e-5)
    assert shares["update_steps"] == pytest.approx(math.sqrt(0.08) / math.sqrt(12 * 0.05), rel=1e-5)


def test_a_step_is_the_width_of_an_even_grid() -> None:
    """Weights spread evenly over the bins of a grid of step 1, all moved by half a step."""
    before = torch.cat([torch.linspace(-6.5, 6.5, 13001)[1:-1], torch.tensor([7.0])])[None]
    after = before + torch.tensor([0.5]).where(before < 5.5, 0)
    shares = counted(before, after, "rtn:group=0").shares()
    assert shares["update_steps"] == pytest.approx(0.5, rel=1e-3)
    assert shares["surviving"] == pytest.approx(1, rel=1e-2)


def test_nothing_to_divide_by_gives_no_number() -> None:
    same = counted(BEFORE, BEFORE, "nf4").shares()
    assert (same["changed"], same["crossing"]) == (0, 0)
    assert (same["surviving"], same["update_steps"], same["zero_bin_changed"]) == (None, None, None)
    exact = counted(BEFORE, AFTER, "full").shares()
    assert (exact["surviving"], exact["update_steps"], exact["zero_bin_changed"]) == (1, None, 0)


@pytest.mark.parametrize("size", [1e20, 1e30, 3e38])
def test_squares_beyond_float32_are_counted(size: float) -> None:
    """Finite weights give finite numbers, those that float64 has."""
    before = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    before[1, 3] = size
    after = before.clone()
    after[0] += 0.1
    after[1, 3:5] *= 0.5
    chain = parse_variant("rtn:bits=4:group=8")
    found = compare(before, after, {"rtn": Format(chain)}, sizes=True)["rtn"]
    rounded = [quantize(weight, chain).values_OI.double() for weight in (before, after)]
    update = after.double() - before.double()
    assert found.update == pytest.approx(float(update.square().sum()))
    assert found.dot == pytest.approx(float(((rounded[1] - rounded[0]) * update).sum()))
    assert found.error == pytest.approx(float((before.double() - rounded[0]).square().sum()), rel=1e-6)
    assert found.sizes is not None
    assert found.sizes.sum() == before.numel()
    assert all(math.isfinite(value) for value in found.shares().values())


def test_a_format_that_makes_infinity_of_weights_is_refused() -> None:
    weight = torch.ones(2, 32)
    weight[1, 1] = 3.4e38
    with pytest.raises(UserError, match=r"bf16 makes infinity of weights as large as 3\.4e\+38"):
        quantize(weight, parse_variant("bf16"))


def test_sizes_by_hand() -> None:
    """Rounding errors of .2 and .2 (.4 and .4) make steps of .49 (.98): sizes 14.3, 2.04, .41 and 6.5 in both rows."""
    found = counted(BEFORE, AFTER, "rtn:group=0", sizes=True).by_size()
    assert found is not None
    assert [(size["from"], size["to"]) for size in found] == [
        (low, None if math.isinf(high) else high) for low, high in pairwise(EDGES)
    ]
    weights = {size["from"]: (size["weights"], size["changed"]) for size in found if size["weights"]}
    assert weights == {0.25: (2 / 8, 1), 2: (2 / 8, 0), 4: (2 / 8, 1 / 2), 8: (2 / 8, 0)}
    assert found[0] == {"from": 0, "to": 0.25, "weights": 0, "changed": None}


def test_rows_that_a_format_holds_exactly_have_no_size() -> None:
    before = torch.tensor([[7.0, 1, 2, 3], [7, 1.25, 2, 3]])
    found = counted(before, before + 0.125, "rtn:group=0", sizes=True)
    assert found.sizes is not None
    assert (int(found.sizes.sum()), found.weights) == (4, 8)


FORMATS = (
    *("full", "bf16", "fp8", "int8", "nf4", "nf4:double=true", "fp4", "int4", "rtn:group=0", "rtn:group=-1"),
    *("rtn:bits=3:group=32:symmetric=false", "hqq", "mxfp4", "nvfp4", "magnitude", "magnitude:scope=tensor", "sparse"),
    *("gguf:Q8_0", "gguf:Q4_0", "bf16+int4"),
)


def plain(before: Tensor, after: Tensor, spec: str) -> dict[str, float]:
    """Return counts and sums of whole matrices in float64."""
    form, form_after = (quantize(weight, parse_variant(spec), place=PLACE) for weight in (before, after))
    update = (after - before).double()
    values, values_after = form.values_OI.double(), form_after.values_OI.double()
    return {
        "changed": int((update != 0).sum()),
        "crossed": int((form.codes_OI != form_after.codes_OI).sum()),
        "zeroed": int((values == 0).sum()),
        "zeroed_changed": int(((values == 0) & (update != 0)).sum()),
        "dot": float(((values_after - values) * update).sum()),
        "update": float(update.square().sum()),
        "error": float((before.double() - values).square().sum()),
    }


def pair() -> tuple[Tensor, Tensor]:
    """Return weights before and after: rows differ in size, some change wholly, some in part, some not at all."""
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(11, 256, generator=generator) * torch.logspace(-2, 1, 11)[:, None]
    update = 0.1 * torch.randn(11, 256, generator=generator)
    update[[0, 1, 2, 4, 7]] = 0
    update[5, 10:] = 0
    return before, before + update


@pytest.mark.parametrize("spec", FORMATS)
def test_slices_and_skipped_rows_change_nothing(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices hold 3 rows."""
    monkeypatch.setattr(update_survival, "SLICE", 3 * 256)
    found = counted(*pair(), spec, PLACE)._asdict()
    for name, value in plain(*pair(), spec).items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-9), name


def test_formats_counted_together_tell_what_each_tells_alone() -> None:
    """In the order asked for, those that look beyond a row among the others."""
    formats = {spec: Format(parse_variant(spec), PLACE) for spec in FORMATS}
    together = compare(*pair(), formats, sizes=True)
    assert list(together) == list(FORMATS)
    for spec, found in together.items():
        alone = counted(*pair(), spec, PLACE, sizes=True)
        assert found[:-1] == alone[:-1]
        assert found.by_size() == alone.by_size()


@pytest.mark.parametrize(
    ("spec", "inputs", "is_rowwise"),
    [
        ("int8", 24, True),
        ("int4", 256, True),
        ("nf4", 64, True),
        ("nf4", 32, False),  # a block of 64 spans two rows
        ("nf4:double=true", 64, False),
        ("rtn:group=-1", 64, False),
        ("magnitude:scope=tensor", 64, False),
        ("bf16+rtn:group=-1", 64, False),
        ("hqq", 768, False),  # stops where the mean error of the whole matrix no longer falls
    ],
)
def test_formats_that_look_beyond_a_row_are_found_out(spec: str, inputs: int, is_rowwise: bool) -> None:
    assert update_survival._is_rowwise(parse_variant(spec), inputs, None) is is_rowwise


def test_rows_that_did_not_change_are_quantized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = []

    def counting(weight: Tensor, *arguments: Any, **options: Any) -> Any:
        quantized.append(len(weight))
        return quantize(weight, *arguments, **options)

    before = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    after = before.clone()
    after[[3, 30]] += 0.5
    monkeypatch.setattr(update_survival, "SLICE", 20 * 8)
    monkeypatch.setattr(update_survival, "quantize", counting)
    update_survival._is_rowwise.cache_clear()
    probed = [update_survival.PROBED_ROWS, *[1] * update_survival.PROBED_ROWS]
    rowwise, whole = (Format(parse_variant(spec)) for spec in ("rtn:group=0", "rtn:group=-1"))
    compare(before, after, {"": rowwise})
    assert quantized == [*probed, 20, 1, 20, 1]
    quantized.clear()
    compare(before, after, {"": rowwise})
    assert quantized == [20, 1, 20, 1]
    quantized.clear()
    compare(before, before.clone(), {"": whole})
    assert quantized == [*probed, 40]


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
def test_a_model_is_compared_matrix_by_matrix(family: str, make_model: Callable[..., Any]) -> None:
    model, chain = make_model(family, layers=2, hidden=32), parse_variant("gguf:Q8_0")
    original = weights(make_model(family, seed=1, layers=2, hidden=32), chain)
    found = tallies(model, original, chain)
    assert found.keys() == original.keys() - {"model.embed_tokens", "transformer.wte"}  # shared with the output layer
    layers = by_layer(found)
    assert [name for name in layers if "1" in name or "0" in name] == [
        f"{'model.layers' if family == 'llama_tied' else 'transformer.h'}.{i}" for i in (0, 1)
    ]
    whole = total(found.values())
    weights_of_all = sum(original[name].numel() for name in found)
    assert sum(part.weights for part in layers.values()) == whole.weights == weights_of_all


def test_an_unchanged_model_has_no_surviving_update(model: Any) -> None:
    found = total(tallies(model, weights(model), parse_variant("rtn:group=8")).values())
    assert (found.crossing, found.surviving) == (0, None)
