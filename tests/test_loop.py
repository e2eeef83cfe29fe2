"""The optimisation loop: the same bits for the same settings, also after an interruption; what ends a run."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor, nn

from stillknows.errors import UserError
from stillknows.model import parameters
from stillknows.model.forward import mean_probability, score_items
from stillknows.model.layers import output_layer
from stillknows.registry import bind
from stillknows.training import loop, objective_inputs
from stillknows.training.loop import FitResult, fit
from stillknows.training.objective_inputs import Term
from stillknows.training.scrambled_answers import scrambled
from stillknows.training.settings import Settings
from stillknows.training.watch import Seen, Watch
from stillknows.training.weight_rounding import WeightStorage

Items = Callable[..., list[Any]]
Make = Callable[..., Any]
STORAGES: tuple[WeightStorage, ...] = get_args(WeightStorage)
every_storage = pytest.mark.parametrize("weights", STORAGES)


@pytest.fixture
def terms(make_items: Items) -> list[Term]:
    """npo on 5 items and kl and nll on 7 others: every kind of reference takes part."""
    forget, retain = make_items([3, 1, 4, 2, 5]), make_items([2, 6, 3, 3, 1, 4, 2], seed=1)
    return [
        Term(bind("objective", "npo"), forget),
        Term(bind("objective", "kl"), retain),
        Term(bind("objective", "nll:weight=0.5"), retain),
    ]


def setting(**changes: Any) -> Settings:
    return Settings(**({"lr": 3e-3, "epochs": 4, "batch_size": 2, "check_every": 2, "save_seconds": 0} | changes))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained(make_model: Make, terms: list[Term], **changes: Any) -> dict[str, Tensor]:
    model = make_model()
    fit(model, terms, setting(**changes))
    return weights_of(model)


@every_storage
def test_one_seed_gives_one_result_and_another_seed_another(
    weights: WeightStorage, make_model: Make, terms: list[Term]
) -> None:
    first = trained(make_model, terms, weights=weights)
    torch.rand(3)  # the global generator plays no part
    assert same(first, trained(make_model, terms, weights=weights))
    assert not same(first, trained(make_model, terms, weights=weights, seed=1))


@every_storage
@pytest.mark.parametrize("interrupted_after", [2, 5, 9])
@pytest.mark.parametrize("how", [{}, {"retain_floor": 0.01, "schedule": "linear", "warmup": 3, "accumulate": 2}])
def test_a_resumed_run_ends_with_the_same_bits(
    weights: WeightStorage,
    interrupted_after: int,
    how: dict[str, Any],
    make_model: Make,
    terms: list[Term],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s = setting(weights=weights, **how)
    monitor = (terms[0].items, terms[1].items)
    whole = make_model()
    outcome = fit(whole, terms, s, monitor=monitor)
    assert outcome.steps == 10

    path = tmp_path / "checkpoint.safetensors"
    step = loop._Loop.step

    def interrupted(self: loop._Loop, total: int) -> float:
        if self.done.steps == interrupted_after:
            raise KeyboardInterrupt
        return step(self, total)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(make_model(), terms, s, monitor=monitor, checkpoint=path, plan_key="plan")
    assert path.is_file()

    taken: list[int] = []
    monkeypatch.setattr(loop._Loop, "step", lambda self, total: (taken.append(1), step(self, total))[1])
    resumed = make_model()
    again = fit(resumed, terms, s, monitor=monitor, checkpoint=path, plan_key="plan")
    assert len(taken) == 10 - (interrupted_after // 2 * 2 if "retain_floor" in how else interrupted_after)
    assert same(weights_of(resumed), weights_of(whole))
    assert (again.steps, again.stopped, again.tokens) == (outcome.steps, outcome.stopped, outcome.tokens)
    assert again.history == outcome.history


def test_a_run_interrupted_twice_and_a_finished_one_resume_too(
    make_model: Make, terms: list[Term], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, step = tmp_path / "checkpoint.safetensors", loop._Loop.step
    whole = trained(make_model, terms, weights="stochastic")

    def run(stop: int) -> nn.Module:
        def interrupted(self: loop._Loop, total: int) -> float:
            if self.done.steps == stop:
                raise KeyboardInterrupt
            return step(self, total)

        monkeypatch.setattr(loop._Loop, "step", interrupted)
        model = make_model()
        fit(model, terms, setting(weights="stochastic"), checkpoint=path, plan_key="plan")
        return model

    for stop in (3, 7):
        with pytest.raises(KeyboardInterrupt):
            run(stop)
    assert same(weights_of(run(-1)), whole)
    assert same(weights_of(run(10)), whole)  # nothing left to do


def test_a_checkpoint_of_another_plan_is_refused(make_model: Make, terms: list[Term], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    fit(make_model(), terms, setting(), checkpoint=path, plan_key="plan")
    with pytest.raises(UserError, match="belongs to a run with other settings"):
        fit(make_model(), terms, setting(lr=1e-3), checkpoint=path, plan_key="another")


def test_checkpoints_are_written_by_time_and_not_too_often(
    make_model: Make, terms: list[Term], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(loop._Loop, "save", lambda self, path, plan_key: saved.append(self.done.steps))
    fit(make_model(), terms, setting(check_every=3), checkpoint=tmp_path / "a")
    assert saved == list(range(1, 11))
    saved.clear()
    fit(make_model(), terms, setting(check_every=3, retain_floor=0.01), checkpoint=tmp_path / "a")
    assert saved == [3, 6, 9, 10]
    saved.clear()
    fit(make_model(), terms, setting(save_seconds=1e9), checkpoint=tmp_path / "a")
    assert saved == []


@pytest.mark.parametrize(("count", "batch"), [(5, 2), (7, 7), (6, 3), (3, 8)])
def test_every_item_is_visited_once_per_epoch(count: int, batch: int, model: Any, make_items: Items) -> None:
    """Of every term, each in its own order, which differs from epoch to epoch and from seed to seed."""
    term = Term(bind("objective", "ga"), make_items([2] * count))
    loops = [loop._Loop(model, [term, term], setting(batch_size=batch, seed=seed), ((), ())) for seed in (0, 1)]
    steps = math.ceil(4 * count / min(batch, count))
    orders = [[i for step in range(steps) for i, _ in loop._batch(k, step)] for loop in loops for k in (0, 1)]
    for order in orders:
        epochs = [order[e * count : (e + 1) * count] for e in range(4)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1
    assert len({tuple(order) for order in orders}) == 4


def test_no_term_is_seen_less_because_another_has_fewer_items(
    model: Any, make_items: Items, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Counter[int]] = [Counter(), Counter()]
    backward = loop._Loop._backward
    monkeypatch.setattr(
        loop._Loop,
        "_backward",
        lambda self, term, given, visits, *parts: (
            seen[[one is term for one in self.terms].index(True)].update(i for i, _ in visits),
            backward(self, term, given, visits, *parts),
        )[1],
    )
    few, many = make_items([2, 3]), make_items([2] * 6, seed=1)
    outcome = fit(model, [Term(bind("objective", "nll"), many), Term(bind("objective", "nll"), few)], setting(epochs=2))
    assert outcome.steps == 6
    assert seen[0] == Counter(dict.fromkeys(range(6), 2))
    assert seen[1] == Counter({0: 6, 1: 6})
    assert outcome.tokens == 2 * sum(len(item.ids) for item in many) + 6 * sum(len(item.ids) for item in few)


@pytest.mark.parametrize(
    ("changes", "steps"), [({}, 10), ({"epochs": 0.5}, 2), ({"max_steps": 3}, 3), ({"batch_size": 99}, 4)]
)
def test_epochs_and_max_steps(changes: dict[str, Any], steps: int, make_model: Make, terms: list[Term]) -> None:
    assert fit(make_model(), terms, setting(**changes)).steps == steps


@pytest.mark.parametrize("changes", [{"epochs": 1e300}, {"epochs": 1e308, "max_steps": 10**400}, {"epochs": 1e7}])
def test_absurd_numbers_of_steps_are_refused_at_once(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"`epochs` \S+ over 4 items are more than 1,000,000 steps"):
        setting(**changes).steps(4)
    assert setting(**changes | {"max_steps": 7}).steps(4) == 7


def probability(model: nn.Module, items: list[Any]) -> float:
    return mean_probability(score_items(model, output_layer(model), items))


def test_forget_below_stops_at_the_first_check_that_is_low_enough(model: Any, make_items: Items) -> None:
    items = make_items([3, 2, 4])
    start = probability(model, items)
    s = setting(lr=2e-3, epochs=100, forget_below=start / 3)
    outcome = fit(model, [Term(bind("objective", "ga"), items)], s, monitor=(items, ()))
    assert outcome.steps < s.steps(3)
    assert outcome.steps % s.check_every == 0
    seen = [check["forget"] for check in outcome.history]
    assert seen[-1] <= start / 3 < min(seen[:-1])
    assert probability(model, items) == pytest.approx(seen[-1], rel=1e-4)
    assert outcome.stopped.startswith("forget items at ")


def test_without_forget_below_no_run_ends_for_it(model: Any, make_items: Items) -> None:
    """Not even where what `look` has seen of the items is 0, as float32 rounds it."""

    class Nothing(Watch):
        def look(self) -> Seen:
            return {"forget": 0.0}

    s = setting(lr=1e-4, epochs=2)
    outcome = fit(model, [Term(bind("objective", "ga"), make_items([3, 2, 4]))], s, watch=Nothing())
    assert (outcome.steps, outcome.stopped) == (s.steps(3), "all steps taken")


def test_retain_floor_goes_back_to_the_last_good_weights(
    make_model: Make, make_items: Items, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradient ascent ruins the retain items too; what is left is the state of the check before, bit by bit."""
    items, retain = make_items([3, 2, 4]), make_items([3, 3], seed=1)
    terms = [Term(bind("objective", "ga"), items), Term(bind("objective", "ga"), retain)]
    model = make_model()
    floor = 0.5
    start = probability(model, retain)
    checked: dict[int, dict[str, Tensor]] = {0: weights_of(model)}
    check = loop._Loop.check

    def watched(self: loop._Loop, *given: Any) -> bool:
        checked[self.done.steps] = weights_of(self.model)
        return check(self, *given)

    monkeypatch.setattr(loop._Loop, "check", watched)
    outcome = fit(model, terms, setting(epochs=50, retain_floor=floor), monitor=((), retain))
    assert outcome.stopped == f"retain below 0.5 of its start; went back to step {outcome.steps}"
    assert outcome.steps == max(checked) - 2
    assert same(weights_of(model), checked[outcome.steps])
    assert probability(model, retain) >= floor * start
    assert outcome.history[-1]["retain"] < floor * start
    assert all(seen["retain"] >= floor * start for seen in outcome.history[:-1])


def test_retain_floor_at_the_first_check_gives_the_start_back(make_model: Make, make_items: Items) -> None:
    retain = make_items([3, 3])
    model = make_model()
    start = weights_of(model)
    outcome = fit(
        model,
        [Term(bind("objective", "ga"), retain)],
        setting(lr=0.5, epochs=9, retain_floor=0.99),
        monitor=((), retain),
    )
    assert outcome.steps == 0
    assert same(weights_of(model), start)


def test_a_resumed_run_goes_back_to_the_weights_that_it_resumed_from(
    make_model: Make, make_items: Items, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted right after the last good check: the next one falls below the floor."""
    retain = make_items([3, 3])
    terms, s = [Term(bind("objective", "ga"), retain)], setting(lr=1e-3, epochs=50, retain_floor=0.5)
    whole = make_model()
    outcome = fit(whole, terms, s, monitor=((), retain))
    assert outcome.steps > 0
    path, step = tmp_path / "checkpoint.safetensors", loop._Loop.step

    def interrupted(self: loop._Loop, total: int) -> float:
        if self.done.steps == outcome.steps:
            raise KeyboardInterrupt
        return step(self, total)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(make_model(), terms, s, monitor=((), retain), checkpoint=path)
    resumed = make_model()
    again = fit(resumed, terms, s, monitor=((), retain), checkpoint=path)
    assert (again.steps, again.stopped) == (outcome.steps, outcome.stopped)
    assert same(weights_of(resumed), weights_of(whole))


def test_without_limits_all_steps_are_taken(make_model: Make, terms: list[Term]) -> None:
    outcome = fit(make_model(), terms, setting(), monitor=(terms[0].items, terms[1].items))
    assert outcome.stopped == "all steps taken"
    assert [seen["step"] for seen in outcome.history] == [2, 4, 6, 8, 10]
    assert all(math.isfinite(seen["loss"]) for seen in outcome.history)
    assert outcome.seconds > 0
    assert FitResult(**outcome.to_json()) == outcome


def test_a_loss_that_is_not_a_number_is_the_users_to_mend(
    model: Any, make_items: Items, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_probs = objective_inputs.token_log_probs
    monkeypatch.setattr(objective_inputs, "token_log_probs", lambda *args: log_probs(*args) * math.nan)
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(UserError, match=r"the loss is nan at step 1[\s\S]*lower `lr`"):
        fit(model, [Term(bind("objective", "nll"), make_items([3]))], setting(check_every=1), checkpoint=path)
    assert not path.exists()


def test_a_diverging_run_ends_in_an_error(model: Any, make_items: Items) -> None:
    with pytest.raises(UserError, match=r"the loss is (nan|inf|-inf) at step"):
        fit(model, [Term(bind("objective", "ga"), make_items([3, 4]))], setting(lr=1e30, epochs=50))


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1]),
        ("constant", 2, [0.5, 1, 1, 1, 1]),
        ("linear", 0, [1, 0.8, 0.6, 0.4, 0.2]),
        ("linear", 2, [0.5, 1, 1, 2 / 3, 1 / 3]),
    ],
)
def test_learning_rates(
    schedule: Literal["constant", "linear"],
    warmup: int,
    expected: list[float],
    model: Any,
    make_items: Items,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates: list[float] = []
    step = loop._Loop.step

    def watched(self: loop._Loop, total: int) -> float:
        loss = step(self, total)
        rates.append(self.optimizer.param_groups[0]["lr"])
        return loss

    monkeypatch.setattr(loop._Loop, "step", watched)
    s = setting(lr=1e-3, schedule=schedule, warmup=warmup, max_steps=5)
    fit(model, [Term(bind("objective", "nll"), make_items([3, 4, 2, 2, 2]))], s)
    assert rates == pytest.approx([1e-3 * rate for rate in expected])


def test_the_model_is_left_frozen_and_was_trained_without_dropout(make_model: Make, make_items: Items) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    assert config.resid_pdrop > 0
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).train()
        torch.manual_seed(len(results))
        fit(model, [Term(bind("objective", "nll"), make_items([3, 4]))], setting())
        assert not any(p.requires_grad for p in model.parameters())
        results.append(weights_of(model))
    assert same(*results)


def is_bfloat16(tensor: Tensor) -> bool:
    return torch.equal(tensor, tensor.bfloat16().float())


@pytest.mark.parametrize("weights", ["bfloat16", "stochastic"])
def test_storage_holds_bfloat16_values_after_every_step(
    weights: WeightStorage, make_model: Make, terms: list[Term], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[bool] = []
    step = loop._Loop.step

    def watched(self: loop._Loop, total: int) -> float:
        held.append(all(is_bfloat16(p.detach()) for p in self.parameters.values()))  # the start too
        loss = step(self, total)
        held.append(all(is_bfloat16(p.detach()) for p in self.parameters.values()))
        return loss

    monkeypatch.setattr(loop._Loop, "step", watched)
    model = make_model()
    assert not is_bfloat16(model.lm_head.weight)
    fit(model, terms, setting(weights=weights))
    assert held == [True] * 20


def spacing(values: Tensor) -> Tensor:
    """The distance of a bfloat16 value from the next one towards 0: 2^(exponent − 7), half that at a power of two."""
    return torch.exp2(torch.floor(torch.log2(values.abs() * (1 - 2**-9))) - 7)


def test_bfloat16_drops_updates_below_half_a_spacing_and_float32_keeps_them(
    make_model: Make, make_items: Items
) -> None:
    """AdamW's first step moves every weight by lr at most; a weight whose half spacing is larger stays where it is."""
    term = Term(bind("objective", "nll"), make_items([5, 6, 7]))
    lr = 2e-4
    before = torch.cat([p.bfloat16().float().flatten() for p in make_model().parameters()])
    moved: dict[str, Tensor] = {}
    for weights in STORAGES:
        model = make_model()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.bfloat16())
        fit(model, [term], setting(lr=lr, max_steps=1, batch_size=3, weights=weights))
        moved[weights] = torch.cat([p.flatten() for p in model.parameters()]) - before
    changed = moved["float32"].abs() > 0.9 * lr
    large, small = spacing(before) / 2 > 1.01 * lr, spacing(before) / 2 < 0.5 * lr
    assert min(int((changed & large).sum()), int((changed & small).sum())) > 50
    assert bool((moved["bfloat16"][large] == 0).all())
    assert bool((moved["bfloat16"][changed & small] != 0).all())
    survived = moved["stochastic"][changed & large]
    assert 0 < (survived != 0).float().mean() < 1
    assert survived.mean() == pytest.approx(moved["float32"][changed & large].mean().item(), abs=lr)


def by_hand(model: nn.Module, items: list[Any]) -> tuple[float, dict[str, Tensor]]:
    """The mean over items of −ln p of an answer's mean token, one item at a time through the whole model, and its
    gradient."""
    model.requires_grad_(True).zero_grad()
    losses = []
    for item in items:
        log_probs = model(torch.tensor([item.ids])).logits[0, item.start - 1 : -1].log_softmax(-1)
        losses.append(-log_probs.gather(-1, torch.tensor(item.ids[item.start :])[:, None]).mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.requires_grad_(False).zero_grad()
    return float(loss.detach()), found


def close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_a_gradient_over_all_items_is_the_mean_whatever_the_batches(
    batch_size: int, make_model: Make, make_items: Items
) -> None:
    forget, retain = make_items([3, 1, 4, 2, 5]), make_items([2, 6, 3], seed=1)
    terms = [Term(bind("objective", "ga"), forget), Term(bind("objective", "nll"), retain)]
    made = loop._Loop(make_model(), terms, setting(batch_size=batch_size))
    descent = by_hand(make_model(), forget)[1]
    close(made._whole_gradients("forget"), {name: -gradient for name, gradient in descent.items()})
    close(made._whole_gradients("retain"), by_hand(make_model(), retain)[1])


def test_a_scrambled_gradient_is_of_replaced_answers_to_each_question_once(make_model: Make, make_items: Items) -> None:
    forget, retain = make_items([3, 1, 4]), make_items([2, 6, 3], seed=1)
    terms = [Term(bind("objective", name), forget) for name in ("ga", "npo")]
    made = loop._Loop(make_model(), [*terms, Term(bind("objective", "nll"), retain)], setting(seed=5))
    for role, items in (("forget", forget), ("retain", retain)):
        replaced = scrambled(items, make_model().config, 5)
        close(made._whole_gradients(f"{role}_scrambled"), by_hand(make_model(), replaced)[1])


def test_the_loss_of_a_step_is_the_sum_of_the_terms_means(make_model: Make, make_items: Items) -> None:
    forget, retain = make_items([3, 1, 4]), make_items([2, 6, 3], seed=1)
    terms = [Term(bind("objective", "ga"), forget), Term(bind("objective", "nll:weight=0.5"), retain)]
    expected = by_hand(make_model(), retain)[0] / 2 - by_hand(make_model(), forget)[0]
    for accumulate in (1, 2, 3, 7):
        outcome = fit(make_model(), terms, setting(batch_size=3, max_steps=1, accumulate=accumulate))
        assert outcome.history == [{"step": 1, "loss": pytest.approx(expected, rel=1e-5)}]
        assert outcome.tokens == sum(len(item.ids) for item in forget + retain)


def test_a_step_in_parts_leaves_the_same_weights(make_model: Make, terms: list[Term]) -> None:
    whole, parts = (trained(make_model, terms, batch_size=4, max_steps=2, accumulate=n) for n in (1, 3))
    close(parts, whole)


def test_gradients_are_clipped_as_a_whole_and_the_optimizer_is_as_set(make_model: Make, terms: list[Term]) -> None:
    for clip, beta2 in ((1e-3, 0.9), (1e9, 0.999)):
        made = loop._Loop(make_model(), terms, setting(clip=clip, beta2=beta2))
        made.step(10)
        norm = float(torch.cat([p.grad.flatten() for p in made.parameters.values()]).norm())
        assert norm == pytest.approx(1e-3, rel=1e-3) if clip < 1 else norm > 0.01
        assert made.optimizer.defaults["betas"] == (0.9, beta2)
        assert made.optimizer.defaults["weight_decay"] == 0


def test_teachers_are_asked_before_the_start_changes_the_weights(make_model: Make, make_items: Items) -> None:
    """KL from what the model was: 0 in the first step, unless the weights were moved in between."""
    items, losses = make_items([3, 2]), []

    @torch.no_grad()
    def start(model: Any, scale: float) -> None:
        model.lm_head.weight.mul_(scale)

    for scale in (1.0, 1.5):
        outcome = fit(
            make_model(),
            [Term(bind("objective", "nll"), items), Term(bind("objective", "kl"), items)],
            setting(max_steps=1, batch_size=2),
            start=partial(start, scale=scale),
        )
        moved = make_model()
        start(moved, scale)
        losses.append(outcome.history[0]["loss"] - by_hand(moved, items)[0])
    assert losses[0] == pytest.approx(0, abs=1e-5)
    assert losses[1] > 0.01


def test_a_named_teacher_is_asked_in_the_place_of_the_reference(make_model: Make, make_items: Items) -> None:
    term = Term(bind("objective", "kl"), make_items([3, 2]))
    lead = Term(bind("objective", "nll:weight=0.001"), make_items([3, 2]))
    assert set(term.objective.plugin.needs) == {"reference_kl", "mask"}
    own, other = (
        fit(make_model(), [lead, term], setting(max_steps=1), teachers=teachers).history[0]["loss"]
        for teachers in (None, {"reference": make_model(seed=1)})
    )
    assert other > own + 0.01


def test_draws_of_retain_terms_have_a_size_of_their_own(make_model: Make, make_items: Items) -> None:
    term = Term(bind("objective", "nll"), make_items([2] * 5))
    sizes = {}
    for retain in (None, 1, 9):
        made = loop._Loop(make_model(), [term, term], setting(batch_size=3, retain_batch_size=retain))
        sizes[retain] = [len(made._batch(k, 4)) for k in (0, 1)]
    assert sizes == {None: [3, 3], 1: [3, 1], 9: [3, 5]}


def test_draws_count_how_often_the_items_were_passed_through(model: Any, make_items: Items) -> None:
    term = Term(bind("objective", "nll"), make_items([2] * 5))
    made = loop._Loop(model, [term], setting(batch_size=2))
    draws = [draw for step in range(10) for draw in made._batch(0, step)]
    assert [draw.epoch for draw in draws] == [i // 5 for i in range(20)]
    assert list(made._all_draws(0, 10)) == draws


def test_in_rounds_a_draw_counts_the_round(model: Any, make_items: Items) -> None:
    term = Term(bind("objective", "nll"), make_items([2] * 3))
    made = loop._Loop(model, [term], Settings(1.0, 1e9, 8, schedule="rounds", round_steps=4, batch_size=2))
    turns = [{draw.epoch for draw in made._batch(0, step)} for step in range(8)]
    assert turns == [{0}] * 4 + [{1}] * 4


def test_what_a_run_cost_is_booked_on_top_of_what_was_booked_before() -> None:
    meter: Any = SimpleNamespace(seconds=2.0, forward_tokens=3, flops=4.0)
    done = FitResult(seconds=1.0, forward_tokens=10, flops=100.0)
    before = replace(done)
    for _ in range(2):  # a meter counts from its start on
        done.add(meter, before)
        assert (done.seconds, done.forward_tokens, done.flops) == (3, 13, 104)
    done.add(meter)
    assert (done.seconds, done.forward_tokens, done.flops) == (5, 16, 108)


def test_a_result_says_what_was_trained_read_and_used(make_model: Make, make_items: Items) -> None:
    items, model = make_items([3, 2, 4]), make_model()
    s = setting(epochs=1, batch_size=3, retain_floor=0.1)
    outcome = fit(model, [Term(bind("objective", "nll"), items)], s, monitor=((), items))
    assert outcome.trained == sum(p.numel() for p in model.parameters())
    assert outcome.tokens == sum(len(item.ids) for item in items)
    assert outcome.forward_tokens >= 2 * outcome.tokens  # before the first step, and at the check
    assert outcome.flops > 0
    assert outcome.peak_memory_bytes is None or outcome.peak_memory_bytes > 1e6


class Seven(Watch):
    def look(self) -> dict[str, float]:
        return {"seen": 7.0}


def test_checks_look_at_the_first_items_and_hold_what_else_was_asked_for(
    make_model: Make, make_items: Items, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "MONITORED", 2)
    items, model = make_items([3, 2, 4]), make_model()
    s = setting(max_steps=1, retain_floor=1e-9, forget_below=1e-9)
    outcome = fit(model, [Term(bind("objective", "nll"), items)], s, monitor=(items, items[::-1]), watch=Seven())
    [check] = outcome.history
    assert (check["step"], check["seen"]) == (1, 7)
    assert check["forget"] == pytest.approx(probability(model, items[:2]), rel=1e-5)
    assert check["retain"] == pytest.approx(probability(model, items[:0:-1]), rel=1e-5)
    unwatched = fit(make_model(), [Term(bind("objective", "nll"), items)], setting(max_steps=1), monitor=(items, items))
    assert unwatched.history[0].keys() == {"step", "loss"}


@pytest.mark.parametrize(("limits", "stops"), [((0.5, 0.0), True), ((0.4999, 0.0), False), ((0.0, 0.5), False)])
def test_limits_are_met_at_the_limit_itself(
    limits: tuple[float, float], stops: bool, make_model: Make, make_items: Items, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forget items at .5 are low enough for .5; retain items at half of their start are enough for a floor of ½."""
    items = make_items([2])
    seen = iter([1.0, *[0.5] * 3]) if limits[1] else iter([0.5] * 3)
    monkeypatch.setattr(loop, "mean_probability", lambda _: next(seen))
    s = setting(max_steps=1, forget_below=limits[0], retain_floor=limits[1])
    outcome = fit(make_model(), [Term(bind("objective", "nll"), items)], s, monitor=(items, items if limits[1] else ()))
    assert outcome.stopped == ("forget items at 0.5000, asked for at most 0.5" if stops else "all steps taken")


def test_what_ends_a_run_by_an_error_says_what_to_do(make_model: Make, terms: list[Term], tmp_path: Path) -> None:
    fit(make_model(), terms, setting(), checkpoint=tmp_path / "a", plan_key="plan")
    with pytest.raises(UserError) as told:
        fit(make_model(), terms, setting(), checkpoint=tmp_path / "a", plan_key="another")
    assert str(told.value).splitlines()[1].strip() == "repeat them, or add `overwrite`"
    with pytest.raises(UserError) as told:
        fit(make_model(), [Term(bind("objective", "ga"), terms[0].items)], setting(lr=1e30, epochs=50))
    assert str(told.value).splitlines()[1].strip() == "lower `lr`, or add a retain term"


def test_progress_starts_where_a_run_was_resumed_and_moves_a_step_at_a_time(
    make_model: Make, terms: list[Term], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    @contextlib.contextmanager
    def progress(label: str, total: int) -> Iterator[Callable[..., None]]:
        told.append((label, total))
        yield lambda *given: told.append(given)

    monkeypatch.setattr(loop, "progress", progress)
    given: dict[str, Any] = {"checkpoint": tmp_path / "a", "label": "unlearning"}
    first = fit(make_model(), terms, setting(max_steps=2, check_every=1), **given)
    assert told == [
        ("unlearning", 2),
        (0,),
        *((1, f"loss {seen['loss']:.3f}") for seen in first.history),
    ]
    told.clear()
    fit(make_model(), terms, setting(max_steps=3, check_every=1), **given)
    assert told[:2] == [("unlearning", 3), (2,)]
    assert len(told) == 3


def test_a_resumed_run_adds_to_what_it_had_cost(make_model: Make, terms: list[Term], tmp_path: Path) -> None:
    path, model = tmp_path / "a", make_model()
    first = fit(model, terms, setting(max_steps=2), checkpoint=path)
    again = fit(make_model(), terms, setting(max_steps=4), checkpoint=path)
    whole = fit(make_model(), terms, setting(max_steps=4))
    assert first.trained == again.trained == sum(p.numel() for p in model.parameters())
    assert first.tokens < again.tokens == whole.tokens
    assert again.forward_tokens > whole.forward_tokens > first.forward_tokens - 1  # the teachers are asked again
    assert again.flops > first.flops
    assert again.seconds > 0


def test_of_a_curriculum_every_batch_is_whole_and_counts_from_its_own_start(model: Any, make_items: Items) -> None:
    terms = [Term(bind("objective", "ga"), make_items([2] * 6)), Term(bind("objective", "nll"), make_items([2] * 4))]
    made = loop._Loop(model, terms, setting(batch_size=2, epochs=2), step_plugins=[bind("step", "layered:folds=2")])
    batches = [[made._batch(k, step) for step in range(6)] for k in (0, 1)]
    assert [len(batch) for found in batches for batch in found] == [2] * 12
    assert [batch[0].epoch for batch in batches[0]] == [0, 0, 1, 0, 0, 0]


def test_companions_of_a_gradient_over_all_items_are_the_first_ones(make_model: Make, make_items: Items) -> None:
    items, refusals = make_items([3, 2]), [[item] for item in make_items([3, 3], seed=7)]
    more = [[*own, *make_items([2], seed=9)] for own in refusals]
    found = []
    for companions in (refusals, [[own[i % 2] for i in range(k, k + 2)] for k, own in enumerate(more)]):
        terms = [Term(bind("objective", "dpo"), items, {"refusal": companions})]
        found.append(loop._Loop(make_model(), terms, setting(batch_size=2))._whole_gradients("forget"))
    close(found[1], found[0])


def test_a_step_in_parts_is_the_same_step(make_model: Make, terms: list[Term], monkeypatch: pytest.MonkeyPatch) -> None:
    """However few tokens a pass may have: memory depends on it, and nothing else."""
    found = []
    for count in (1, 5):
        monkeypatch.setattr(loop, "passes", lambda model, lengths, count=count: count)
        model = make_model()
        fit(model, terms, setting(max_steps=3))
        found.append(parameters.copies(model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_products_in_bfloat16_train_float32_weights(make_model: Make, terms: list[Term], compute: str) -> None:
    model, plain = make_model(), make_model()
    fit(plain, terms, setting(max_steps=3))
    fit(model, terms, setting(max_steps=3, compute=compute))
    apart = max(float((p - q).abs().max()) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert (apart == 0) == (compute == "float32")
    assert apart < 2e-2
