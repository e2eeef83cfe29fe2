"""Terms on hidden states and the methods made of them: contract tests through the training loop, values by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillknows.errors import UserError
from stillknows.model.layers import block_output, blocks
from stillknows.model.ref import ModelRef
from stillknows.registry import Plugin, bind, plugins
from stillknows.training.loop import _Loop, fit
from stillknows.training.objective_inputs import Draw, InputSpec, Term
from stillknows.training.settings import Settings
from stillknows.types import Benchmark, Example, Split
from stillknows.unlearning import method, unlearn

Items = Callable[..., list[Any]]
Make = Callable[..., Any]
TERMS = [
    plugin
    for plugin in plugins("objective").values()
    if any(InputSpec.of(name).field == "hidden" for name in plugin.needs)
]
LENGTHS = [4, 1, 7, 3]
LAYER, DEPTH = 2, 3
every_term = pytest.mark.parametrize("plugin", TERMS, ids=lambda p: p.name)


def setting(**changes: Any) -> Settings:
    return Settings(**({"lr": 1e-3, "epochs": 1, "batch_size": len(LENGTHS)} | changes))


def make_loop(model: nn.Module, plugin: Plugin, items: list[Any], options: str = "", **changes: Any) -> _Loop:
    term = Term(bind(plugin.kind, f"{plugin.name}:layer={LAYER}{options}"), items)
    return _Loop(model, [term], setting(**changes))


def losses(loop: _Loop, rows: list[int]) -> Tensor:
    term = loop.terms[0]
    return term.objective(**loop.inputs[0]([Draw(i, 0) for i in rows]))


def move(model: nn.Module, scale: float = 0.05, seed: int = 9) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def plain_states(model: nn.Module, item: Any, layer: int = LAYER) -> Tensor:
    """The output of a block at the places that predict the item's answer, from the model's own list of states."""
    states_LD = model(input_ids=torch.tensor([item.ids]), output_hidden_states=True).hidden_states[layer][0]
    return states_LD[max(1, item.start) - 1 : len(item.ids) - 1]


def unit(size: int, seed: int = 0) -> Tensor:
    u = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return u / u.norm()


# The stated loss of one item from its states and the reference's, each [A, D], written out.
STATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "steer": lambda h, h_ref: (h - 6.5 * unit(h.shape[1])).pow(2).mean(),
    "steer_adaptive": lambda h, h_ref: (h - 5 * h_ref.norm(dim=1).mean() * unit(h.shape[1])).pow(2).mean(),
    "hidden": lambda h, h_ref: (h - h_ref).pow(2).mean(),
    "reroute": lambda h, h_ref: ((h * h_ref).sum(1) / h.norm(dim=1) / h_ref.norm(dim=1)).clamp(min=0).mean(),
}


@every_term
def test_one_finite_loss_per_item_whatever_the_padding(plugin: Plugin, make_model: Make, make_items: Items) -> None:
    model = make_model(layers=DEPTH)
    loop = make_loop(model, plugin, make_items(LENGTHS))
    move(model)
    together_B = losses(loop, [0, 1, 2, 3])
    assert together_B.shape == (4,)
    assert bool(together_B.isfinite().all())
    assert together_B.requires_grad
    alone_B = torch.cat([losses(loop, [i]) for i in range(4)])
    torch.testing.assert_close(together_B, alone_B, rtol=1e-5, atol=1e-6)


@every_term
def test_loss_and_gradient_equal_autograd_of_the_stated_loss(
    plugin: Plugin, make_model: Make, make_items: Items
) -> None:
    reference, model = make_model(layers=DEPTH), make_model(layers=DEPTH)
    items = make_items(LENGTHS)
    loop = make_loop(model, plugin, items)
    move(model)
    stated = torch.stack(
        [STATED[plugin.name](plain_states(model, item), plain_states(reference, item).detach()) for item in items]
    ).mean()
    expected = torch.autograd.grad(stated, list(model.parameters()), allow_unused=True)
    assert loop._backward(loop.terms[0], loop.inputs[0], [Draw(i, 0) for i in range(4)]) == pytest.approx(
        stated.item(), rel=1e-5
    )
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        if gradient is None:
            assert parameter.grad is None or not parameter.grad.any()
        else:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


@every_term
def test_gradient_is_zero_exactly_where_no_answer_token_is_predicted(
    plugin: Plugin, make_model: Make, make_items: Items
) -> None:
    model, items = make_model(layers=DEPTH), make_items(LENGTHS)
    loop = make_loop(model, plugin, items)
    move(model)
    with block_output(blocks(model)[LAYER - 1]) as seen:
        found_B = losses(loop, [0, 1, 2, 3])
    *_, states_BLD = seen  # before them: whether these items may share a pass
    states_BLD.retain_grad()
    found_B.sum().backward()
    assert states_BLD.grad is not None
    reached_BL = states_BLD.grad.abs().amax(-1) > 0
    predicting_BL = torch.tensor(
        [[item.start - 1 <= column < len(item.ids) - 1 for column in range(reached_BL.shape[1])] for item in items]
    )
    assert torch.equal(reached_BL, predicting_BL)
    later = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert later
    assert all("layers.2." not in name and "lm_head" not in name and "model.norm" not in name for name in later)


@every_term
def test_weight_multiplies_the_loss(plugin: Plugin, make_model: Make, make_items: Items) -> None:
    model, items = make_model(layers=DEPTH), make_items(LENGTHS)
    loops = [make_loop(model, plugin, items, options) for options in ("", ":weight=2.5")]
    move(model)
    one_B, more_B = (losses(loop, [0, 1, 2, 3]) for loop in loops)
    torch.testing.assert_close(more_B, 2.5 * one_B)


@every_term
def test_accumulated_gradients_equal_those_of_one_batch(plugin: Plugin, make_model: Make, make_items: Items) -> None:
    found = []
    for parts in (1, 3):
        model = make_model(layers=DEPTH)
        loop = make_loop(model, plugin, make_items(LENGTHS), accumulate=parts)
        move(model)
        loop._backward(loop.terms[0], loop.inputs[0], [Draw(i, 0) for i in (3, 0, 2, 1)])
        found.append([p.grad for p in blocks(model)[0].parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_hidden_is_0_at_the_reference(make_model: Make, make_items: Items) -> None:
    [plugin] = [p for p in TERMS if p.name == "hidden"]
    found_B = losses(make_loop(make_model(layers=DEPTH), plugin, make_items(LENGTHS)), [0, 1, 2, 3])
    torch.testing.assert_close(found_B, torch.zeros(4), rtol=0, atol=1e-10)


def test_rerouting_is_1_at_the_reference_and_0_from_a_right_angle_on(make_model: Make, make_items: Items) -> None:
    [plugin] = [p for p in TERMS if p.name == "reroute"]
    found_B = losses(make_loop(make_model(layers=DEPTH), plugin, make_items(LENGTHS)), [0, 1, 2, 3])
    torch.testing.assert_close(found_B, torch.ones(4))
    angles = torch.tensor([[[0.0, 1.0], [-1.0, 0.5], [1.0, 1.0]]])
    before, mask = torch.tensor([[1.0, 0.0]]).expand(1, 3, 2), torch.ones(1, 3, dtype=torch.bool)
    found = bind("objective", "reroute")(hidden=angles, reference_hidden=before, mask=mask)
    assert found.item() == pytest.approx(0.5**0.5 / 3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "gpt2", "gpt_neox", "cohere"])
def test_states_are_those_of_the_models_own_list(family: str, make_model: Make, make_items: Items) -> None:
    """The families' blocks return tensors or tuples."""
    model, items = make_model(family, layers=DEPTH), make_items(LENGTHS)
    loop = _Loop(model, [Term(bind("objective", f"steer:layer={LAYER}"), items)], setting())
    found_BAD = loop.inputs[0]([Draw(i, 0) for i in range(4)])["hidden"]
    assert isinstance(found_BAD, Tensor)
    torch.testing.assert_close(found_BAD[2], plain_states(model, items[2]), rtol=1e-5, atol=1e-5)
    assert not found_BAD[1, LENGTHS[1] :].any()


# Two items of two tokens and one, of two features; the reference's lengths are 5, 13 (mean 9) and 2.
HIDDEN = [[[1.0, 2.0], [3.0, -1.0]], [[0.5, 0.25], [0.0, 0.0]]]
REFERENCE = [[[3.0, 4.0], [5.0, -12.0]], [[0.0, 2.0], [0.0, 0.0]]]
MASK = [[True, True], [True, False]]


def by_hand(lengths: tuple[float, float]) -> list[float]:
    """Mean square distance to these lengths times u, for each item."""
    a, b = unit(2).tolist()
    x, y = lengths
    first = ((1 - x * a) ** 2 + (2 - x * b) ** 2 + (3 - x * a) ** 2 + (-1 - x * b) ** 2) / 4
    return [first, ((0.5 - y * a) ** 2 + (0.25 - y * b) ** 2) / 2]


GOLDEN = {
    "steer": by_hand((6.5, 6.5)),
    "steer_adaptive": by_hand((45.0, 10.0)),
    "hidden": [(4 + 4 + 4 + 121) / 4, (0.25 + 1.75**2) / 2],
    "reroute": [(11 / 5 / 5**0.5 + 27 / 13 / 10**0.5) / 2, 0.25 / 0.3125**0.5],
}


@every_term
def test_golden_values_in_float64(plugin: Plugin) -> None:
    inputs = {
        "hidden": torch.tensor(HIDDEN, dtype=torch.float64),
        "reference_hidden": torch.tensor(REFERENCE, dtype=torch.float64),
        "mask": torch.tensor(MASK),
    }
    found_B = bind(plugin.kind, plugin.name)(**{name: inputs[name] for name in plugin.needs})
    assert found_B.tolist() == pytest.approx(GOLDEN[plugin.name], rel=1e-6)  # u is drawn in float32


def test_the_goal_is_one_direction_of_a_seed() -> None:
    """Where the states are 0 the loss is c²/D for any u; where they are c·u of the same seed it is 0."""
    for seed in (0, 3):
        term = bind("objective", f"steer:coefficient=2:seed={seed}")
        goal = 2 * unit(8, seed)
        assert bool((goal >= 0).all())
        mask = torch.ones(1, 3, dtype=torch.bool)
        assert term(hidden=torch.zeros(1, 3, 8), mask=mask).item() == pytest.approx(4 / 8)
        assert term(hidden=goal.expand(1, 3, 8), mask=mask).item() == pytest.approx(0, abs=1e-12)
    assert not torch.equal(unit(8, 0), unit(8, 3))


@pytest.mark.parametrize("spec", ["steer:coefficient=-1", "steer_adaptive:scale=-1"])
def test_negative_lengths_are_refused(spec: str) -> None:
    with pytest.raises(UserError, match=f"{spec} is out of range"):
        bind("objective", spec)


def names_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def test_down_proj_lets_the_feed_forward_outputs_of_three_blocks_move(make_model: Make) -> None:
    weights = names_of(make_model(layers=4))
    for layer, expected in (("3", [0, 1, 2]), ("4", [1, 2, 3]), ("0.25", [0]), ("1", [0])):
        allowed = bind("step", f"down_proj:layer={layer}")(weights=weights)
        chosen = [name for name, mask in allowed.items() if bool(mask.any())]
        assert chosen == [f"model.layers.{i}.mlp.down_proj.weight" for i in expected]
        assert all(bool(allowed[name].all()) for name in chosen)
        assert [mask.shape for mask in allowed.values()] == [w.shape for w in weights.values()]
    [last] = [name for name, m in bind("step", "down_proj:layer=4:count=1")(weights=weights).items() if bool(m.any())]
    assert last == "model.layers.3.mlp.down_proj.weight"


def test_down_proj_finds_the_matrix_of_every_family(family_model: Any) -> None:
    weights = names_of(family_model)
    [chosen] = [name for name, m in bind("step", "down_proj:layer=1")(weights=weights).items() if bool(m.any())]
    assert sorted(weights[chosen].shape) == sorted((16, {"gpt2": 64}.get(family_model.config.model_type, 24)))
    assert "mlp" in chosen


@pytest.mark.parametrize(
    ("spec", "names", "message"),
    [
        ("down_proj:layer=5", ["model.layers.3.mlp.down_proj.weight"], "layer=5 does not exist"),
        ("down_proj:count=0", [], "count=0 is out of range"),
        ("down_proj", ["model.layers.0.experts.weight"], "no tensor has the name"),
    ],
)
def test_down_proj_refuses(spec: str, names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bind("step", spec)(weights={name: torch.zeros(2, 2) for name in names})


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("rmu", ["steer:coefficient=6.5:layer=0.25:seed=0", "hidden:weight=1200.0:layer=0.25", "down_proj:layer=0.25"]),
        ("rmu:coefficient=2:layer=2", ["steer:coefficient=2.0:layer=2.0:seed=0", "hidden:weight=1200.0:layer=2.0"]),
        ("adaptive_rmu", ["steer_adaptive:scale=5.0:layer=0.25:seed=0", "hidden:weight=1200.0:layer=0.25"]),
        (
            "circuit_breakers",
            ["reroute:weight=10.0:layer=0.33", "hidden:weight=10.0:layer=0.33"],
        ),
    ],
)
def test_recipes_stand_for_their_parts(spec: str, parts: list[str]) -> None:
    found = [part.spec for part in method.parse(spec).parts]
    assert found[: len(parts)] == parts
    assert found[-1].startswith("lora:" if spec == "circuit_breakers" else "down_proj:layer=")


@pytest.mark.parametrize("spec", ["rmu:coefficient=3:alpha=10:layer=2", "adaptive_rmu:scale=3:alpha=10:layer=2"])
def test_a_published_method_moves_the_forget_states_and_its_three_matrices_only(
    spec: str, make_model: Make, make_items: Items
) -> None:
    model, reference = make_model(layers=4), make_model(layers=4)
    forget, retain = make_items(LENGTHS), make_items(LENGTHS, seed=5)
    chosen = method.parse(spec)
    terms = [Term(term, forget if term.plugin.role == "forget" else retain) for term in chosen.terms]
    fit(model, terms, setting(epochs=40, lr=3e-3), step_plugins=chosen.step_plugins)
    moved = [
        name for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True) if (p != q).any()
    ]
    assert moved == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]

    def aligned(which: nn.Module) -> float:
        states = torch.cat([plain_states(which, item) for item in forget])
        return float(torch.cosine_similarity(states, unit(16)[None]).mean())

    def shift(items: list[Any]) -> float:
        pairs = [(plain_states(model, item), plain_states(reference, item)) for item in items]
        return float(torch.cat([(a - b).norm(dim=1) for a, b in pairs]).mean())

    with torch.no_grad():
        assert aligned(model) > aligned(reference) + 0.2
        assert shift(forget) > 1.5 * shift(retain)


@pytest.mark.parametrize("spec", ["rmu:layer=7", "npo + hidden:layer=7", "npo + nll + down_proj:layer=7"])
def test_a_layer_that_does_not_exist_is_told_before_the_model_is_loaded(
    spec: str, save_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ModelRef, "load", lambda *args, **options: pytest.fail("the model was loaded"))
    forget = Split("forget", "forget", (Example("a", "what is", "red", "a"),))
    retain = Split("retain", "retain", (Example("b", "where is", "blue", "b"),))
    benchmark = Benchmark("test", (forget, retain))
    request = unlearn.UnlearnConfig(str(save_model("model")), benchmark, spec, setting())
    with pytest.raises(UserError, match="layer=7 does not exist"):
        unlearn.unlearn(request, tmp_path / "out")
