"""Files with quantized weights written as ordinary checkpoints, and models that Python packages ship."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import stillknows as sk
from stillknows.errors import UserError
from stillknows.experiments import tiny_models
from stillknows.model import fetching, run_record
from stillknows.model.fetching import Shipped
from stillknows.model.ref import LoadOptions, ModelRef

Case = Callable[..., Any]
HEADS = 4
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<turn>\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"  # noqa: E501


def build(folder: Path) -> Path:
    """Save a small Llama whose chat template ends a turn with another token than the end of a sequence."""
    tokenizer = tiny_models.subword_tokenizer(["Ada was born in Paris.", "Who was born in Rome?"], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})  # type: ignore[dict-item]
    tokenizer.chat_template = TEMPLATE
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .gguf file of that model with blocks of four bits."""
    folder = tmp_path_factory.mktemp("gguf")
    record = sk.quantize(build(folder / "model"), "gguf:Q4_1", out=folder / "file")
    return folder / "file" / record["file"]


@pytest.fixture(scope="module")
def imported(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported") / "plain"
    sk.import_model(file, out=folder)
    return folder


def dequantized(file: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file as gguf's own package reads it."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}


# --- What is written --------------------------------------------------------------------------------------------------


def test_the_weights_are_bit_by_bit_what_the_file_stands_for(file: Path, imported: Path) -> None:
    found, told = load_file(imported / "model.safetensors"), dequantized(file)
    assert {w.dtype for w in found.values()} == {torch.float32}
    plain = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
    plain |= {f"blk.{i}.ffn_{part}": f"model.layers.{i}.mlp.{part}_proj" for i in (0, 1) for part in ("up", "down")}
    for there, here in plain.items():
        assert np.array_equal(told[f"{there}.weight"], found[f"{here}.weight"].numpy()), here
    heads = told["blk.0.attn_q.weight"].reshape(HEADS, 8, 2, 64).swapaxes(1, 2).reshape(64, 64)  # pairs to halves
    assert np.array_equal(heads, found["model.layers.0.self_attn.q_proj.weight"].numpy())


def test_transformers_reads_the_same_weights_of_the_file_and_of_the_folder(file: Path, imported: Path) -> None:
    ours = AutoModelForCausalLM.from_pretrained(imported, dtype=torch.float32).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_bfloat16_weights_are_the_float32_ones_rounded(file: Path, imported: Path, tmp_path: Path) -> None:
    sk.import_model(file, out=tmp_path / "half", dtype="bfloat16")
    exact, half = (load_file(folder / "model.safetensors") for folder in (imported, tmp_path / "half"))
    assert all(torch.equal(half[key], exact[key].to(torch.bfloat16)) for key in exact)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_folder_is_an_ordinary_model_with_tokenizer_and_template(file: Path, imported: Path) -> None:
    config = json.loads((imported / "config.json").read_text())
    assert config.get("quantization_config") is None
    tokenizer, there = AutoTokenizer.from_pretrained(imported), ModelRef.open(str(file), packed=True).tokenizer
    assert tokenizer("Who was Ada?")["input_ids"] == there("Who was Ada?")["input_ids"]
    assert tokenizer.chat_template == TEMPLATE
    record = run_record.read(imported)
    assert record is not None
    assert (record["imported"], record["form"], record["dtype"]) == (file.name, "GGUF Q4_1", "float32")
    ModelRef.open(str(imported), LoadOptions()).load()


def test_the_token_that_ends_a_turn_ends_an_answer(imported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(imported)
    ends = GenerationConfig.from_pretrained(imported).eos_token_id
    assert ends == [tokenizer.convert_tokens_to_ids(token) for token in ("<eos>", "<turn>")]
    assert ModelRef.open(str(imported)).end_tokens == frozenset(ends)


def test_folders_with_quantized_weights_are_imported_too(imported: Path, tmp_path: Path) -> None:
    sk.quantize(imported, "nf4", out=tmp_path / "packed")
    sk.import_model(tmp_path / "packed", out=tmp_path / "plain")
    packed = ModelRef.open(str(tmp_path / "packed"), packed=True).load().model.state_dict()
    plain = ModelRef.open(str(tmp_path / "plain")).load().model.state_dict()
    assert all(torch.equal(packed[key], plain[key]) for key in packed)


# --- What is refused --------------------------------------------------------------------------------------------------


def test_a_plain_model_is_refused(imported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds plain weights already"):
        sk.import_model(imported, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_is_replaced_only_where_that_is_said(file: Path, tmp_path: Path) -> None:
    sk.import_model(file, out=tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        sk.import_model(file, out=tmp_path, dtype="bfloat16")
    assert (tmp_path / "model.safetensors").read_bytes() == before
    sk.import_model(file, out=tmp_path, dtype="bfloat16", overwrite=True)
    assert len((tmp_path / "model.safetensors").read_bytes()) < len(before)


def test_a_failure_while_writing_leaves_nothing(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no more")

    monkeypatch.setattr(run_record, "_require_written", fail)
    with pytest.raises(OSError, match="no more"):
        sk.import_model(file, out=tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.*"))


# --- Packages ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def shipped(file: Path, monkeypatch: pytest.MonkeyPatch) -> Shipped:
    """A package that ships the file, known under the name "small"; pip looks nowhere but where a test lets it."""
    content = file.read_bytes()
    known = Shipped("stillknows-small", "1.0", "small_model/m.gguf", len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(fetching.SHIPPED, "small", known)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return known


def pack(folder: Path, shipped: Shipped, content: bytes) -> Path:
    """Write a wheel as an index gives it; it depends on a package that there is not."""
    name = f"{shipped.package.replace('-', '_')}-{shipped.version}"
    info = f"{name}.dist-info"
    files = {
        shipped.file: content,
        "small_model/__init__.py": b"raise SystemExit('this was imported')",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {shipped.package}\nVersion: {shipped.version}\n"
        "Requires-Dist: stillknows-no-such-package\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"]).encode()
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        for path, data in files.items():
            wheel.writestr(path, data)
    return folder


def unpack(wheels: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay a wheel's files where Python looks for packages, as installing it does."""
    zipfile.ZipFile(next(wheels.glob("*.whl"))).extractall(site)
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()


def test_a_package_is_downloaded_alone_and_its_file_imported(
    file: Path, imported: Path, shipped: Shipped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Case
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(pack(tmp_path / "wheels", shipped, file.read_bytes())))
    ran = cli("fetch", "small", "--out", tmp_path / "plain", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["imported"] == "stillknows-small==1.0: small_model/m.gguf"
    ours, plain = (load_file(folder / "model.safetensors") for folder in (imported, tmp_path / "plain"))
    assert all(torch.equal(ours[key], plain[key]) for key in ours)


def test_an_installed_package_is_not_downloaded_and_never_imported(
    file: Path, shipped: Shipped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpack(pack(tmp_path / "wheels", shipped, file.read_bytes()), tmp_path / "site", monkeypatch)
    with fetching.located(shipped) as found:
        assert found == tmp_path / "site" / "small_model" / "m.gguf"
    assert "small_model" not in sys.modules


@pytest.mark.parametrize("installed", [False, True])
def test_another_content_is_refused_wherever_it_comes_from(
    installed: bool, file: Path, shipped: Shipped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = file.read_bytes()[:-1] + b"\x01"
    wheels = pack(tmp_path / "wheels", shipped, other)
    if installed:
        unpack(wheels, tmp_path / "site", monkeypatch)
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    with pytest.raises(UserError, match="its SHA-256 is another"):
        sk.fetch("small", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_wheel_is_refused(shipped: Shipped, tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"the wheel of stillknows-small==1\.0 is damaged"):
        fetching._unpacked(tmp_path / "a.whl", shipped)


def test_a_package_that_cannot_be_had_is_one_message(shipped: Shipped, tmp_path: Path, cli: Case) -> None:
    ran = cli("fetch", "small", "--out", tmp_path / "out")
    assert ran.code == 2
    assert "pip does not get stillknows-small==1.0: ERROR: No matching distribution" in ran.err
    assert "give m.gguf to `stillknows import`" in ran.err
    assert not (tmp_path / "out").exists()


def test_names_and_folders_are_checked_before_anything_is_downloaded(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'smollm2'"):
        sk.fetch("smollm", out=tmp_path / "out")
    sk.import_model(file, out=tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        sk.fetch("smollm2", out=tmp_path / "out")
