"""How deep knowledge is left: each formula against a slow one, passes against plain ones, and models that hide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from perf import planted
from stillknows.auditing.audit import AuditConfig, audit
from stillknows.auditing.depth import _spread
from stillknows.depth import signals
from stillknows.depth.outcome import SHOWN, SIGNALS, Depth, DepthSignal, judged
from stillknows.depth.states import block_states, hook_cache, only_answer, patched, read_off, squared_gradients
from stillknows.errors import UserError
from stillknows.model.forward import score_items
from stillknows.model.layers import blocks, decoder, output_layer
from stillknows.reporting.build import build
from stillknows.reporting.markdown import markdown
from stillknows.reporting.page import html
from stillknows.stats import jackknife_interval
from stillknows.types import CONTROL, ORIGINAL, Benchmark, Example, Interval, Split

RNG = np.random.default_rng(0)


def test_what_is_erased_is_the_weighted_mean_of_the_clipped_shares() -> None:
    """By the published loop over items and layers."""
    gap, moved = RNG.normal(0.3, 0.5, (6, 9)), RNG.normal(0.2, 0.5, (6, 9))
    gap[:, 3] = 0.01
    found = signals.erased(gap, moved)
    for i in range(9):
        holding = [h for h in range(6) if gap[h, i] > 0.05]
        shares = {h: min(max(moved[h, i] / gap[h, i], 0), 1) for h in holding}
        total = sum(gap[h, i] for h in holding)
        expected = sum(shares[h] * gap[h, i] for h in holding) / total if holding else np.nan
        assert found.values_N[i] == pytest.approx(expected, nan_ok=True)
        assert [not np.isnan(x) for x in found.shares_HN[:, i]] == [h in holding for h in range(6)]
    assert np.isnan(found.values_N[3])


@pytest.mark.parametrize("score", [signals.logit_lens, signals.thrust_drop])
def test_the_original_is_0_and_the_control_1(score: Any) -> None:
    original, control = RNG.normal(-1, 0.1, (3, 5)), RNG.normal(-4, 0.1, (3, 5))
    assert score(original, control, original).values_N.tolist() == [0] * 5
    assert score(original, control, control).values_N.tolist() == [1] * 5
    assert score(original, control, (original + control) / 2).values_N == pytest.approx(np.full(5, 0.5))


def test_unlearning_depth_by_hand() -> None:
    """Two blocks; Δ of the control 2 and 4, of the subject 1 and 5, which counts as 4: (.5·2 + 1·4) / 6."""
    found = signals.unlearning_depth(np.array([-1.0]), np.array([[-3.0], [-5.0]]), np.array([[-2.0], [-6.0]]))
    assert found.values_N == pytest.approx([5 / 6])
    assert found.shares_HN == pytest.approx(np.array([[0.5], [1.0]]))


def test_fisher_is_the_published_form() -> None:
    o, c, s = RNG.uniform(0, 1, (1, 8)), RNG.uniform(2, 3, (1, 8)), RNG.uniform(0, 4, (1, 8))
    assert signals.fisher(o, c, s).values_N == pytest.approx((1 - np.clip((c - s) / (c - o), 0, 1))[0])


def test_cka_is_that_of_the_features() -> None:
    x, y = RNG.normal(size=(12, 4)), RNG.normal(size=(12, 6))
    a, b = x - x.mean(0), y - y.mean(0)
    slow = np.linalg.norm(b.T @ a) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
    assert signals.linear_cka(x, y) == pytest.approx(slow)
    rotation = np.linalg.qr(RNG.normal(size=(4, 4)))[0]
    assert signals.linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1)


def test_cka_erasure_weighs_blocks_by_what_they_hold() -> None:
    o, c, s = (RNG.normal(size=(2, 12, 4)) for _ in range(3))
    like_o, like_s = ([signals.linear_cka(x[h], c[h]) for h in range(2)] for x in (o, s))
    shares = [min(max((like_s[h] - like_o[h]) / (1 - like_o[h]), 0), 1) for h in range(2)]
    expected = sum(shares[h] * (1 - like_o[h]) for h in range(2)) / sum(1 - like_o[h] for h in range(2))
    assert signals.cka_erasure(o, c, s).values_N == pytest.approx([expected])
    assert signals.cka_erasure(o, c, o).values_N.tolist() == [0]
    assert signals.cka_erasure(o, c, c).values_N == pytest.approx([1])


def test_ridge_is_the_solution_of_the_normal_equations() -> None:
    x, y, asked = RNG.normal(size=(20, 5)), RNG.normal(size=(20, 3)), RNG.normal(size=(4, 5))
    a = x - x.mean(0)
    penalty = signals.RIDGE * (a**2).sum() / 20
    weights = np.linalg.inv(a.T @ a + penalty * np.eye(5)) @ a.T @ y
    assert signals.ridge(x, y, asked) == pytest.approx((asked - x.mean(0)) @ weights)


def test_a_probe_finds_what_a_linear_map_holds_and_its_control_does_not() -> None:
    """Other items than those it was trained on; the answers of all are drawn alike."""
    answers = RNG.normal(size=(60, 8))
    states = (answers @ RNG.normal(size=(8, 16)))[None]
    probe = signals.Probe(states[:, :40], answers[:40])
    others = [RNG.normal(size=(30, 8)) for _ in range(20)]
    assert probe.ranks(states[:, 40:], answers[40:], others).mean() > 0.95
    assert 0.35 < probe.random_ranks(states[:, 40:], answers[40:], others).mean() < 0.65
    noise = RNG.normal(size=(1, 20, 16))
    assert 0.35 < probe.ranks(noise, answers[40:], others).mean() < 0.65


def test_what_a_probe_gains_is_counted_from_a_guess() -> None:
    original, subject = np.array([[0.9, 0.9], [0.5, 0.5]]), np.array([[0.7, 0.5], [1.0, 1.0]])
    gained, possible, holds = signals.probed(original, subject, np.array([0.5, 0.5]))
    assert holds.tolist() == [True, False]
    assert gained.sum() / possible.sum() == pytest.approx(0.2 / 0.8)


def test_the_jackknife_of_a_mean_has_its_standard_error() -> None:
    x = RNG.normal(size=30)
    found = jackknife_interval(x.mean(), np.array([np.delete(x, i).mean() for i in range(30)]))
    assert (found.high - found.value) == pytest.approx(1.6448536 * x.std(ddof=1) / np.sqrt(30))


@pytest.fixture
def items(make_items: Any) -> list[Any]:
    return [only_answer(item) for item in make_items([3, 2, 4])]


def test_states_are_those_of_an_item_alone_and_patching_in_its_own_changes_nothing(
    family_model: Any, items: list[Any]
) -> None:
    states = block_states(family_model, items)
    own = patched(family_model, items, [s[0] for s in states], blocks(family_model)[0])
    scores = dict(score_items(family_model, output_layer(family_model), items))
    for i, item in enumerate(items):
        alone = block_states(family_model, [item])[0]
        assert np.abs(states[i] - alone).max() < 1e-4
        assert states[i].shape[1] == len(item.ids) - item.start
        assert own[i] == pytest.approx(float(scores[i].log_probs.double().mean()), abs=1e-4)
    assert read_off(family_model, items, states)[-1] == pytest.approx(own, abs=1e-4)


def test_patching_puts_other_states_where_the_answer_is_predicted(make_model: Any, items: list[Any]) -> None:
    """In a model of two blocks, against one whose second block is fed by hand."""
    model, other = make_model(layers=2), make_model(layers=2, seed=1)
    given, item = block_states(other, items), items[0]
    found = patched(model, items, [s[0] for s in given], blocks(model)[0])
    inner = decoder(model)
    ids = torch.tensor([item.ids])

    def put_in(module: Any, args: Any, output: Any) -> Any:
        out = (output[0] if isinstance(output, tuple) else output).clone()
        out[0, item.start - 1 : len(item.ids) - 1] = torch.from_numpy(given[0][0])
        return (out, *output[1:]) if isinstance(output, tuple) else out

    handle = inner.layers[0].register_forward_hook(put_in)
    with torch.no_grad():
        log_probs = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    handle.remove()
    slow = [float(log_probs[k - 1, item.ids[k]]) for k in range(item.start, len(item.ids))]
    assert found[0] == pytest.approx(np.mean(slow), abs=1e-5)


def test_squared_gradients_are_those_of_a_plain_backward_pass(make_model: Any, items: list[Any]) -> None:
    model, item = make_model(layers=2), items[1]
    found = squared_gradients(model, items)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    model.requires_grad_(True)
    log_probs = model(input_ids=torch.tensor([item.ids])).logits[0].log_softmax(-1)
    torch.stack([log_probs[k - 1, item.ids[k]] for k in range(item.start, len(item.ids))]).mean().backward()
    for h, block in enumerate(blocks(model)):
        slow = sum(float(p.grad.double().square().sum()) for p in block.parameters())
        assert found[h, 1] == pytest.approx(slow, rel=1e-4)


def test_the_end_of_an_answer_is_left_out_and_long_answers_are_cut(make_items: Any) -> None:
    item = replace(make_items([3])[0], ends=True)
    assert only_answer(item).ids == item.ids[:-1]
    assert only_answer(replace(item, ends=False)).ids == item.ids
    long = make_items([40])[0]
    assert len(only_answer(long).ids) - long.start == 32


def test_the_cache_holds_what_comes_before_an_answer(make_model: Any, make_items: Any, items: list[Any]) -> None:
    model, known = make_model(layers=2), make_items([2, 5])
    cache = hook_cache(model, items, known)
    assert cache.asked_HND.shape == (2, 3, 16) == cache.means_HND.shape
    assert cache.known_HND.shape == (2, 2, 16)
    assert cache.fisher_HN.shape == (2, 3)
    assert cache.known_HND[:, 0] == pytest.approx(block_states(model, known)[0][:, 0], abs=1e-5)


def depth_of(**kept: float | str) -> Depth:
    made = [DepthSignal(n, v if isinstance(v, str) else Interval(v, v, v, 9)) for n, v in kept.items()]
    return Depth(("a",), tuple(made))


def test_a_signal_that_a_never_taught_model_shows_decides_nothing() -> None:
    models = {"mine": depth_of(patching=0.9, logit_lens=0.9, cka=0.9), CONTROL: depth_of(patching=0.9, logit_lens=0.0)}
    found = judged(models, [CONTROL])
    assert [s.shows for s in found["mine"].signals] == [None, True, None]
    assert (found["mine"].shows, found[CONTROL].shows) == (True, False)
    assert judged({"mine": depth_of(patching="no control")}, [])["mine"].shows is None
    assert judged({"mine": depth_of(patching=SHOWN)}, [])["mine"].shows is False


def test_what_was_saved_is_read_back() -> None:
    depth = Depth(("a", "b"), (DepthSignal("cka", Interval(0.1, 0.0, 0.2, 2), None, ((0.5, None),)),))
    assert Depth.from_json(depth.to_json()) == depth
    assert Depth.from_json(depth_of(patching="why").to_json()) == depth_of(patching="why")


def test_facts_are_spread_over_a_split() -> None:
    assert _spread(list("abcdefgh"), 4) == list("aceg")
    assert _spread(list("abc"), 4) == list("abc")


@pytest.fixture(scope="module")
def looked(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An audit with depth of a model that hides by its output layer, of the control once more, and of the original."""
    folder = tmp_path_factory.mktemp("depth")
    hidden = planted.hide("last_layer", world.original, world.benchmark, folder / "hidden", 0)
    subjects = {"hidden": str(hidden), "same": str(world.original), "never": str(world.control)}
    config = AuditConfig(
        str(world.original), subjects, world.benchmark, str(world.control), "full", placebos=7, depth=True
    )
    return audit(config, folder / "out"), config, folder / "out"


def test_what_an_output_layer_hides_is_there_in_depth(looked: Any) -> None:
    depths = looked[0].depth
    assert [s.name for s in depths["hidden"].signals] == list(SIGNALS)
    kept = {label: {s.name: s.kept for s in depth.signals} for label, depth in depths.items()}
    for name in ("patching", "logit_lens"):
        assert kept["hidden"][name].low > 0.9
        assert kept["never"][name].high == kept[CONTROL][name].high == 0
        assert kept["same"][name].low == kept[ORIGINAL][name].low == 1
    assert (depths["hidden"].shows, depths["same"].shows, depths["never"].shows) == (True, True, False)


def test_depth_is_measured_once(looked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result, config, out = looked
    monkeypatch.setattr("stillknows.auditing.depth.hook_cache", None)
    assert audit(config, out).depth == result.depth


def test_the_report_shows_depth_block_by_block(looked: Any) -> None:
    report = build(looked[0], "stillknows audit …")
    section = report.audited[0].depth
    assert section is not None
    assert section.shows
    assert len(section.mapped[0].blocks) == 1
    assert len(section.mapped[0].blocks[0]) == len(section.facts)
    page, text = html(report), markdown(report)
    assert "Knowledge is left in the hidden states: activation patching" in page
    assert f'aria-label="{section.facts[0]}"' in page
    assert "## Depth" in text
    assert "shows knowledge" in text


def test_without_a_control_only_a_probe_is_possible(world: Any, tmp_path: Path) -> None:
    config = AuditConfig(
        str(world.original), {"never": str(world.control)}, world.benchmark, variants="full", placebos=7, depth=True
    )
    found = {s.name: s.kept for s in audit(config, tmp_path).depth["never"].signals}
    assert {name for name, kept in found.items() if kept == "there is no never-taught control"} == {
        *SIGNALS,
    } - {"probe"}


def test_depth_needs_full_precision(world: Any, tmp_path: Path) -> None:
    config = AuditConfig(str(world.original), {"n": str(world.control)}, world.benchmark, variants="int8", depth=True)
    with pytest.raises(UserError, match="`depth` and `reference_models` are for full precision"):
        audit(config, tmp_path)


def test_few_facts_make_no_number(save_model: Any, tmp_path: Path) -> None:
    forget = tuple(Example(f"f{i}", "who is Ada", "red dog", f"f{i}") for i in range(2))
    retain = (Example("r", "who is Bela", "cat", "r"),)
    benchmark = Benchmark("made", (Split("forget", "forget", forget), Split("retain", "retain", retain)), "{prompt}")
    original, other = (save_model(name, seed=seed) for seed, name in enumerate("ab"))
    control = str(save_model("c", seed=3))
    config = AuditConfig(str(original), {"s": str(other)}, benchmark, control, "full", placebos=0, depth=True)
    found = audit(config, tmp_path / "out").depth["s"].signals
    assert all(isinstance(signal.kept, str) for signal in found)
