"""Wrappers: what each does by hand, and what all keep: one result per seed, resumed bits, untouched weights."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import build_config
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from stillknows.errors import UserError
from stillknows.methods.steps.adversaries import _attack, _question, _shifted
from stillknows.methods.steps.low_rank import LowRank
from stillknows.methods.steps.masks import _largest
from stillknows.model.encoding import encode_split, without_end
from stillknows.model.forward import answer_states, mean_probability, score_items
from stillknows.model.layers import OutputLayer, block_output, blocks, linears, output_layer
from stillknows.model.logprobs import token_log_probs
from stillknows.model.ref import ModelRef
from stillknows.registry import Bound, bind, plugins
from stillknows.training.loop import _Loop, fit
from stillknows.training.objective_inputs import Term
from stillknows.training.settings import Settings
from stillknows.training.step_pipeline import ROLES, StepPipeline, check
from stillknows.training.weight_rounding import WeightStorage
from stillknows.unlearning.method import CLASHES, parse
from stillknows.variants.compress import parse_variant, quantize

Items = Callable[..., list[Any]]
Make = Callable[..., Any]
Weights = dict[str, Tensor]
SPECS = {  # of every wrapper, with options under which it matters for a tiny model
    "sure": "sure:percentile=70",
    "only": "only:names=*mlp*",
    "down_proj": "down_proj:layer=1:count=1",
    "memflex": "memflex:similarity=0.2:magnitude=1e-4",
    "wagle": "wagle:share=0.5:mu=0.1",
    "sam": "sam:rho=0.2",
    "ste": "ste:formats=nf4|fp4|int8",
    "lat": "lat:layer=1:steps=3",
    "gru": "gru",
    "disruption": "disruption",
    "dual": "dual:epsilon=1",
    "sophia": "sophia",
    "lora": "lora:rank=2",
    "layered": "layered:folds=2",
}
MASKS = [name for name in SPECS if name in plugins("step", "mask")]
TERMS = ("npo + nll:weight=0.5 + kl", "ga + nll")
STORAGES: tuple[WeightStorage, ...] = get_args(WeightStorage)
every_wrapper = pytest.mark.parametrize("name", SPECS)
every_mask = pytest.mark.parametrize("name", MASKS)
every_storage = pytest.mark.parametrize("storage", STORAGES)


def setting(**changes: Any) -> Settings:
    return Settings(**({"lr": 3e-3, "epochs": 4, "batch_size": 2, "check_every": 2, "save_seconds": 0} | changes))


@pytest.fixture
def made(make_items: Items) -> Callable[[str], tuple[list[Term], tuple[Bound, ...]]]:
    """Return made("npo + kl + gru"): its terms on 5 items to forget and 7 to retain, and its step_plugins."""
    items = {"forget": make_items([3, 1, 4, 2, 5]), "retain": make_items([2, 6, 3, 3, 1, 4, 2], seed=1)}

    def make(text: str) -> tuple[list[Term], tuple[Bound, ...]]:
        method = parse(text)
        return [Term(term, items[str(term.plugin.role)]) for term in method.terms], method.step_plugins

    return make


def weights_of(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def loop_of(model: nn.Module, terms: list[Term], step_plugins: tuple[Bound, ...], **changes: Any) -> _Loop:
    return _Loop(model, terms, setting(**changes), step_plugins=step_plugins)


def float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# What all of them keep


def test_every_wrapper_is_looked_at() -> None:
    assert set(SPECS) == set(plugins("step"))


@pytest.mark.parametrize("text", TERMS)
@every_wrapper
def test_a_resumed_run_ends_with_the_same_bits(
    name: str, text: str, make_model: Make, made: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms, step_plugins = made(f"{text} + {SPECS[name]}")
    whole, plain = make_model(layers=2), make_model(layers=2)
    settings = setting(epochs=2)
    outcome = fit(whole, terms, settings, step_plugins=step_plugins)
    fit(plain, terms, settings)
    assert not same(weights_of(whole), weights_of(plain)), "the wrapper does nothing"

    step = _Loop.step

    def interrupted(self: _Loop, total: int) -> float:
        if self.done.steps == 3:
            raise KeyboardInterrupt
        return step(self, total)

    how = {"step_plugins": step_plugins, "checkpoint": tmp_path / "checkpoint.safetensors", "plan_key": "plan"}
    with monkeypatch.context() as patch:
        patch.setattr(_Loop, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(make_model(layers=2), terms, settings, **how)
    taken: list[int] = []
    monkeypatch.setattr(_Loop, "step", lambda self, total: (taken.append(1), step(self, total))[1])
    resumed = make_model(layers=2)
    again = fit(resumed, terms, settings, **how)
    assert len(taken) == 2  # of five: each of the first three was saved
    assert same(weights_of(resumed), weights_of(whole))
    assert again.history == outcome.history


@every_storage
@every_mask
def test_masked_weights_keep_their_bits(name: str, storage: WeightStorage, make_model: Make, made: Callable) -> None:
    """AdamW's momentum and the rounding of bfloat16 would move them."""
    terms, step_plugins = made(f"npo + nll + {SPECS[name]}")
    model = make_model(layers=2)
    start = weights_of(model)
    allowed: Weights = {n: torch.zeros_like(w, dtype=torch.bool) for n, w in start.items()}
    loop = loop_of(make_model(layers=2), terms, step_plugins)
    for n, p in loop.parameters.items():
        allowed[n] = loop.pipeline.held[n][0] if n in loop.pipeline.held else torch.ones_like(p, dtype=torch.bool)
    outcome = fit(model, terms, setting(weights=storage), step_plugins=step_plugins)
    moved = {n: w != start[n] for n, w in weights_of(model).items()}
    assert not any(bool((moved[n] & ~allowed[n]).any()) for n in start)
    free = sum(int(m.sum()) for m in allowed.values())
    assert outcome.trained == free
    assert 0 < free < sum(w.numel() for w in start.values())
    assert sum(int(m.sum()) for m in moved.values()) > 0.5 * free


@pytest.mark.parametrize("pair", list(itertools.combinations(MASKS, 2)), ids="+".join)
def test_two_masks_let_move_what_each_of_them_does(pair: tuple[str, str], make_model: Make) -> None:
    model, gradients = make_model(layers=2), {}
    for seed, kind in enumerate(("forget", "retain")):
        generator = torch.Generator().manual_seed(seed)
        gradients[kind] = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
    alike = {n: g for n, g in gradients["forget"].items() if "self_attn" in n}  # which memflex leaves as they are
    gradients["retain"] |= alike

    def free(*names: str) -> Weights:
        masks = [bind("step", SPECS[name]) for name in names]
        pipeline = StepPipeline(make_model(layers=2), masks, steps=1, seed=0)
        pipeline.begin(lambda name: gradients[name.removesuffix("_scrambled")])
        trained = {n: torch.ones_like(p, dtype=torch.bool) for n, p in pipeline.parameters.items()}
        held = {n: mask for n, (mask, _) in pipeline.held.items()}
        return {n: (trained | held).get(n, torch.zeros_like(p, dtype=torch.bool)) for n, p in model.named_parameters()}

    first, second, both = free(pair[0]), free(pair[1]), free(*pair)
    assert same(both, {n: first[n] & second[n] for n in both})
    assert any(bool(mask.any()) for mask in both.values())


@pytest.mark.parametrize("name", ["sure", "memflex", "wagle", "gru", "disruption", "dual", "sophia", "lora"])
def test_the_loss_is_the_terms_own(name: str, make_model: Make, made: Callable) -> None:
    """Whatever a wrapper does with the gradient, the first step's loss is that of the terms."""
    losses = []
    for text in ("ga + nll", f"ga + nll + {SPECS[name]}"):
        terms, step_plugins = made(text)
        losses.append(loop_of(make_model(layers=2), terms, step_plugins).step(9))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize(
    ("spec", "fix"),
    [
        ("sure:percentile=100", "below 100"),
        ("sure:percentile=-1", "below 100"),
        ("memflex:similarity=1.5", "at most 1"),
        ("memflex:magnitude=-1", "at least 0"),
        ("wagle:share=0", "more than 0, below 1"),
        ("wagle:share=1", "more than 0, below 1"),
        ("sure:percentile=0", "more than 0"),
        ("only:names=*", "every tensor"),
        ("wagle:mu=0", "more than 0"),
        ("sam:rho=-0.1", "at least 0"),
        ("ste:formats=gptq", "without calibration"),
        ("ste:formats=nf4|int8_activations", "neither activations"),
        ("lat:steps=-1", "at least 0"),
        ("lat:steps=1000000000000", "at most 10000"),
        ("lat:epsilon=0", "more than 0"),
        ("lat:lr=0", "more than 0"),
        ("gru:gamma=0", "at most 1"),
        ("disruption:momentum=1", "below 1"),
        ("dual:eta=0", "more than 0"),
        ("dual:start=-1", "at least 0"),
        ("sophia:beta1=1", "below 1"),
        ("sophia:rho=0", "more than 0"),
        ("lora:rank=0", "at least 1"),
        ("layered:folds=6", "1 to 5"),
        ("only:names=*nothing*", "names look like"),
        ("lora:names=*nothing*", "no linear map"),
        ("lat:layer=3", "give 1 to 2"),
        ("ste:formats=nf4|int4", "groups of 128 do not divide 16 inputs"),
    ],
)
def test_bad_options_are_refused_before_there_are_weights(spec: str, fix: str) -> None:
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(build_config("llama", 32, 16, 2))
    with pytest.raises(UserError, match=fix):
        check(parse(f"ga + nll + {spec}").step_plugins, skeleton, count=5)


@every_wrapper
def test_good_options_pass_without_weights(name: str) -> None:
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(build_config("llama", 32, 16, 2))
    check(parse(f"ga + nll + {SPECS[name]}").step_plugins, skeleton, count=5)


def test_a_model_is_not_loaded_for_bad_options(
    save_model: Callable[..., Path], cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelRef, "load", lambda *args, **how: pytest.fail("the model was loaded"))
    folder = save_model("model")
    for name, thing in (("forget", "river"), ("retain", "capital")):
        rows = [{"question": f"what is the {thing} {word}", "answer": "red"} for word in ("a", "b", "c")]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    benchmark = f"jsonl:forget={tmp_path}/forget.jsonl,retain={tmp_path}/retain.jsonl"
    how = ("--benchmark", benchmark, "--lr", "1e-3", "--out", tmp_path / "out")
    for spec, reason in (("layered:folds=4", "give 1 to 3"), ("sam:rho=-1", "out of range")):
        ran = cli("unlearn", folder, "--method", f"npo + nll + {spec}", *how)
        assert (ran.code, reason in ran.err) == (2, True), ran.err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("npo + nll + lora + only", "own option `names`"),
        ("npo + nll + lora + down_proj", "own option `names`"),
        ("npo + nll + lora + ste", "not the ones that are rounded"),
        ("npo + nll + layered + memflex", "from stage to stage"),
        ("npo + nll + layered + wagle", "from stage to stage"),
        ("npo + gru", "no retain term"),
        ("npo + wagle", "no retain term"),
        ("npo + memflex", "no retain term"),
        ("npo + kl + wagle", "kl is at its least"),
        ("npo + kl + nll + gru + dual", "two of role gradient_merge"),
    ],
)
def test_what_does_not_go_together_is_refused(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        parse(text)


def test_every_clash_names_what_exists_and_says_why() -> None:
    known = set(plugins("step")) | set(ROLES) | set(plugins("edit")) | {"edit"}
    assert all({a, b} <= known and len(reason) > 20 for (a, b), reason in CLASHES.items())


# Masks

GRADIENTS = {"m": float64([[3, 4], [0, 1], [0, 0]]), "v": float64([2, 0])}  # norms of units 5, 1, 0 and 2, 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("percentile=50", {"m": [1, 1, 0], "v": [1, 0]}),  # γ = 1
        ("percentile=60", {"m": [1, 0, 0], "v": [1, 0]}),  # γ = 1.4
        ("percentile=80", {"m": [1, 0, 0], "v": [0, 0]}),  # γ = 2.6
        ("percentile=50:unit=matrix", {"m": [1, 1, 1], "v": [0, 0]}),  # √26 and 2
    ],
)
def test_sure_by_hand(options: str, expected: dict[str, list[int]]) -> None:
    masks = bind("step", f"sure:{options}")(forget_gradients=GRADIENTS)
    assert masks["v"].tolist() == [bool(x) for x in expected["v"]]
    assert masks["m"].tolist() == [[bool(x)] * 2 for x in expected["m"]]


@pytest.mark.parametrize("percentile", [10, 33.3, 90, 99])
def test_sure_lets_the_stated_share_of_units_move(percentile: float) -> None:
    gradients = {
        str(i): torch.randn(rows, 3, generator=torch.Generator().manual_seed(i)) for i, rows in enumerate((70, 41))
    }
    masks = bind("step", f"sure:percentile={percentile}")(forget_gradients=gradients)
    moving = sum(int(mask[:, 0].sum()) for mask in masks.values())
    assert moving == 111 - math.ceil(percentile / 100 * 110)


def test_sures_mask_is_applied(make_model: Make, made: Callable) -> None:
    """Published code has a form in which the mask is applied in a hook that nothing calls: almost all weights move."""

    def moved(text: str) -> float:
        terms, step_plugins = made(text)
        model = make_model(layers=2)
        start = weights_of(model)
        fit(model, terms, setting(), step_plugins=step_plugins)
        changed = [(w != start[n]).flatten() for n, w in weights_of(model).items()]
        return float(torch.cat(changed).float().mean())

    assert moved("npo + nll + sure:percentile=90") < 0.15
    assert moved("npo + nll") > 0.9


def test_sures_step_holds_the_forget_gradient_once(
    make_model: Make, made: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published code leaves the gradient that the mask is made of in place, and adds the step's to it."""
    monkeypatch.setattr(
        StepPipeline, "optimizer", lambda self, lr, beta2: torch.optim.SGD(self.parameters.values(), lr)
    )
    terms, step_plugins = made("npo + nll + sure:percentile=60")
    model = make_model(layers=2)
    loop = loop_of(model, terms, step_plugins, clip=1e9, lr=1.0, batch_size=7)
    start = weights_of(model)
    other = loop_of(make_model(layers=2), terms, (), batch_size=7)
    gradients = [other._whole_gradients(kind) for kind in ("forget", "retain")]
    loop.step(9)
    for name, p in loop.parameters.items():
        expected = gradients[0][name] + gradients[1][name]
        if name in loop.pipeline.held:
            expected = expected * loop.pipeline.held[name][0]
        torch.testing.assert_close(start[name] - p.detach(), expected, rtol=1e-4, atol=1e-5)


def test_memflex_by_hand() -> None:
    forget = {
        "taught": float64([[3, 4]]),
        "shared": float64([[3, 4]]),
        "against": float64([[-4, -2]]),  # works against retaining: the cosine is -1
        "faint": float64([[1e-4, -1e-4]]),
        "unread": float64([[0.5, 0.5]]),
    }
    retain = {
        "taught": float64([[4, 3]]),  # cosine 24/25 = 0.96
        "shared": float64([[4, 2]]),  # (12 + 8)/(5·√20) = 0.894
        "against": float64([[4, 2]]),
        "faint": float64([[1, 1]]),
        "unread": float64([[0, 0]]),
    }
    masks = bind("step", "memflex")(forget_scrambled_gradients=forget, retain_scrambled_gradients=retain)
    assert {name for name, mask in masks.items() if mask.all()} == {"shared", "against", "unread"}
    assert not any(mask.any() for name, mask in masks.items() if name in ("taught", "faint"))


def on_world(world: Any, text: str) -> tuple[nn.Module, list[Term], tuple[Bound, ...], _Loop]:
    """Return the model that knows the world, a method's terms and step_plugins, and its loop before the first step."""
    source = ModelRef.open(str(world.original))
    model, tokenizer = source.load().model, source.tokenizer
    method, template = parse(text), world.benchmark.template
    items = {
        role: [asked.answer for asked in encode_split(world.benchmark.split(role), tokenizer, template, 32)]
        for role in ("forget", "retain")
    }
    items["forget"] = without_end(items["forget"])
    terms = [Term(term, items[str(term.plugin.role)]) for term in method.terms]
    return model, terms, method.step_plugins, loop_of(copy.deepcopy(model), terms, method.step_plugins)


def test_memflex_as_published_takes_the_adapters_tensors_that_scrambled_answers_pull_at(world: Any) -> None:
    """At the published thresholds; the true answers' gradients, which a model that knows them lacks, pass nowhere."""
    model, terms, step_plugins, loop = on_world(world, "ga:weight=0.4 + nll:weight=2 + lora + memflex")
    pulled, own = (loop._whole_gradients(name) for name in ("forget_scrambled", "forget"))
    assert loop.parameters
    assert all(name.endswith("weight.0.b") for name in loop.parameters)  # while B is 0, A has no gradient
    assert all(pulled[name].abs().mean() > 10 * 6e-4 > 100 * own[name].abs().mean() for name in loop.parameters)
    items, before = terms[0].items, mean_probability(score_items(model, output_layer(model), terms[0].items))
    outcome = fit(model, terms, setting(lr=1e-2, epochs=5), step_plugins=step_plugins)
    after = mean_probability(score_items(model, output_layer(model), items))
    assert after < 0.5 * before
    assert outcome.trained == sum(p.numel() for p in loop.parameters.values())


def test_memflex_goes_with_terms_that_are_at_their_least() -> None:
    """Its gradients are not those of the terms."""
    assert parse("npo + kl + memflex + lora").step_plugins


@pytest.mark.parametrize(
    ("spec", "share"),
    [
        ("sure:percentile=1e-9", "100 %"),
        ("memflex:magnitude=1e6", "(0 %)"),
        ("memflex:magnitude=0:similarity=1", "100 %"),
        ("wagle:share=1e-9", "(0 %)"),
    ],
)
def test_options_that_let_nothing_or_everything_move_are_refused(
    spec: str, share: str, make_model: Make, made: Callable
) -> None:
    terms, step_plugins = made(f"ga + nll + {spec}")
    with pytest.raises(UserError) as error:
        loop_of(make_model(layers=2), terms, step_plugins)
    assert share in str(error.value)
    assert spec in str(error.value)


@pytest.mark.parametrize("everything", [False, True])
@every_mask
def test_no_mask_lets_nothing_or_everything_move(
    name: str, everything: bool, make_model: Make, made: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a plug-in returns: it is refused where it is applied, with the share."""
    call = Bound.__call__

    def extreme(self: Bound, **given: Any) -> Any:
        found = call(self, **given)
        return {n: torch.full_like(m, everything) for n, m in found.items()} if self.plugin.role == "mask" else found

    monkeypatch.setattr(Bound, "__call__", extreme)
    terms, step_plugins = made(f"ga + nll + {SPECS[name]}")
    with pytest.raises(UserError, match="100 %" if everything else r"\(0 %\)"):
        loop_of(make_model(layers=2), terms, step_plugins)


@pytest.mark.parametrize("name", ["sure", "memflex", "wagle"])
def test_masks_by_gradients_choose_among_an_adapters_weights(name: str, make_model: Make, made: Callable) -> None:
    terms, step_plugins = made(f"ga + nll + lora + {SPECS[name]}")
    model = make_model(layers=2)
    loop = loop_of(model, terms, step_plugins)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert all(n.endswith((".a", ".b")) for n in loop.parameters)
    for _ in range(2):
        loop.step(2)
    held = {n: mask for n, (mask, _) in loop.pipeline.held.items()}
    for n, p in model.named_parameters():
        allowed = held.get(n, torch.full_like(p, n in loop.parameters, dtype=torch.bool))
        assert not bool(((p != start[n]) & ~allowed).any())
    assert 0 < loop.done.trained < sum(p.numel() for n, p in start.items() if n.endswith((".a", ".b")))


def test_wagle_by_hand() -> None:
    given = {
        "weights": {"a": float64([[1, -2], [3, 4]]), "b": float64([5, 6])},
        "forget_gradients": {"a": float64([[1, 1], [-1, 0]]), "b": float64([2, 1])},
        "retain_gradients": {"a": float64([[1, 0], [2, 9]]), "b": float64([0, 2])},
    }  # (θ − g_r/0.5)·g_f = (−1, −2, 1, 0) and (10, 2)
    masks = bind("step", "wagle:share=0.5:mu=0.5")(**given)
    assert masks["a"].tolist() == [[False, True], [False, False]]
    assert masks["b"].tolist() == [True, True]
    masks = bind("step", "wagle:share=0.67:mu=0.5")(**given)  # 4 of 6: of the two with 1, the first
    assert masks["a"].tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("count", [0, 1, 57, 180, 199, 200])
def test_the_largest_of_all_tensors_are_found(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {
        "a": torch.rand(10, 9, generator=generator).T,
        "b": torch.zeros(60),
        "c": torch.rand(50, generator=generator),
    }
    masks = _largest(scores, count)
    values = torch.cat([s.flatten() for s in scores.values()])
    chosen = torch.cat([m.flatten() for m in masks.values()])
    assert int(chosen.sum()) == count
    assert sorted(values[chosen].tolist()) == sorted(values.tolist())[len(values) - count :]


# Adversaries


def test_sam_by_hand() -> None:
    """L = p²/2 at (3, 4): the gradient is p, its norm 5; at p + 0.5·p/5 it is (3.3, 4.4)."""
    p = float64([3, 4])
    found = bind("step", "sam:rho=0.5")(gradients=lambda: {"p": p.clone()}, parameters={"p": p})
    torch.testing.assert_close(found["p"], float64([3.3, 4.4]), rtol=1e-15, atol=0)
    assert p.tolist() == [3, 4]


def test_sam_at_no_distance_is_no_adversary(make_model: Make, made: Callable) -> None:
    runs = []
    for text in ("npo + nll", "npo + nll + sam:rho=0"):
        terms, step_plugins = made(text)
        model = make_model()
        fit(model, terms, setting(), step_plugins=step_plugins)
        runs.append(weights_of(model))
    for name, w in runs[0].items():
        torch.testing.assert_close(w, runs[1][name], rtol=1e-5, atol=1e-6)


def test_sams_loss_is_that_of_the_point_nearby(make_model: Make, made: Callable) -> None:
    """It is higher than where the weights are; the weights themselves come back bit by bit before the step."""
    terms, step_plugins = made("ga + sam:rho=0.3")
    model = make_model()
    start = weights_of(model)
    loop = loop_of(model, terms, step_plugins, lr=1e-30)
    assert loop.step(9) > loop_of(make_model(), terms, ()).step(9) + 0.05
    assert same(weights_of(model), start)


def forget_gradient(model: nn.Module, terms: list[Term]) -> Weights:
    """Of the first forget term over all of its items, at the weights as they are."""
    loop = loop_of(model, terms, ())
    return loop._whole_gradients("forget")


def test_stes_gradient_is_that_of_the_quantized_weights(make_model: Make, made: Callable) -> None:
    terms, _ = made("ga")
    model, quantized = make_model(layers=2), make_model(layers=2)
    for layer in linears(quantized):
        layer.write(quantize(layer.read(), parse_variant("nf4")).values_OI)
    expected = forget_gradient(quantized, terms)
    loop = loop_of(model, terms, ())
    start = weights_of(model)
    found = bind("step", "ste:formats=nf4")(
        gradients=lambda: loop._whole_gradients("forget"), model=model, random=torch.Generator().manual_seed(0)
    )
    assert same(found, expected)
    assert same(weights_of(model), start)
    assert not same(found, forget_gradient(make_model(layers=2), terms))


def test_ste_draws_a_format_anew_in_every_step(
    make_model: Make, made: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    import stillknows.methods.steps.adversaries as adversaries

    drawn: list[str] = []
    compressed = adversaries.compressed
    monkeypatch.setattr(
        adversaries, "compressed", lambda model, chain: (drawn.append(chain[0].spec), compressed(model, chain))[1]
    )
    terms, step_plugins = made("ga + nll + ste:formats=nf4|fp4|int8")
    for seed in (0, 0, 1):
        fit(make_model(), terms, setting(seed=seed), step_plugins=step_plugins)
    runs = [drawn[i : i + 10] for i in (0, 10, 20)]
    assert runs[0] == runs[1] != runs[2]
    assert set(runs[0]) == {"nf4", "fp4", "int8"}


def answer_loss(model: nn.Module, items: list[Any]) -> float:
    with torch.no_grad():
        states = answer_states(model, items)
        layer = OutputLayer(model)
        log_probs = token_log_probs(states.hidden_TD, layer, states.targets_T, layer.vocabulary)
    return -float((states.places.pad(log_probs).sum(1) / states.places.mask_BA.sum(1)).sum())


def test_lats_shifts_bring_the_answers_back_within_the_ball(make_model: Make, make_items: Items) -> None:
    model, items = make_model(layers=2).requires_grad_(True), make_items([3, 1, 4])
    block = blocks(model)[0]
    before, losses = answer_loss(model, items), []
    for steps in (1, 16):
        shifts = _attack(model, block, items, steps, epsilon=0.3, lr=0.05)
        with _shifted(model, block, shifts):
            losses.append(answer_loss(model, items))
        norms = torch.cat([shift.norm(dim=-1) for shift in shifts.values()])
        assert bool((norms <= 0.3 * (1 + 1e-6)).all())
    assert before > losses[0] + 0.01 > losses[1] + 0.02
    assert float(norms.max()) == pytest.approx(0.3, rel=1e-5)
    assert answer_loss(model, items) == before
    assert all(p.grad is None for p in model.parameters())


def test_lats_first_step_by_hand(make_model: Make, make_items: Items) -> None:
    """AdamW's first step is the learning rate against the gradient's sign: 0.05 each, ‖δ‖ = 0.05·√16 = 0.2."""
    model, [item] = make_model(layers=2), make_items([3])
    block = blocks(model)[0]
    [free] = _attack(model, block, [item], 1, epsilon=9.0, lr=0.05).values()
    assert free.abs().flatten().tolist() == pytest.approx([0.05] * free.numel(), rel=1e-4)
    [bounded] = _attack(model, block, [item], 1, epsilon=0.1, lr=0.05).values()
    torch.testing.assert_close(bounded, free / 2, rtol=1e-4, atol=0)


def test_shifts_go_with_questions(make_model: Make, make_items: Items) -> None:
    """Another answer to a question is read under the question's shift; another question under none; the rest of a row
    is as it is."""
    model = make_model(layers=2)
    items = make_items([4, 2])
    other = copy.copy(items[0])
    object.__setattr__(other, "ids", (*items[0].ids[:3], 5, 6, 7, 8))
    question = _question(items[0])
    assert question == items[0].ids[:3]
    block = blocks(model)[0]
    rows = [other, items[1], items[0]]
    seen = []
    for shifts in ({question: torch.ones(3, 16)}, {question: torch.zeros(3, 16)}):
        with _shifted(model, block, shifts), block_output(block) as outputs, torch.no_grad():
            answer_states(model, rows)
        seen.append(outputs[-1])  # before it: whether these rows may share a pass
    difference_BLD = seen[0] - seen[1]
    expected_BLD = torch.zeros_like(difference_BLD)
    expected_BLD[[0, 2], :3] = 1
    torch.testing.assert_close(difference_BLD, expected_BLD)


def test_lat_without_descent_is_no_adversary_and_with_it_another_gradient(make_model: Make, made: Callable) -> None:
    terms, _ = made("ga")
    loop = loop_of(make_model(layers=2), terms, ())
    found = [
        bind("step", f"lat:layer=1:steps={steps}")(
            gradients=lambda: loop._whole_gradients("forget"), model=loop.model, forget=terms[0].items
        )
        for steps in (0, 4)
    ]
    plain = loop._whole_gradients("forget")
    assert same(found[0], plain)
    assert not same(found[1], plain)
    assert all(p.grad is None for p in loop.model.parameters())


def test_texts_are_shifted_as_a_whole(make_model: Make, make_items: Items) -> None:
    from dataclasses import replace

    [item] = make_items([4], prompt=1)
    text = replace(item, example=replace(item.example, prompt=""))
    model = make_model(layers=2)
    [shift] = _attack(model, blocks(model)[0], [text], 1, 2.0, 0.05).values()
    assert len(shift) == 5
    assert bool((shift[:4] != 0).all())


# Combinations

FORGET, RETAIN = {"p": float64([1, -2])}, {"p": float64([1, 1])}


def test_gru_by_hand() -> None:
    """⟨g_f, g_r⟩ = −1, ‖g_r‖² = 2: g_f + g_r/2 = (1.5, −1.5), and with g_r (2.5, −0.5); ḡ = 0.8·g_r has the same line.

    Then g_r = (0, 1): ḡ = 0.8·(0, 1) + 0.2·(0.8, 0.8) = (0.16, 0.96), ⟨g_f, ḡ⟩ = −1.76, ‖ḡ‖² = 0.9472.
    """
    state: Weights = {}
    for gamma in (1.0, 0.8):
        gru = bind("step", f"gru:gamma={gamma}")
        found = gru(forget_gradients=FORGET, retain_gradients=RETAIN, state=state)
        assert found["p"].tolist() == pytest.approx([2.5, -0.5], rel=1e-14)
        assert bool(state) == (gamma < 1)
    found = gru(forget_gradients=FORGET, retain_gradients={"p": float64([0, 1])}, state=state)
    back = -1.76 / 0.9472
    assert found["p"].tolist() == pytest.approx([1 - back * 0.16, -2 - back * 0.96 + 1], rel=1e-14)


@pytest.mark.parametrize("seed", range(20))
def test_gru_leaves_no_conflict_and_adds_where_there_is_none(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    forget, retain = (
        {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in (("a", (3, 2)), ("b", (4,)))
        }
        for _ in range(2)
    )

    def inner(a: Weights, b: Weights) -> float:
        return sum(float((a[name] * b[name]).sum()) for name in a)

    found = bind("step", "gru:gamma=1")(forget_gradients=forget, retain_gradients=retain, state={})
    rectified = {name: found[name] - retain[name] for name in found}
    assert inner(rectified, retain) >= -1e-12
    if inner(forget, retain) >= 0:
        assert same(found, {name: forget[name] + retain[name] for name in forget})
    else:
        assert inner(rectified, retain) == pytest.approx(0, abs=1e-12)


def test_disruption_by_hand() -> None:
    forget = {"p": float64([1, -2, 3, 5])}
    retain = {"p": float64([2, 2, -1, 0])}
    none = bind("step", "disruption:momentum=0")
    found = none(forget_gradients=forget, retain_gradients=retain, state={})
    assert found["p"].tolist() == [3, 2, -1, 0]
    state: Weights = {}
    some = bind("step", "disruption:momentum=0.9")
    assert same(some(forget_gradients=forget, retain_gradients=retain, state=state), found)
    later = {
        "p": float64([-1, -20, 0, 1])
    }  # ḡ = 0.9·0.1·(2, 2, −1, 0) + 0.1·(−1, −20, 0, 1) = (0.08, −1.82, −0.09, 0.1)
    found = some(forget_gradients=forget, retain_gradients=later, state=state)
    assert state["p"].tolist() == pytest.approx([0.08, -1.82, -0.09, 0.1])
    assert found["p"].tolist() == [1 - 1, -2 - 20, 0, 5 + 1]


def test_disruption_forgets_only_where_signs_agree(make_model: Make, made: Callable) -> None:
    terms, step_plugins = made("npo + nll + disruption:momentum=0")
    loop = loop_of(make_model(), terms, step_plugins, batch_size=7, clip=1e9)
    forget, retain = (loop._whole_gradients(kind) for kind in ("forget", "retain"))
    loop.step(9)
    for name, p in loop.parameters.items():
        assert p.grad is not None
        expected = retain[name] + forget[name] * (forget[name].sign() == retain[name].sign())
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-5)


def test_dual_by_hand() -> None:
    """λ = 2, then 2 + 0.5·(1.3 − 0.3) = 2.5, then 2.5 + 0.5·(0.1 − 0.3) = 2.4, then max(0, 2.4 − 5.15) = 0."""
    dual, state = bind("step", "dual:epsilon=0.3:eta=0.5:start=2"), {}
    for loss, multiplier in ((1.3, 2), (0.1, 2.5), (-10, 2.4), (0.3, 0)):
        found = dual(forget_gradients=FORGET, retain_gradients=RETAIN, retain_loss=loss, state=state)
        assert found["p"].tolist() == pytest.approx([1 + multiplier, -2 + multiplier], rel=1e-14)
    assert float(state["multiplier"]) == 0


def test_dual_raises_its_multiplier_while_retaining_fails(make_model: Make, made: Callable) -> None:
    found = []
    for epsilon in (0.5, 50):
        terms, step_plugins = made(f"ga + nll + dual:start=10:epsilon={epsilon}")
        loop = loop_of(make_model(), terms, step_plugins)
        loop.step(9)
        found.append(float(loop.pipeline.state["multiplier"]))
    assert found[0] > 10 > found[1]


# Optimizers


def test_sophia_by_hand() -> None:
    """g = 0.5: m = 0.05, h = 0.0125; ρ·B·h = 0.04·5120·0.0125 = 2.56, so the step is m/2.56; B = 2 clips it to 1.

    Then g = −1: m = 0.045 − 0.1 = −0.055, h = 0.011875 + 0.05 = 0.061875, ρ·B·h = 12.672.
    """
    for tokens, steps in ((5120, (0.05 / 2.56, -0.055 / 12.672)), (2, (1, -1))):
        p = nn.Parameter(float64([[1.0]]))
        optimizer = bind("step", f"sophia:tokens={tokens}")(parameters=[p], lr=0.1)
        expected = 1.0
        for gradient, step in zip((0.5, -1.0), steps, strict=True):
            p.grad = float64([[gradient]])
            optimizer.step()
            expected = expected * (1 - 0.1 * 0.1) - 0.1 * step
            assert p.item() == pytest.approx(expected, rel=1e-12)


def test_sophia_decays_no_vectors_and_stays_where_there_is_no_gradient() -> None:
    p, matrix = nn.Parameter(float64([1.0])), nn.Parameter(float64([[1.0]]))
    optimizer = bind("step", "sophia")(parameters=[p, matrix], lr=0.5)
    p.grad, matrix.grad = torch.zeros_like(p), torch.zeros_like(matrix)
    optimizer.step()
    assert p.item() == 1
    assert matrix.item() == 0.95


# Adapters


def test_lora_by_hand() -> None:
    update = LowRank(float64([[1, 2, 3], [4, 5, 6]]), rank=1, alpha=4.0, generator=torch.Generator().manual_seed(0))
    assert update.b.tolist() == [[0], [0]]
    assert bool((update.a.abs() <= 3**-0.5).all())
    with torch.no_grad():
        update.a.copy_(float64([[1, 0, -1]]))
        update.b.copy_(float64([[0.5], [2]]))
    assert update(float64([[1, 2, 3], [4, 5, 6]])).tolist() == [[3, 2, 1], [12, 5, -2]]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 9)[None]).logits


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_merged_adapter_is_the_adapted_model(family: str, make_model: Make, made: Callable) -> None:
    terms, step_plugins = made("npo + nll + lora:rank=2:names=*attn*")
    model = make_model(family, layers=2)
    original, start = logits(model), weights_of(model)
    loop = loop_of(model, terms, step_plugins, lr=1e-2)
    assert torch.equal(logits(model), original)
    for _ in range(5):
        loop.step(5)
    adapted = logits(model)
    assert (adapted - original).abs().max() > 1e-2
    loop.pipeline.close()
    assert torch.equal(logits(model), adapted)
    names = [name for name, p in model.named_parameters() if "attn" in name and p.dim() == 2]
    assert {name for name, w in weights_of(model).items() if not torch.equal(w, start[name])} == set(names)
    ranks = {name: int(torch.linalg.matrix_rank(model.get_parameter(name) - start[name], rtol=1e-3)) for name in names}
    assert set(ranks.values()) == {2}
    assert weights_of(model).keys() == start.keys()


def test_an_adapters_reference_is_the_original(make_model: Make, made: Callable) -> None:
    terms, step_plugins = made("npo + nll:weight=0 + lora")
    assert loop_of(make_model(), terms, step_plugins).step(9) == pytest.approx(20 * math.log(2), rel=1e-6)


# Curricula


def test_layered_by_hand() -> None:
    stages = bind("step", "layered:folds=3")(count=5)
    assert stages == [([0, 3], [1, 2, 4]), ([0, 1, 3, 4], [2]), ([0, 1, 2, 3, 4], [])]


def test_stages_take_equal_shares_of_the_steps_and_retain_what_is_deferred(make_model: Make, made: Callable) -> None:
    terms, step_plugins = made("ga + nll + layered:folds=2")
    loop = loop_of(make_model(), terms, step_plugins, batch_size=2, epochs=4)
    forget, retain = terms[0].items, terms[1].items
    drawn = [
        [{loop.terms[k].items[i].ids for step in steps for i, _ in loop._batch(k, step)} for k in (0, 1)]
        for steps in (range(5), range(5, 10))
    ]
    first, second = ({forget[i].ids for i in chosen} for chosen in ((0, 2, 4), (1, 3)))
    assert drawn[0][0] == first
    assert drawn[1][0] == first | second
    assert drawn[0][1] <= {item.ids for item in retain} | second
    assert drawn[0][1] & second
    assert drawn[1][1] <= {item.ids for item in retain}
