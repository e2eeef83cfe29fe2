"""Formats fit the model: a group that does not divide a layer's inputs gives way to the largest usual one that does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from stillknows import defaults
from stillknows.analysis import diagnose
from stillknows.errors import UserError
from stillknows.registry import plugins
from stillknows.variants import fitting
from stillknows.variants.compress import parse_variant
from stillknows.variants.variant import parse_variant as parse

# hidden and intermediate size, of published models and of none; and the largest usual group that divides both
WIDTHS = {
    (576, 1536): 64,  # SmolLM2-135M
    (960, 2560): 64,  # SmolLM2-360M
    (896, 4864): 128,  # Qwen2.5-0.5B
    (48, 96): 16,
    (80, 160): 16,
    (96, 192): 32,
    (320, 1000): None,
    (100, 200): None,
    (144, 256): 16,
    (1024, 2816): 128,
    (1024, 1376): 32,
}
SPECS = {
    *defaults.USUAL,
    *defaults.FORMATS.split(","),
    *defaults.DEPLOYED,
    *plugins("transform", "deployment"),
}
GROUPED = sorted(spec for spec in SPECS - {"kv"} if parse_variant(spec)[0].options.get("group", 0) > 0)


def bare(hidden: int, intermediate: int) -> Any:
    """A model without numbers."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def save(folder: Path, tokenizer: Any, hidden: int, seed: int) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "vocab_size": 32, "num_hidden_layers": 1}
        config = LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=32, initializer_range=0.2)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("widths", WIDTHS)
def test_a_format_takes_the_largest_usual_group_and_is_called_after_it(widths: tuple[int, int]) -> None:
    model, group = bare(*widths), WIDTHS[widths]
    for spec in GROUPED:
        chain = parse_variant(spec)
        own = chain[0].options["group"]
        if group is None:
            with pytest.raises(UserError, match=rf"mine: layer .*groups of {own} do not divide"):
                fitting.fitted(model, chain, "mine", exact=False)
            continue
        name, found = fitting.fitted(model, chain, spec, exact=False)
        assert found[0].options == chain[0].options | {"group": min(group, own)}
        assert parse_variant(name)[0].identity == found[0].identity  # it can be typed again
        assert (name == spec) == (group >= own)


@pytest.mark.parametrize("widths", [(48, 96), (100, 200)])
def test_formats_without_groups_stay_as_they_are(widths: tuple[int, int]) -> None:
    model = bare(*widths)
    for spec in sorted(SPECS - {"kv", *GROUPED}):
        chain = parse_variant(spec)
        try:
            assert fitting.fitted(model, chain, spec, exact=False) == (spec, chain)
        except UserError:  # such as blocks of 32
            with pytest.raises(UserError):
                fitting.check(model, chain, spec)


@pytest.mark.parametrize("widths", WIDTHS)
def test_the_default_method_of_texts_rounds_to_formats_that_fit_every_model(widths: tuple[int, int]) -> None:
    assert defaults.TEXT_METHOD == "robust"
    for spec in plugins("recipe")["robust"].options["formats"].split("|"):
        fitting.check(bare(*widths), parse_variant(spec), spec)


def test_a_chain_fits_as_a_whole() -> None:
    name, _ = fitting.fitted(bare(96, 192), parse_variant("bf16+int4+kv:bits=4"), "mine", exact=False)
    assert name == "bf16+int4:group=16+kv:bits=4:group=16"  # heads of 48 numbers


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("rtn:bits=3", "use rtn:bits=3:group=64"),
        ("rtn:group=128,bits=3", "use rtn:bits=3:group=64"),
        ("gptq:symmetric=false", "use gptq:group=64:symmetric=false"),
        ("rtn:group=100", "use rtn:group=64"),
        ("bf16+int4:group=128", "use bf16+int4:group=64"),
        ("rtn:group=128+int4", "use rtn:group=64+int4:group=64"),
    ],
)
def test_what_is_meant_as_it_is_is_refused_with_what_to_type(spec: str, hint: str) -> None:
    with pytest.raises(UserError, match=rf"mine: layer .*do not divide 576 inputs\n  {re.escape(hint)}$") as refused:
        fitting.fitted(bare(576, 1536), parse_variant(spec), "mine", exact=True)
    fitting.check(bare(576, 1536), parse_variant(str(refused.value).rpartition("use ")[2]), "typed")


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("bf16+int4", "bf16+int4:group=64"),
        ("rtn:bits=8:group=64+int4", "rtn:bits=8:group=64+int4:group=64"),
        ("kv:bits=4:group=0+int4", "kv:bits=4:group=0+int4:group=64"),
    ],
)
def test_options_of_one_link_do_not_fix_another(spec: str, found: str) -> None:
    assert fitting.fitted(bare(576, 1536), parse_variant(spec), spec, exact=True)[0] == found


def test_a_format_in_a_chain_with_an_attack_that_has_options_fits_the_model(
    cli: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    original, subject = (save(tmp_path / str(seed), tokenizer, 48, seed) for seed in (0, 1))
    for name in ("f", "r"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": f"who is {name}", "answer": "Ada"}))
    benchmark = f"jsonl:forget={tmp_path / 'f.jsonl'},retain={tmp_path / 'r.jsonl'}"
    models = (subject, "--original", original, "--benchmark", benchmark)
    ran = cli("audit", *models, "--variants", "full,int4+sample(n=2)", "--out", tmp_path / "audit", "--json")
    assert ran.code == 5, ran.err
    assert json.loads(ran.out)["variants"] == ["full", "int4:group=16+sample:n=2"]


@pytest.mark.parametrize(("hidden", "variants"), [(48, "int4:group=16"), (100, None)])
def test_the_default_audit_and_diagnosis_fit_the_model(
    hidden: int, variants: str | None, cli: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    original, subject = (save(tmp_path / str(seed), tokenizer, hidden, seed) for seed in (0, 1))
    for name, answer in (("f", "Ada"), ("r", "Rome")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": f"who is {name}", "answer": answer}))
    benchmark = f"jsonl:forget={tmp_path / 'f.jsonl'},retain={tmp_path / 'r.jsonl'}"
    models = (subject, "--original", original, "--benchmark", benchmark)
    ran = cli("audit", *models, "--out", tmp_path / "audit", "--json")
    assert ran.code == 5, ran.err
    report = json.loads(ran.out)
    usual = ["full", "bf16", "int8", "nf4", "fp4", *([variants] if variants else [])]
    formats = [name for name in report["variants"] if parse(name).role == "deployment"]
    assert formats == usual
    told = f"int4 becomes {variants}" if variants else "int4 is left out: layer"
    assert told in ran.err
    left_out = [left["variant"] for left in report["left_out"] if parse(left["variant"]).role == "deployment"]
    assert left_out == ([] if variants else ["int4"])
    formats = [form["format"] for form in diagnose.diagnose(str(original), str(subject))["formats"]]
    assert formats == ["int8", "nf4", "fp4", *([variants] if variants else []), "rtn:group=0"]
    if variants:
        typed = cli("audit", *models, "--variants", f"full,{variants}", "--out", tmp_path / "again", "--json")
        [first, again] = (cells(json.loads(out), variants) for out in (ran.out, typed.out))
        assert first == again
    refused = cli("audit", *models, "--variants", "full,int4:group=128", "--out", tmp_path / "refused")
    assert refused.code == 2
    assert ("use int4:group=16" in refused.err) == bool(variants)


def cells(report: Any, variant: str) -> list[Any]:
    return [cell for cell in report["subjects"][0]["cells"] if cell["variant"] == variant and "value" in cell]
