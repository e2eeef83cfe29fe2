"""Variants: what a chain does to a model and to a question, what it is called, and what a list of them stands for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from stillknows import defaults, registry
from stillknows.errors import UserError
from stillknows.registry import bind
from stillknows.store import digest
from stillknows.types import Benchmark, Decoding, Example, Split
from stillknows.variants import compress
from stillknows.variants.variant import Variant, expand, parse_variant

TEMPLATE = "Question: {prompt}\nAnswer:"
SPLIT = Split(
    "forget",
    "forget",
    tuple(Example(q, q, "Paris", f"fact {i}") for i, q in enumerate(("where is Ada?", "who is Bela?", "what is red?"))),
)
BENCHMARK = Benchmark("mine", (SPLIT,), TEMPLATE)
FORMATS = list(defaults.DEPLOYED)


@pytest.mark.parametrize(
    ("variants", "expected", "named"),
    [
        ("deployed", FORMATS, []),
        (" deployed , int4", [*FORMATS, "int4"], ["int4"]),
        ("int4,deployed", ["full", "int4", *FORMATS[1:]], ["int4"]),
        ("nf4,deployed,deployed,nf4", ["full", "nf4", *(f for f in FORMATS[1:] if f != "nf4")], ["nf4"]),
        ("bf16,deployed,full", FORMATS, ["bf16", "full"]),
        ("int4,bf16", ["int4", "bf16"], ["int4", "bf16"]),
    ],
)
def test_deployed_stands_for_its_formats(variants: str, expected: list[str], named: list[str]) -> None:
    found_named, chains = expand(variants)
    assert list(chains) == expected
    assert found_named == set(named)


def test_the_default_is_a_plan_that_begins_with_the_usual_formats() -> None:
    """Nothing of it was named: what a model does not allow is left out instead of being refused."""
    named, found = expand(defaults.VARIANTS)
    assert (named, list(found)[: len(defaults.USUAL)]) == (frozenset(), [*defaults.USUAL])
    assert {variant.role for variant in found.values()} == {"deployment", "attack"}


def test_a_list_without_variants_is_refused() -> None:
    for given in ("", []):
        with pytest.raises(UserError, match="no variant is named\n  name one in `variants`, such as full"):
            expand(given)


def test_a_format_in_other_words_is_not_measured_twice() -> None:
    _, chains = expand("deployed,gguf,rtn:group=128:grid=full,awq:clip=false")
    missing = {"gguf:Q4_K_M", "rtn:grid=full"}
    assert list(chains) == [
        *(name for name in FORMATS if name not in missing),
        *("gguf", "rtn:group=128:grid=full", "awq:clip=false"),
    ]


def test_every_deployed_format_is_another() -> None:
    chains = [parse_variant(spec) for spec in defaults.DEPLOYED]
    assert len({tuple(chain.identity) for chain in chains}) == len(defaults.DEPLOYED) == 19


@pytest.mark.parametrize("variants", ["deployd", "bf16+deployed", "deployed,"])
def test_the_word_stands_alone_in_a_list(variants: str) -> None:
    with pytest.raises(UserError, match="no transform named"):
        expand(variants)


@pytest.mark.parametrize(("word", "meant"), [("relern", "relearn"), ("frames", "frame"), ("int44", "int4")])
def test_a_misspelt_variant_is_told_the_nearest_format_or_attack(word: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"no transform named '{word}'; did you mean '{meant}'\\?"):
        expand(f"full,{word}(x=1)+int8")


def test_a_list_with_the_default_and_more_names_what_is_more() -> None:
    named, found = expand([defaults.VARIANTS, "relearn"])
    assert named == {"relearn"}
    assert named < set(found)


# One variant


def test_a_variant_knows_its_parts() -> None:
    variant = parse_variant("bf16+relearn(steps=5)+int8+frame")
    assert variant.spec == "bf16+relearn:steps=5+int8+frame"
    assert [link.spec for link in variant.chain] == ["bf16", "int8"]
    assert (variant.role, variant.is_plain, variant.defended, variant.ids_NL) == ("attack", False, True, None)
    plain = parse_variant("bf16+int8")
    assert (plain.role, plain.is_plain, plain.teaches, plain.defences) == ("deployment", True, False, [])
    other = variant.with_formats(compress.parse_variant("full+nf4"))
    assert other.spec == "full+relearn:steps=5+nf4+frame"


def test_equal_variants_have_one_identity_and_calibration_belongs_to_it() -> None:
    assert parse_variant("rtn:bits=4+bf16").identity == parse_variant("rtn + bf16").identity
    assert parse_variant("rtn+bf16").identity != parse_variant("bf16+rtn").identity
    variant, ids_NL = parse_variant("gptq"), torch.arange(6).reshape(2, 3)
    with_text = variant._replace(ids_NL=ids_NL)
    assert with_text.identity == [*variant.identity, digest([[0, 1, 2], [3, 4, 5]])]
    assert with_text.identity != variant._replace(ids_NL=ids_NL + 1).identity


@pytest.mark.parametrize(
    ("spec", "changing", "asking"),
    [
        ("full", "", []),
        ("int8+nf4", "", []),
        ("noise", "", ["attack"]),
        ("noise:scale=0", "", ["attack"]),
        ("relearn", "", ["attack", "taught all but 1 of 2"]),
        ("relearn:data=retain", "", ["attack"]),
        ("rtt:fold=2", "", ["attack", "taught all but 2 of 5"]),
        ("relearn:steps=0", "", ["attack"]),
        ("frame+int8", "frame", ["attack"]),
        ("int8+frame+relearn", "frame", ["attack", "taught all but 1 of 2"]),
        ("fewshot:n=0+frame", "frame", ["attack"]),
        ("thrust", "thrust", []),
    ],
)
def test_variants_that_ask_the_same_say_so(spec: str, changing: str, asking: list[str]) -> None:
    own = [bind("transform", changing).identity] if changing else []
    assert parse_variant(spec).asking == "+".join([*asking[:1], *own, *asking[1:]])


def test_questions_are_reworded_by_one_attack_after_the_other() -> None:
    assert parse_variant("int8").worded(SPLIT, BENCHMARK) == {"": SPLIT}
    both = parse_variant("frame:style=no_mark+int8+frame:style=upper").worded(SPLIT, BENCHMARK)
    assert {name: split.examples[1].prompt for name, split in both.items()} == {"no_mark upper": "WHO IS BELA"}
    every = parse_variant("frame:style=no_mark+frame").worded(SPLIT, BENCHMARK)
    assert all(name.startswith("no_mark ") for name in every)
    assert len(every) > 5


def test_a_split_is_worded_by_its_own_template_before_the_benchmarks() -> None:
    link = bind("transform", "frame")
    given = replace(SPLIT, template="Q: {prompt}\nA:")
    for split, template in ((SPLIT, TEMPLATE), (given, "Q: {prompt}\nA:")):
        expected = {name: found for name, found in link(split=split, template=template).items() if found.examples}
        assert parse_variant("frame").worded(split, BENCHMARK) == expected


def test_an_attack_without_a_question_to_change_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def strange(split: Split) -> dict[str, Split]:
        return {"kept": split, "empty": replace(split, examples=())}

    link = replace(bind("transform", "hint").plugin, name="strange", function=strange, budget=None)
    variant = Variant((registry.Bound(link, {}, "strange"),))
    assert list(variant.worded(SPLIT, BENCHMARK)) == ["kept"]
    with pytest.raises(UserError) as told:
        variant.worded(replace(SPLIT, examples=()), BENCHMARK)
    assert str(told.value) == "strange changes no question of the forget split\n  leave it out"


def test_what_is_taught_is_asked_by_attacks_that_do_not_teach() -> None:
    taught = parse_variant("relearn").taught_facts([SPLIT, SPLIT])
    assert taught == {"fact 0", "fact 2"}
    asked = parse_variant("relearn").worded(SPLIT, BENCHMARK, taught)
    assert [e.fact for e in asked[""].examples] == ["fact 1"]
    for spec in ("noise", "relearn:steps=0", "int8"):
        assert parse_variant(spec).worded(SPLIT, BENCHMARK, taught) == {"": SPLIT}
    with pytest.raises(UserError) as told:
        parse_variant("relearn").worded(SPLIT, BENCHMARK, [f"fact {i}" for i in range(3)])
    assert str(told.value) == "every fact of the forget split is taught and cannot be asked\n  give more facts"


def test_answers_are_drawn_as_the_last_attack_on_decoding_says() -> None:
    usual = Decoding(new_tokens=3)
    assert parse_variant("int8+relearn+frame").decoding(usual) == usual
    found = parse_variant("sample(n=7)+int8+sample(n=9, temperature=0.5)").decoding(usual)
    assert (found.samples, found.temperature, found.new_tokens) == (9, 0.5, 3)


@pytest.mark.parametrize(
    ("spec", "gates"),
    [
        ("int8", ("usual",)),
        ("frame", ("usual",)),
        ("choice", ("multiple_choice",)),
        ("choice+frame", ("multiple_choice",)),
        ("frame+true_false", ("multiple_choice",)),
        ("sample", ("leak_at_k:k=20",)),  # as answers are drawn anyway: judged by sampling all the same
        ("sample(n=7)", ("leak_at_k:k=7",)),
        ("sample(n=0)", ("usual",)),
        ("choice+sample(n=7)", ("leak_at_k:k=7",)),
        ("context", ()),
        ("context+sample(n=7)", ()),
        ("context:k=0", ("usual",)),
    ],
)
def test_what_a_variant_is_judged_by(spec: str, gates: tuple[str, ...]) -> None:
    assert parse_variant(spec).gates(("usual",)) == gates


def test_defences_that_need_other_models_stand_in_no_variant() -> None:
    with pytest.raises(UserError) as told:
        parse_variant("int8+offset")
    assert str(told.value).splitlines() == [
        "offset needs more than the model that it stands beside",
        "  save it with `stillknows defend`, and audit that file",
    ]
    with pytest.raises(UserError, match=r"gguf\+relearn\+gptq: a file format cannot be chained with a calibrated one"):
        parse_variant("gguf+relearn+gptq")
    assert [link.spec for link in parse_variant("thrust+icul+frame").defences] == ["thrust", "icul"]


@pytest.mark.parametrize("needed", ["unlearned", "reference"])
def test_a_link_that_needs_another_model_stands_in_no_variant(needed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    functions: dict[str, Any] = {"unlearned": lambda model, unlearned: model, "reference": lambda reference: reference}
    function = functions[needed]
    plugin = registry.Plugin("transform", "strange", function, "this test", 1, role="defence", level="logits")
    monkeypatch.setattr("stillknows.variants.variant.bind", lambda kind, spec: registry.Bound(plugin, {}, spec))
    with pytest.raises(UserError, match="strange needs more than the model"):
        parse_variant("strange")


# What is done to a model


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what was done to a model, in order; the links are "shifted", "watched" and "served"."""
    done: list[str] = []
    made = registry.Plugin("transform", "", print, "this test", 1, role="attack")

    def shifted(model: nn.Module, taught: list[Any]) -> None:
        done.append(f"shifted by {len(taught)}")
        with torch.no_grad():
            next(iter(model.parameters())).add_(1)

    @contextlib.contextmanager
    def watched(model: nn.Module) -> Iterator[None]:
        done.append("watched")
        yield
        done.append("let go")

    def served(model: nn.Module) -> nn.Module:
        done.append("served")
        return nn.Sequential(model)

    plugins = {f.__name__: replace(made, name=f.__name__, function=f) for f in (shifted, watched, served)}
    levels: dict[str, Any] = {"shifted": "weights", "watched": "activations", "served": "logits"}
    links = {name: registry.Bound(replace(p, level=levels[name]), {}, name) for name, p in plugins.items()}
    bound = bind
    monkeypatch.setattr("stillknows.variants.variant.bind", lambda kind, spec: links.get(spec) or bound(kind, spec))
    return done


def test_a_model_is_changed_in_the_written_order_and_is_as_before_afterwards(model: Any, stages: list[str]) -> None:
    before = {name: p.clone() for name, p in model.state_dict().items()}
    first = next(iter(before))
    chain = parse_variant("shifted+watched+int8+served+frame+shifted")
    with chain.applied(model, lambda link, need: ["a", "b"]) as answering:
        assert isinstance(answering, nn.Sequential)
        assert answering[0] is model
        assert torch.equal(model.state_dict()[first], before[first] + 1 + 1)
        name = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(model.state_dict()[name], compress.quantize(before[name], compress.parse_variant("int8"))[0])
        assert stages == ["shifted by 2", "watched", "served", "shifted by 2"]
    assert stages[-1] == "let go"
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    with parse_variant("shifted+frame").applied(model, lambda link, need: []) as answering:
        assert answering is model
    assert stages[-1] == "shifted by 0"


def test_neighbouring_formats_are_one_chain_and_calibration_reaches_them(
    model: Any, stages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chains: list[Any] = []

    @contextlib.contextmanager
    def compressed(found: nn.Module, chain: compress.Chain, ids_NL: Any) -> Iterator[None]:
        assert found is model
        chains.append((type(chain), [link.spec for link in chain], ids_NL))
        yield

    monkeypatch.setattr(compress, "compressed", compressed)
    ids_NL: Any = 7
    with parse_variant("bf16+gptq+shifted+int8")._replace(ids_NL=ids_NL).applied(model, lambda link, need: []):
        assert chains == [(tuple, ["bf16", "gptq"], 7), (tuple, ["int8"], 7)]
