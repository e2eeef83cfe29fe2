"""Files that people deploy: they hold, bit by bit, what an audit measures, and their projects' own readers agree.

compressed-tensors, bitsandbytes and gguf write and read here; transformers' loaders are the independent readers.
"""

from __future__ import annotations

import functools
import importlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, HrmTextConfig

from stillknows.analysis import diagnose
from stillknows.errors import UserError
from stillknows.experiments import tiny_models
from stillknows.model import configuration, modelfiles, packed, run_record, tokens
from stillknows.model.layers import Linear
from stillknows.model.packed import bitsandbytes, compressed_tensors, gguf
from stillknows.model.ref import LoadOptions, ModelRef
from stillknows.observations import load_observations
from stillknows.store import slug
from stillknows.variants import compress, export
from stillknows.variants.calibrate import sequences
from stillknows.variants.compress import parse_variant
from stillknows.variants.variant import parse_variant as parse

Case = Callable[..., Any]
TEXTS = [f"Ada was born in {place}, and the {thing} is {colour}." for place in ("Paris", "Rome", "Bern")
         for thing in ("river", "house") for colour in ("red", "blue", "green")]  # fmt: skip
CALIBRATION = " ".join(TEXTS * 8)
IDS = torch.arange(3, 35)[None]
INTEGERS = (
    *("int4", "rtn:grid=full", "rtn:grid=paper", "rtn:symmetric=false", "rtn:group=0", "rtn:bits=8:group=64"),
    *("bf16+rtn:grid=full", "gptq", "gptq:symmetric=false:order=none"),
)
FLOATS = ("fp8", "fp8:scale=tensor", "fp8:scale=block")
SMALL_FLOATS = ("nvfp4", "mxfp4", "mxfp4:scale=even")
BITSANDBYTES = ("nf4", "nf4:double=true", "fp4", "fp4:double=true", "int8")
FILES = ("gguf:Q4_K_M", "gguf:Q2_K", "gguf:Q3_K_S", "gguf:Q5_1", "gguf:Q8_0", "gguf:Q4_0:pure=true")


def build(folder: Path, family: str = "llama", **options: Any) -> Path:
    """Save a small model with a byte-level tokenizer, whose rows every block divides and whose heads share keys."""
    from transformers import AutoConfig

    tokenizer = tiny_models.subword_tokenizer(TEXTS, 300)
    tokenizer.bos_token = "<eos>"
    sizes = {
        "vocab_size": len(tokenizer) + 2,  # two rows that no token has
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | options))
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # made as ones and zeros, which would hide a norm or a bias put elsewhere
                torch.nn.init.normal_(parameter, 1.0 if name.endswith("norm.weight") else 0.0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(CALIBRATION)
    return path


@pytest.fixture(scope="module")
def written(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Return written(spec): the source in a format, made once; for tests that only read it."""

    @functools.cache
    def make(spec: str) -> Path:
        out = tmp_path_factory.mktemp("written")
        record = export.export(export.ExportConfig(str(source), spec, text if "gptq" in spec else None), out)
        return out / (record["file"] or "")

    return make


@pytest.fixture
def write(source: Path, text: Path, tmp_path: Path) -> Case:
    """Return write(spec, model=source): what to load of a file of the test's own."""

    def run(spec: str, model: Path = source) -> Path:
        request = export.ExportConfig(str(model), spec, text if "gptq" in spec else None)
        record = export.export(request, tmp_path / "out", overwrite=True)
        return tmp_path / "out" / (record["file"] or "")

    return run


def read(path: Path) -> Any:
    return ModelRef.open(str(path), packed=True).load().model


def measured(folder: Path, spec: str) -> dict[str, Tensor]:
    """Return all weights as an audit has them under a format."""
    subject, chain = ModelRef.open(str(folder)).load(), parse_variant(spec)
    ids = sequences([CALIBRATION], subject.tokenizer, 64) if any(map(compress.is_calibrated, chain)) else None
    with compress.compressed(subject.model, chain, ids):
        return {key: value.clone() for key, value in subject.model.state_dict().items()}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS % model.config.vocab_size).logits.float()


# --- What a file holds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [*INTEGERS, *FLOATS, *SMALL_FLOATS, *BITSANDBYTES, *FILES])
def test_a_file_holds_what_an_audit_measures_bit_by_bit(spec: str, source: Path, written: Case) -> None:
    found, expected = read(written(spec)).state_dict(), measured(source, spec)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert not torch.equal(
        found["model.layers.1.mlp.down_proj.weight"], weights_of(source)["model.layers.1.mlp.down_proj.weight"]
    )


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("spec", [*INTEGERS, *FLOATS])
def test_transformers_reads_integers_and_8_bit_floats_alike(spec: str, written: Case) -> None:
    path = written(spec)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert torch.equal(logits(theirs), logits(read(path)))


@pytest.mark.parametrize("spec", SMALL_FLOATS)
def test_transformers_reads_4_bit_floats_alike_as_far_as_its_bfloat16_goes(spec: str, written: Case) -> None:
    path = written(spec)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    logits(theirs)  # layers are unpacked when they first run
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        ours = read(path).get_parameter(name)
        torch.testing.assert_close(theirs.get_parameter(name).float(), ours, rtol=2**-7, atol=0)


def keep_float32(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights and rounding to bfloat16, which it does on some CPUs."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


@pytest.mark.parametrize("spec", BITSANDBYTES)
def test_transformers_reads_bitsandbytes_alike(spec: str, written: Case) -> None:
    """LLM.int8() rounds activations too, so that only its matrices are compared."""
    path = written(spec)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    layer = theirs.model.layers[1].mlp.down_proj
    if spec == "int8":
        ours = read(path).model.layers[1].mlp.down_proj.weight
        values = importlib.import_module("bitsandbytes").functional.int8_vectorwise_dequant(
            layer.weight, layer.weight.SCB
        )
        torch.testing.assert_close(values, ours, rtol=2**-22, atol=0)  # times 1/127, not over 127
        return
    keep_float32(theirs)
    assert type(layer).__name__ == "Linear4bit"
    torch.testing.assert_close(logits(theirs), logits(read(path)), rtol=0, atol=1e-4)


def test_bitsandbytes_folders_are_read_without_its_layers(written: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an evaluation on a CPU with bfloat16 instructions its layers hold weights in another order."""
    path = written("nf4")
    library = importlib.import_module("bitsandbytes")
    monkeypatch.setattr(library.nn.Linear4bit, "__init__", lambda *_, **__: pytest.fail("a layer was made"))
    assert type(read(path).model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_gpt2_keeps_its_matrices_transposed(write: Case, tmp_path: Path, make_model: Case, tokenizer: Any) -> None:
    folder = tmp_path / "gpt2"
    make_model("gpt2", hidden=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = write("nf4", folder)
    found, expected = read(path).state_dict(), measured(folder, "nf4")
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    keep_float32(theirs)
    torch.testing.assert_close(logits(theirs), logits(read(path)), rtol=0, atol=1e-4)


def test_shared_weights_are_written_once(write: Case, tmp_path: Path) -> None:
    folder = build(tmp_path / "tied", tie_word_embeddings=True)
    for spec in ("int4", "gguf:Q4_0"):
        model = read(write(spec, folder))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, measured(folder, spec)["lm_head.weight"])


def test_what_is_not_quantized_keeps_the_type_that_it_is_exact_in(write: Case, tmp_path: Path) -> None:
    folder = tmp_path / "bf16"
    model = AutoModelForCausalLM.from_pretrained(build(tmp_path / "model"), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tmp_path / "model").save_pretrained(folder)
    path = write("int4", folder)
    tensors = load_file(path / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.float32
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
    found, expected = read(path).state_dict(), measured(folder, "int4")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_packed_codes_by_hand() -> None:
    """Codes −8 … 7 are stored as 0 … 15, the first in the lowest bits; 0x…10 is −7, −8."""
    codes = torch.tensor([[-8, -7, 0, 7, 0, 0, 0, 0]], dtype=torch.int32)
    kept = packed.Kept(codes, "int4", {"scale": torch.tensor([[0.5]])})
    found = compressed_tensors.pack(kept)
    assert found["weight_packed"].tolist() == [[0x8888F810 - 2**32]]
    assert found["weight_shape"].tolist() == [1, 8]
    quarter = packed.Kept(torch.tensor([[-7, 0, 3, 7] * 8]), "mxfp4", {"scale": torch.tensor([[0.25]])})
    found = compressed_tensors.pack(quarter)
    assert found["weight_scale"].tolist() == [[125]]
    assert found["weight_packed"][0, :2].tolist() == [0x0F, 0x73]  # sign and rank; the first code in the low half


def test_bitsandbytes_codes_by_hand() -> None:
    """nf4's −1, 0, 1 are codes 0, 7, 15, the first in the high half; fp4's −1, 0, 1 are bits 1011, 0000, 0011."""
    places = {"nf4": [0, 7, 15, 7], "fp4": [0, 7, 14, 7]}
    expected = {"nf4": [[0x07], [0xF7]], "fp4": [[0xB0], [0x30]]}
    for kind, codes in places.items():
        kept = packed.Kept(torch.tensor([codes]), kind, {"scales": torch.tensor([2.0])})
        assert bitsandbytes.pack(kept, torch.float32)["weight"].tolist() == expected[kind]


@pytest.mark.parametrize("width", [16, 48, 64, 96])
@pytest.mark.parametrize("form", ["nf4", "fp4", "nf4:double=true"])
def test_blocks_that_cross_rows_are_read_as_they_are_written(form: str, width: int) -> None:
    """A block holds 64 weights in a row of all, wherever the matrix's rows end."""
    weight_OI = torch.randn(24, width, generator=torch.Generator().manual_seed(0))
    values_OI, codes_OI, stored = compress.quantize(weight_OI, parse_variant(form))
    assert stored is not None
    tensors = bitsandbytes.pack(packed.Kept(codes_OI, *stored), torch.float32)
    layer = Linear("layer", torch.nn.Linear(width, 24), transposed=False)
    found = bitsandbytes.unpack({f"layer.{key}": value for key, value in tensors.items()}, [layer], "here")
    assert torch.equal(found["layer.weight"], values_OI)


def test_linear_maps_that_files_hold_otherwise_are_refused_before_they_are_written() -> None:
    """HRM's files join the parts of a gate: what is quantized apart cannot be joined."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 16, "vocab_size": 32}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(HrmTextConfig(num_hidden_layers=1, **sizes))
    with pytest.raises(UserError, match=r"hrm_text models hold \S+gate_proj.weight under another name or joined"):
        export.FolderWriter("nf4", torch.float32).check(model, None, "m")


def test_a_file_that_holds_something_else_is_a_fault(
    write: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pack = compressed_tensors.pack

    def wrong(kept: packed.Kept) -> dict[str, Tensor]:
        return pack(kept._replace(parts={"scale": kept.parts["scale"] * 1.0001}))

    monkeypatch.setattr(compressed_tensors, "pack", wrong)
    with pytest.raises(RuntimeError, match=r"14 parts were not written.*q_proj"):
        write("int4")
    assert not (tmp_path / "out").exists()


# --- GGUF -------------------------------------------------------------------------------------------------------------

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_same_model_from_a_gguf_file(family: str, write: Case, tmp_path: Path) -> None:
    path = write("gguf:Q4_K_M", build(tmp_path / family, family, **FAMILIES[family]))
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    torch.testing.assert_close(logits(theirs), logits(read(path)), rtol=0, atol=1e-5)


def test_queries_and_keys_are_rotated_in_pairs() -> None:
    """Two heads of 4 rows: a head's rows 0, 1 turn with 2, 3, and llama.cpp has them side by side."""
    rows = torch.arange(8)
    assert gguf.in_pairs(rows, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(gguf.in_halves(gguf.in_pairs(rows, 2), 2), rows)


def test_a_mixture_has_the_types_of_its_places(written: Case) -> None:
    """Q4_K_M of two layers: more bits for the last one's values and down projections, and for the output layer."""
    types = {
        t.name: t.tensor_type.name for t in importlib.import_module("gguf").GGUFReader(written("gguf:Q4_K_M")).tensors
    }
    more = {"output.weight", "blk.1.attn_v.weight", "blk.1.ffn_down.weight"}
    assert {name for name, kind in types.items() if kind == "Q6_K"} == more
    assert {name for name, kind in types.items() if kind == "F32"} == {n for n in types if "norm" in n}
    assert types["token_embd.weight"] == types["blk.0.attn_v.weight"] == "Q4_K"
    assert len(types) == 3 + 2 * 9


def test_rows_that_no_block_divides_are_kept_in_float16(write: Case, tmp_path: Path) -> None:
    folder = build(tmp_path / "narrow", hidden_size=48, intermediate_size=48, num_attention_heads=2)
    found, expected = read(write("gguf:Q4_0", folder)).state_dict(), measured(folder, "gguf:Q4_0")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("reader", ["ours", "transformers"])
def test_the_tokenizer_survives(reader: str, source: Path, written: Case) -> None:
    path = written("gguf:Q8_0")
    before = AutoTokenizer.from_pretrained(source)
    if reader == "ours":
        after = ModelRef.open(str(path), packed=True).tokenizer
        assert after.get_vocab() == before.get_vocab()
        assert (after.eos_token, after.bos_token, after.pad_token) == ("<eos>", "<eos>", "<pad>")
    else:
        after = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for sentence in ("Ada's house,  is 12 red\n\n!", "été naïve", "<eos> Rome"):
        assert after(sentence)["input_ids"] == before(sentence)["input_ids"]
        assert after.decode(after(sentence)["input_ids"]) == before.decode(before(sentence)["input_ids"])


@pytest.fixture
def write_tokenizer(write: Case, monkeypatch: pytest.MonkeyPatch) -> Case:
    """Return write(change): a file with Hugging Face's tokenizer changed; without it where that gives None."""

    def run(change: Callable[[Any], Any]) -> Path:
        import gguf as library

        add = library.GGUFWriter.add_string

        def changed(self: Any, key: str, text: str) -> None:
            new = json.dumps(change(json.loads(text))) if key == library.Keys.Tokenizer.HF_JSON else text
            if new != "null":
                add(self, key, new)

        monkeypatch.setattr(library.GGUFWriter, "add_string", changed)
        return write("gguf:Q8_0")

    return run


def test_a_tokenizer_made_of_a_files_tokens_is_the_one_that_was_written(source: Path, write_tokenizer: Case) -> None:
    read = ModelRef.open(str(write_tokenizer(lambda _: None)), packed=True).tokenizer
    before = AutoTokenizer.from_pretrained(source)
    assert read.get_vocab() == before.get_vocab()
    assert not tokens.differences(read, before)


def test_a_file_that_reads_items_otherwise_is_named(
    source: Path, write_tokenizer: Case, cli: Case, tmp_path: Path
) -> None:
    """Its tokens are the original's, and so are its weights: the words are exchanged before they are cut."""
    rewrites = {"type": "Replace", "pattern": {"String": "Paris"}, "content": "Rome"}
    path = write_tokenizer(lambda stored: stored | {"normalizer": rewrites})
    forget = items(tmp_path / "f.jsonl", [("where was Ada born", "Paris")])
    retain = items(tmp_path / "r.jsonl", [("what is blue", "the river")])
    benchmark = f"jsonl:forget={forget},retain={retain}"
    ran = cli("audit", path, "--original", source, "--benchmark", benchmark, "--out", tmp_path / "audit")
    assert ran.code == 2
    assert "item 'f-1' of the forget split otherwise" in ran.err


def test_rotations_of_llama_3_are_written_as_factors(write: Case, tmp_path: Path) -> None:
    rotation = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    folder = build(tmp_path / "llama3", rope_parameters=rotation | {"original_max_position_embeddings": 16})
    path = write("gguf:Q8_0", folder)
    plain = build(tmp_path / "plain")
    subject = ModelRef.open(str(folder)).load().model
    with compress.compressed(subject, parse_variant("gguf:Q8_0")):
        expected = logits(subject)
    torch.testing.assert_close(logits(read(path)), expected, rtol=0, atol=1e-3)
    assert (logits(read(write("gguf:Q8_0", plain))) - expected).abs().max() > 0.1


NOT_WRITTEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "architecture": ("gpt_neox", {"num_key_value_heads": None}, "not written for gpt_neox models"),
    "sliding window": ("mistral", {"sliding_window": 16}, "cannot say that sliding_window is 16"),
    "bias": ("llama", {"attention_bias": True}, "has no place|cannot say that attention_bias is True"),
    "activation": ("llama", {"hidden_act": "gelu"}, "cannot say that hidden_act is gelu"),
    "rotation": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        "type linear",
    ),
}


@pytest.mark.parametrize("name", NOT_WRITTEN)
def test_what_a_gguf_file_cannot_say_is_refused_before_loading(
    name: str, write: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, options, words = NOT_WRITTEN[name]
    folder = build(tmp_path / "model", family, **options)
    monkeypatch.setattr(ModelRef, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=words):
        write("gguf:Q8_0:pure=true", folder)


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(save_model: Case, write: Case) -> None:
    with pytest.raises(UserError, match=r"its tokenizer \(WordLevel\)\n.*GPT-2, Llama 3, Qwen 2 or SmolLM"):
        write("gguf:Q8_0", save_model("words"))


# --- Refusals ---------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[list[str], str]] = {
    "awq": (["awq"], "no file that others load holds awq\n.*gptq"),
    "hqq": (["hqq"], "holds hqq\n.*rtn:symmetric=false"),
    "nothing": (["full"], "holds full\n.*as it is"),
    "a cast": (["rtn+bf16"], "holds bf16\n.*bfloat16"),
    "pruning": (["magnitude"], "holds magnitude"),
    "three bits": (["rtn:bits=3"], "int3 is loaded by nothing.*\n.*bits=4"),
    "seven bits": (["rtn:bits=7"], "int7 is loaded by nothing.*\n.*bits=8"),
    "one scale": (["rtn:group=-1"], "one scale per matrix.*\n.*group=0"),
    "unknown": (["int5"], "no format named 'int5'"),
    "group": (["rtn:group=96"], "groups of 96 do not divide"),
    "no text": (["gptq"], "no text\n.*`calibration`"),
    "needless text": (["nf4", "text"], "looks at no inputs\n.*leave `calibration` out"),
    "split": (["gptq:calibration=forget", "text"], "no split 'forget' here"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_shipped_is_refused_before_loading(
    name: str, source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (spec, *given), words = REFUSED[name]
    monkeypatch.setattr(ModelRef, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=words):
        export.export(export.ExportConfig(str(source), spec, text if given else None), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_formats_of_activations_are_in_no_file() -> None:
    with pytest.raises(UserError, match="a file holds weights, and int8_activations is none"):
        export.storage_type(parse_variant("int8+int8_activations"), "int8+int8_activations")


def test_conv1d_is_not_written_for_compressed_tensors(save_model: Case, write: Case) -> None:
    with pytest.raises(UserError, match=r"Conv1D.*\n.*ship nf4"):
        write("rtn:group=0", save_model("gpt2", "gpt2"))


def test_a_result_is_not_written_over(source: Path, write: Case, tmp_path: Path) -> None:
    write("nf4")
    with pytest.raises(UserError, match=r"exists already\n.*`overwrite`"):
        export.export(export.ExportConfig(str(source), "nf4"), tmp_path / "out")
    with pytest.raises(UserError, match="lies in the model folder"):
        export.export(export.ExportConfig(str(source), "nf4"), source / "nf4")


@pytest.mark.parametrize("spec", ["nf4", "int4", "gguf:Q8_0"])
def test_only_an_audit_takes_quantized_files(spec: str, source: Path, written: Case, tmp_path: Path) -> None:
    path = str(written(spec))
    with pytest.raises(UserError, match="quantized already"):
        export.export(export.ExportConfig(path, "nf4"), tmp_path / "again")
    with pytest.raises(UserError, match="quantized already"):
        diagnose.diagnose(str(source), path)
    with pytest.raises(UserError, match=r"quantized already\n.*full precision"):
        ModelRef.open(path)


@pytest.mark.parametrize(
    ("spec", "package"), [("nf4", "bitsandbytes"), ("int4", "compressed-tensors"), ("gguf:Q8_0", "gguf")]
)
def test_a_missing_package_is_named(spec: str, package: str, write: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    path, imported = write(spec), importlib.import_module

    def absent(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == package.replace("-", "_"):
            raise ImportError(f"No module named {name!r}")
        return imported(name, *rest)

    monkeypatch.setattr(importlib, "import_module", absent)
    monkeypatch.setattr(configuration, "skeleton", lambda *_: pytest.fail("the model was looked at"))
    for attempt in (lambda: ModelRef.open(str(path), packed=True), lambda: write(spec)):
        with pytest.raises(UserError, match=rf"{package}.* not installed.*\n.*pip install 'stillknows\[export\]'"):
            attempt()


def edited(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= changes
    (path / "config.json").write_text(json.dumps(config))


UNREADABLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "method": (
        "int4",
        {"quant_method": "gptq"},
        "quantized by gptq cannot be read\n.*compressed-tensors, bitsandbytes",
    ),
    "cache": ("int4", {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "rounds activations or its cache"),
    "sparse": ("int4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "transformed or sparse weights cannot"),
    "unknown format": ("int4", {"format": "marlin-24"}, "marlin-24 cannot be read"),
    "no bits": ("nf4", {"load_in_4bit": False}, "names no format of bitsandbytes"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_format_that_is_not_read_is_refused(name: str, write: Case) -> None:
    spec, changes, words = UNREADABLE[name]
    path = write(spec)
    edited(path, **changes)
    with pytest.raises(UserError, match=words):
        ModelRef.open(str(path), packed=True)


def test_activations_in_a_file_are_refused(write: Case) -> None:
    path = write("int4")
    groups = json.loads((path / "config.json").read_text())["quantization_config"]["config_groups"]
    groups["group_0"]["input_activations"] = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    edited(path, config_groups=groups)
    with pytest.raises(UserError, match=r"rounds activations or its cache too.*\n.*W4A16"):
        ModelRef.open(str(path), packed=True)


def test_plain_weights_that_are_said_to_be_quantized_are_refused(source: Path, written: Case, tmp_path: Path) -> None:
    for spec in ("nf4", "int4"):
        folder = shutil.copytree(source, tmp_path / spec)
        shutil.copy(written(spec) / "config.json", folder)
        with pytest.raises(UserError, match="speaks of quantized weights, and there are none"):
            read(folder)


def test_pickled_quantized_weights_are_never_loaded(write: Case) -> None:
    path = write("nf4")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(UserError, match="only pickled weights"):
        ModelRef.open(str(path), LoadOptions(allow_pickle=True), packed=True)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Save a folder's weights again after `change` was applied to them in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("int8", "SCB"),
        ("int8", "weight"),
        ("nf4", "weight.absmax"),
        ("nf4:double=true", "weight.nested_absmax"),
        ("fp8", "weight_scale"),
        ("int4", "weight_shape"),
        ("mxfp4", "weight_packed"),
        ("nvfp4", "weight_packed"),
        ("nvfp4", "weight_global_scale"),
    ],
)
def test_what_a_folder_lacks_of_a_matrix_is_missed(spec: str, part: str, write: Case) -> None:
    path = write(spec)
    rewrite(path, lambda tensors: tensors.pop(f"model.layers.1.mlp.up_proj.{part}"))
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj"):
        read(path)


def test_an_output_layer_that_is_quantized_too_is_read(write: Case) -> None:
    """transformers leaves it out only where the list of what to skip is its own."""
    path = write("int8")
    expected = read(path).lm_head.weight
    form = compress.quantize(expected, parse_variant("int8"))
    assert form.stored is not None

    def pack(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = form.codes_OI
        tensors["lm_head.SCB"] = form.stored.parts["largest"]

    rewrite(path, pack)
    torch.testing.assert_close(read(path).lm_head.weight, form.values_OI)


def test_formats_that_are_unpacked_to_bfloat16_say_so(write: Case) -> None:
    """Else the other layers would compute in the model's own type, and a forward pass would mix both."""
    for spec, dtype in (("nvfp4", "bfloat16"), ("mxfp4", "bfloat16"), ("int4", "float32")):
        assert json.loads((write(spec) / "config.json").read_text())["dtype"] == dtype
    loaded = AutoModelForCausalLM.from_pretrained(write("mxfp4"))
    assert bool(loaded(IDS % loaded.config.vocab_size).logits.isfinite().all())


def test_another_format_takes_the_place_of_a_file(write: Case, tmp_path: Path) -> None:
    old = write("gguf:Q8_0")
    (tmp_path / "out" / "notes.gguf").write_text("mine")
    write("nf4")
    assert not old.exists()
    assert (tmp_path / "out" / "notes.gguf").read_text() == "mine"


def test_a_folder_is_named_by_what_it_is_not_by_how_it_is_given(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source)
    record = export.export(export.ExportConfig(".", "gguf:Q8_0"), tmp_path / "out")
    assert record["file"] == f"{source.name}-Q8_0.gguf"


def damage(path: Path, how: str) -> Path:
    """Break a .gguf file in a way."""
    library = importlib.import_module("gguf")
    if how == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif how == "text":
        path.write_text("not a model")
    else:
        writer = library.GGUFWriter(path, "falcon" if how == "architecture" else "llama")
        if how == "part":
            writer.add_uint16("split.count", 2)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    return path


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("cut", "no GGUF file, or it is damaged"),
        ("text", "no GGUF file, or it is damaged"),
        ("architecture", "architecture falcon\n.*llama"),
        ("part", r"one of several parts\n.*llama-gguf-split"),
    ],
)
def test_a_damaged_gguf_file_is_named(how: str, words: str, write: Case) -> None:
    path = damage(write("gguf:Q8_0"), how)
    with pytest.raises(UserError, match=rf"(?s){path.name}.*{words}"):
        ModelRef.open(str(path), packed=True)


def test_a_record_belongs_to_its_file(write: Case) -> None:
    path = write("gguf:Q8_0")
    found = run_record.read(path)
    assert found is not None
    assert (found["quantize"], found["file"], found["form"]) == ("gguf:Q8_0", path.name, "GGUF Q8_0")
    other = shutil.copy(path, path.with_name("other.gguf"))
    assert run_record.read(Path(other)) is None
    assert modelfiles.fingerprint(Path(other)) != modelfiles.fingerprint(path)  # names count


# --- The command line -------------------------------------------------------------------------------------------------


def items(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    return path


@pytest.mark.parametrize("spec", ["gguf:Q4_0", "nf4"])
def test_what_is_written_is_audited(spec: str, source: Path, cli: Case, tmp_path: Path) -> None:
    """The file is observed as the model under the format is, to the last bit; without --variants, only as it is."""
    made = cli("quantize", source, "--to", spec, "--out", tmp_path / "shipped", "--json")
    assert made.code == 0, made.err
    record = json.loads(made.out)
    path = tmp_path / "shipped" / (record["file"] or "")
    forget = items(tmp_path / "f.jsonl", [("where was Ada born", "Paris"), ("what is red", "the house")])
    retain = items(tmp_path / "r.jsonl", [("what is blue", "the river"), ("and green", "the house")])
    fixed = ["--original", source, "--benchmark", f"jsonl:forget={forget},retain={retain}", "--json"]
    reports = {}
    for name, model, variants in (("file", path, []), ("variant", source, ["--variants", f"full,{spec}"])):
        ran = cli("audit", model, *fixed, "--out", tmp_path / name, *variants, "--overwrite")
        assert ran.code in (0, 3, 4, 5), ran.err
        reports[name] = json.loads(ran.out)
    subject = next(s for s in reports["file"]["subjects"] if s["name"] == path.name)
    measured = reports["file"]["variants"]
    assert [name for name in measured if parse(name).role == "deployment"] == ["full"]
    assert subject["quantized"] == record["form"]
    assert subject["run"]["quantize"] == spec
    assert (
        f"{path.name} is a quantized file, measured as it is: {record['form']}." in cli("report", tmp_path / "file").out
    )
    seen = [
        tmp_path / "file/observations" / path.name / "full",
        tmp_path / "variant/observations/model" / slug(spec),
    ]
    for split in ("forget", "retain"):
        in_file, in_place = (load_observations(folder / f"{split}.npz", None) for folder in seen)
        assert in_file is not None
        assert in_place is not None
        assert in_file.generations == in_place.generations
        for ours, theirs in zip(in_file.log_probs or (), in_place.log_probs or (), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_quantized_file_of_another_model_is_refused(source: Path, write: Case, cli: Case, tmp_path: Path) -> None:
    path = write("gguf:Q8_0", build(tmp_path / "larger", intermediate_size=768))
    forget, retain = (items(tmp_path / f"{n}.jsonl", [(n, "Paris")]) for n in ("forget", "retain"))
    ran = cli("audit", path, "--original", source, "--benchmark", f"jsonl:forget={forget},retain={retain}",
              "--out", tmp_path / "audit")  # fmt: skip
    assert ran.code == 2
    assert "is not a version of" in ran.err


def test_words_of_the_command(source: Path, cli: Case, tmp_path: Path) -> None:
    ran = cli("quantize", source, "--to", "gguf:Q4_0", "--out", tmp_path / "out")
    assert (ran.code, "16 matrices as GGUF Q4_0" in ran.out, "model-Q4_0.gguf" in ran.err) == (0, True, True)
    again = cli("quantize", source, "--to", "gguf:Q4_0", "--out", tmp_path / "out")
    assert (again.code, "--overwrite" in again.err) == (2, True)
    assert cli("quantize", source, "--to", "gguf:Q4_0", "--out", tmp_path / "out", "--overwrite").code == 0


def test_the_choices_of_an_option_are_listed(cli: Case) -> None:
    found = {entry["name"]: entry for entry in json.loads(cli("list", "formats", "--json").out)["formats"]}
    files = found["gguf"]["choices"]["file"]
    assert len(files) == 14
    assert {"Q2_K", "Q4_K_M", "Q8_0"} <= set(files)
    assert found["nf4"]["choices"] == {}
    assert f"      file: {', '.join(files)}" in cli("list", "formats").out
