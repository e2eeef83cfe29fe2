"""Contract tests over every registered format, and what holds for each by construction.

All of them map each block of weights by itself onto a grid, so: shape and type are kept, values are finite, equal codes
in a block stand for equal values, and larger weights never get smaller codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from stillknows.analysis.update_survival import tallies, total
from stillknows.errors import UserError
from stillknows.model.layers import linears
from stillknows.registry import plugins
from stillknows.transforms.compression import codebooks, parts
from stillknows.transforms.compression.codebooks import FP4, NF4
from stillknows.variants import fitting
from stillknows.variants.compress import Quantized, parse_variant, quantize, weights

Make = Callable[..., Any]
O, I = 6, 128  # noqa: E741
BLOCK = 64  # of nf4 and fp4, as bitsandbytes has it by default

# Every form under test, with the block that shares a scale (None: no scale).
BLOCKS: dict[str, tuple[int, ...] | None] = {
    "full": None,
    "bf16": None,
    "fp16": None,
    "int8": (O, 1, I),
    "nf4": (O * I // BLOCK, 1, BLOCK),
    "fp4": (O * I // BLOCK, 1, BLOCK),
    "nf4:double=true": (O * I // BLOCK, 1, BLOCK),
    "fp4:double=true": (O * I // BLOCK, 1, BLOCK),
    "fp8": (O, 1, I),
    "fp8:scale=tensor": (1, 1, O * I),
    "fp8:scale=block": (1, 1, O * I),
    "mxfp4": (O, 4, 32),
    "mxfp4:scale=even": (O, 4, 32),
    "nvfp4": (O, 8, 16),
    "hqq": (O, 2, 64),
    "hqq:bits=2:group=32": (O, 4, 32),
    "hqq:bits=8:group=0": (O, 1, I),
    "magnitude": None,
    "magnitude:sparsity=0.3:scope=tensor": None,
    "sparse": None,
    "sparse:n=1:m=8": None,
    "gguf": (O, 4, 32),  # 256 does not divide I: what Q4_K falls back to; the rest is in test_quantizers_gguf.py
    "gguf:Q4_0": (O, 4, 32),
    "gguf:Q8_0": (O, 4, 32),
    "int4": (O, 1, 128),
    "rtn": (O, 1, 128),
    "rtn:bits=2:group=32": (O, 4, 32),
    "rtn:bits=3:group=64": (O, 2, 64),
    "rtn:bits=8:group=0": (O, 1, I),
    "rtn:group=-1": (1, 1, O * I),
    "rtn:group=32:grid=full": (O, 4, 32),
    "rtn:bits=8:group=32:grid=full": (O, 4, 32),
    "rtn:group=32:grid=paper": (O, 4, 32),
    "rtn:bits=8:group=0:grid=paper": (O, 1, I),
    "rtn:group=32:symmetric=false": (O, 4, 32),
    "rtn:bits=3:group=-1:symmetric=false": (1, 1, O * I),
    "rtn:bits=8:group=0:symmetric=false": (O, 1, I),
}
FORMS = tuple(BLOCKS)
ROUND = tuple(f for f in FORMS if f.startswith(("rtn", "int")))
# The largest magnitude keeps its place on the grid, so rounding again finds the same grid.
KEEPS_ITS_SCALE = tuple(f for f in FORMS if not any(word in f for word in ("grid", "symmetric", "double", "hqq")))
every_form = pytest.mark.parametrize("form", FORMS)


def apply(form: str, weight_OI: Tensor) -> Quantized:
    return quantize(weight_OI, parse_variant(form))


def sample(seed: int = 0, scale: float = 0.05) -> Tensor:
    return scale * torch.randn(O, I, generator=torch.Generator().manual_seed(seed))


def outliers() -> Tensor:
    weight_OI = sample(3)
    weight_OI[1, 7] = 4.0
    weight_OI[2, 9] = -4.0
    return weight_OI


HARD: dict[str, Tensor] = {
    "zeros": torch.zeros(O, I),
    "constant": torch.full((O, I), 0.3),
    "negative": -sample(1).abs() - 0.01,
    "positive": sample(1).abs() + 0.01,
    "huge": sample(2, 1e30),
    "tiny": sample(2, 1e-30),
    "subnormal": sample(2, 1e-41),
    "one zero row": sample() * (torch.arange(O) > 0)[:, None],
    "one weight": torch.zeros(O, I).index_put((torch.tensor(2), torch.tensor(5)), torch.tensor(-1.5)),
    "outliers": outliers(),
    "bfloat16 values": sample().bfloat16().float(),
}
hard = pytest.mark.parametrize("weight_OI", HARD.values(), ids=HARD)


def test_every_registered_format_is_under_test() -> None:
    """Formats of what flows through a model, and those that look at it, have files of their own."""
    ours = {name: plugin.needs for name, plugin in plugins("transform", "deployment").items()}
    plain = {name for name, needs in ours.items() if set(needs) <= {"weight_OI", "place"}}
    assert {form.partition(":")[0] for form in FORMS} == plain, "add the new format to BLOCKS"


@every_form
@hard
def test_values_are_finite_and_shaped_like_the_weights(form: str, weight_OI: Tensor) -> None:
    given_OI = weight_OI.clone()
    found = apply(form, weight_OI)
    assert (found.values_OI.shape, found.codes_OI.shape) == (weight_OI.shape, weight_OI.shape)
    assert found.values_OI.dtype == torch.float32
    assert found.codes_OI.dtype in (torch.int8, torch.int32)
    assert bool(found.values_OI.isfinite().all())
    assert torch.equal(weight_OI, given_OI), "the input was changed"


@every_form
def test_what_is_worked_on_at_once_changes_nothing(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of one or two blocks and a last one that is shorter, against the whole matrix at once."""
    whole = apply(form, outliers())
    monkeypatch.setattr(parts, "CACHED", 5 * BLOCK // 2)
    found = apply(form, outliers())
    assert torch.equal(found.values_OI, whole.values_OI)
    assert torch.equal(found.codes_OI, whole.codes_OI)


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_type_of_the_weights_is_kept(form: str, dtype: torch.dtype) -> None:
    found = apply(form, sample().to(dtype))
    assert found.values_OI.dtype == dtype
    torch.testing.assert_close(found.values_OI, apply(form, sample().to(dtype).float()).values_OI.to(dtype))


@every_form
def test_zeros_stay_zeros(form: str) -> None:
    assert bool((apply(form, HARD["zeros"]).values_OI == 0).all())
    assert bool((apply(form, HARD["one zero row"]).values_OI[0] == 0).all())


@every_form
def test_a_strided_weight_gives_what_its_copy_gives(form: str) -> None:
    """GPT-2 stores [I, O]; the walk hands over a view."""
    strided_OI = sample().T.contiguous().T
    assert not strided_OI.is_contiguous()
    strided, plain = apply(form, strided_OI), apply(form, sample())
    for a, b in zip(tensors(strided), tensors(plain), strict=True):
        assert torch.equal(a, b)


def tensors(form: Quantized) -> list[Tensor]:
    return [*form[:2], *(form.stored.parts.values() if form.stored else ())]


def in_blocks(form: str, x_OI: Tensor) -> Tensor:
    """Rows that share a scale, [blocks, members]."""
    block = BLOCKS[form]
    return x_OI.reshape(-1, 1) if block is None else x_OI.reshape(-1, block[-1])


@every_form
@hard
def test_equal_codes_in_a_block_are_equal_values_and_order_is_kept(form: str, weight_OI: Tensor) -> None:
    """Sorted by weight, codes and values never fall, and the value stays where the code stays."""
    found = apply(form, weight_OI)
    order = in_blocks(form, weight_OI).sort(1).indices
    values = in_blocks(form, found.values_OI).gather(1, order)
    codes = in_blocks(form, found.codes_OI.int()).gather(1, order)
    assert bool((values.diff(dim=1) >= 0).all())
    assert bool((values.diff(dim=1)[codes.diff(dim=1) == 0] == 0).all())
    assert bool((codes.diff(dim=1) >= 0).all()) or BLOCKS[form] is None


@pytest.mark.parametrize("form", ["rtn:bits=2:group=32", "rtn:group=32:symmetric=false", "nf4", "int8"])
def test_a_block_depends_on_nothing_outside_it(form: str) -> None:
    other_OI = sample()
    size = in_blocks(form, other_OI).shape[1]
    other_OI.view(-1)[size:] *= 3
    first = slice(0, size)
    assert torch.equal(
        apply(form, other_OI).values_OI.flatten()[first], apply(form, sample()).values_OI.flatten()[first]
    )


@pytest.mark.parametrize("form", KEEPS_ITS_SCALE)
@hard
def test_idempotent_where_the_largest_weight_is_on_the_grid(form: str, weight_OI: Tensor) -> None:
    """The codes exactly; the values to one unit in the last place, since Δ = max/7 is rounded anew."""
    once = apply(form, weight_OI)
    twice = apply(form, once.values_OI)
    assert torch.equal(twice.codes_OI, once.codes_OI)
    exact = form not in ROUND and not form.startswith(("fp8", "nvfp4"))
    torch.testing.assert_close(twice.values_OI, once.values_OI, rtol=0 if exact else 2**-22, atol=0)


@pytest.mark.parametrize("form", [f for f in ROUND if f not in KEEPS_ITS_SCALE])
def test_the_other_grids_move_their_scale_and_so_are_not_idempotent(form: str) -> None:
    """ "full" and "paper" have no code for the largest weight of one sign, so the second Δ is another; the asymmetric
    grid rounds its zero, which can cost a step of the range. What holds instead: a second rounding costs at most what a
    first one may."""
    once = apply(form, sample())
    twice = apply(form, once.values_OI)
    if "grid" in form:
        assert not torch.equal(twice.values_OI, once.values_OI)
    assert bool(((twice.values_OI - once.values_OI).abs() <= allowed_error(form, once.values_OI)).all())


def steps(form: str, weight_OI: Tensor) -> Tensor:
    """Δ of every weight, [O, I], in float64, from the definitions."""
    bits = 8 if "bits=8" in form or form == "int8" else 2 if "bits=2" in form else 3 if "bits=3" in form else 4
    blocks = in_blocks(form, weight_OI).double()
    half = 2 ** (bits - 1)
    if "symmetric=false" in form:
        step = (blocks.amax(1).clamp_min(0) - blocks.amin(1).clamp_max(0)) / (2**bits - 1)
    else:
        divisor = half if "paper" in form else half - 0.5 if "full" in form else half - 1
        step = blocks.abs().amax(1) / divisor
    return step[:, None].expand(blocks.shape).reshape(weight_OI.shape)


def allowed_error(form: str, weight_OI: Tensor) -> Tensor:
    """Half a step; a whole one where "paper" has no code for the largest weight; and rounding in float32."""
    step_OI = steps(form, weight_OI)
    share = torch.full_like(step_OI, 0.5)
    if "paper" in form:
        top = in_blocks(form, weight_OI) > in_blocks(form, weight_OI).abs().amax(1, keepdim=True) * 0.9
        share[top.reshape(weight_OI.shape)] = 1.0
    return share * step_OI * (1 + 1e-4) + 1e-37


@pytest.mark.parametrize("form", ROUND)
@hard
def test_error_is_at_most_half_a_step(form: str, weight_OI: Tensor) -> None:
    error_OI = (apply(form, weight_OI).values_OI.double() - weight_OI.double()).abs()
    assert bool((error_OI <= allowed_error(form, weight_OI)).all())


@pytest.mark.parametrize("form", ROUND)
def test_codes_use_the_bits_and_no_more(form: str) -> None:
    bits = 8 if "bits=8" in form or form == "int8" else 2 if "bits=2" in form else 3 if "bits=3" in form else 4
    half = 2 ** (bits - 1)
    for weight_OI in HARD.values():
        codes_OI = apply(form, weight_OI).codes_OI
        assert -half <= codes_OI.min() <= codes_OI.max() <= half - 1
    codes = {code for seed in range(20) for code in apply(form, sample(seed)).codes_OI.flatten().tolist()}
    lowest = -half if any(word in form for word in ("full", "paper", "symmetric")) else -half + 1
    if bits <= 4:
        assert codes == set(range(lowest, half))


SYMMETRIC = [
    f for f in FORMS if not any(word in f for word in ("full:", "grid=", "symmetric=false", "hqq", "fp4:double"))
]


@pytest.mark.parametrize("form", SYMMETRIC)
@hard
def test_negated_weights_give_negated_values(form: str, weight_OI: Tensor) -> None:
    """Where the grid is symmetric: not "full" and "paper" (one code more below 0), nor nf4 (another table below 0), nor
    hqq (a zero of its own). fp4 takes the lower of two equally near values, as bitsandbytes does on a CPU."""
    found_OI, plain_OI = apply(form, -weight_OI).values_OI, apply(form, weight_OI).values_OI
    if form.startswith("nf4"):
        assert bool((found_OI.sign() == -plain_OI.sign()).float().mean() > 0.8)
    elif form == "fp4":
        torch.testing.assert_close((found_OI + weight_OI).abs(), (plain_OI - weight_OI).abs(), rtol=1e-5, atol=1e-37)
        assert bool((found_OI == -plain_OI).float().mean() > 0.99)
    else:
        assert bool((found_OI == -plain_OI).all())


@pytest.mark.parametrize("grid", ["full", "paper"])
def test_the_grids_with_one_code_more_below_zero_are_not_symmetric(grid: str) -> None:
    form = f"rtn:group=32:grid={grid}"
    assert not torch.equal(apply(form, -sample()).values_OI, -apply(form, sample()).values_OI)


@pytest.mark.parametrize("form", [f for f in FORMS if not f.startswith("hqq")])
@pytest.mark.parametrize("factor", [2.0, 2**-10])
def test_scaling_by_a_power_of_two_scales_the_values(form: str, factor: float) -> None:
    """Nothing in a format depends on absolute size, within float16's range; hqq's solver alone does."""
    weight_OI = sample(scale=1e3 if form.startswith("gguf") else 1.0)  # its scales are float16
    if form == "fp16":
        weight_OI = weight_OI.where(weight_OI.abs() > 0.1, 0.5)  # away from float16's subnormals after scaling
    scaled, plain = apply(form, weight_OI * factor), apply(form, weight_OI)
    assert torch.equal(scaled.values_OI, plain.values_OI * factor)
    if BLOCKS[form] is not None:
        assert torch.equal(scaled.codes_OI, plain.codes_OI)


def test_int4_full_grid_by_hand() -> None:
    """Δ = 7.5/7.5 = 1: −7.5 goes to the even neighbour −8, 7.5 to 8 and is cut to 7, half-way cases to even codes."""
    weight_OI = torch.tensor([[-7.5, 7.5, 0.5, 1.5, 2.5, -0.5, -1.5, 3.49]])
    found = apply("rtn:group=8:grid=full", weight_OI)
    assert found.codes_OI.tolist() == [[-8, 7, 0, 2, 2, 0, -2, 3]]
    assert found.values_OI.tolist() == [[-8, 7, 0, 2, 2, 0, -2, 3]]


def test_int4_full_grid_by_formula() -> None:
    weight_OI = sample()
    for row, codes in zip(weight_OI.tolist(), apply("rtn:grid=full", weight_OI).codes_OI.tolist(), strict=True):
        step = max(map(abs, row)) / 7.5
        assert codes == [max(-8, min(7, round(w / step))) for w in row]


def test_the_papers_example() -> None:
    """arXiv 2410.16454: max|w| = 200 gives Δ = 25 in 4 bits and 1.5625 in 8; the largest has no code and is cut."""
    weight_OI = torch.tensor([[200.0, -200.0, 12.4, 12.6, -12.4, 100.0, 0.78, 0.79]])
    four = apply("rtn:bits=4:group=0:grid=paper", weight_OI)
    assert four.values_OI.tolist() == [[175, -200, 0, 25, 0, 100, 0, 0]]
    eight = apply("rtn:bits=8:group=0:grid=paper", weight_OI)
    assert eight.values_OI.tolist()[0][:2] == [127 * 1.5625, -200]
    assert eight.values_OI.tolist()[0][-2:] == [0, 1.5625]


def test_asymmetric_by_hand() -> None:
    """Range −1 .. 14, Δ = 1, zero at −8 + 1 = −7: codes −8 .. 7 stand for −1 .. 14."""
    found = apply("rtn:group=8:symmetric=false", torch.tensor([[-1.0, 14.0, 0.0, 0.4, 0.6, 13.4, 5.0, -0.6]]))
    assert found.values_OI.tolist() == [[-1, 14, 0, 0, 1, 13, 5, -1]]
    assert found.codes_OI.tolist() == [[-8, 7, -7, -7, -6, 6, -2, -8]]


def test_int8_by_hand() -> None:
    found = apply("int8", torch.tensor([[127.0, -127.0, 0.4, 0.6, -63.5], [0.0, 0.0, 0.0, 0.0, -12.7]]))
    assert found.codes_OI.tolist() == [[127, -127, 0, 1, -64], [0, 0, 0, 0, -127]]
    assert found.values_OI[0].tolist() == [127, -127, 0, 1, -64]
    assert found.values_OI[1, 4].item() == pytest.approx(-12.7)


def test_int4_is_rtn_in_groups_of_128() -> None:
    wide_OI = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    for a, b in zip(apply("int4", wide_OI)[:2], apply("rtn:bits=4:group=128", wide_OI)[:2], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("form", "value", "expected"),
    [
        ("bf16", 1 + 2**-8, 1.0),
        ("bf16", 1 + 3 * 2**-8, 1 + 2**-6),
        ("bf16", 1 + 2**-7, 1 + 2**-7),
        ("bf16", -3.0e38, -3.004e38),
        ("fp16", 1 + 2**-11, 1.0),
        ("fp16", 1e6, 65504.0),
        ("fp16", -1e6, -65504.0),
        ("fp16", 1e-9, 0.0),
    ],
)
def test_casts_by_hand(form: str, value: float, expected: float) -> None:
    assert apply(form, torch.full((1, 2), value)).values_OI[0, 0].item() == pytest.approx(expected, rel=1e-3, abs=0)
    if abs(value) < 2:
        assert apply(form, torch.full((1, 2), value)).values_OI[0, 0].item() == expected


def test_full_precision_is_the_identity() -> None:
    for weight_OI in HARD.values():
        assert torch.equal(apply("full", weight_OI).values_OI, weight_OI)
    a_OI, b_OI = sample(), sample()
    b_OI[0, 0] = torch.nextafter(b_OI[0, 0], torch.tensor(1.0))
    assert int((apply("full", a_OI).codes_OI != apply("full", b_OI).codes_OI).sum()) == 1


@pytest.mark.parametrize(("form", "table"), [("nf4", NF4), ("fp4", FP4)])
@hard
def test_codebooks_take_the_nearest_entry(form: str, table: tuple[float, ...], weight_OI: Tensor) -> None:
    """In float64: no other entry of the table is nearer, up to rounding at a tie."""
    found = apply(form, weight_OI)
    blocks = weight_OI.double().reshape(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    error = (found.values_OI.double().reshape(-1, BLOCK) - blocks).abs()
    entries = torch.tensor(table, dtype=torch.float64)
    best = (entries * scale[..., None] - blocks[..., None]).abs().amin(-1)
    assert bool((error <= best + 2e-7 * scale + 1.2e-38).all())


def test_code_books_are_the_published_ones() -> None:
    nf4 = [-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0]
    nf4 += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1]
    positive = [0.0052083, 1 / 6, 0.25, 1 / 3, 0.5, 2 / 3, 1]
    assert pytest.approx(nf4, abs=1e-7) == NF4
    assert pytest.approx([-v for v in reversed(positive)] + [0, *positive], abs=1e-7) == FP4


def test_codebook_blocks_run_over_rows_and_the_last_may_be_short() -> None:
    weight_OI = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    for form in ("nf4", "fp4"):
        found = apply(form, weight_OI).values_OI.flatten()
        for start in range(0, 150, BLOCK):
            part = weight_OI.flatten()[start : start + BLOCK]
            assert torch.equal(found[start : start + BLOCK], apply(form, part[None]).values_OI[0])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.floats(-30, 30), st.sampled_from(FORMS))
def test_contracts_hold_for_any_scale(seed: int, log_scale: float, form: str) -> None:
    weight_OI = sample(seed, math.exp(log_scale))
    found = apply(form, weight_OI)
    assert bool(found.values_OI.isfinite().all())
    if form in ROUND:
        error_OI = (found.values_OI.double() - weight_OI.double()).abs()
        assert bool((error_OI <= allowed_error(form, weight_OI)).all())


def in_bitsandbytes(form: str, weight_OI: Tensor) -> tuple[Tensor, Any]:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        weight_OI, blocksize=BLOCK, quant_type=form[:3], compress_statistics="double" in form
    )
    return functional.dequantize_4bit(packed, state), state


@pytest.mark.parametrize("form", ["nf4", "fp4"])
@pytest.mark.parametrize("case", ["bfloat16 values", "outliers", "zeros", "constant", "one weight"])
@pytest.mark.filterwarnings("ignore")
def test_codebooks_equal_bitsandbytes_bit_by_bit(form: str, case: str) -> None:
    """Also at half-way cases, which 16-bit weights have: both multiply by 1/max and do not divide by max."""
    halves = torch.cat([sample(seed) for seed in range(20)]).bfloat16().float()
    for weight_OI in (HARD[case], torch.cat([sample(s, 10.0**-s) for s in range(5)]), halves):
        assert torch.equal(apply(form, weight_OI).values_OI, in_bitsandbytes(form, weight_OI)[0])


@pytest.mark.parametrize("form", ["nf4:double=true", "fp4:double=true"])
@pytest.mark.parametrize("case", ["bfloat16 values", "outliers", "zeros", "constant", "one weight"])
@pytest.mark.filterwarnings("ignore")
def test_double_quantization_equals_bitsandbytes_bit_by_bit(form: str, case: str) -> None:
    """In all blocks but those whose scale lies so near to half-way between two of the 256 values that the library's CPU
    kernel, which looks the nearest one up in a table of 2^16 places, may take the other one; about 1 in 1000."""
    many = torch.cat([sample(seed) for seed in range(60)])
    for weight_OI in (HARD[case], torch.cat([sample(s, 10.0**-s) for s in range(5)]), many):
        theirs_OI, state = in_bitsandbytes(form, weight_OI)
        differ = (apply(form, weight_OI).values_OI != theirs_OI).reshape(-1, BLOCK).any(1)
        scales = weight_OI.reshape(-1, BLOCK).abs().amax(1)
        places = torch.cat([part / part.abs().max() for part in (scales - state.offset).split(256)])[differ]
        edges = (state.state2.code[1:] + state.state2.code[:-1]) / 2
        assert bool(((places[:, None] - edges).abs().amin(1) < 2**-16).all())
        assert differ.float().mean() <= 0.01


@pytest.mark.filterwarnings("ignore")
def test_the_values_of_double_quantization_are_the_librarys() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(codebooks._dynamic_book(), functional.create_dynamic_map())


def test_double_quantization_by_hand() -> None:
    """Scales 1 and 3: mean 2, distances ∓1, which 8 bits hold as −.99297 and 1; the codes do not change."""
    weight_OI = torch.stack([torch.full((BLOCK,), 1.0), torch.full((BLOCK,), -3.0)])
    once, twice = apply("nf4", weight_OI), apply("nf4:double=true", weight_OI)
    assert torch.equal(once.codes_OI, twice.codes_OI)
    lowest = -(1 - 0.9 / 64 / 2)  # the middle of the last of 64 equal parts of .1..1
    torch.testing.assert_close(twice.values_OI[:, 0], torch.tensor([2 + lowest, -3.0]))


@pytest.mark.parametrize("form", ["nf4", "fp4"])
def test_double_quantization_moves_scales_by_little(form: str) -> None:
    """At most half the widest gap of the 256 values, .9/64, of the largest distance from the mean; in float64."""
    weight_OI = torch.cat([sample(seed, 1 + seed) for seed in range(100)])
    once, twice = apply(form, weight_OI).values_OI.double(), apply(f"{form}:double=true", weight_OI).values_OI.double()
    scales = weight_OI.reshape(-1, BLOCK).abs().amax(1).double()
    far = torch.cat([p.abs().max().expand(len(p)) for p in (scales - scales.mean()).split(256)])
    moved = (twice - once).reshape(-1, BLOCK).abs().amax(1)
    assert bool((moved <= 0.9 / 64 / 2 * far * (1 + 1e-4)).all())
    assert not torch.equal(once, twice)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_equals_bitsandbytes(dtype: torch.dtype) -> None:
    """Also at ties, which 16-bit weights have: both multiply by 127/max and do not divide by max/127."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight_OI = torch.cat([sample(seed) for seed in range(20)]).to(dtype)
    codes_OI, largest_O, _ = functional.int8_vectorwise_quant(weight_OI)
    ours = apply("int8", weight_OI.float())
    assert torch.equal(ours.codes_OI, codes_OI)
    torch.testing.assert_close(ours.values_OI, codes_OI * largest_O[:, None] / 127)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("rtn:group=48", "groups of 48 do not divide 128 inputs"),
        ("rtn:group=256", "groups of 256 do not divide 128 inputs"),
        ("rtn:group=-2", "groups of -2 do not divide"),
        ("rtn:bits=1", "bits=1 is out of range"),
        ("rtn:bits=9", "bits=9 is out of range"),
    ],
)
def test_impossible_options_are_the_users_to_mend(form: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply(form, sample())


def test_a_format_that_does_not_suit_a_layer_names_it(model: Any) -> None:
    """Before anything is changed: the second kind of layer has 24 inputs, which 16 does not divide."""
    with pytest.raises(UserError, match=r"mine: layer model\.layers\.0\.mlp\.down_proj \(16, 24\): .*groups of 16"):
        fitting.check(model, parse_variant("rtn:group=16"), "mine")
    fitting.check(model, parse_variant("rtn:group=8"), "mine")


def test_the_decoders_linear_maps_and_nothing_else(make_model: Make) -> None:
    assert [layer.name.rpartition(".")[2] for layer in linears(make_model("llama"))] == [
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ]
    gpt2 = list(linears(make_model("gpt2")))
    assert [(layer.name.rpartition("h.0.")[2], tuple(layer.read().shape)) for layer in gpt2] == [
        ("attn.c_attn", (48, 16)),
        ("attn.c_proj", (16, 16)),
        ("mlp.c_fc", (64, 16)),
        ("mlp.c_proj", (16, 64)),
    ]


def test_every_family_has_linear_maps_and_keeps_its_head(family_model: Any) -> None:
    found = list(linears(family_model))
    assert len(found) >= 4
    assert all(layer.module is not family_model.get_output_embeddings() for layer in found)


def test_surviving_update_by_hand(model: Any) -> None:
    """int4 of a group [7, …]: Δ = 1. Of two updates of .4, the one from 0 to .4 is lost, from .2 to .6 becomes 1."""
    for layer in linears(model):
        layer.write(torch.zeros(layer.read().shape))
    layer = next(iter(linears(model)))
    start = torch.zeros(16, 16)
    start[0, :3] = torch.tensor([7.0, 0.0, 0.2])
    layer.write(start)
    original = weights(model)
    start[0, 1:3] += 0.4
    layer.write(start)
    damage = total(tallies(model, original, parse_variant("rtn:bits=4:group=8")).values())
    count = sum(layer.read().numel() for layer in linears(model))
    assert damage.weights == count
    assert damage.crossing == pytest.approx(1 / count)
    assert damage.surviving == pytest.approx(1.0 * 0.4 / (2 * 0.4**2))
    full = total(tallies(model, original, parse_variant("full")).values())
    assert (full.crossing, full.surviving) == (pytest.approx(2 / count), pytest.approx(1))
    same = total(tallies(model, weights(model), parse_variant("nf4")).values())
    assert (same.crossing, same.surviving, same.weights) == (0, None, count)


@pytest.mark.parametrize("form", ["nf4", "bf16+int8", "gguf:Q4_0:pure=true"])
def test_mixtures_of_experts_are_refused(form: str) -> None:
    """Their experts lie in stacks, which no linear map holds: most of the model would stay as it is."""
    config = MixtralConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    with pytest.raises(
        UserError, match=r"\d\d% of the weights are in no linear map, most of them in \S+experts\.gate_up_proj"
    ):
        fitting.check(model, parse_variant(form), form)
    fitting.check(model, parse_variant("full"), "full")


def test_many_weights_outside_linear_maps_are_refused_whatever_their_shape(make_model: Make) -> None:
    """DBRX keeps its experts below one another in one matrix; a few weights elsewhere are as in deployment."""
    model, block = make_model(), make_model().model.layers[0]
    model.model.few = torch.nn.Parameter(torch.zeros(2, 8, 8))
    fitting.check(model, parse_variant("nf4"), "nf4")
    model.model.many = torch.nn.Parameter(torch.zeros(2 * sum(p.numel() for p in block.parameters()) // 16, 16))
    with pytest.raises(UserError, match=r"6\d% of the weights are in no linear map, most of them in model\.many,"):
        fitting.check(model, parse_variant("nf4"), "nf4")


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_places_at_and_beside_every_edge(name: str) -> None:
    """The nearest place is the number of edges below, whatever the number's sign and size."""
    edges = codebooks._edges(torch.tensor(codebooks.TABLES[name]))
    beside = [torch.nextafter(edges, torch.full_like(edges, end)) for end in (-2.0, 2.0)]
    special = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1.0, -1.0, 1 + 2**-23, -1 - 2**-23])
    scaled = torch.cat([edges, *beside, special, torch.linspace(-1, 1, 9999)])
    places = torch.empty(len(scaled), dtype=torch.int8)
    codebooks._write_places(scaled.clone(), codebooks._cells(name, scaled.device), out=places)
    assert torch.equal(places.int(), torch.searchsorted(edges, scaled, out_int32=True))
