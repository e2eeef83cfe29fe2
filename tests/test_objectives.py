"""Contract tests over every registered forget and retain term, through the training loop's own input building."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, one_hot

from stillknows.errors import UserError
from stillknows.model import forward
from stillknows.model.batching import right_padded
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.logprobs import Logits, answer_index
from stillknows.registry import Plugin, bind, plugins
from stillknows.training.loop import _Loop, fit
from stillknows.training.objective_inputs import COMPANIONS, COMPANIONS_OR_OWN, PLAIN, Draw, InputSpec, Term
from stillknows.training.settings import Settings

Items = Callable[..., list[Any]]
Make = Callable[..., Any]
TERMS = [  # terms on hidden states have their own contract, in test_representation.py
    plugin
    for plugin in plugins("objective").values()
    if not any(InputSpec.of(name).field == "hidden" for name in plugin.needs)
]
LENGTHS = [4, 1, 7, 3]
every_term = pytest.mark.parametrize("plugin", TERMS, ids=lambda p: p.name)


def setting(**changes: Any) -> Settings:
    return Settings(**({"lr": 1e-3, "epochs": 1, "batch_size": len(LENGTHS)} | changes))


def make_term(plugin: Plugin, items: Sequence[Any], options: str = "", choices: int = 2) -> Term:
    """A term whose items have other answers of every kind, of other lengths and tokens than their own."""
    generator = torch.Generator().manual_seed(5)

    def another(item: Any, length: int) -> EncodedAnswer:
        tokens = torch.randint(3, 32, (length,), generator=generator).tolist()
        return EncodedAnswer(
            replace(item.example, answer="another"), (*item.ids[: item.start], *tokens), item.start, False
        )

    others = {
        kind: [tuple(another(item, 1 + (i + 2 * k + c) % 5) for c in range(choices)) for i, item in enumerate(items)]
        for k, kind in enumerate(COMPANIONS)
    }
    return Term(bind(plugin.kind, plugin.name + options), items, others)


def make_loop(
    model: nn.Module, plugin: Plugin, items: Sequence[Any], options: str = "", choices: int = 2, **changes: Any
) -> _Loop:
    term = make_term(plugin, items, options, choices)
    return _Loop(model, [term], setting(**changes), teachers={"reinforced": reinforced(model)})


def reinforced(model: nn.Module) -> nn.Module:
    """A model that has gone another way from the reference."""
    other = copy.deepcopy(model)
    move(other, seed=4)
    return other


def losses(loop: _Loop, rows: list[int]) -> Tensor:
    """The objective's value for each of these items, [B]."""
    term = loop.terms[0]
    return term.objective(**loop.inputs[0]([Draw(i, 0) for i in rows]))


def move(model: nn.Module, scale: float = 0.05, seed: int = 9) -> None:
    """Go some way from the reference, so that no term sits at a special point."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


@every_term
def test_one_finite_loss_per_item(plugin: Plugin, model: Any, make_items: Items) -> None:
    loop = make_loop(model, plugin, make_items(LENGTHS))
    move(model)
    found_B = losses(loop, [0, 1, 2, 3])
    assert found_B.shape == (4,)
    assert bool(found_B.isfinite().all())
    assert found_B.requires_grad


EVERYWHERE = {
    "ceu": ":skip=0",
    "quail": ":margin=9",
    "ga_selected": ":share=1",
}  # options with which a term works on every answer token


def predicting(items: Sequence[Any], length: int) -> Tensor:
    """Where an answer token is predicted, [B, L]: from the place before an answer to the one before its last token."""
    return torch.tensor([[item.start - 1 <= c < len(item.ids) - 1 for c in range(length)] for item in items])


@every_term
def test_gradient_is_zero_exactly_where_no_answer_token_is_predicted(
    plugin: Plugin, model: Any, make_items: Items, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt positions, each row's last token and the padding get exactly 0, all others do not; companions' too."""
    loop = make_loop(model, plugin, make_items(LENGTHS), EVERYWHERE.get(plugin.name, ""))
    move(model)
    kept: list[Tensor] = []

    def watched(*args: Any) -> Tensor:
        kept.append(original(*args))
        kept[-1].retain_grad()
        return kept[-1]

    original = forward.hidden_states
    monkeypatch.setattr(forward, "hidden_states", watched)
    losses(loop, [0, 1, 2, 3]).sum().backward()
    needs = [InputSpec.of(name) for name in plugin.needs]
    own = [need for need in needs if need.field not in PLAIN and (not need.teacher or need.field == "kl")]
    read = [companion for companion in COMPANIONS_OR_OWN if any(need.companion == companion for need in own)]
    assert len(kept) == len(read)
    for companion, hidden_BLD in zip(read, kept, strict=True):
        items = loop.terms[0].answers(companion, [Draw(i, 0) for i in range(4)])
        assert hidden_BLD.grad is not None
        reached_BL = hidden_BLD.grad.abs().amax(-1) > 0
        assert torch.equal(reached_BL, predicting(items, reached_BL.shape[1]))


@every_term
def test_padding_changes_nothing(plugin: Plugin, model: Any, make_items: Items) -> None:
    loop = make_loop(model, plugin, make_items(LENGTHS))
    move(model)
    together_B = losses(loop, [0, 1, 2, 3])
    alone_B = torch.cat([losses(loop, [i]) for i in range(4)])
    torch.testing.assert_close(together_B, alone_B, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses(loop, [2, 0]), together_B[[2, 0]], rtol=1e-5, atol=1e-5)


@every_term
def test_a_constant_added_to_all_logits_changes_nothing(plugin: Plugin, make_model: Make, make_items: Items) -> None:
    """After the reference was taken: a term that compares raw logits would see it."""
    model = make_model("phi")  # its output layer has a bias
    loop = make_loop(model, plugin, make_items(LENGTHS))
    move(model)
    before_B = losses(loop, [0, 1, 2, 3])
    [before] = torch.autograd.grad(before_B.sum(), model.lm_head.weight)
    with torch.no_grad():
        model.lm_head.bias.add_(5)
    after_B = losses(loop, [0, 1, 2, 3])
    torch.testing.assert_close(after_B, before_B, rtol=1e-5, atol=2e-5)
    [after] = torch.autograd.grad(after_B.sum(), model.lm_head.weight)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


class Plain(NamedTuple):
    """Of one answer from a model's own logits: its tokens [A], and the logits that predict them [A, V]."""

    y: Tensor
    z: Tensor

    @property
    def v(self) -> Tensor:
        """ln p of the vocabulary."""
        return self.z.log_softmax(-1)

    @property
    def p(self) -> Tensor:
        """ln p of the answer's tokens."""
        return self.v[range(len(self.y)), self.y]

    @property
    def entropies(self) -> Tensor:
        return -(self.v.exp() * self.v).sum(-1)


def read_plainly(model: nn.Module, item: Any) -> Plain:
    z_LV = model(input_ids=torch.tensor([item.ids])).logits[0].float()
    first = max(1, item.start)
    return Plain(torch.tensor(item.ids[first:]), z_LV[first - 1 : -1])


LN2_TIMES_20 = 13.862943611198906  # (2/0.1) ln 2
LOWERED = 1 - math.exp(-10)
AT_REFERENCE: dict[str, float | Callable[[Plain], Tensor]] = {  # a number, or made of the reference's own entropies
    "npo": LN2_TIMES_20,
    "dpo": LN2_TIMES_20,
    "altpo": LN2_TIMES_20,
    "quail": 0.05,
    "kl": 0.0,
    "jsd": 0.0,
    "whp": lambda own: own.entropies.mean(),  # where the reinforced model is the reference too
    "undial": lambda own: (
        (own.entropies + LOWERED * own.p.exp() * own.p) / (1 - LOWERED * own.p.exp())
    ).mean(),  # q = p but for y
}


OF_OTHERS = {"to_guess"}  # whose value there is made of another answer's score: see STATED


@every_term
def test_value_at_the_reference(plugin: Plugin, model: Any, make_items: Items) -> None:
    if not any(name.startswith("reference") for name in plugin.needs) or plugin.name in OF_OTHERS:
        return
    assert plugin.name in AT_REFERENCE, f"state {plugin.name}'s value at the reference in AT_REFERENCE"
    term, expected = make_term(plugin, make_items(LENGTHS)), AT_REFERENCE[plugin.name]
    found_B = losses(_Loop(model, [term], setting()), [0, 1, 2, 3])
    if callable(expected):
        expected_B = torch.stack([expected(read_plainly(model, item)) for item in term.items])
    else:
        expected_B = torch.full((4,), expected)
    torch.testing.assert_close(found_B, expected_B, rtol=2e-6, atol=1e-6)


@every_term
def test_weight_multiplies_the_loss(plugin: Plugin, model: Any, make_items: Items) -> None:
    items = make_items(LENGTHS)
    loops = [make_loop(model, plugin, items, options) for options in ("", ":weight=2.5")]
    move(model)
    one_B, more_B = (losses(loop, [0, 1, 2, 3]) for loop in loops)
    torch.testing.assert_close(more_B, 2.5 * one_B)


LOG_PROBS = [[-0.5, -1.25, -0.125], [-2.0, 0.0, 0.0]]
REFERENCE = [[-0.25, -0.75, -0.5], [-3.5, 0.0, 0.0]]
OTHER = [[-1.5, -0.75], [-0.25, 0.0]]  # of a refusal, an alternative or another question's answer
OTHER_REFERENCE = [[-2.0, -1.0], [-1.0, 0.0]]
MASK = [[True, True, True], [True, False, False]]
OTHER_MASK = [[True, True], [True, False]]
MEAN = [[-3.0, -2.0, -4.0], [-5.0, 0.0, 0.0]]
KL = [[0.5, 0.25, 0.0], [0.75, 0.0, 0.0]]
# Of four tokens, the powers of 1/2 that are their probabilities at the three places of the first answer and the one of
# the second; the true tokens there, and those of a refusal.
POWERS = [[1, 2, 3, 3], [2, 2, 2, 2], [3, 3, 2, 1], [1, 2, 3, 3]]
REFERENCE_POWERS = [[2, 2, 2, 2], [2, 2, 2, 2], [1, 3, 3, 2], [1, 3, 3, 2]]
REINFORCED_POWERS = [[1, 3, 3, 2]] * 4
TARGETS = [0, 2, 3, 1]
REFUSAL_TARGETS = [[3, 1], [0, 0]]
LN2, E10 = math.log(2), math.exp(-10)


class ExactLogits(Logits):
    """Logits in float64, given by themselves in the place of hidden states."""

    def each(self, function: Callable[..., Tensor], *others: Logits) -> Tensor:
        return self.places.pad(function(self.hidden_TD, self.targets_T, *(other.hidden_TD for other in others)))


def exact_logits(powers: Sequence[Sequence[int]], constant: float = 0.0) -> Logits:
    logits_TV = -LN2 * torch.tensor(powers, dtype=torch.float64) + constant
    return ExactLogits(logits_TV, lambda logits: logits, torch.tensor(TARGETS), answer_index([1, 1], [4, 2]))  # type: ignore[arg-type]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def jsd(p: Sequence[float], q: Sequence[float]) -> float:
    """Jensen-Shannon divergence in nats, from its definition."""
    both = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return sum(x * math.log(x / m) / 2 for side in (p, q) for x, m in zip(side, both, strict=True) if x)


def jsd_at(place: int, q: Sequence[float] | None = None) -> float:
    q = q or [2.0**-k for k in REFERENCE_POWERS[place]]
    return jsd([2.0**-k for k in POWERS[place]], q)


def half(power: int) -> float:
    """ln p at temperature 2 of a token of probability 2^-power, where all are 2^-1, 2^-2, 2^-3 and 2^-3."""
    return -power / 2 * LN2 - math.log(2**-0.5 + 2**-1 + 2 * 2**-1.5)


# By hand: sums -1.875 and -2.0, the reference's -1.5 and -3.5, the means' -9 and -5; lengths 3 and 1. Of other answers:
# sums -2.25 and -0.25, the reference's -3 and -1; lengths 2 and 1.
GOLDEN: dict[str, tuple[float, float]] = {
    "ga": (-0.625, -2.0),
    "ga_selected": (-0.3125, -2.0),  # the two smallest losses of three, the only one of one
    "ga_tempered": ((2 * half(1) - 2 * LN2) / 3, half(2)),
    "wga": (
        (-0.5 * math.exp(-0.5) - 1.25 * math.exp(-1.25) - 0.125 * math.exp(-0.125)) / 3,
        -2 * math.exp(-2),
    ),
    "satimp": (
        sum(math.exp(5 * x) * (1 - math.exp(x)) * x for x in (-0.5, -1.25, -0.125)) / 3,
        math.exp(-10) * (1 - math.exp(-2)) * -2,
    ),
    "idk": (1.125, 0.25),
    "mismatch": (1.125, 0.25),
    "exchanged": (1.125, 0.25),
    "to_guess": (math.log1p(math.exp(2 * (-0.625 + 1.5))), math.log1p(math.exp(2 * (-2.0 + 1.0)))),
    "flat": (
        math.tanh((math.exp(-0.5) + math.exp(-1.25) + math.exp(-0.125)) / 3) / 2
        - math.tanh((math.exp(-1.5) + math.exp(-0.75)) / 2) / 2,
        math.tanh(math.exp(-2)) / 2 - math.tanh(math.exp(-0.25)) / 2,
    ),
    "npo": (-20 * math.log(sigmoid(-0.1 * -0.375)), -20 * math.log(sigmoid(-0.1 * 1.5))),
    "simnpo": (-2 / 4.5 * math.log(sigmoid(4.5 * 0.625)), -2 / 4.5 * math.log(sigmoid(4.5 * 2))),
    "dpo": (-20 * math.log(sigmoid(0.1 * (0.75 + 0.375))), -20 * math.log(sigmoid(0.1 * (0.75 - 1.5)))),
    "altpo": (-20 * math.log(sigmoid(0.1 * (0.75 + 0.375))), -20 * math.log(sigmoid(0.1 * (0.75 - 1.5)))),
    "ap": (-10 * math.log(sigmoid(0.1 * 0.375)), -10 * math.log(sigmoid(0.1 * -1.75))),
    "nll": (0.625, 2.0),
    "kl": (0.25, 0.75),
    "smoothed_nll": ((0.95 * 1.875 + 0.05 * 9) / 3, 0.95 * 2 + 0.05 * 5),
    "me": ((0.25 + 0 + 0.25) * LN2 / 3, 0.25 * LN2),  # mean powers 9/4, 2, 9/4, 9/4; less 2
    "undial": (
        ((8 + E10) / (3 + E10) + 2 + (17 + 2 * E10) / (6 + 2 * E10)) * LN2 / 3,
        (13 + 2 * E10) / (7 + E10) * LN2,
    ),
    "ceu": ((2 + 5 / 2) * LN2 / 2, 5 / 3 * LN2),  # goals 1:1:0:1, 1:1:2:0 and 4:0:1:1; the first place is left out
    "jsd_refusal": (  # tokens 3, 1, and 3 again
        (jsd_at(0, [0, 0, 0, 1]) + jsd_at(1, [0, 1, 0, 0]) + jsd_at(2, [0, 0, 0, 1])) / 3,
        jsd_at(3, [1, 0, 0, 0]),
    ),
    "flattening": (2 * (1.25 * LN2) ** 2 / 3, (1.25 * LN2) ** 2),
    "inverted_hinge": ((1.25 + 1 + 1.25) / 3, 0.75),  # 1 + 1/2 − 1/4, 1 + 1/4 − 1/4, again the first; 1 + 1/4 − 1/2
    "quail": ((0 + 0.05 + 0.05 / 4) / 3, 2 * 0.05 / 4),  # changes [5 1 -3 -3]/4, 0, [-2 0 1 1], [0 1 0 -1] times ln 2
    "whp": ((17 / 7 + 2 + 19 / 8) * LN2 / 3, 15 / 8 * LN2),  # goals 1:2:2:2 twice, then the reference twice
    "jsd": ((jsd_at(0) + jsd_at(1) + jsd_at(2)) / 3, jsd_at(3)),
}


@every_term
@pytest.mark.parametrize("constant", [0.0, 5.0])
def test_golden_values_in_float64(plugin: Plugin, constant: float) -> None:
    """They stay when a constant is added to the logits of the model, and another to those of the models before it."""
    assert plugin.name in GOLDEN, f"work out {plugin.name}'s values by hand and add them to GOLDEN"
    floats = {"log_probs": LOG_PROBS, "reference_log_probs": REFERENCE, "mean_log_probs": MEAN, "reference_kl": KL}
    for kind in COMPANIONS:
        floats |= {f"{kind}_log_probs": OTHER, f"reference_{kind}_log_probs": OTHER_REFERENCE}
    inputs: dict[str, Any] = {name: torch.tensor(values, dtype=torch.float64) for name, values in floats.items()}
    inputs |= {"mask": torch.tensor(MASK), **{f"{kind}_mask": torch.tensor(OTHER_MASK) for kind in COMPANIONS}}
    inputs["refusal_targets"] = torch.tensor(REFUSAL_TARGETS)
    inputs["logits"] = exact_logits(POWERS, constant)
    inputs["reference_logits"] = exact_logits(REFERENCE_POWERS, -2 * constant)
    inputs["reinforced_logits"] = exact_logits(REINFORCED_POWERS, 3 * constant)
    found_B = bind(plugin.kind, plugin.name)(**{name: inputs[name] for name in plugin.needs})
    assert found_B.tolist() == pytest.approx(GOLDEN[plugin.name], rel=1e-13)


def test_npo_bends_with_beta_and_stays_finite() -> None:
    """Towards 0 its gradient is gradient ascent's; far away it is flat and finite."""
    log_probs = torch.tensor([[-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-1.5, -0.5]], dtype=torch.float64)
    npo = bind("objective", "npo:beta=1e-6")
    [gradient] = torch.autograd.grad(npo(log_probs=log_probs, reference_log_probs=reference).sum(), log_probs)
    torch.testing.assert_close(gradient, torch.ones_like(gradient), rtol=1e-5, atol=0)
    for shift in (-1e4, 1e4):
        value = bind("objective", "npo")(log_probs=log_probs + shift, reference_log_probs=reference)
        assert bool(value.isfinite().all())
        assert (value.item() < 1e-6) == (shift < 0)


def cross_entropy(goal_AV: Tensor, answer: Plain) -> Tensor:
    return -(goal_AV * answer.v).sum(-1).mean()


def ceu_loss(answer: Plain) -> Tensor:
    goal_AV = answer.z.detach().clone()
    goal_AV[range(len(answer.y)), answer.y] = -torch.inf
    skip = min(1, len(answer.y) - 1)
    return cross_entropy(goal_AV.softmax(-1)[skip:], Plain(answer.y[skip:], answer.z[skip:]))


def jsd_loss(v: Tensor, q: Tensor) -> Tensor:
    """Of ln p and a distribution that may hold zeros."""
    m = (v.exp() + q) / 2
    return (v.exp() * (v - m.log()) + torch.xlogy(q, q) - torch.xlogy(q, m)).sum(-1).mean() / 2


def repeated(tokens: Tensor, answer: Plain) -> Tensor:
    return one_hot(torch.tensor([tokens[t % len(tokens)] for t in range(len(answer.y))]), 32).float()


def quail_loss(z: Tensor, z_ref: Tensor) -> Tensor:
    change = (z - z.mean(-1, keepdim=True)) - (z_ref - z_ref.mean(-1, keepdim=True))
    return torch.clamp(0.05 - change.abs(), min=0).mean()


def hinge_loss(p: Tensor, y: Tensor) -> Tensor:
    others = [torch.cat([p[t, :k], p[t, k + 1 :]]).max() for t, k in enumerate(y.tolist())]
    return torch.stack([1 + p[t, k] - others[t] for t, k in enumerate(y.tolist())]).mean()


def whp_goal(ref: Plain, more: Plain) -> Tensor:
    return (ref.v - torch.clamp(more.v - ref.v, min=0)).softmax(-1)


def softly(margin: Tensor, beta: float) -> Tensor:
    return torch.log1p(torch.exp(-beta * margin)) / beta


# The stated loss of one item, written out from what the model (m), its reference (r) and the reinforced model (x) say.
STATED: dict[str, Callable[[Any, Any, Any], Tensor]] = {
    "ga": lambda m, r, x: m.own.p.mean(),
    "ga_selected": lambda m, r, x: m.own.p.sort(descending=True).values[: max(1, int(0.8 * len(m.own.p)))].mean(),
    "ga_tempered": lambda m, r, x: (m.own.z / 2).log_softmax(-1)[range(len(m.own.y)), m.own.y].mean(),
    "wga": lambda m, r, x: (m.own.p.detach().exp() * m.own.p).mean(),
    "satimp": lambda m, r, x: (m.own.p.detach().exp() ** 5 * (1 - m.own.p.detach().exp()) * m.own.p).mean(),
    "idk": lambda m, r, x: -m.refusal.p.mean(),
    "mismatch": lambda m, r, x: -m.mismatched.p.mean(),
    "exchanged": lambda m, r, x: -m.exchanged.p.mean(),
    "to_guess": lambda m, r, x: 2 * softly(r.exchanged.p.mean() - m.own.p.mean(), 2.0),
    "flat": lambda m, r, x: (torch.tanh(m.own.p.exp().mean()) - torch.tanh(m.refusal.p.exp().mean())) / 2,
    "npo": lambda m, r, x: 20 * torch.log(1 + (m.own.p.sum().exp() / r.own.p.sum().exp()) ** 0.1),
    "simnpo": lambda m, r, x: 2 * softly(-m.own.p.mean() - 3.5, 4.5),
    "dpo": lambda m, r, x: 2 * softly((m.refusal.p.sum() - r.refusal.p.sum()) - (m.own.p.sum() - r.own.p.sum()), 0.1),
    "altpo": lambda m, r, x: (
        2 * softly((m.alternative.p.sum() - r.alternative.p.sum()) - (m.own.p.sum() - r.own.p.sum()), 0.1)
    ),
    "ap": lambda m, r, x: softly(m.own.p.sum() - m.refusal.p.sum(), 0.1),
    "nll": lambda m, r, x: -m.own.p.mean(),
    "smoothed_nll": lambda m, r, x: -(0.95 * m.own.p + 0.05 * m.own.v.mean(-1)).mean(),
    "kl": lambda m, r, x: (r.own.v.exp() * (r.own.v - m.own.v)).sum(-1).mean(),
    "me": lambda m, r, x: (math.log(1 / 32) - m.own.v).mean(),
    "undial": lambda m, r, x: cross_entropy((r.own.z - 10 * one_hot(r.own.y, 32)).softmax(-1), m.own),
    "ceu": lambda m, r, x: ceu_loss(m.own),
    "jsd_refusal": lambda m, r, x: jsd_loss(m.own.v, repeated(m.refusal.y, m.own)),
    "flattening": lambda m, r, x: (m.own.z.amax(-1) - m.own.z.mean(-1)).square().mean(),
    "inverted_hinge": lambda m, r, x: hinge_loss(m.own.v.exp(), m.own.y),
    "quail": lambda m, r, x: quail_loss(m.own.z, r.own.z),
    "whp": lambda m, r, x: cross_entropy(whp_goal(r.own, x.own), m.own),
    "jsd": lambda m, r, x: jsd_loss(m.own.v, r.own.v.exp()),
}


STATED_FOR = {"simnpo": ":delta=3.5"}  # options with which a loss is not flat at random weights


def stated_loss(name: str, term: Term, models: Sequence[nn.Module], turn: int = 0) -> Tensor:
    """The mean over a term's items at a turn; models: the trained one, its reference, the reinforced one."""
    assert name in STATED, f"write {name}'s loss out in STATED"
    asked = {InputSpec.of(need).companion for need in term.objective.plugin.needs} | {""}
    values = []
    for i in range(len(term.items)):
        answers = {companion or "own": term.answers(companion, [(i, turn)])[0] for companion in asked}
        said = [
            SimpleNamespace(**{companion: read_plainly(model, item) for companion, item in answers.items()})
            for model in models
        ]
        values.append(STATED[name](*said))
    return torch.stack(values).mean()


class ManualAdamW:
    """AdamW without decay, from its definition, after clipping the gradient's norm over all parameters."""

    def __init__(self, parameters: Sequence[Tensor], lr: float, clip: float) -> None:
        self.parameters, self.lr, self.clip, self.steps = parameters, lr, clip, 0
        self.m = [torch.zeros_like(p) for p in parameters]
        self.v = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        self.steps += 1
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        for p, g, m, v in zip(self.parameters, gradients, self.m, self.v, strict=True):
            g = g * min(1.0, self.clip / norm)
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.999).add_(g * g, alpha=0.001)
            m_hat, v_hat = m / (1 - 0.9**self.steps), v / (1 - 0.999**self.steps)
            p.sub_(self.lr * m_hat / (v_hat.sqrt() + 1e-8))


@every_term
@pytest.mark.parametrize("clip", [0.05, 1e9])
def test_steps_equal_autograd_of_the_stated_loss(
    plugin: Plugin, clip: float, make_model: Make, make_items: Items
) -> None:
    """Three steps of a term and 0.3 nll, against plain logits, written-out losses and a written-out AdamW.

    They start some way from the reference, so that no weight sees the rounding errors alone of a gradient that is 0
    there. Each step is a pass of its own: other answers take turns.
    """
    reference, plain, model = (make_model(layers=2) for _ in range(3))
    other = reinforced(reference)
    move(plain)
    started = copy.deepcopy(plain)
    term = make_term(plugin, make_items(LENGTHS), STATED_FOR.get(plugin.name, ""))
    nll = Term(bind("objective", "nll:weight=0.3"), make_items(LENGTHS))
    plain.requires_grad_(True)
    parameters = list(plain.parameters())
    optimizer = ManualAdamW(parameters, lr=1e-3, clip=clip)
    for turn in range(3):
        loss = stated_loss(plugin.name, term, [plain, reference, other], turn) + 0.3 * stated_loss(
            "nll", nll, [plain] * 3
        )
        optimizer.step(torch.autograd.grad(loss, parameters))
    fit(model, [term, nll], setting(epochs=3, clip=clip), teachers={"reinforced": other}, start=move)
    for found, expected, start in zip(model.parameters(), parameters, started.parameters(), strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=3e-5)
        assert (found - start).abs().max() > 2e-3


@every_term
def test_gradient_equals_autograd_of_the_stated_loss(plugin: Plugin, make_model: Make, make_items: Items) -> None:
    reference, model = make_model(layers=2), make_model(layers=2)
    loop = make_loop(model, plugin, make_items(LENGTHS), STATED_FOR.get(plugin.name, ""))
    models = [model, reference, reinforced(reference)]
    move(model)
    stated = stated_loss(plugin.name, loop.terms[0], models)
    expected = torch.autograd.grad(stated, list(model.parameters()))
    assert loop._backward(loop.terms[0], loop.inputs[0], [Draw(i, 0) for i in range(4)]) == pytest.approx(
        stated.item(), rel=1e-5
    )
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


@every_term
@pytest.mark.parametrize("accumulate", [3, 9])
def test_accumulated_gradients_equal_those_of_one_batch(
    plugin: Plugin, accumulate: int, make_model: Make, make_items: Items
) -> None:
    found = []
    for parts in (1, accumulate):
        model = make_model()
        loop = make_loop(model, plugin, make_items(LENGTHS), accumulate=parts)
        move(model)
        value = loop._backward(loop.terms[0], loop.inputs[0], [Draw(i, 0) for i in (3, 0, 2, 1)])
        found.append([torch.tensor(value), *(p.grad for p in model.parameters()), torch.tensor(loop.done.tokens)])
    for a, b in zip(*found, strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@every_term
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_accumulation_changes_no_run(
    plugin: Plugin, weights: Literal["float32", "bfloat16"], make_model: Make, make_items: Items
) -> None:
    """A whole run; in bfloat16 a weight may end one spacing away where the sums round differently."""
    items, runs = make_items(LENGTHS), []
    for accumulate in (1, 2):
        model = make_model()
        terms = [make_term(plugin, items), Term(bind("objective", "nll:weight=0.3"), items)]
        other = reinforced(model)
        fit(
            model,
            terms,
            setting(epochs=4, accumulate=accumulate, weights=weights),
            teachers={"reinforced": other},
            start=move,
        )
        runs.append(torch.cat([p.flatten() for p in model.parameters()]))
    tolerance = 1e-5 if weights == "float32" else 2**-8
    assert torch.isclose(*runs, rtol=tolerance, atol=1e-5).float().mean() > 0.998


@every_term
def test_terms_descend(plugin: Plugin, model: Any, make_items: Items) -> None:
    """A retain term lowers the loss of its items, a forget term raises it.

    Of terms with parts taken as constants, the answers' log-probability is what descends.
    """
    loop = make_loop(model, plugin, make_items(LENGTHS), EVERYWHERE.get(plugin.name, ""), choices=1, epochs=9)
    move(model)
    values = []
    for _ in range(6):
        value = loop.step(9)
        if plugin.name in ("wga", "satimp", "ceu"):
            value = sum(read_plainly(model, item).p.mean().item() for item in loop.terms[0].items)
        values.append(value)
    assert all(after < before for before, after in pairwise(values))


def read_wrongly(name: str, z_BLV: Tensor, z_ref_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Losses as published code had them; labels are -100 at prompts and fillers."""
    predicted_BL = labels_BL[:, 1:]
    if name == "undial":  # every place counts, and -100 is looked up as a token
        goal_BLV = (z_ref_BLV[:, :-1] - 10 * one_hot(predicted_BL % z_BLV.shape[-1], z_BLV.shape[-1])).softmax(-1)
        return -(goal_BLV * z_BLV[:, :-1].log_softmax(-1)).sum(-1).mean()
    if name == "flattening":  # the mask is not shifted against the logits
        return (z_BLV.amax(-1) - z_BLV.mean(-1)).square()[labels_BL != -100].mean()
    if name == "kl":  # over prompts and fillers too
        return (
            kl_div(z_BLV.log_softmax(-1), z_ref_BLV.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
        )
    raise ValueError(name)


@pytest.mark.parametrize("name", ["undial", "flattening", "kl"])
def test_published_ways_to_judge_the_wrong_places_are_seen(name: str, make_model: Make, make_items: Items) -> None:
    """What the contract demands of every term, that gradient reaches the predicting places only, these forms fail."""
    items = make_items(LENGTHS, vocabulary=128)
    model, reference = make_model(vocabulary=128), make_model(vocabulary=128)
    move(model)
    ids_BL = right_padded([item.ids for item in items])
    labels_BL = torch.full_like(ids_BL, -100)
    for row, item in enumerate(items):
        labels_BL[row, item.start : len(item.ids)] = ids_BL[row, item.start : len(item.ids)]
    z_BLV = model(input_ids=ids_BL).logits.detach().requires_grad_()
    wrong = read_wrongly(name, z_BLV, reference(input_ids=ids_BL).logits, labels_BL)
    [gradient_BLV] = torch.autograd.grad(wrong, z_BLV)
    assert not torch.equal(gradient_BLV.abs().amax(-1) > 0, predicting(items, ids_BL.shape[1]))


def test_published_losses_on_raw_logits_are_seen(make_model: Make, make_items: Items) -> None:
    """A constant on all logits, which no term may see, changes these forms; and KL(p ‖ p) is 0 only of logarithms."""
    reference, model = make_model(), make_model()
    move(model)
    [item] = make_items([4])
    y, z = read_plainly(model, item)
    z_ref = read_plainly(reference, item).z
    places = range(len(y))

    def npo(z: Tensor) -> Tensor:
        return 2 * softly(z_ref[places, y].sum() - z[places, y].sum(), 0.1)

    def kl(z: Tensor) -> Tensor:
        return (z_ref.softmax(-1) * (z_ref - z)).sum(-1).mean()

    assert (npo(z + 5) - npo(z)).abs() > 0.1
    assert (kl(z + 5) - kl(z)).abs() > 0.1
    assert kl_div(z.softmax(-1), z.softmax(-1), reduction="none").sum(-1).mean().abs() > 0.1
    assert kl_div(z.log_softmax(-1), z.softmax(-1), reduction="none").sum(-1).mean().abs() < 1e-6


CONVEX: dict[str, Callable[[Tensor], Tensor]] = {  # f of each divergence, f(1) = 0
    "total_variation": lambda t: (t - 1).abs() / 2,
    "kl": lambda t: t * t.log(),
    "jensen_shannon": lambda t: t * t.log() - (t + 1) * ((t + 1) / 2).log(),
    "pearson": lambda t: (t - 1) ** 2,
}


@pytest.mark.parametrize("name", CONVEX)
@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_costs_of_flat_are_the_conjugates_of_its_gains(name: str, p: float) -> None:
    """f*(u) = sup over t of u·t − f(t), searched on a grid; the gain of 0 is told by a second answer."""
    from stillknows.methods.objectives.likelihood import DIVERGENCES

    gain, cost = DIVERGENCES[name]  # type: ignore[index]
    grid = torch.linspace(1e-6, 20, 2_000_001, dtype=torch.float64)
    u = gain(torch.tensor(p, dtype=torch.float64))
    assert float(cost(torch.tensor(p, dtype=torch.float64))) == pytest.approx(
        float((u * grid - CONVEX[name](grid)).max()), abs=1e-5
    )


def test_jsd_to_a_refusal_is_bounded_and_its_gradient_finite() -> None:
    """ln 2 where the refusal is impossible, 0 where it is certain."""
    for power, value in ((2000, LN2), (0, 0.0)):
        powers = [[power, 0 if power else 2000, 2000, 2000]] * 4
        logits = exact_logits(powers)
        logits.hidden_TD.requires_grad_()
        zeros = torch.zeros(2, 1, dtype=torch.long)
        loss_B = bind("objective", "jsd_refusal")(
            logits=logits, mask=torch.tensor(MASK), refusal_targets=zeros, refusal_mask=zeros == 0
        )
        assert loss_B.tolist() == pytest.approx([value] * 2, abs=1e-12)
        loss_B.sum().backward()
        assert logits.hidden_TD.grad is not None
        assert bool(logits.hidden_TD.grad.isfinite().all())


def test_ceu_leaves_an_answers_beginning_alone_but_not_all_of_it() -> None:
    """Places 1 to 3 of 3 and the only one of the other; leaving out 1, 2 and more leaves the last."""
    values = [
        bind("objective", f"ceu:skip={skip}")(logits=exact_logits(POWERS), mask=torch.tensor(MASK)) for skip in range(4)
    ]
    first = (2 * 2 + 3 + 3) / 4 * LN2  # goal 0:2:1:1 for powers 1 2 3 3
    expected = [(first + 2 * LN2 + 2.5 * LN2) / 3, 2.25 * LN2, 2.5 * LN2, 2.5 * LN2]
    assert [float(value_B[0]) for value_B in values] == pytest.approx(expected)
    assert [float(value_B[1]) for value_B in values] == pytest.approx([5 / 3 * LN2] * 4)


@pytest.mark.parametrize(
    "spec",
    [
        *("wga:beta=-1", "satimp:beta1=-1", "satimp:beta2=-1", "npo:beta=0", "simnpo:beta=0", "dpo:beta=-1"),
        *("altpo:beta=0", "ap:beta=0", "ceu:skip=-1", "quail:margin=0", "whp:alpha=-1", "npo:beta=nan"),
    ],
)
def test_options_out_of_range_are_refused(spec: str) -> None:
    with pytest.raises(UserError, match=f"{spec} is out of range"):
        bind("objective", spec)


def test_every_stated_value_belongs_to_a_term() -> None:
    assert {*AT_REFERENCE, *GOLDEN, *STATED} <= {plugin.name for plugin in TERMS}
