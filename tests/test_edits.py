"""Edits: what each does to a tiny model, against its formula; what it leaves alone, bit by bit; what it refuses."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillknows.errors import UserError
from stillknows.methods.edits.distillation import noise
from stillknows.methods.edits.formats import raise_update
from stillknows.methods.edits.influence import newton_step
from stillknows.model import parameters
from stillknows.model.forward import mean_extraction, mean_probability, score_items
from stillknows.model.layers import block_output, blocks, linears, output_layer
from stillknows.model.ref import ModelRef
from stillknows.registry import bind, plugins
from stillknows.store import read_json
from stillknows.training.loop import fit
from stillknows.training.objective_inputs import Term
from stillknows.training.settings import Settings
from stillknows.types import Benchmark, Example, Split
from stillknows.unlearning import unlearn
from stillknows.variants.compress import parse_variant, quantize

Items = Callable[..., list[Any]]
Make = Callable[..., Any]
SETTINGS = Settings(lr=1e-3, epochs=3, batch_size=4)
# An option with which each edit changes nothing.
IDENTITY = {
    "task_vector": "alpha=0",
    "mix": "alpha=1",
    "equal_retain": None,  # depends on the scores
    "undo": "alpha=0",
    "lunar": "coefficient=0",
    "influence": "scale=0",
    "floor": "share=0",
}
EDITS = list(plugins("edit"))
every_edit = pytest.mark.parametrize("name", EDITS)


def moved(model: nn.Module, scale: float = 0.01, seed: int = 3) -> Any:
    """Return a copy some way off."""
    found = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in found.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return found


def apply(spec: str, model: nn.Module, original: nn.Module, make_items: Items) -> dict[str, Tensor]:
    """Run an edit with everything that it may ask for, and return the weights."""
    forget, retain = make_items([3, 4, 2]), make_items([2, 5, 3, 4], seed=1)
    given: dict[str, Any] = {
        "model": model,
        "original": parameters.copies(original),
        "reinforced": moved(original, 0.02, seed=8),
        "forget": forget,
        "retain": retain,
        "refusals": [[item] for item in make_items([3, 3, 3], seed=7)],
        "settings": SETTINGS,
    }
    edit = bind("edit", spec)
    edit(**{name: given[name] for name in edit.plugin.needs})
    return parameters.copies(model)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@every_edit
def test_edits_change_something_and_two_runs_agree(name: str, make_model: Make, make_items: Items) -> None:
    original = make_model(layers=2)
    before = parameters.copies(moved(original))
    runs = [apply(name, moved(original), original, make_items) for _ in range(2)]
    assert same(*runs)
    assert all(bool(w.isfinite().all()) for w in runs[0].values())
    if name != "equal_retain":
        assert not same(before, runs[0])


@every_edit
def test_the_identity_leaves_every_bit(name: str, make_model: Make, make_items: Items) -> None:
    assert name in IDENTITY, f"name the option with which {name} changes nothing in IDENTITY"
    if IDENTITY[name] is None:
        return
    original = make_model(layers=2)
    before = parameters.copies(moved(original))
    assert same(apply(f"{name}:{IDENTITY[name]}", moved(original), original, make_items), before)


@pytest.mark.parametrize(
    "spec",
    [
        *("mix:alpha=1.1", "mix:alpha=-0.1", "equal_retain:floor=0", "equal_retain:floor=1.01", "undo:alpha=2"),
        *("undo:beta=-1", "undo:lr=0", "undo:epochs=-1", "lunar:damping=0", "influence:radius=0"),
        *("influence:damping=0", "floor:share=2", "floor:bins=0", "mix:alpha=nan"),
    ],
)
def test_options_out_of_range_are_refused_when_they_are_read(spec: str) -> None:
    with pytest.raises(UserError, match=f"{spec} is out of range"):
        bind("edit", spec)


def test_a_task_vector_is_taken_away(make_model: Make, make_items: Items) -> None:
    """θ − α·(θ_ft − θo), also where θ is not θo: MUSE's code adds −α times the vector to the model it is given."""
    original = make_model(layers=2)
    start, taught = parameters.copies(moved(original)), parameters.copies(moved(original, 0.02, seed=8))
    found = apply("task_vector:alpha=2.5", moved(original), original, make_items)
    for name, o in parameters.copies(original).items():
        torch.testing.assert_close(found[name], start[name] - 2.5 * (taught[name] - o), rtol=1e-5, atol=1e-6)


def test_what_the_reinforced_model_did_not_change_keeps_its_bits(make_model: Make) -> None:
    original, reinforced = make_model(), make_model()
    with torch.no_grad():
        reinforced.lm_head.weight.add_(0.25)
    model = make_model()
    bind("edit", "task_vector")(model=model, original=parameters.copies(original), reinforced=reinforced)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, original.get_parameter(n))]
    assert changed == ["lm_head.weight"]
    torch.testing.assert_close(model.lm_head.weight, original.lm_head.weight - 5 * 0.25)


def test_equal_retain_keeps_the_retain_items_probability(
    make_model: Make, make_items: Items, caplog: pytest.LogCaptureFixture
) -> None:
    original = make_model(layers=2)
    retain = make_items([2, 5, 3, 4], seed=1)
    fit(original, [Term(bind("objective", "nll"), retain)], Settings(lr=1e-2, epochs=30, batch_size=4))

    def probability(model: nn.Module) -> float:
        return mean_probability(score_items(model, output_layer(model), retain))

    damaged = moved(original, 0.3)
    start = probability(original)
    caplog.set_level("INFO", "stillknows")
    assert probability(damaged) < 0.9 * start
    apply("equal_retain", damaged, original, make_items)
    assert 0.95 * start <= probability(damaged) < start
    words = (
        r"mixed with the original: \d[\d.]* % of the update is taken, which keeps 95 % of the original's .* on retain"
    )
    assert re.fullmatch(words, caplog.messages[-1])
    unharmed = moved(original, 1e-6)
    caplog.clear()
    before = parameters.copies(unharmed)
    assert same(apply("equal_retain", unharmed, original, make_items), before)
    assert caplog.messages == []


def test_equal_retain_by_extraction_strength(make_model: Make, make_items: Items) -> None:
    """As published: what follows from the beginning of an answer is what stays, and not its probability."""
    original = make_model(layers=2)
    retain = make_items([2, 5, 3, 4], seed=1)
    fit(original, [Term(bind("objective", "nll"), retain)], Settings(lr=1e-2, epochs=30, batch_size=4))

    def strength(model: nn.Module) -> float:
        return mean_extraction(score_items(model, output_layer(model), retain), retain)

    damaged = moved(original, 0.3)
    assert strength(original) > strength(damaged)
    apply("equal_retain:by=extraction_strength", damaged, original, make_items)
    assert strength(damaged) >= 0.95 * strength(original)
    assert not same(parameters.copies(damaged), parameters.copies(original))


def test_noise_shrinks_vectors_and_disturbs_matrices_within_glorots_bound(make_model: Make) -> None:
    before, model = make_model(hidden=32), make_model(hidden=32)
    noise(model, 0.25, 0.5, seed=3)
    spread = []
    for name, p in model.named_parameters():
        rest = p - 0.75 * before.get_parameter(name)
        if p.dim() < 2:
            torch.testing.assert_close(rest, torch.zeros_like(rest), rtol=0, atol=1e-6)
            continue
        bound = 0.25 * 0.5 * (6 / sum(p.shape)) ** 0.5
        assert 0.95 * bound < rest.abs().max() < bound * (1 + 1e-4)
        spread.append(float(rest.std() / (bound / 3**0.5)))
    assert spread == pytest.approx([1.0] * len(spread), abs=0.1)
    empty = make_model()
    noise(empty, 1.0, 0.0, seed=3)
    assert all(not p.any() for p in empty.parameters())


def test_noise_is_of_its_seed(make_model: Make) -> None:
    models = [make_model() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        noise(model, 0.5, 0.1, seed)
    assert same(parameters.copies(models[0]), parameters.copies(models[1]))
    assert not same(parameters.copies(models[0]), parameters.copies(models[2]))


def kl(student: nn.Module, teacher: nn.Module, items: list[Any]) -> float:
    """Mean over items of the mean over answer tokens of KL(teacher ‖ student), from plain logits."""
    found = []
    for item in items:
        ids = torch.tensor([item.ids])
        p, q = (m(input_ids=ids).logits[0].log_softmax(-1)[item.start - 1 : -1] for m in (teacher, student))
        found.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return sum(found) / len(found)


def test_undo_teaches_the_noised_copy_what_the_model_said(make_model: Make, make_items: Items) -> None:
    """Away from θu for good, but near in what it says of the retain items; forgetting is not trained against."""
    model, teacher, noised = (make_model(layers=2) for _ in range(3))
    retain = make_items([2, 5, 3, 4], seed=1)
    settings = Settings(lr=3e-3, epochs=40, batch_size=4, seed=5, retain_floor=0.9, forget_below=0.5)
    noise(noised, 0.6, 0.1, settings.seed)
    bind("edit", "undo:alpha=0.6")(model=model, retain=retain, settings=settings)
    with torch.no_grad():
        assert kl(model, teacher, retain) < 0.3 * kl(noised, teacher, retain)
    kept, undone, lost = (nn.utils.parameters_to_vector(m.parameters()) for m in (model, noised, teacher))
    assert (kept - undone).norm() < (kept - lost).norm()


def test_undo_is_shrink_perturb_and_then_distillation(make_model: Make, make_items: Items) -> None:
    """The same bits as fit of kl that starts from the noised weights, with the learning rate and epochs of its own."""
    retain = make_items([2, 5, 3, 4], seed=1)
    model, expected = make_model(), make_model()
    bind("edit", "undo:alpha=0.3:lr=0.01:epochs=2")(model=model, retain=retain, settings=SETTINGS)
    fit(
        expected,
        [Term(bind("objective", "kl"), retain)],
        replace(SETTINGS, lr=0.01, epochs=2),
        start=lambda noised: noise(noised, 0.3, 0.1, SETTINGS.seed),
    )
    assert same(parameters.copies(model), parameters.copies(expected))


def seen(model: nn.Module, item: Any, number: int) -> tuple[Tensor, Tensor]:
    """The output of a block at all tokens of an item, and what its down projection was given, [L, …]."""
    given: list[Tensor] = []
    handle = blocks(model)[number - 1].mlp.down_proj.register_forward_pre_hook(lambda _, x: given.append(x[0]))  # type: ignore
    with block_output(blocks(model)[number - 1]) as put_out:
        model(input_ids=torch.tensor([item.ids]))
    handle.remove()
    return put_out[0][0], given[0][0]


def lunar_case(make_model: Make, make_items: Items, **sizes: Any) -> tuple[Any, Any, dict[str, Any]]:
    forget, retain = make_items([2, 1], prompt=2), make_items([2, 2], prompt=2, seed=1)
    refusals = [
        [
            replace(item, ids=(*item.ids[: item.start], *other.ids[other.start :]))
            for other in make_items([2, 3], seed=k)
        ]
        for k, item in enumerate(forget, 7)
    ]
    model, before = make_model(layers=3, **sizes), make_model(layers=3, **sizes)
    return model, before, {"model": model, "forget": forget, "retain": retain, "refusals": refusals}


def test_lunar_moves_forget_states_by_the_direction_and_no_retain_state(make_model: Make, make_items: Items) -> None:
    """11 tokens give 24 inputs each: with little damping least squares meets every one of them."""
    model, before, given = lunar_case(make_model, make_items)
    with torch.no_grad():
        bind("edit", "lunar:layer=2:coefficient=1.5:damping=1e-9")(**given)
        told = [seen(before, x, 2)[0][x.start - 1 : -1] for items in given["refusals"] for x in items]
        known = [seen(before, x, 2)[0][x.start - 1 : -1] for x in given["forget"]]
        shift = 1.5 * (torch.cat(told).mean(0) - torch.cat(known).mean(0))
        for item in given["forget"]:
            a, b = (seen(m, item, 2)[0][item.start - 1 : -1] for m in (model, before))
            torch.testing.assert_close(a - b, shift.expand_as(a), rtol=1e-2, atol=1e-3 * float(shift.norm()))
        for item in given["retain"]:
            a, b = (seen(m, item, 2)[0] for m in (model, before))
            torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * float(shift.norm()))
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]


def test_lunars_matrix_is_the_damped_least_squares_solution(make_model: Make, make_items: Items) -> None:
    """Against torch's solver on the stacked system, damping as further rows."""
    model, before, given = lunar_case(make_model, make_items)
    with torch.no_grad():
        bind("edit", "lunar:layer=1:coefficient=2:damping=0.1")(**given)
        told = [seen(before, x, 1)[0][x.start - 1 : -1] for items in given["refusals"] for x in items]
        known = [[part[x.start - 1 : -1] for part in seen(before, x, 1)] for x in given["forget"]]
        kept = torch.cat([seen(before, x, 1)[1] for x in given["retain"]]).double()
    shift = 2 * (torch.cat(told).mean(0) - torch.cat([states for states, _ in known]).mean(0)).double()
    forget = torch.cat([inputs for _, inputs in known]).double()
    square = (forget.T @ forget + kept.T @ kept).diagonal().mean()
    rows = torch.cat([forget, kept, (0.1 * square).sqrt() * torch.eye(24)])
    goal = torch.cat([shift.expand(len(forget), -1), torch.zeros(len(kept) + 24, 16)])
    expected = torch.linalg.lstsq(rows, goal).solution.T
    found = blocks(model)[0].mlp.down_proj.weight - blocks(before)[0].mlp.down_proj.weight  # type: ignore[operator]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "phi", "gpt_neox", "qwen3"])
def test_lunar_knows_families_that_add_what_they_write(family: str, make_model: Make, make_items: Items) -> None:
    forget, retain = make_items([2, 3]), make_items([2, 4], seed=1)
    refusals = [[item] for item in make_items([3, 3], seed=7)]
    model, before = make_model(family, layers=2), make_model(family, layers=2)
    bind("edit", "lunar:layer=2")(model=model, forget=forget, retain=retain, refusals=refusals)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    assert len(changed) == 1


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_lunar_refuses_families_that_do_more(family: str, make_model: Make, make_items: Items) -> None:
    """Gemma 2 normalises what is written, Granite scales it. The weights are as before."""
    model = make_model(family)
    if family == "granite":
        model.model.layers[0].residual_multiplier = 0.2
    before = parameters.copies(model)
    given = {"forget": make_items([2, 3]), "retain": make_items([2], seed=1)}
    with pytest.raises(UserError, match="does more to what its feed-forward layers put out"):
        bind("edit", "lunar:layer=1")(model=model, refusals=[[i] for i in make_items([3, 3], seed=7)], **given)
    assert same(parameters.copies(model), before)


def test_a_newton_step_by_hand() -> None:
    """h = 1, 4, 1 has mean 2, λ = 1: g/(h + λ) = 1, .4, −1; ½·Σ(h + λ)·step² = (2 + .8 + 2)/2 = 2.4."""
    g = {"a": torch.tensor([2.0, 2.0]), "b": torch.tensor([-2.0])}
    h = {"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([1.0])}
    plain = newton_step(g, h, rate=1, radius=2.5, damping=0.5)
    torch.testing.assert_close(torch.cat([*plain.values()]), torch.tensor([1.0, 0.4, -1.0]))
    shorter = newton_step(g, h, rate=1, radius=0.6, damping=0.5)
    torch.testing.assert_close(torch.cat([*shorter.values()]), torch.tensor([0.5, 0.2, -0.5]))
    half = newton_step(g, h, rate=0.5, radius=torch.inf, damping=0.5)
    torch.testing.assert_close(torch.cat([*half.values()]), torch.tensor([0.5, 0.2, -0.5]))
    with pytest.raises(UserError, match="has no gradient in these tensors"):
        newton_step(g, {name: torch.zeros_like(v) for name, v in h.items()}, 1, 1, 1)


def test_influence_equals_plain_autograd_and_moves_the_named_tensors_only(make_model: Make, make_items: Items) -> None:
    forget, retain = make_items([3, 1]), make_items([2, 5, 3, 4], seed=1)
    model, plain = make_model(layers=2), make_model(layers=2)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    weights = [plain.get_parameter(name).requires_grad_(True) for name in names]

    def gradients(item: Any) -> tuple[Tensor, ...]:
        log_probs = plain(input_ids=torch.tensor([item.ids])).logits[0].log_softmax(-1)
        targets = torch.tensor(item.ids[item.start :])
        loss = -log_probs[item.start - 1 : -1].gather(1, targets[:, None]).mean()
        return torch.autograd.grad(loss, weights)

    g = [torch.stack(found).mean(0) for found in zip(*map(gradients, forget), strict=True)]
    h = [torch.stack(found).square().mean(0) for found in zip(*map(gradients, retain), strict=True)]
    added = 0.2 * float(torch.cat([x.flatten() for x in h]).mean())
    bind("edit", "influence:names=*up_proj*:damping=0.2:scale=1e-4:radius=inf")(
        model=model, forget=forget, retain=retain
    )
    for name, start, gi, hi in zip(names, weights, g, h, strict=True):
        expected = 1e-4 * (2 / 4) * gi / (hi + added)
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(model.get_parameter(name) - start, expected, rtol=1e-2, atol=1e-6)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, plain.get_parameter(n))]
    assert changed == names
    assert not any(p.requires_grad for p in model.parameters())


def test_influence_forgets_more_than_it_costs(make_model: Make, make_items: Items) -> None:
    model = make_model(layers=2)
    forget, retain = make_items([3, 4]), make_items([2, 5, 3, 4], seed=1)
    fit(model, [Term(bind("objective", "nll"), [*forget, *retain])], Settings(lr=1e-2, epochs=20, batch_size=6))

    def probability(items: list[Any]) -> float:
        return mean_probability(score_items(model, output_layer(model), items))

    before = probability(forget), probability(retain)
    bind("edit", "influence")(model=model, forget=forget, retain=retain)
    after = probability(forget), probability(retain)
    assert after[0] < 0.5 * before[0]
    assert after[1] > 0.8 * before[1]


def test_a_floor_by_hand() -> None:
    """Grid of rtn, one scale per row: Δ = 7/7 = 1. Rounding errors are .25, 0, −.25, 0: a step is √12·√(1/32) = .612.

    1.25 − .612 is still in the bin of 1, 1.25 − 1.5·.612 is not. 7 moves outwards and keeps its own change.
    """
    before = torch.tensor([[1.25, 2.0, 2.75, 7.0]])
    now = before + torch.tensor([[-0.25, 0.01, -0.01, 0.02]])
    chain = parse_variant("rtn:group=0")
    step = 12**0.5 / 32**0.5
    chosen = torch.tensor([[True, True, False, True]])
    raised = raise_update(before, now, chosen, chain, bins=1.0)
    expected = torch.tensor([[1.25 - 1.5 * step, 2 + step, 2.74, 7.02]])
    torch.testing.assert_close(raised, expected)
    crossing = quantize(raised, chain).codes_OI != quantize(before, chain).codes_OI
    assert crossing.tolist() == [[True, True, False, False]]
    twice = raise_update(before, now, chosen, chain, bins=2.0)
    torch.testing.assert_close(twice[0, :3], torch.tensor([1.25 - 2 * step, 2 + 2 * step, 2.74]))


@pytest.mark.parametrize("spec", ["nf4", "rtn:group=0", "fp4"])
def test_the_floor_raises_the_largest_changes_only(spec: str, make_model: Make) -> None:
    original = make_model(hidden=64)
    model = moved(original, 1e-4)
    start = copy.deepcopy(model)
    floor = plugins("edit")["floor"].function
    floor(model, parameters.copies(original), format=spec, share=0.05, bins=1)
    chain = parse_variant(spec)
    matrices = {f"{layer.name}.weight" for layer in linears(model)}
    for name, p in model.named_parameters():
        before, now = original.get_parameter(name), start.get_parameter(name)
        raised = p != now
        if name not in matrices:
            assert not raised.any()
            continue
        assert 0.9 * 0.05 < raised.float().mean() <= 0.05 + 1 / p.numel()
        assert (now - before).abs()[raised].min() >= (now - before).abs()[~raised].quantile(0.9)
        assert torch.equal((p - before)[raised].sign(), (now - before)[raised].sign())
        errors = before - quantize(before, chain).values_OI
        steps = (12 * errors.square().mean(1, keepdim=True)).sqrt().expand_as(p)
        assert bool(((p - before).abs()[raised] >= 0.999 * steps[raised]).all())
        crossing = quantize(p, chain).codes_OI != quantize(before, chain).codes_OI
        assert crossing[raised].float().mean() > 0.99
        lost = quantize(now, chain).codes_OI == quantize(before, chain).codes_OI
        assert lost[raised].float().mean() > 0.9  # which is what the floor is for


def test_what_was_not_changed_is_never_chosen(make_model: Make) -> None:
    original, model = make_model(), make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    bind("edit", "floor:share=1")(model=model, original=parameters.copies(original))
    changed = {n: int((p != original.get_parameter(n)).sum()) for n, p in model.named_parameters()}
    assert changed.pop("model.layers.0.mlp.up_proj.weight") == 1
    assert not any(changed.values())


def benchmark(refusals: tuple[str, ...] = ("the dog",), *, retains: bool = True) -> Benchmark:
    forget = Split("forget", "forget", (Example("a", "what is", "red", "a"), Example("b", "who is", "Ada", "b")))
    retain = Split("retain", "retain", (Example("c", "where is", "blue", "c"), Example("d", "what flows", "cat", "d")))
    return Benchmark("test", (forget, retain) if retains else (forget,), refusals=refusals)


@pytest.mark.parametrize(
    ("method", "source", "message"),
    [
        ("npo + nll + lunar:layer=9", benchmark(), "layer=9 does not exist"),
        ("lunar", benchmark(retains=False), "has no split to retain, which lunar"),
        ("npo + undo", benchmark(retains=False), "has no split to retain, which undo"),
        ("npo + equal_retain", benchmark(retains=False), "has no split to retain, which equal_retain"),
        ("influence:names=*nothing*", benchmark(), "no tensor is called"),
        ("npo + floor:format=nf5", benchmark(), "no format named 'nf5'"),
        ("npo + floor:format=gptq", benchmark(), "needs a format of weights alone"),
        ("npo + floor:format=kv_fp8", benchmark(), "needs a format of weights alone"),
        ("npo + floor:format=rtn", benchmark(), "groups of 128 do not divide"),
        ("npo + undo:alpha=3", benchmark(), "alpha=3 is out of range"),
    ],
)
def test_what_cannot_work_is_told_before_the_model_is_loaded(
    method: str,
    source: Benchmark,
    message: str,
    save_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(ModelRef, "load", lambda *args, **options: pytest.fail("the model was loaded"))
    request = unlearn.UnlearnConfig(str(save_model("model")), source, method, SETTINGS)
    with pytest.raises(UserError, match=message):
        unlearn.unlearn(request, tmp_path / "out")


def test_edits_run_after_the_training_and_in_their_order(save_model: Callable[..., Path], tmp_path: Path) -> None:
    """npo + nll, then halfway back; with alpha=0 back to the original, whatever came before."""
    folder, found = save_model("model"), {}
    for name, method in (
        ("plain", "npo + nll"),
        ("half", "npo + nll + mix"),
        ("back", "npo + nll + floor:format=nf4 + undo + equal_retain + mix:alpha=0"),
        ("lunar", "lunar:layer=1"),
    ):
        out = tmp_path / name
        unlearn.unlearn(unlearn.UnlearnConfig(str(folder), benchmark(), method, SETTINGS), out)
        found[name] = parameters.copies(ModelRef.open(str(out)).load().model)
        assert read_json(out / "run.json")["method"] == method
    original = parameters.copies(ModelRef.open(str(folder)).load().model)
    assert same(found["back"], original)
    for key, o in original.items():
        torch.testing.assert_close(found["half"][key], (o + found["plain"][key]) / 2)
    changed = [key for key, o in original.items() if not torch.equal(o, found["lunar"][key])]
    assert changed == ["model.layers.0.mlp.down_proj.weight"]
