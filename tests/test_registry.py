"""A text names a function and its checked options; every plug-in says what it is and where it comes from."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest

from stillknows import registry
from stillknows.errors import UserError, did_you_mean
from stillknows.kinds import KINDS, LEVELS, RENAMED, ROLES, Kind, Level, PluginRole, spelled
from stillknows.needs import NEEDS
from stillknows.registry import Limits, Plugin, bind, plugins, register

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
    @register("metric", role="example", source="a paper", version=3)
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

    return plugins("metric", "example")["sample"]


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
        bind("transform", "int8:4")
    with pytest.raises(UserError, match=r"no attack named 'int8'; .*\n  stillknows list attacks"):
        bind("transform", "int8", "attack")


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
        register("metric", role="example", source="x")(sample)
    with pytest.raises(UserError, match="model metric 'sample' is called like the metric"):
        asking("metric", "model", "subject", "control", name="sample")


def test_a_name_may_be_used_by_two_kinds() -> None:
    def sample() -> None: ...

    for kind in ("recipe", "benchmark"):
        assert register(kind, source="x")(sample) is sample


def test_an_earlier_name_is_understood_and_the_oldest_identifies() -> None:
    asking("edit", None, "model", name="renamed", aliases=("oldest", "older"))
    for name in ("renamed", "older", "oldest"):
        bound = bind("edit", name)
        assert (bound.spec, bound.identity) == ("renamed", "oldest@1")
    with pytest.raises(UserError, match="edit 'older' is registered twice"):
        asking("edit", None, "model", name="older")
    with pytest.raises(UserError, match="edit 'newest' is registered twice"):
        asking("edit", None, "model", name="newest", aliases=("renamed",))


def test_what_one_method_can_name_has_one_name() -> None:
    with pytest.raises(UserError, match="mask 'npo' is called like the forget objective"):
        asking("step", "mask", "weights", name="npo")


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


def test_every_kind_and_role_has_plugins() -> None:
    assert {(plugin.kind, plugin.role) for plugin in ALL} == {(kind, role) for kind in KINDS for role in roles(kind)}
    assert {plugin.level for plugin in ALL} == {None, *LEVELS}


def test_plugins_of_a_role_are_those_of_the_kind_that_have_it() -> None:
    for kind in KINDS:
        parts = [plugins(kind, role) for role in roles(kind)]
        assert sorted(name for part in parts for name in part) == sorted(plugins(kind))


# What is refused when a plug-in registers


def roles(kind: Kind) -> tuple[PluginRole | None, ...]:
    return ROLES[kind] or (None,)


def asking(
    kind: Any,
    role: Any,
    *names: str,
    name: str = "plugin",
    options: dict[str, tuple[Any, Any]] | None = None,
    **more: Any,
) -> None:
    """Register a plug-in with parameters of these names, and options by name: (type, default)."""

    def plugin(**inputs: Any) -> None: ...

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    for option, (annotation, default) in (options or {}).items():
        parameters.append(
            inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    plugin.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    plugin.__name__ = name
    register(kind, role=role, source="a paper", **more)(plugin)


KNOWN = [
    (kind, role, name)
    for (kind, role), forms in NEEDS.items()
    for name in sorted(frozenset().union(*(form.required | form.optional for form in forms)))
]


@pytest.mark.parametrize(("kind", "role", "name"), KNOWN)
def test_a_misspelt_need_is_refused_with_the_right_name(kind: Kind, role: PluginRole | None, name: str) -> None:
    middle = len(name) // 2
    misspelt = name[:middle] + name[middle] + name[middle:]
    [form, *_] = [form for form in NEEDS[kind, role] if name in form.required | form.optional]
    others = sorted(form.required - {name})
    message = f"asks for {misspelt!r}, which nothing provides; did you mean {name!r}?"
    with pytest.raises(UserError, match=re.escape(message)):
        asking(kind, role, misspelt, *others)
    assert "plugin" not in plugins(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_role_says_what_its_plugins_may_ask_for(kind: Kind) -> None:
    for role in roles(kind):
        assert NEEDS[kind, role]
        assert all(bool(form.levels) == (kind == "transform") for form in NEEDS[kind, role])
        with pytest.raises(UserError, match="'nothing_like_it', which nothing provides"):
            asking(kind, role, "nothing_like_it")


@pytest.mark.parametrize("former", RENAMED)
def test_former_kinds_are_refused_with_their_new_spelling(former: Any) -> None:
    kind, role = RENAMED[former]
    new = re.escape(f"are now of kind {kind!r}, role {role!r}\n  {spelled(kind, role)}")
    for call in (lambda: register(former, source="a paper"), lambda: bind(former, "x"), lambda: plugins(former)):
        with pytest.raises(UserError, match=new):
            call()


@pytest.mark.parametrize(
    ("kind", "role", "message"),
    [
        ("transfrom", None, "no kind of plug-in named 'transfrom'; did you mean 'transform'?"),
        (
            "transform",
            None,
            'the transform \'plugin\' says no role\n  @register("transform", role="deployment", source=…)',
        ),
        ("transform", "atack", "the transform 'plugin' has the unknown role 'atack'; did you mean 'attack'?"),
        ("step", "adversary", "the role 'adversary' is now called 'perturbation'"),
        ("recipe", "attack", "the recipe 'plugin' has the role 'attack', and a recipe has none"),
    ],
)
def test_a_role_is_one_that_the_kind_has(kind: str, role: str | None, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        asking(kind, role)


@pytest.mark.parametrize(
    ("role", "names", "stated", "level"),
    [
        ("deployment", ("weight_OI",), None, "weights"),
        ("attack", ("cached_TD",), None, "cache"),
        ("attack", ("model", "taught"), None, "weights"),
        ("attack", ("model",), "activations", "activations"),
        ("attack", ("split", "template"), "prompt", "prompt"),
        ("defence", ("model", "unlearned"), None, "logits"),
    ],
)
def test_the_level_follows_from_what_a_transform_asks_for(
    role: PluginRole, names: tuple[str, ...], stated: Level | None, level: Level
) -> None:
    asking("transform", role, *names, level=stated)
    assert plugins("transform", role)["plugin"].level == level


@pytest.mark.parametrize(
    ("kind", "role", "names", "stated", "message"),
    [
        ("transform", "attack", ("decoding",), "weights", "one that is given decoding changes decoding"),
        ("transform", "attack", ("model",), "activation", "did you mean 'activations'?"),
        (
            "transform",
            "attack",
            ("model",),
            "cache",
            "one that is given model changes weights or activations or logits",
        ),
        ("metric", "example", ("hits",), "logits", "only transforms have one"),
    ],
)
def test_a_level_that_does_not_go_with_the_parameters_is_refused(
    kind: Kind, role: PluginRole, names: tuple[str, ...], stated: str, message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        asking(kind, role, *names, level=stated)


@pytest.mark.parametrize(
    ("kind", "role", "names", "message"),
    [
        (
            "transform",
            "deployment",
            ("weight_OI", "cached_TD"),
            "(weight_OI, …) or (activations_TI, …) or (cached_TD, …)",
        ),
        ("transform", "deployment", ("hessian_II",), "asks for (hessian_II), and is called with"),
        ("step", "optimizer", ("parameters",), "is called with (lr, parameters, …)"),
        ("transform", "defence", ("forget", "asked_MD"), "asks for (forget, asked_MD)"),
        ("objective", "forget", ("hidden",), "has no option 'layer'"),
        ("transform", "deployment", ("weight_OI", "hessian_II"), "has no option 'calibration'"),
        (
            "recipe",
            None,
            ("beta",),
            "asks for 'beta', which nothing provides; it is given nothing\n  options follow a *",
        ),
        ("metric", "example", ("reference_hit",), "did you mean 'reference_hits'?"),
    ],
)
def test_needs_must_go_together(kind: Kind, role: PluginRole, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        asking(kind, role, *names)


@pytest.mark.parametrize(
    ("role", "said", "message"),
    [
        ("attack", {"budget": "step"}, "has no option 'step', which is to be its budget; did you mean 'steps'?"),
        ("defence", {"budget": "steps"}, "says what its budget is or what it is judged by, as only attacks do"),
        ("defence", {"judged_by": ()}, "says what its budget is or what it is judged by, as only attacks do"),
    ],
)
def test_attacks_alone_have_a_budget_and_it_is_an_option(role: Any, said: dict[str, Any], message: str) -> None:
    def costly(model: Any, *, steps: int = 1) -> None: ...

    with pytest.raises(UserError, match=re.escape(message)):
        register("transform", role=role, source="test", **said)(costly)


def test_a_model_metric_reads_what_is_observed() -> None:
    with pytest.raises(UserError, match=r"reads 'log_prob', which is not observed; did you mean 'log_probs'\?"):
        asking("metric", "model", "subject", "control", reads=("log_prob",))


@pytest.mark.parametrize("kind", [int, float, bool, str, Literal["a"], int | None, Annotated[float, Limits(0)]])
def test_options_of_types_that_a_text_can_give_are_taken(kind: Any) -> None:
    asking("recipe", None, options={"option": (kind, None)})
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
        asking("recipe", None, options={"option": (kind, default)})


def test_inputs_are_given_by_name() -> None:
    with pytest.raises(UserError, match=r"has the parameter \*names: 'str', and inputs are given by name"):

        @register("recipe", source="a paper")
        def several(*names: str) -> str:
            return ""
