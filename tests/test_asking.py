"""All models of an audit read the same tokens, or the difference is named and nothing is decided."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM

from stillknows import observations
from stillknows.model.ref import ModelRef

Case = Callable[..., Any]
FORGET = {"question": "where is Ada", "answer": "Paris", "paraphrase": "in Paris"}
RETAIN = {"question": "where is Bela", "answer": "Rome and the river"}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | changes))


def edit_tokenizer(folder: Path, **parts: Any) -> None:
    """Exchange parts of a saved tokenizer; its vocabulary stays."""
    path = str(folder / "tokenizer.json")
    found = Tokenizer.from_file(path)
    for name, part in parts.items():
        setattr(found, name, part)
    found.save(path)


@pytest.fixture
def data(tmp_path: Path) -> str:
    forget, retain = tmp_path / "f.jsonl", tmp_path / "r.jsonl"
    forget.write_text(json.dumps(FORGET) + "\n")
    retain.write_text(json.dumps(RETAIN) + "\n")
    return f"jsonl:forget={forget},retain={retain}"


@pytest.fixture
def models(save_model: Case) -> Any:
    """Return the folders of an original and a subject with the same weights, all with a chat template."""
    original, subject = save_model("original"), save_model("subject")
    for folder in (original, subject):
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    return original, subject


@pytest.fixture
def run(cli: Case, data: str, tmp_path: Path) -> Case:
    """Return run(original, subject, *options): an audit into the folder "audit"."""

    def call(original: Path, subject: Path, *options: object) -> Any:
        fixed = ["--original", original, "--benchmark", data, "--variants", "full", "--out", tmp_path / "audit"]
        return cli("audit", subject, *fixed, *options)

    return call


def cells(tmp_path: Path, name: str) -> dict[tuple[str, str], float]:
    report = json.loads((tmp_path / "audit" / "report.json").read_text())
    found = next(subject for subject in report["subjects"] if subject["name"] == name)["cells"]
    return {(c["split"], c["metric"]): c["value"] for c in found if "value" in c}


def reasons(tmp_path: Path) -> str:
    report = json.loads((tmp_path / "audit" / "report.json").read_text())
    return "\n".join(f["detail"] or "" for f in report["subjects"][0]["findings"])


def of_answer(folder: Path) -> None:
    edit_tokenizer(folder, normalizer=normalizers.Replace("Paris", "red"))


def of_name(folder: Path) -> None:
    edit_tokenizer(folder, normalizer=normalizers.Replace("Ada", "Bela"))


def of_paraphrase(folder: Path) -> None:
    edit_tokenizer(folder, normalizer=normalizers.Replace("in Paris", "in Rome"))


def of_retain(folder: Path) -> None:
    edit_tokenizer(folder, normalizer=normalizers.Replace(Regex("Rome.*"), "dog"))


def to_nothing(folder: Path) -> None:
    edit_tokenizer(folder, normalizer=normalizers.Replace("Paris", ""))


def in_pieces(folder: Path) -> None:
    edit_tokenizer(folder, pre_tokenizer=pre_tokenizers.Split("a", "isolated"))


def with_opening(folder: Path) -> None:
    edit_tokenizer(folder, post_processor=processors.TemplateProcessing("<s> $A", None, [("<s>", 1)]))


def with_another_end(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token=".")


def without_an_end(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token=None)


DIFFERENT = {
    of_answer: "item 'f-1' of the forget split",
    of_name: "item 'f-1' of the forget split",
    of_paraphrase: "item 'f-1' of the forget split",
    of_retain: "item 'r-1' of the retain split",
    to_nothing: "item 'f-1'",
    in_pieces: "item 'f-1' of the forget split",
    with_opening: "item 'f-1' of the forget split otherwise",
    with_another_end: "on ., not </s>",
    without_an_end: "no end-of-sequence token",
}


@pytest.mark.parametrize("role", ["subject", "control"])
@pytest.mark.parametrize("change", DIFFERENT, ids=lambda f: f.__name__)
def test_a_tokenizer_that_reads_an_item_otherwise_is_named(
    change: Case, role: str, models: Any, save_model: Case, run: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it has the same vocabulary, and whichever model it is: before weights are loaded, nothing is written."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    original, subject = models
    control = save_model("control", seed=1)
    changed = subject if role == "subject" else control
    change(changed)
    ran = run(original, subject, "--control", control)
    assert (ran.code, ran.out) == (2, "")
    assert DIFFERENT[change] in ran.err
    assert str(changed) in ran.err
    assert "tokenizer.json" in ran.err
    assert not (tmp_path / "audit" / "report.json").exists()


SETTINGS: dict[str, Any] = {
    "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "rms_norm_eps": 1e-3,
    "hidden_act": "relu",
    "is_causal": False,
    "model_type": "mistral",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_by_which_a_model_computes_otherwise_is_named(
    name: str, models: Any, run: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same weights: long questions could be read through a window, or rotated otherwise."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    original, subject = models
    edit_json(subject / "config.json", **{name: SETTINGS[name]}, architectures=None)
    ran = run(original, subject)
    assert (ran.code, ran.out) == (2, "")
    assert f"{subject} computes otherwise than {original}: its config.json says {name} = " in ran.err
    assert "the original's config.json" in ran.err
    assert not (tmp_path / "audit" / "report.json").exists()


def test_rotations_that_depend_on_the_longest_text_make_it_a_setting(models: Any, run: Case) -> None:
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}}
    for folder, longest in zip(models, (64, 32), strict=True):
        edit_json(folder / "config.json", **dynamic, max_position_embeddings=longest)
    ran = run(*models)
    assert ran.code == 2
    assert "max_position_embeddings = 32, not 64" in ran.err


@pytest.mark.parametrize("ends", ["abc", {"a": 1}, [2, 1.5], [True]])
def test_end_tokens_that_are_no_numbers_are_named(ends: Any, models: Any, run: Case) -> None:
    edit_json(models[1] / "generation_config.json", eos_token_id=ends)
    ran = run(*models)
    assert ran.code == 2
    assert "generation_config.json" in ran.err
    assert "eos_token_id" in ran.err


def test_a_part_of_a_configuration_that_is_no_configuration_is_named(models: Any, run: Case) -> None:
    edit_json(models[1] / "config.json", text_config={"a": "b"})
    ran = run(*models)
    assert ran.code == 2
    assert "config.json cannot be used" in ran.err


def other_words(template: str) -> str:
    return template.replace("assistant :{%", "assistant : in{%")


def names_left_out(template: str) -> str:
    return template.replace("m.content", "m.content | replace('Ada', 'Bela')")


@pytest.mark.parametrize("change", [other_words, names_left_out])
def test_a_chat_template_that_writes_an_item_otherwise_is_named(
    change: Case, models: Any, run: Case, tmp_path: Path
) -> None:
    original, subject = models
    (subject / "chat_template.jinja").write_text(change(TEMPLATE))
    ran = run(original, subject, "--template", "chat")
    assert ran.code == 2
    assert "item 'f-1' of the forget split otherwise" in ran.err
    assert not (tmp_path / "audit" / "report.json").exists()


@pytest.mark.parametrize(
    ("template", "words"), [(None, "no chat template"), ("{{ messages }}", "another chat template")]
)
def test_a_chat_template_that_was_not_measured_is_told(
    template: str | None, words: str, models: Any, run: Case, tmp_path: Path
) -> None:
    original, subject = models
    (subject / "chat_template.jinja").unlink()
    if template:
        (subject / "chat_template.jinja").write_text(template)
    assert run(original, subject).code in (3, 4, 5)
    assert f"it comes with {words}" in reasons(tmp_path)
    assert "what users meet in a chat was not measured" in reasons(tmp_path)


def test_equal_models_are_not_told_of(models: Any, run: Case, tmp_path: Path) -> None:
    run(*models)
    assert "template" not in reasons(tmp_path)
    assert "end generations" not in reasons(tmp_path)


def resaved(folder: Path) -> None:
    """As by another version of transformers."""
    changes = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True}
    edit_json(folder / "tokenizer_config.json", **changes)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')


def longer(folder: Path) -> None:
    edit_json(folder / "config.json", max_position_embeddings=128)


def shorter(folder: Path) -> None:
    edit_json(folder / "config.json", max_position_embeddings=32)


def ended_at_once(folder: Path) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=[2, *range(3, 31)])


def trained_otherwise(folder: Path) -> None:
    """What trainers leave in a configuration, some of it unknown to transformers."""
    edit_json(
        folder / "config.json",
        **{"use_cache": False, "attention_dropout": 0.1, "initializer_range": 0.5, "pretraining_tp": 2},
        **{"_name_or_path": "org/model", "dtype": "bfloat16", "trainer_version": "2026.1", "pad_token_id": 0},
    )


def decoded_otherwise(folder: Path) -> None:
    edit_tokenizer(folder, decoder=decoders.Sequence([decoders.Replace(Regex(".*"), "dog"), decoders.Fuse()]))


ALIKE = (resaved, longer, shorter, trained_otherwise, ended_at_once, decoded_otherwise)


@pytest.mark.parametrize("change", ALIKE, ids=lambda f: f.__name__)
def test_what_changes_no_weight_changes_no_number(change: Case, models: Any, run: Case, tmp_path: Path) -> None:
    """Generations are ended and decoded as the original's, whatever the subject's own files say."""
    original, subject = models
    change(subject)
    assert run(original, subject, "--metrics", "answer_probability,extraction_strength,rouge_l").code in (3, 4, 5)
    found, expected = cells(tmp_path, "subject"), cells(tmp_path, "original")
    shared = [place for place in expected if place in found and "." not in place[1]]
    assert ("forget", "rouge_l") in shared
    assert {place: found[place] for place in shared} == {place: expected[place] for place in shared}
    text = [generations(tmp_path, name) for name in ("original", "subject")]
    assert text[0] == text[1]
    assert ("end generations at other tokens" in reasons(tmp_path)) == (change is ended_at_once)


def generations(tmp_path: Path, name: str) -> Any:
    path = tmp_path / "audit" / "observations" / name / "full" / "forget.npz"
    seen = observations.load_observations(path)
    assert seen is not None
    assert seen.generations
    return seen.generations


def test_items_are_cut_to_what_every_model_reads(models: Any, run: Case, tmp_path: Path) -> None:
    original, subject = models
    long = {"question": "where is Ada", "answer": "red " * 70}
    (tmp_path / "f.jsonl").write_text(json.dumps(long) + "\n")
    longer(subject)
    assert run(original, subject, "--long-items", "truncate").code in (3, 4, 5)
    assert cells(tmp_path, "subject")["forget", "answer_probability"] == pytest.approx(
        cells(tmp_path, "original")["forget", "answer_probability"], rel=1e-6
    )


def test_another_reader_of_the_original_is_another_audit(models: Any, run: Case, tmp_path: Path) -> None:
    """What was decoded by one tokenizer is not taken for what another would have decoded."""
    original, subject = models
    run(original, subject)
    before = generations(tmp_path, "subject")
    decoded_otherwise(original)
    run(original, subject, "--overwrite")
    assert generations(tmp_path, "subject") != before


def test_the_end_tokens_of_a_folder(models: Any) -> None:
    folder = models[0]
    assert ModelRef.open(str(folder)).end_tokens == {2}
    edit_json(folder / "generation_config.json", eos_token_id=[2, 5])
    assert ModelRef.open(str(folder)).end_tokens == {2, 5}
    (folder / "generation_config.json").unlink()
    assert ModelRef.open(str(folder)).end_tokens == {2}


def test_what_a_suppression_writes_is_read_as_the_original_reads_it(
    models: Any, cli: Case, run: Case, data: str, tmp_path: Path
) -> None:
    """Here its tokenizer rewrites no item, but the words that the guard puts in the place of a question."""
    original, subject = models
    edit_tokenizer(subject, normalizer=normalizers.Replace("cat", "dog"))
    file = tmp_path / "guarded.json"
    options = ["--method", "guard:says=cat", "--benchmark", data, "--out", file]
    assert cli("defend", subject, *options).code == 0
    ran = run(original, file)
    assert ran.code == 2
    assert "item 'f-1' of the forget split otherwise" in ran.err
