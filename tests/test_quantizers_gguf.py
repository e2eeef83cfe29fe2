"""GGUF formats: bytes equal to ggml's, types equal to llama.cpp's choice, places equal to gguf-py's names.

ggml itself comes with pywhispercpp, whose wheel holds an unmodified libggml-base; gguf is llama.cpp's own package, a
second implementation of the simple types in numpy. Neither is needed to use the formats.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillknows.analysis.update_survival import tallies, total
from stillknows.errors import UserError
from stillknows.model.architecture import MatrixRole, placed
from stillknows.model.layers import linears
from stillknows.model.packed.ggml import Bytes, pack
from stillknows.registry import plugins
from stillknows.transforms.compression.gguf import FALLBACK, gguf, main_type, type_in_file
from stillknows.transforms.compression.gguf_blocks import SUPER, TYPES, fill
from stillknows.variants.compress import compressed, parse_variant, quantize, weights
from stillknows.variants.fitting import check

SIMPLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
GGML_NUMBERS = {name: int(i) for name, i in zip(TYPES, (2, 3, 6, 7, 8, 10, 11, 12, 13, 14), strict=True)}
FILES = tuple(json.loads((Path(__file__).parent / "golden/gguf_types.json").read_text())["qwen3-0.6b"]["files"])
every_type = pytest.mark.parametrize("name", TYPES)


def sample(seed: int = 0, scale: float = 0.02, rows: int = 6) -> Tensor:
    return scale * torch.randn(rows, 2 * SUPER, generator=torch.Generator().manual_seed(seed))


CASES: dict[str, Tensor] = {
    "normal": sample(),
    "bfloat16 values": sample(1).bfloat16().float(),
    "heavy tails": sample(2, 1.0) ** 3 / 100,
    "positive": sample(3, 0.3).abs(),
    "negative": -sample(4, 0.3).abs() - 0.1,
    "far from zero": sample(5, 0.01) + 0.5,
    "ties": (sample(6, 3.0)).round() / 8,
    "mostly zero": sample(7, 1.0).where(sample(7, 1.0) > 1.5, 0.0),
    "zeros": torch.zeros(2, SUPER),
    "constant": torch.full((2, SUPER), 0.3),
    "negative constant": torch.full((2, SUPER), -0.3),
    "scales below float16's normal numbers": sample(8, 1e-6),
    "scales that float16 rounds to zero": sample(9, 1e-12),
    "large": sample(10, 100.0),
    "float16's largest": sample(11, 3e4).clamp(-65504, 65504),
    "zero sub-blocks": sample(12).where(torch.arange(2 * SUPER) % 64 < 32, 0.0),
    "one weight": torch.zeros(2, SUPER).index_put((torch.tensor(1), torch.tensor(77)), torch.tensor(-1.5)),
}
every_case = pytest.mark.parametrize("x", CASES.values(), ids=CASES)


# --- ggml's bytes -----------------------------------------------------------------------------------------------------


class Ggml:
    """ggml's C library: the bytes of a matrix in a type, and the values that they stand for."""

    def __init__(self, path: str) -> None:
        self.library = ctypes.CDLL(path)
        self.library.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.library.ggml_quantize_chunk.argtypes = [
            *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
            *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
        ]

    def bytes_of(self, x: Tensor, name: str) -> Bytes:
        rows, inputs = x.shape
        given = np.ascontiguousarray(x.numpy())
        size = pack(name, fill(x[:1, : TYPES[name].weights], name)._asdict()).size * x.numel() // TYPES[name].weights
        found = np.zeros(size, np.uint8)
        addresses = given.ctypes.data, found.ctypes.data
        written = self.library.ggml_quantize_chunk(GGML_NUMBERS[name], *addresses, 0, rows, inputs, None)
        assert written == size
        return found.reshape(-1, size * TYPES[name].weights // x.numel())

    def values_of(self, content: Bytes, name: str, shape: torch.Size) -> Tensor:
        values = np.empty(shape, np.float32)
        read = getattr(self.library, f"dequantize_row_{name.replace('Q', 'q')}")
        read.argtypes, read.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
        read(np.ascontiguousarray(content).ctypes.data, values.ctypes.data, values.size)
        return torch.from_numpy(values)


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("elsewhere compilers fuse ggml's multiplications and additions, which moves its last bits")
    try:
        files = importlib.metadata.files("pywhispercpp") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pywhispercpp, whose wheel holds libggml-base, is not installed")
    paths = [str(file.locate()) for file in files if file.name.startswith("libggml-base")]
    assert paths, "this pywhispercpp has no libggml-base"
    return Ggml(paths[0])


@every_type
@every_case
def test_bytes_and_values_equal_ggmls(ggml: Ggml, name: str, x: Tensor) -> None:
    blocks = fill(x, name)
    content = ggml.bytes_of(x, name)
    np.testing.assert_array_equal(pack(name, blocks._asdict()), content)
    assert torch.equal(blocks.values.reshape(x.shape), ggml.values_of(content, name, x.shape))


@every_type
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), log_scale=st.floats(-14, 6), power=st.sampled_from([1, 3]), shift=st.floats(-2, 2))
def test_bytes_equal_ggmls_at_any_scale(
    ggml: Ggml, name: str, seed: int, log_scale: float, power: int, shift: float
) -> None:
    x = (sample(seed, 1.0, rows=3) ** power + shift) * math.exp(log_scale)
    np.testing.assert_array_equal(pack(name, fill(x, name)._asdict()), ggml.bytes_of(x, name))


@pytest.mark.parametrize("name", SIMPLE)
@every_case
def test_bytes_equal_those_of_gguf_py(name: str, x: Tensor) -> None:
    quants = pytest.importorskip("gguf.quants")
    constants = pytest.importorskip("gguf.constants")
    content = quants.quantize(x.numpy(), constants.GGMLQuantizationType[name])
    np.testing.assert_array_equal(pack(name, fill(x, name)._asdict()).reshape(content.shape), content)


def test_many_blocks_are_filled_in_parts_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fill(sample(), "Q4_K").values
    monkeypatch.setattr("stillknows.transforms.compression.gguf_blocks.CACHED", 3 * SUPER)
    assert torch.equal(fill(sample(), "Q4_K").values, whole)


# --- By hand ----------------------------------------------------------------------------------------------------------


def row(*numbers: float) -> Tensor:
    return torch.tensor([[*numbers, *[0.0] * (32 - len(numbers))]])


@pytest.mark.parametrize(
    ("name", "x", "codes", "values"),
    [
        # Δ = 127/127: halves away from zero
        ("Q8_0", row(127, 0.5, -0.5, 2.5, -3.4), [127, 1, -1, 3, -3], [127, 1, -1, 3, -3]),
        # Δ = −8/−8 = 1: the largest is −8; 7.6 has no code 8 and gets 7
        ("Q4_0", row(-8, 7.6, 0.4, 0.6, -0.6), [-8, 7, 0, 1, -1], [-8, 7, 0, 1, -1]),
        # Δ = 8/−8 = −1: codes are stored as −8, 7 …, and turned so that they rise with the weights
        ("Q4_0", row(8, -7.6, 0.4, 0.6, -0.6), [8, -7, 0, 1, -1], [8, -7, 0, 1, -1]),
        ("Q5_0", row(-16, 15.6, 0.4, -0.6), [-16, 15, 0, -1], [-16, 15, 0, -1]),
        # from 0 to 15 in steps of 1; and from −1 to 30 in steps of 1
        ("Q4_1", row(15, 7.4, 7.6, 0.2), [15, 7, 8, 0], [15, 7, 8, 0]),
        ("Q5_1", row(30, -1, 7.4), [31, 0, 8], [30, -1, 7]),
    ],
)
def test_simple_types_by_hand(name: str, x: Tensor, codes: list[int], values: list[float]) -> None:
    found = gguf(x, file=name)  # type: ignore[arg-type]
    assert found.codes_OI[0, : len(codes)].tolist() == codes
    assert found.values_OI[0, : len(values)].tolist() == values


def test_q4_k_by_hand() -> None:
    """Eight sub-blocks of 0, 1, …, 15 twice: scale 1 is 63 times float16(1/63), and there is no offset."""
    x = torch.arange(16.0).repeat(16)[None]
    unit = torch.tensor(1 / 63).half().float()
    blocks = fill(x, "Q4_K")
    assert blocks.scale.item() == unit
    assert blocks.multiples.tolist() == [[63] * 8]
    assert blocks.offset_multiples.tolist() == [[0] * 8]
    assert torch.equal(gguf(x, file="Q4_K_M").values_OI, x * (63 * unit))


def test_q6_k_by_hand() -> None:
    """Sub-blocks of −32, …, −17 and of a quarter of that: the scales 1 and 1/4 are −128 and −32 times −1/128."""
    first = torch.arange(-32.0, -16.0)
    x = torch.cat([first, first / 4]).repeat(8)[None]
    blocks = fill(x, "Q6_K")
    assert blocks.scale.item() == -1 / 128
    assert blocks.multiples.tolist() == [[-128, -32] * 8]
    assert blocks.codes[0, 0].tolist() == blocks.codes[0, 1].tolist() == list(range(-32, -16))
    assert torch.equal(gguf(x, file="Q6_K").values_OI, x)


# --- What holds for every type ----------------------------------------------------------------------------------------

HARD = CASES | {
    "huge": sample(2, 1e30),
    "tiny": sample(2, 1e-30),
    "subnormal": sample(2, 1e-41),
    "outliers": sample(3).index_put((torch.tensor(1), torch.tensor(7)), torch.tensor(4.0)),
}
MAIN_FILES = {main_type(file): file for file in FILES}


@every_type
@pytest.mark.parametrize("x", HARD.values(), ids=HARD)
def test_values_are_finite_and_rise_with_the_weights(name: str, x: Tensor) -> None:
    """Within a sub-block: sorted by weight, codes and values never fall, and the value stays where the code stays."""
    found = quantize(x, parse_variant(f"gguf:{MAIN_FILES[name]}:pure=true"))
    assert bool(found.values_OI.isfinite().all())
    members = fill(x[:1, :SUPER].clamp(-1, 1), name).codes.shape[-1]
    order = x.reshape(-1, members).sort(1).indices
    values, codes = (part.reshape(-1, members).gather(1, order).diff(dim=1) for part in found[:2])
    assert bool((values >= 0).all())
    assert bool((codes >= 0).all())
    assert bool((values[codes == 0] == 0).all())


@every_type
def test_more_bits_bring_less_error(name: str) -> None:
    """Root mean square error over the weights' own, on normal weights: about 2^−bits, so below twice that."""
    bits = int(name[1])
    error = (fill(sample(), name).values.reshape(sample().shape) - sample()).square().mean().sqrt() / 0.02
    assert 0.15 * 2**-bits < error < 2 * 2**-bits


def test_weights_beyond_float16_are_clamped() -> None:
    x = torch.tensor([[1e6, -1e6, *[0.0] * 30]])
    assert gguf(x, file="Q8_0").values_OI[0, :2].tolist() == pytest.approx([65504, -65504], rel=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_numbers_are_refused(value: float) -> None:
    x = sample()
    x[3, 5] = value
    with pytest.raises(UserError, match="infinite or not a number"):
        gguf(x)


# --- Which type a matrix gets -----------------------------------------------------------------------------------------


def layers_of(text: str) -> set[int]:
    """ "0-2,5" -> {0, 1, 2, 5}."""
    ends = [part.split("-") for part in text.split(",")]
    return {layer for first, *last in ends for layer in range(int(first), int((last or [first])[0]) + 1)}


def fitting(name: str, inputs: int) -> str:
    return name if inputs % TYPES[name].weights == 0 else FALLBACK[name]


@pytest.mark.parametrize("file", FILES)
def test_types_are_those_that_llama_cpp_chooses(file: str) -> None:
    """Five models with and without tied embeddings, shared key heads, 80 layers, and rows that 256 does not divide."""
    golden = json.loads((Path(__file__).parent / "golden/gguf_types.json").read_text())
    for model, content in golden.items():
        sizes, listed = content["sizes"], content["files"][file]
        main, tied = main_type(file), "output" not in content["files"]["Q4_0"]
        dense_roles = () if "n_expert" in sizes else ("gate", "up", "down")
        for role in ("embedding", "query", "key", "value", "attention_output", *dense_roles, "output"):
            if tied and role == "output":
                continue
            asked: Any = "output" if tied and role == "embedding" else role
            inputs = {"down": sizes["n_ff"], "attention_output": 64 * 64}.get(role, sizes["n_embd"])
            for layer in range(sizes["n_layer"] if role not in ("embedding", "output") else 1):
                place = MatrixRole(asked, layer, sizes["n_layer"], sizes["n_head"] // sizes["n_head_kv"], "llama", 0)
                kinds = listed.get(role, {})
                expected = next((kind for kind, text in kinds.items() if layer in layers_of(text)), main)
                assert fitting(type_in_file(file, place, inputs), inputs) == expected, (model, role, layer)


def test_golden_types_are_more_than_the_main_ones() -> None:
    golden = json.loads((Path(__file__).parent / "golden/gguf_types.json").read_text())
    assert golden["qwen3-0.6b"]["files"]["Q4_K_M"]["down"] == {"Q6_K": "0-2,5,8,11,14,17,20,23-27"}
    assert len(golden) == 5
    assert {len(content["files"]) for content in golden.values()} == {14}


def test_the_options_are_the_files_of_the_golden_table() -> None:
    for file in FILES:
        assert parse_variant(f"gguf:{file}")[0].options["file"] == file
    with pytest.raises(UserError, match=r"Q4_K_X is not known; did you mean 'Q4_K_"):
        parse_variant("gguf:Q4_K_X")
    assert plugins("transform", "deployment")["gguf"].needs == ("weight_OI", "place")


@pytest.mark.parametrize(
    ("file", "inputs", "simple"),
    [
        ("Q4_K_M", 96, "Q5_0"),
        ("Q5_K_M", 96, "Q5_1"),
        ("Q6_K", 32, "Q8_0"),
        ("Q3_K_M", 128, "Q4_0"),
        ("Q2_K", 64, "Q4_0"),
    ],
)
def test_rows_that_256_does_not_divide_fall_back(file: Any, inputs: int, simple: Any) -> None:
    x = sample()[:, :inputs]
    assert torch.equal(gguf(x, file=file).values_OI, gguf(x, file=simple).values_OI)


@pytest.mark.parametrize("file", ["Q4_K_M", "Q4_0", "Q8_0"])
def test_rows_that_32_does_not_divide_stay_float16(file: Any) -> None:
    x = sample()[:, :48]
    assert torch.equal(gguf(x, file=file).values_OI, x.half().float())


def at(role: Any, layer: int = 0, **changes: Any) -> MatrixRole:
    return MatrixRole(role, layer, 16, 1, "llama", 0)._replace(**changes)


def test_a_place_changes_the_type_and_pure_does_not_look_at_it() -> None:
    x = sample()
    six, four = gguf(x, file="Q6_K").values_OI, gguf(x, file="Q4_K_M").values_OI
    assert torch.equal(gguf(x, at("down", 0)).values_OI, six)
    assert torch.equal(gguf(x, at("down", 2)).values_OI, four)
    assert torch.equal(gguf(x, at("down", 0), pure=True).values_OI, four)


@pytest.mark.parametrize("place", [at("unknown"), at("up", experts=8), at("up", family="falcon")])
def test_a_mixture_that_is_not_known_is_refused_with_a_way_out(place: MatrixRole) -> None:
    with pytest.raises(UserError, match="use gguf:Q4_K_M:pure=true, which gives every matrix Q4_K"):
        gguf(sample(), place)
    gguf(sample(), place, pure=True)


# --- Places -----------------------------------------------------------------------------------------------------------

GGUF_NAMES = {
    "embedding": "token_embd",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "query_key_value": "attn_qkv",
    "attention_output": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "output": "output",
}
ARCHITECTURES = {"phi": "phi2", "gpt_neox": "gptneox", "cohere": "command-r", "mistral": "llama"}


def test_places_are_those_of_ggufs_names(family_model: Any) -> None:
    """gguf-py maps module names to tensor names; all families' matrices have the places that these say."""
    gguf_py = pytest.importorskip("gguf")
    wanted = ARCHITECTURES.get(family_model.config.model_type, family_model.config.model_type)
    arch = next(arch for arch, name in gguf_py.MODEL_ARCH_NAMES.items() if name == wanted)
    names = gguf_py.get_tensor_name_map(arch, 1)
    for layer, place in placed(family_model):
        if place.role == "output" and family_model.config.tie_word_embeddings:
            continue  # llama.cpp has no such tensor then
        block = f"blk.{place.layer}." if place.role not in ("embedding", "output") else ""
        assert names.get_name(layer.name) == f"{block}{GGUF_NAMES[place.role]}", layer.name


def test_tied_weights_are_met_once_and_as_the_output_layer(make_model: Callable[..., Any]) -> None:
    for family, roles in (("llama", ["embedding", "output"]), ("llama_tied", ["output"])):
        model = make_model(family, layers=2)
        found = list(placed(model))
        assert [place.role for _, place in found if place.role in ("embedding", "output")] == roles
        assert [layer.name for layer, _ in found][len(roles) - 1 : -1] == [layer.name for layer in linears(model)]
        assert len({layer.read().data_ptr() for layer, _ in found}) == len(found)
        assert {place.layer for _, place in found} == {0, 1}
        assert {place.layers for _, place in found} == {2}


def test_a_place_tells_how_many_queries_share_a_key(make_model: Callable[..., Any]) -> None:
    model = make_model()
    assert {place.sharing for _, place in placed(model)} == {1}
    model.config.num_key_value_heads = 1
    assert {place.sharing for _, place in placed(model)} == {2}
    model.config.num_local_experts = 8
    assert {place.experts for _, place in placed(model)} == {8}


# --- Whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2"])
def test_a_model_is_quantized_with_its_embedding_and_output_layer(make_model: Callable[..., Any], family: str) -> None:
    """Each matrix is what the format makes of it at its place; norms and biases stay; all is restored."""
    model, chain = make_model(family, hidden=SUPER, layers=3), parse_variant("gguf")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = {}
    for layer, place in placed(model):
        form_OI = gguf(layer.read(), place).values_OI
        expected[layer.read().data_ptr()] = form_OI.T if layer.transposed else form_OI
    with compressed(model, chain):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected.get(tensor.data_ptr(), before[name])), name
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert sum(tensor.data_ptr() in expected for tensor in model.state_dict().values()) >= len(expected)
    assert {name.split(".")[-1] for name in changed} == {"weight"}
    assert any("emb" in name or "wte" in name for name in changed)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_other_formats_still_leave_embedding_and_output_layer(model: Any) -> None:
    head = model.get_output_embeddings().weight.clone()
    with compressed(model, parse_variant("rtn:group=8")):
        assert torch.equal(model.get_output_embeddings().weight, head)


def test_the_surviving_update_counts_embedding_and_output_layer(make_model: Callable[..., Any]) -> None:
    original, model = make_model(), make_model()
    model.get_output_embeddings().weight.data += 1.0
    damage = total(tallies(model, weights(original), parse_variant("gguf:Q8_0")).values())
    assert damage.weights == sum(layer.read().numel() for layer, _ in placed(model))
    assert 0 < damage.crossing < 1
    assert damage.surviving == pytest.approx(1, abs=0.01)
    linear = tallies(model, weights(original), parse_variant("int8"))
    assert total(linear.values()).surviving is None


def test_a_model_of_an_unknown_kind_is_refused_before_anything_is_quantized(model: Any) -> None:
    model.config.num_local_experts = 8
    with pytest.raises(UserError, match=r"mine: layer model\.embed_tokens \(32, 16\): gguf: .*llama model"):
        check(model, parse_variant("gguf"), "mine")
    check(model, parse_variant("gguf:pure=true"), "mine")


def test_files_are_not_made_of_calibrated_weights() -> None:
    with pytest.raises(UserError, match="cannot be chained with a calibrated one"):
        parse_variant("gptq+gguf")
    assert len(parse_variant("bf16+gguf")) == 2
