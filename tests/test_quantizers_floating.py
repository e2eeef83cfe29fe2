"""fp8, mxfp4 and nvfp4: by hand, by their bounds, and bit by bit as compressed-tensors and torchao have them.

What torchao stores is in golden/mxfp4.json; comparisons with the library itself need `make oracles`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from stillknows.errors import UserError
from stillknows.transforms.compression.floating import E2M1, fp8, mxfp4, nvfp4
from stillknows.variants import fitting
from stillknows.variants.compress import Quantized, parse_variant, quantize

FP8_SCALES = ("tensor", "channel", "block")
# the libraries use what will go from torch; transformers imports those of them that it finds
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def apply(form: str, weight_OI: Tensor) -> Quantized:
    return quantize(weight_OI, parse_variant(form))


def sample(outputs: int = 200, inputs: int = 192, seed: int = 0) -> Tensor:
    return 0.05 * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def uneven() -> Tensor:
    """Rows whose sizes differ by orders of magnitude."""
    return sample(seed=1) * torch.exp(4 * torch.randn(200, 1, generator=torch.Generator().manual_seed(2)))


CASES = {
    "normal": sample(),
    "bfloat16 values": sample(seed=3).bfloat16().float(),
    "sixteenths": torch.randint(-64, 65, (200, 192), generator=torch.Generator().manual_seed(4)) / 16,
    "uneven rows": uneven(),
    "constant": torch.full((32, 64), 0.3),
    "one row": sample(8, 64) * (torch.arange(8) == 3)[:, None],
    "huge": 1e30 * sample(16, 64),
}
cases = pytest.mark.parametrize("weight_OI", CASES.values(), ids=CASES)


def test_fp8_by_hand() -> None:
    """Δ = 1: 8 steps from a power of two to the next, of 2^−9 below 2^−6; half-way cases go to the even mantissa."""
    given = [448.0, 17.0, 19.0, 18.0, -17.0, 2**-9, 2**-10, 1.5 * 2**-9, 0.0, 440.0]
    found = fp8(torch.tensor([given]))
    assert found.values_OI.tolist() == [[448, 16, 20, 18, -16, 2**-9, 0, 2**-8, 0, 448]]
    # 448 = 1.75·2^8: exponent field 15, mantissa 6: 15·8 + 6; 16: (4 + 7)·8; 2^−9 is the least
    assert found.codes_OI.tolist() == [[126, 88, 90, 89, -88, 1, 0, 2, 0, 126]]


@pytest.mark.parametrize(("scale", "tops"), [("tensor", [8, 8, 8]), ("channel", [8, 1, 2]), ("block", [8, 1, 8])])
def test_fp8_shares_its_scale(scale: Any, tops: list[float]) -> None:
    """Output 128 lies in another block of 128 × 128 than outputs 0 and 1. A weight of .1 in each of them tells Δ."""
    weight_OI = torch.zeros(130, 200)
    weight_OI[0, 0], weight_OI[128, 0], weight_OI[1, 0] = 8.0, 1.0, 2.0
    for output, top in zip((0, 128, 1), tops, strict=True):
        weight_OI[output, 1] = 0.1
        step = top / 448
        expected = (torch.tensor(0.1) / step).to(torch.float8_e4m3fn).float() * step
        found = fp8(weight_OI, scale=scale).values_OI[output, 1]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", FP8_SCALES)
@cases
def test_fp8_error(scale: Any, weight_OI: Tensor) -> None:
    found = fp8(weight_OI, scale=scale)
    step = {"tensor": weight_OI.abs().max(), "channel": weight_OI.abs().amax(1, keepdim=True)}.get(scale)
    if step is None:  # each block by itself
        step = torch.cat(
            [
                torch.cat([t.abs().max().expand(t.shape) for t in rows.split(128, 1)], 1)
                for rows in weight_OI.split(128, 0)
            ]
        )
    bound = torch.maximum(weight_OI.abs().double() / 16, step.double() / 448 / 1024)
    error = (found.values_OI.double() - weight_OI.double()).abs()
    assert bool((error <= bound * (1 + 1e-5)).all())
    assert int(found.codes_OI.abs().max()) == 126


def test_mxfp4_by_hand() -> None:
    """Largest 7: the step is 2^(2 − 2) = 1 and 7 is cut to 6; half-way cases go to the even mantissa."""
    given = [7.0, 0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, -0.25, -0.75, -2.5, -7.0, 0.0, 6.9]
    expected = [6, 0, 0.5, 1, 1, 2, 2, 4, 4, 6, 0, -1, -2, -6, 0, 6]
    found = mxfp4(torch.tensor([given + [0.0] * 16]))
    assert found.values_OI.tolist() == [expected + [0] * 16]
    assert found.codes_OI.tolist() == [[7, 0, 1, 2, 2, 4, 4, 6, 6, 7, 0, -2, -4, -7, 0, 7] + [0] * 16]


@pytest.mark.parametrize(
    ("largest", "scale", "step"),
    [
        *((largest, scale, 1.0) for largest in (4.0, 5.0, 6.9) for scale in ("floor", "even")),
        *((7.0, "floor", 1.0), (7.0, "even", 2.0), (7.99, "floor", 1.0), (7.99, "even", 2.0), (8.0, "floor", 2.0)),
        *((2.0**-100, "floor", 2.0**-102), (2.0**127, "floor", 2.0**125), (2.0**-126, "floor", 2.0**-127)),
        *((2.0**-125, "floor", 2.0**-127), (2.0**-124, "floor", 2.0**-126), (2.0**-130, "floor", 2.0**-127)),
    ],
)
def test_the_shared_power_of_two(largest: float, scale: Any, step: float) -> None:
    """The smallest weight that does not become 0 tells the step: just above a quarter of it."""
    found = mxfp4(torch.tensor([[largest, 0.3 * step, 0.24 * step] + [0.0] * 29]), scale=scale).values_OI[0].double()
    if largest >= 4 * step:
        assert found[1].item() == step / 2
        assert found[2].item() == 0
    assert found[0].item() in {step * value for value in E2M1}
    assert abs(found[0].item() - largest) <= 2 * step


def test_blocks_of_mxfp4_follow_the_inputs_of_one_output() -> None:
    weight_OI = sample(4, 96)
    weight_OI[1, 32:64] *= 1000
    found = mxfp4(weight_OI).values_OI
    for output in range(4):
        for start in (0, 32, 64):
            part = weight_OI[output : output + 1, start : start + 32]
            assert torch.equal(found[output : output + 1, start : start + 32], mxfp4(part).values_OI)


def test_nvfp4_by_hand() -> None:
    """max|w| = 2688 gives g = 1. The largest of a block is 6·s with s = 448, 1, 17 (stored as 16), 2^−11 (as 0)."""
    tops = [2688.0, 6.0, 102.0, 6 * 2.0**-11]
    rows = [[top, top / 6, top / 24, -top / 12, top / 12 * 1.4] + [0.0] * 11 for top in tops]
    found = nvfp4(torch.tensor(rows).reshape(1, -1))
    # in steps of 17/16 at the third block: 6.375 is cut to 6, 1.0625 is 1, .2656 is ½, −.53 is −½, .74 is ½
    expected = [[2688, 448, 0, -224, 224], [6, 1, 0, -0.5, 0.5], [96, 16, 8, -8, 8], [0] * 5]
    assert found.values_OI.reshape(4, 16)[:, :5].tolist() == expected
    assert found.codes_OI.reshape(4, 16)[:, :5].tolist() == [
        [7, 2, 0, -1, 1],
        [7, 2, 0, -1, 1],
        [7, 2, 1, -1, 1],
        [0] * 5,
    ]


def grid_error(found: Quantized, blocks: Tensor, step: Tensor) -> None:
    """At most half the distance between the neighbours on E2M1's grid times the step; what is beyond 6 is cut."""
    scaled = blocks.double() / step
    allowed = 0.25 * (1 + (scaled.abs() >= 2).double() + 2 * (scaled.abs() >= 4).double())
    error = (found.values_OI.double().reshape(blocks.shape) / step - scaled).abs()
    inside = scaled.abs() <= 6
    assert bool((error <= allowed + 1e-6)[inside].all())
    assert bool((error <= scaled.abs() - 6 + 1e-6)[~inside].all())


@cases
def test_mxfp4_error(weight_OI: Tensor) -> None:
    blocks = weight_OI.reshape(len(weight_OI), -1, 32)
    largest = blocks.double().abs().amax(-1, keepdim=True).clamp_min(1e-300)
    grid_error(mxfp4(weight_OI), blocks, torch.exp2(torch.floor(torch.log2(largest)) - 2).clamp_min(2.0**-127))


@cases
def test_nvfp4_error(weight_OI: Tensor) -> None:
    """Where the block's scale is a normal number: within 1/16 of what brings the block's largest to 6."""
    blocks = weight_OI.reshape(len(weight_OI), -1, 16)
    found = nvfp4(weight_OI)
    largest = blocks.double().abs().amax(-1, keepdim=True)
    error = (found.values_OI.double().reshape(blocks.shape) - blocks.double()).abs()
    normal = largest * 448 >= blocks.abs().max() * 2.0**-6
    bound = largest / 6 * (1 + 1 / 16)  # half of the widest gap, 2, times the step
    assert bool((error <= bound * (1 + 1e-5))[normal.expand_as(error)].all())
    assert bool((found.values_OI.abs() <= weight_OI.abs().max() * (1 + 1e-6)).all())


@pytest.mark.parametrize("form", ["fp8", "fp8:scale=tensor", "fp8:scale=block", "mxfp4", "mxfp4:scale=even", "nvfp4"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_does_not_become_a_number(form: str, value: float) -> None:
    weight_OI = sample(4, 64)
    weight_OI[2, 40] = value
    (link,) = parse_variant(form)
    assert not bool(link(weight_OI=weight_OI).values_OI[2, 40].isfinite())
    with pytest.raises(UserError, match="makes infinity of weights"):
        apply(form, weight_OI)


@pytest.mark.parametrize("form", ["fp8", "mxfp4", "nvfp4"])
def test_a_whole_matrix_too_small_for_a_scale_is_zero(form: str) -> None:
    found = apply(form, torch.full((2, 32), 1e-44))
    assert bool((found.values_OI <= 1e-44).all())
    assert bool(found.values_OI.isfinite().all())


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (130, 129), (257, 128)])
def test_fp8_takes_any_shape(shape: tuple[int, int]) -> None:
    for scale in FP8_SCALES:
        found = apply(f"fp8:scale={scale}", sample(*shape)).values_OI
        assert bool(((found - sample(*shape)).abs() <= 0.05 * 5 / 16).all())


@pytest.mark.parametrize(
    ("form", "size", "inputs"), [("mxfp4", 32, 48), ("nvfp4", 16, 24), ("mxfp4:scale=even", 32, 8)]
)
def test_inputs_that_blocks_do_not_divide_are_refused(form: str, size: int, inputs: int) -> None:
    with pytest.raises(UserError, match=rf"blocks of {size} do not divide {inputs} inputs\n.*use fp8"):
        apply(form, sample(4, inputs))


def test_a_model_whose_layers_do_not_suit_is_refused_before_it_is_changed(model: Any) -> None:
    with pytest.raises(UserError, match=r"mine: layer .*mxfp4: its blocks of 32 do not divide 16 inputs"):
        fitting.check(model, parse_variant("mxfp4"), "mine")
    fitting.check(model, parse_variant("fp8:scale=block"), "mine")


@pytest.mark.parametrize("scale", ["floor", "even"])
def test_mxfp4_stores_what_torchao_stores(scale: Any) -> None:
    golden = json.loads((Path(__file__).parent / "golden/mxfp4.json").read_text())
    found = mxfp4(torch.tensor(golden["inputs"]), scale=scale)
    codes = torch.tensor(golden[scale]["codes"]).reshape(found.codes_OI.shape)
    ranks = codes & 7
    signed = torch.where(codes > 7, -ranks, ranks)
    steps = torch.tensor([2.0 ** (exponent - 127) for exponent in golden[scale]["exponents"]]).repeat_interleave(32)
    values = torch.tensor(E2M1)[ranks] * signed.sign() * steps.reshape(codes.shape)
    assert torch.equal(found.codes_OI, signed.int())
    assert torch.equal(found.values_OI, values)
    assert {int(rank) for rank in signed.flatten()} == set(range(-7, 8))


def in_compressed_tensors(weight_OI: Tensor, form: str) -> Tensor:
    """Quantize and dequantize with compressed-tensors, scales as its observers compute them."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    arguments: dict[str, Any] = {"type": "float", "symmetric": True, "num_bits": 8 if "fp8" in form else 4}
    blocks, over, overall = weight_OI, (1,), None
    if form == "mxfp4:scale=even":
        byte = torch.uint8
        arguments |= {"strategy": "group", "group_size": 32, "scale_dtype": byte, "zp_dtype": byte}
        blocks, over = weight_OI.unflatten(-1, (-1, 32)), (-1,)
    elif form == "nvfp4":
        arguments |= {"strategy": "tensor_group", "group_size": 16}
        arguments |= {"scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}
        blocks, over = weight_OI.unflatten(-1, (-1, 16)), (-1,)
        overall = generate_gparam(weight_OI.min(), weight_OI.max())
    else:
        strategy = form.partition("=")[2]
        arguments |= {"strategy": strategy}
        if strategy == "tensor":
            blocks, over = weight_OI.reshape(1, -1), (1,)
        elif strategy == "block":
            arguments |= {"block_structure": [128, 128]}
            rows, columns = weight_OI.shape
            blocks = pad(weight_OI, (0, -columns % 128, 0, -rows % 128)).unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
            over = (1, 3)
    least, most = blocks.amin(over), blocks.amax(over)
    if "channel" in form:
        least, most = least[:, None], most[:, None]
    options = quantization.QuantizationArgs(**arguments)
    scale, zero = calculate_qparams(least, most, options, global_scale=overall)
    zeros = None if form == "nvfp4" else zero  # of symmetric formats; stored in 8 bits there, which do not add
    return fake_quantize(weight_OI, scale.float(), zeros, options, global_scale=overall)


@pytest.mark.parametrize("form", [*(f"fp8:scale={scale}" for scale in FP8_SCALES), "mxfp4:scale=even", "nvfp4"])
@cases
def test_equal_to_compressed_tensors_bit_by_bit(form: str, weight_OI: Tensor) -> None:
    assert torch.equal(apply(form, weight_OI).values_OI, in_compressed_tensors(weight_OI, form))


@pytest.mark.oracle("torchao")
@pytest.mark.parametrize("scale", ["floor", "even"])
@cases
def test_mxfp4_equals_torchao_bit_by_bit(scale: Any, weight_OI: Tensor) -> None:
    """Values, and the stored exponents and 4-bit codes."""
    from torchao.prototype.mx_formats import mx_tensor as mx
    from torchao.prototype.mx_formats.config import ScaleCalculationMode

    mode = ScaleCalculationMode[scale.upper()]
    exponents, packed = mx.to_mx(weight_OI, torch.float4_e2m1fn_x2, 32, mode)
    theirs_OI = mx.to_dtype(packed, exponents, torch.float4_e2m1fn_x2, 32, torch.float32)
    found = mxfp4(weight_OI, scale=scale)
    assert torch.equal(found.values_OI, theirs_OI)
    nibbles = torch.stack([packed & 15, packed >> 4], -1).reshape(weight_OI.shape).int()
    assert torch.equal(found.codes_OI.abs(), nibbles & 7)


@pytest.mark.oracle("torchao")
def test_nvfp4_is_near_torchaos() -> None:
    """torchao multiplies by reciprocals, so that half-way cases may go to the other side; no other weights differ."""
    from torchao.prototype.mx_formats import nvfp4_tensor as nv

    for weight_OI in (CASES["normal"], CASES["bfloat16 values"]):
        scale = nv.per_tensor_amax_to_scale(weight_OI.abs().max())
        theirs_OI = nv.NVFP4Tensor.to_nvfp4(weight_OI, per_tensor_scale=scale).dequantize(torch.float32)
        differ = ~torch.isclose(nvfp4(weight_OI).values_OI, theirs_OI, rtol=1e-5)
        assert differ.float().mean() < 0.005
        ours, others = ((values - weight_OI)[differ].abs() for values in (nvfp4(weight_OI).values_OI, theirs_OI))
        torch.testing.assert_close(ours, others, rtol=1e-4, atol=0)
