"""One door to a model: its files are read once, loaded as asked for, and refused when they were touched."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stillknows.auditing.audit import audit
from stillknows.auditing.plan import AuditConfig
from stillknows.errors import UserError
from stillknows.experiments import tiny_models
from stillknows.model import configuration, finding, loading, modelfiles
from stillknows.model.packed import gguf
from stillknows.model.ref import LoadOptions, ModelRef
from stillknows.model.target import LocalTarget
from stillknows.types import Benchmark, Example, Split
from stillknows.variants import export

Save = Callable[..., Path]
EXAMPLES = tuple(Example(str(i), f"where is {name}", "Paris", name) for i, name in enumerate(("Ada", "Bela", "dog")))
BENCHMARK = Benchmark(
    "b", (Split("forget", "forget", EXAMPLES[:2]), Split("retain", "retain", EXAMPLES[2:])), "{prompt}"
)
OPENED: Counter[str] | None = None  # how often each file was opened, while somebody counts


def count_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if OPENED is not None and event == "open":
        OPENED[str(arguments[0])] += 1


sys.addaudithook(count_opened)  # there is no way to remove one


@pytest.fixture
def opened() -> Iterator[Counter[str]]:
    """Count how often each file is opened in a test."""
    global OPENED
    OPENED = Counter()
    yield OPENED
    OPENED = None


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count calls of what reads a model's files, by name."""
    found: Counter[str] = Counter()
    places = {
        finding: ("readable_files", "require_weights"),
        configuration: ("read", "skeleton", "end_tokens"),
        loading: ("tokenizer", "plain_model", "model_of"),
        modelfiles.ModelFiles: ("fingerprint",),
        ModelRef: ("open", "check", "load"),
        gguf.GgufFile: ("__init__", "config", "tokenizer", "weights"),
    }
    for place, names in places.items():
        for name in names:
            original = getattr(place, name)

            def counted(
                *given: Any, _name: str = f"{place.__name__}.{name}", _original: Any = original, **how: Any
            ) -> Any:
                found[_name.removeprefix("stillknows.model.")] += 1
                return _original(*given, **how)

            monkeypatch.setattr(place, name, staticmethod(counted) if name == "open" else counted)
    return found


def test_an_audit_reads_each_models_files_once(
    save_model: Save, tmp_path: Path, entered: Counter[str], opened: Counter[str]
) -> None:
    """Three models, three variants, two splits: each model is opened, checked and loaded once, all else is read once.

    config.json is opened four times: by stillknows, by transformers, and for fingerprints before and after loading.
    """
    folders = [save_model(name, seed=i) for i, name in enumerate(("original", "control", "subject"))]
    original, control, subject = map(str, folders)
    opened.clear()
    audit(AuditConfig(original, {"s": subject}, BENCHMARK, (control,), "full,int8,bf16"), tmp_path / "out")
    once = {"ModelRef.open", "ModelRef.check", "ModelRef.load", "finding.readable_files", "finding.require_weights"}
    once |= {"configuration.read", "configuration.skeleton", "configuration.end_tokens"}
    once |= {"loading.tokenizer", "loading.plain_model"}
    assert entered == dict.fromkeys(once, 3) | {"ModelFiles.fingerprint": 6}
    assert {opened[str(folder / "config.json")] for folder in folders} == {4}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A plain model, and two .gguf files of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("packed") / "model"
    tokenizer = tiny_models.subword_tokenizer([e.prompt for e in EXAMPLES], 300)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, eos_token_id=1, **sizes)  # type: ignore[reportArgumentType]
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    records = {
        kind: export.export(export.ExportConfig(str(folder), f"gguf:{kind}"), folder.parent / kind)
        for kind in ("Q8_0", "Q5_1")
    }
    return [folder, *(folder.parent / kind / record["file"] for kind, record in records.items())]


def test_an_audit_opens_each_gguf_file_once(packed: list[Path], tmp_path: Path, entered: Counter[str]) -> None:
    """Two of them, so that keeping the latest is not enough; one makes the configuration, tokenizer and weights."""
    original, *files = map(str, packed)
    audit(AuditConfig(original, dict(zip("ab", files, strict=True)), BENCHMARK, variants="full,int8"), tmp_path / "out")
    counts = {name: count for name, count in entered.items() if name.startswith("GgufFile")}
    assert counts == {f"GgufFile.{name}": 2 for name in ("__init__", "config", "tokenizer", "weights")}


def test_weights_are_float32_unless_they_are_wanted_as_stored(save_model: Save) -> None:
    folder = save_model("model")
    plain = ModelRef.open(str(folder)).load()
    plain.model.to(torch.bfloat16).save_pretrained(folder)
    found = {how: ModelRef.open(str(folder), LoadOptions(dtype=how)).load().model for how in ("float32", "stored")}  # type: ignore[reportArgumentType]
    assert {p.dtype for p in found["float32"].parameters()} == {torch.float32}
    assert {p.dtype for p in found["stored"].parameters()} == {torch.bfloat16}
    for one, other in zip(*(model.parameters() for model in found.values()), strict=True):
        assert torch.equal(one, other.float())


def test_packed_weights_are_float32_in_any_case(packed: list[Path]) -> None:
    ref = ModelRef.open(str(packed[1]), LoadOptions(dtype="stored"), packed=True)
    assert {p.dtype for p in ref.load().model.parameters()} == {torch.float32}


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def replace_by_another(path: Path) -> None:
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").replace(path)


@pytest.mark.parametrize("change", [touch, replace_by_another])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_what_was_touched_since_it_was_opened_is_refused(change: Any, name: str, save_model: Save) -> None:
    """Its configuration and tokenizer may have been read before, and its fingerprint taken after."""
    ref = ModelRef.open(str(save_model("model")))
    assert ref.tokenizer
    change(ref.folder / name)
    with pytest.raises(UserError, match=r"model changed while it was read\n.*run it again"):
        ref.load()


def test_models_that_were_loaded_share_nothing_with_their_ref(save_model: Save) -> None:
    """A model is trained, untied and saved; what its ref holds is read by others."""
    ref = ModelRef.open(str(save_model("model", "llama_tied")))
    before, skeleton = ref.configuration.to_dict(), ref.skeleton
    model = ref.load().model
    model.config.eos_token_id = 9
    model.config.tie_word_embeddings = False
    assert model.config is not ref.configuration
    assert (ref.configuration.to_dict(), ref.skeleton) == (before, skeleton)
    assert all(p.is_meta for p in ref.skeleton.parameters())


def test_a_target_says_what_it_can_do_and_does_it(model: Any, tokenizer: Any, make_items: Any) -> None:
    target, items = LocalTarget("m", model, tokenizer), make_items([2, 5])
    assert target.capabilities == {"score", "generate", "gradients"}
    assert [len(target.score(items)[i].log_probs) for i in (0, 1)] == [2, 5]
    assert len(target.generate(items, [3, 3])) == 2
    assert target.generate(items, [9, 9], 1.0, seed=1) != target.generate(items, [9, 9], 1.0, seed=2)
    assert (target.gradient_norms(items) > 0).all()
