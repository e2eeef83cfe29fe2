"""The grammar of specs: what is written is read back, today's short spellings too."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillknows import specs
from stillknows.errors import UserError
from stillknows.kinds import Kind
from stillknows.registry import bind, bind_all
from stillknows.specs import Call
from stillknows.unlearning import method
from stillknows.variants.variant import expand

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z_0-9]{0,5}", fullmatch=True)
VALUES = st.one_of(st.text(max_size=12), st.text('ab =,:+|()[]"\\', max_size=12), NAMES)


@st.composite
def calls(draw: st.DrawFn, values: st.SearchStrategy[str] = VALUES) -> Call:
    options = draw(st.lists(NAMES, max_size=3, unique=True))
    keys = [*([""] if draw(st.booleans()) else []), *options]
    return Call(draw(NAMES), tuple((key, draw(values)) for key in keys))


NESTED = calls(st.one_of(VALUES, calls().map(Call.nested), st.lists(calls(), min_size=1).map(
    lambda found: f"[{', '.join(call.nested() for call in found)}]"
)))  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(NESTED)
def test_a_call_is_read_as_it_was_written(call: Call) -> None:
    assert specs.parse(str(call)) == call
    assert specs.parse(call.bracketed()) == call
    assert specs.parse(call.nested()) == call


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(NESTED, min_size=1, max_size=2), min_size=1, max_size=3), st.booleans())
def test_a_list_of_chains_is_read_as_it_was_written(chains: list[list[Call]], brackets: bool) -> None:
    text = ", ".join(" + ".join(map(str, chain)) for chain in chains)
    found = specs.listed(f"[{text}]" if brackets else text)
    assert [[specs.parse(call) for call in specs.chained(chain)] for chain in found] == chains


@settings(max_examples=60, deadline=None)
@given(st.lists(calls(), min_size=1, max_size=3))
def test_alternatives_are_read_as_they_were_written(found: list[Call]) -> None:
    texts = [call.nested() for call in found]
    assert [specs.parse(text) for text in specs.alternatives("|".join(texts))] == found
    assert [specs.parse(text) for text in specs.alternatives(f"[{', '.join(texts)}]")] == found


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        call = specs.parse(text)
    except UserError:
        return
    assert specs.parse(str(call)) == call or not re.fullmatch(specs.NAME, call.name)


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("rtn", Call("rtn")),
        ("rtn()", Call("rtn")),
        ("rtn:", Call("rtn")),
        ("rtn(bits=3, group=64)", Call("rtn", (("bits", "3"), ("group", "64")))),
        ("rtn:bits=3:group=64", Call("rtn", (("bits", "3"), ("group", "64")))),
        ("rtn:bits=3,group=64", Call("rtn", (("bits", "3"), ("group", "64")))),
        ("tofu:forget10", Call("tofu", (("", "forget10"),))),
        ("tofu(forget10)", Call("tofu", (("", "forget10"),))),
        ("jsonl:forget=a.jsonl,retain=C:/b, c", Call("jsonl", (("forget", "a.jsonl"), ("retain", "C:/b, c")))),
        ("only:names=*.mlp.[a-c]*", Call("only", (("names", "*.mlp.[a-c]*"),))),
        ("jsonl:forget=a (1.jsonl", Call("jsonl", (("forget", "a (1.jsonl"),))),
        ('guard(says="No, not this: a=b")', Call("guard", (("says", "No, not this: a=b"),))),
        ("ste(formats=[nf4, rtn(bits=3, group=64)])", Call("ste", (("formats", "[nf4, rtn(bits=3, group=64)]"),))),
    ],
)  # fmt: skip
def test_spellings(text: str, call: Call) -> None:
    assert specs.parse(text) == call


@pytest.mark.parametrize(
    ("text", "spelling"),
    [
        ("rtn(bits=3, group=64)", "rtn:bits=3:group=64"),
        ("rtn:bits=3,group=64", "rtn:bits=3:group=64"),
        ("gguf(Q4_K_M)", "gguf:Q4_K_M"),
        ("ste(formats=[nf4, rtn(bits=3)])", "ste:formats=[nf4, rtn(bits=3)]"),
        ('guard(says="No, a=b")', 'guard(says="No, a=b")'),
    ],
)
def test_there_is_one_canonical_spelling(text: str, spelling: str) -> None:
    assert str(specs.parse(text)) == spelling


def test_a_list_gives_options_to_what_stands_before_them() -> None:
    found = ("full", "rtn:bits=3:group=64", "bf16+rtn:bits=4")
    assert specs.spelled("full, rtn:bits=3, group=64,bf16 + rtn(bits=4),full") == found


def test_lists_are_given_as_text_or_one_by_one() -> None:
    found = ("full", "rtn:bits=3:group=64", "bf16+rtn:bits=4")
    assert specs.spelled(["full", "rtn(bits=3, group=64)", "bf16 + rtn(bits=4)", "full"]) == found
    assert specs.spelled(found) == specs.spelled(", ".join(found)) == found
    assert specs.spelled("") == specs.spelled(" ") == specs.spelled([]) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("full,group=64", "full,group=64: group=64 belongs to nothing\n  write full(group=64)"),
        ("rtn(bits=3", "rtn(bits=3: the bracket after rtn does not close at the end\n  rtn(option=value, …)"),
        ("rtn(bits=3)4", "rtn(bits=3)4: the bracket after rtn does not close at the end"),
        ("rtn(bits=3)(group=4)", "the bracket after rtn does not close at the end"),
    ],
)
def test_what_cannot_be_read_says_what_to_type(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        specs.parse(text)


# What plug-ins make of it

STORED = [  # a spec and its identity as caches and run records hold it: neither may change
    ("transform", "rtn:bits=3:group=64", "rtn@1:bits=3:grid=restricted:group=64:symmetric=True"),
    ("transform", "rtn:bits=3,group=64", "rtn@1:bits=3:grid=restricted:group=64:symmetric=True"),
    ("transform", "gguf:Q4_K_M", "gguf@1:file=Q4_K_M:pure=False"),
    (
        "transform",
        "gptq:calibration=forget",
        "gptq@2:bits=4:calibration=forget:damp=0.01:grid=full:group=128:order=magnitude:symmetric=True",
    ),
    ("transform", "nf4:double=true", "nf4@2:double=True"),
    ("metric", "rouge_l:score=fmeasure", "rouge_l@1:score=fmeasure:stemmer=True"),
    ("metric", "min_k:0.2", "min_k@1:k=0.2"),
    (
        "metric",
        "privleak:auc_retrain=0.5",
        "privleak@1:auc_retrain=0.5:holdouts=privleak_holdout:k=0.4:members=privleak_forget",
    ),
    ("step", "ste", "ste@1:formats=nf4"),
    ("step", "ste:formats=nf4|fp4", "ste@1:formats=nf4|fp4"),
    ("step", "ste:formats=bf16+nf4|gguf:Q4_K_M", "ste@1:formats=bf16+nf4|gguf:Q4_K_M"),
    ("edit", "floor:format=gguf:Q4_0:share=0.2", "floor@1:bins=1.0:format=gguf:Q4_0:share=0.2"),
    ("recipe", "robust:formats=nf4", "robust@1:alpha=1.0:beta=0.1:floor=0.95:formats=nf4:rho=0.01"),
    ("recipe", "robust", "robust@1:alpha=1.0:beta=0.1:floor=0.95:formats=nf4|fp4:rho=0.01"),
    ("step", "only:names=*.mlp.*|*[0-3].q_proj", "only@1:names=*.mlp.*|*[0-3].q_proj"),
    ("transform", "guard:says=No, not this.:threshold=0.5", "guard@1:says=No, not this.:threshold=0.5"),
    (
        "benchmark",
        "jsonl:forget=a.jsonl,retain=C:/b c.jsonl",
        "jsonl@1:forget=a.jsonl:neighbour=:refusals=:retain=C:/b c.jsonl:template=Question: {prompt}\nAnswer:",
    ),
    (
        "benchmark",
        "rwku:Prince Bo, Duke of Ren,data=x",
        "rwku@1:data=x:model=llama3:persons=5:retain=others:target=Prince Bo, Duke of Ren:template={prompt}",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "spec", "identity"), STORED)
def test_identities_in_caches_and_records_stay(kind: Kind, spec: str, identity: str) -> None:
    assert bind(kind, spec).identity == identity


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("transform", "rtn(bits=3, group=64)", "rtn:bits=3:group=64"),
        ("step", "ste(formats=[nf4, fp4])", "ste:formats=nf4|fp4"),
        ("step", "ste:formats=nf4, fp4", "ste:formats=nf4|fp4"),
        ("step", "ste(formats=[nf4,rtn:bits=3])", "ste(formats=[ nf4, rtn(bits=3) ])"),
        ("edit", "floor(format=gguf(Q4_0))", "floor:format=gguf:Q4_0"),
    ],
)
def test_two_spellings_of_one_thing_are_one(kind: Kind, first: str, second: str) -> None:
    assert bind(kind, first).identity == bind(kind, second).identity


def test_options_of_what_an_option_names_reach_it() -> None:
    parts = method.parse("ga + ste(formats=[nf4, rtn(bits=3, group=64)]) + robust(formats=[bf16+nf4])").parts
    named = [part.options["formats"] for part in parts if part.plugin.name == "ste"]
    assert named == ["[nf4, rtn(bits=3, group=64)]", "bf16+nf4"]
    assert specs.alternatives(named[0]) == ["nf4", "rtn(bits=3, group=64)"]
    assert list(bind_all("metric", "membership(attacks=[loss, min_k(k=0.2)])")) == [
        "membership:attacks=[loss, min_k(k=0.2)]"
    ]


def test_a_list_of_variants_means_what_it_says() -> None:
    assert list(expand("full,rtn:bits=3,group=64")[1]) == ["full", "rtn:bits=3:group=64"]
    assert list(expand("full, bf16 + rtn(bits=3, group=64)")[1]) == ["full", "bf16+rtn:bits=3:group=64"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "ga + ste:formats=bf16+nf4",
            "nf4 is a format: write ste(formats=[bf16+nf4]) for one after the other, or ste(formats=[bf16, nf4])",
        ),
        ("ga + ste:formats=rtn:bits=3", "options of what formats names stand in brackets: ste(formats=rtn(bits=3))"),
        ("ga + ste:formats=nf5", "no format named 'nf5'; did you mean 'nf4'?"),
        ("npo + floor:format=rtn(bitz=3)", "no option 'bitz' of rtn; did you mean 'bits'?"),
    ],
)
def test_a_method_says_how_formats_are_named_in_it(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        method.parse(spec)
