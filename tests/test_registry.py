"""A text names a function and its checked options; every plug-in says what it is and where it comes from."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

import pytest

from stillknows import registry
from stillknows.errors import UserError, did_you_mean
from stillknows.needs import NEEDS
from stillknows.registry import Kind, Limits, Plugin, bind, plugins, register

KINDS: tuple[Kind, ...] = get_args(Kind)
ALL = [plugin for kind in KINDS for plugin in plugins(kind).values()]


@pytest.fixture(autouse=True)
def sandbox() -> Iterator[None]:
    """Take away what a test registers."""
    before: dict[Kind, dict[str, Plugin]] = {kind: dict(known) for kind, known in registry._plugins.items()}
    yield
    for kind, known in before.items():
        registry._plugins[kind] = known


@pytest.fixture
def sample() -> Plugin:
    @register("metric", source="a paper", version=3)
    def sample_(
        hits: list[int],
        *,
        count: int = 1,
        rate: float = 0.5,
        name: str = "x",
        flag: bool = False,
        mode: Literal["low", "high"] = "low",
        limit: int | None = None,
    ) -> tuple[Any, ...]:
        """Return everything. Twice.

        More words.
        """
        return hits, count, rate, name, flag, mode, limit

    return plugins("metric")["sample"]


def test_a_plugin_is_its_signature(sample: Plugin) -> None:
    assert sample.name == "sample"
    assert (sample.source, sample.version) == ("a paper", 3)
    assert sample.needs == ("hits",)
    expected = {"count": 1, "rate": 0.5, "name": "x", "flag": False, "mode": "low", "limit": None}
    assert sample.options == expected
    assert list(sample.options) == list(expected)
    assert sample.summary == "Return everything. Twice."


@pytest.mark.parametrize(
    ("spec", "given"),
    [
        ("sample", {}),
        ("  sample ", {}),
        ("sample:", {}),
        ("sample:7", {"count": 7}),
        ("sample:7:flag=true", {"count": 7, "flag": True}),
        ("sample:count=2:rate=1e-3", {"count": 2, "rate": 1e-3}),
        ("sample:count=2,rate=3,flag=True", {"count": 2, "rate": 3.0, "flag": True}),
        ("sample:name=a:b", {"name": "a:b"}),
        ("sample:name=C:/data,x:flag=false", {"name": "C:/data,x", "flag": False}),
        ("sample:name=a=b", {"name": "a=b"}),
        ("sample:name=", {"name": ""}),
        ("sample:mode=high:limit=4", {"mode": "high", "limit": 4}),
        ("sample:limit=none", {"limit": None}),
        ("sample:count=-1", {"count": -1}),
    ],
)
@pytest.mark.usefixtures("sample")
def test_options_are_read(spec: str, given: dict[str, Any]) -> None:
    bound = bind("metric", spec)
    assert bound.options == bound.plugin.options | given
    assert {key: type(bound.options[key]) for key in given} == {key: type(value) for key, value in given.items()}
    assert bound(hits=[1]) == ([1], *bound.options.values())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("smaple", "no metric named 'smaple'; did you mean 'sample'?"),
        ("", "no metric named ''; known: "),
        ("sample:cuont=2", "no option 'cuont' of sample; did you mean 'count'?"),
        ("sample:hits=2", "no option 'hits' of sample"),
        ("sample:count=two", "sample:count=two is not of type int"),
        ("sample:count=1.5", "sample:count=1.5 is not of type int"),
        ("sample:rate=fast", "sample:rate=fast is not of type float"),
        ("sample:flag=1", "sample:flag=1 is not true or false"),
        ("sample:mode=hihg", "sample:mode=hihg is not known; did you mean 'high'?"),
        ("sample(count=1, count=2)", "sample: count is given twice"),
        ("sample:1:count=2", "sample: count is given twice"),
        ("sample:limit=few", "sample:limit=few is not of type int"),
    ],
)
@pytest.mark.usefixtures("sample")
def test_a_wrong_text_is_explained(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        bind("metric", spec)


def test_a_plugin_without_options_takes_none() -> None:
    with pytest.raises(UserError, match="expected option=value, got '4'"):
        bind("quantizer", "int8:4")


@pytest.mark.usefixtures("sample")
def test_identity_names_version_and_all_options_in_one_order() -> None:
    a, b = bind("metric", "sample:rate=1:count=2"), bind("metric", "sample:count=2,rate=1.0")
    assert a.identity == b.identity
    assert a.identity.startswith("sample@3:count=2:flag=False:")
    others = [bind("metric", f"sample:{option}").identity for option in ("count=3", "rate=1", "name=y", "flag=true")]
    assert len({a.identity, bind("metric", "sample").identity, *others}) == 6


@pytest.mark.usefixtures("sample")
def test_a_name_is_registered_once() -> None:
    def sample(hits: list[int]) -> None: ...

    with pytest.raises(UserError, match="'sample' is registered twice"):
        register("metric", source="x")(sample)


def test_a_name_may_be_used_by_two_kinds() -> None:
    def sample() -> None: ...

    for kind in ("recipe", "benchmark"):
        assert register(kind, source="x")(sample) is sample


def test_the_nearest_word_is_offered_else_all() -> None:
    assert did_you_mean("betta", ["beta", "weight"]) == "; did you mean 'beta'?"
    assert did_you_mean("zzz", ["beta", "alpha"]) == "; known: alpha, beta"
    assert did_you_mean("zzz", []) == ""


@pytest.mark.parametrize("plugin", ALL, ids=lambda p: f"{p.kind}-{p.name}")
def test_every_plugin_documents_itself(plugin: Plugin) -> None:
    doc = inspect.getdoc(plugin.function) or ""
    assert plugin.summary.endswith("."), "the first line of the docstring is one sentence"
    assert plugin.source
    assert plugin.version >= 1
    missing = [name for name in plugin.options if f"{name}:" not in doc and f"{name} :" not in doc]
    assert missing == [] or len(plugin.options) < 2, f"options that the docstring does not explain: {missing}"


@pytest.mark.parametrize("plugin", ALL, ids=lambda p: f"{p.kind}-{p.name}")
def test_every_plugin_works_by_its_bare_name_and_its_options_can_be_typed(plugin: Plugin) -> None:
    """Each option has a default and a type that a text can give; giving the defaults changes nothing."""
    assert inspect.Parameter.empty not in plugin.options.values()
    bound = bind(plugin.kind, plugin.name)
    assert bound.options == plugin.options
    assert plugin.types.keys() == plugin.options.keys()
    assert plugin.options.keys() | set(plugin.needs) <= inspect.get_annotations(plugin.function).keys()
    text = ":".join(f"{key}={value}" for key, value in plugin.options.items() if value is not None)
    assert bind(plugin.kind, f"{plugin.name}:{text}").identity == bound.identity


@pytest.mark.parametrize(
    ("option", "good", "bad", "fix"),
    [
        ("share", ("0", "1", "0.5"), ("-1", "1.001", "nan", "inf"), "give at least 0, at most 1"),
        ("rate", ("1e-9", "inf"), ("0", "-1", "nan"), "give more than 0"),
        ("count", ("1", "7"), ("0",), "give at least 1"),
        ("decay", ("0", "0.5"), ("1", "-1", "2"), "give at least 0, below 1"),
        ("lr", ("none", "1"), ("0",), "give more than 0"),
    ],
)
def test_numbers_outside_their_limits_are_refused(
    option: str, good: tuple[str, ...], bad: tuple[str, ...], fix: str
) -> None:
    @register("edit", source="a paper")
    def limited(
        model: Any,
        *,
        share: Annotated[float, Limits(0, 1)] = 0,
        rate: Annotated[float, Limits(0, above=True)] = 1,
        decay: Annotated[float, Limits(0, 1, below=True)] = 0,
        count: Annotated[int, Limits(1)] = 1,
        lr: Annotated[float | None, Limits(0, above=True)] = None,
    ) -> None:
        """Nothing."""

    for value in good:
        found = bind("edit", f"limited:{option}={value}").options[option]
        assert found == (None if value == "none" else float(value))
    for value in bad:
        with pytest.raises(UserError, match=f"limited:{option}={value} is out of range\n  {fix}$"):
            bind("edit", f"limited:{option}={value}")
    with pytest.raises(UserError, match="is not of type"):
        bind("edit", f"limited:{option}=much")


def test_every_kind_has_plugins() -> None:
    assert {plugin.kind for plugin in ALL} == set(KINDS)


# What is refused when a plug-in registers


def asking(kind: Kind, *names: str, options: dict[str, tuple[Any, Any]] | None = None, **more: Any) -> None:
    """Register a plug-in with parameters of these names, and options by name: (type, default)."""

    def plugin(**inputs: Any) -> None: ...

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    for name, (annotation, default) in (options or {}).items():
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    plugin.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    register(kind, source="a paper", **more)(plugin)


KNOWN = [
    (kind, name)
    for kind, forms in NEEDS.items()
    for name in sorted(frozenset().union(*(form.required | form.optional for form in forms)))
]


@pytest.mark.parametrize(("kind", "name"), KNOWN)
def test_a_misspelt_need_is_refused_with_the_right_name(kind: Kind, name: str) -> None:
    middle = len(name) // 2
    misspelt = name[:middle] + name[middle] + name[middle:]
    [form, *_] = [form for form in NEEDS[kind] if name in form.required | form.optional]
    others = sorted(form.required - {name})
    message = f"asks for {misspelt!r}, which nothing provides; did you mean {name!r}?"
    with pytest.raises(UserError, match=re.escape(message)):
        asking(kind, misspelt, *others)
    assert "plugin" not in plugins(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_says_what_its_plugins_may_ask_for(kind: Kind) -> None:
    assert NEEDS[kind]
    with pytest.raises(UserError, match="'nothing_like_it', which nothing provides"):
        asking(kind, "nothing_like_it")


@pytest.mark.parametrize(
    ("kind", "names", "message"),
    [
        ("quantizer", ("weight_OI", "cached_TD"), "(weight_OI, …) or (activations_TI, …) or (cached_TD, …)"),
        ("quantizer", ("hessian_II",), "asks for (hessian_II), and is called with"),
        ("optimizer", ("parameters",), "is called with (lr, parameters, …)"),
        ("suppression", ("forget", "asked_MD"), "asks for (forget, asked_MD)"),
        ("forget", ("hidden",), "has no option 'layer'"),
        ("quantizer", ("weight_OI", "hessian_II"), "has no option 'calibration'"),
        ("recipe", ("beta",), "asks for 'beta', which nothing provides; it is given nothing\n  options follow a *"),
        ("metric", ("reference_reference_hits",), "did you mean 'reference_hits'?"),
    ],
)
def test_needs_must_go_together(kind: Kind, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        asking(kind, *names)


def test_a_figure_reads_what_is_observed() -> None:
    with pytest.raises(UserError, match=r"reads 'log_prob', which is not observed; did you mean 'log_probs'\?"):
        asking("figure", "subject", "control", reads=("log_prob",))


@pytest.mark.parametrize("kind", [int, float, bool, str, Literal["a"], int | None, Annotated[float, Limits(0)]])
def test_options_of_types_that_a_text_can_give_are_taken(kind: Any) -> None:
    asking("recipe", options={"option": (kind, None)})
    assert list(plugins("recipe")["plugin"].types) == ["option"]


@pytest.mark.parametrize(
    ("kind", "default", "message"),
    [
        (list[int], (), "no text can give its option 'option'"),
        (int | str, 1, "no text can give its option 'option'"),
        (Literal[1, 2], 1, "no text can give its option 'option'"),
        (Annotated[float, "positive"], 1.0, "no text can give its option 'option'"),
        ("Unknown", 1, "the type of an option cannot be read: name 'Unknown' is not defined"),
        (inspect.Parameter.empty, 1, "no type of its option 'option'"),
        (int, inspect.Parameter.empty, "has no default for its option 'option'"),
    ],
)
def test_options_that_no_text_can_give_are_refused(kind: Any, default: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        asking("recipe", options={"option": (kind, default)})


def test_inputs_are_given_by_name() -> None:
    with pytest.raises(UserError, match=r"has the parameter \*names: 'str', and inputs are given by name"):

        @register("recipe", source="a paper")
        def several(*names: str) -> str:
            return ""
