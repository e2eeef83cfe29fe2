"""Calibrated formats: statistics against a plain loop, GPTQ against its derivation, AWQ against what it promises."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillknows.errors import UserError
from stillknows.model.layers import blocks, linears
from stillknows.observations import load_observations
from stillknows.registry import bind
from stillknows.transforms.compression import calibrated, parts
from stillknows.transforms.compression.calibrated import awq, gptq, output_error
from stillknows.transforms.compression.rtn import RoundingGrid, rtn
from stillknows.variants import calibrate, compress, fitting
from stillknows.variants.calibrate import sequences, statistics

OUTPUTS, INPUTS = 24, 64


@pytest.fixture
def weight_OI() -> Tensor:
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0)) / 8


@pytest.fixture
def x_TI() -> Tensor:
    """Correlated inputs of unlike size."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(500, INPUTS, generator=generator) @ torch.randn(INPUTS, INPUTS, generator=generator)
    return mixed / 8 * torch.linspace(0.1, 4, INPUTS)


@pytest.fixture
def ids_NL() -> Tensor:
    return torch.randint(3, 32, (5, 24), generator=torch.Generator().manual_seed(2))


def hessian(x_TI: Tensor) -> Tensor:
    return x_TI.T @ x_TI / len(x_TI)


def inputs_of(model: Any, name: str, ids_NL: Tensor) -> Tensor:
    """Return what enters a module, sequence by sequence, as [tokens, I] in float64."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, -2).double()))
    for ids_L in ids_NL:
        model(input_ids=ids_L[None])
    handle.remove()
    return torch.cat(seen)


@torch.no_grad()
def test_statistics_are_those_of_the_whole_model(make_model: Callable[..., Any], ids_NL: Tensor) -> None:
    """Without changes to the weights: the inputs of every map as in a plain forward pass."""
    for family in ("llama", "gpt2", "gemma2", "phi"):
        model = make_model(family, layers=3)
        found = {name: seen for block in statistics(model, ids_NL) for name, (_, seen) in block.items()}
        assert list(found) == [layer.name for layer in linears(model)]
        for name, seen in found.items():
            x_TI = inputs_of(model, name, ids_NL)
            torch.testing.assert_close(seen.hessian_II.double(), hessian(x_TI), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(seen.magnitudes_I.double(), x_TI.abs().mean(0), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_later_blocks_see_what_earlier_ones_have_become(make_model: Callable[..., Any], ids_NL: Tensor) -> None:
    model, changed = make_model(layers=2), make_model(layers=2)
    walk = statistics(model, ids_NL)
    for layer, _ in next(walk).values():
        layer.read().mul_(0.5)
    for name, module in changed.named_modules():
        if isinstance(module, nn.Linear) and "layers.0." in name:
            module.weight.mul_(0.5)
    for name, (_, seen) in next(walk).items():
        x_TI = inputs_of(changed, name, ids_NL)
        torch.testing.assert_close(seen.hessian_II.double(), hessian(x_TI), rtol=1e-4, atol=1e-5)


def test_maps_outside_the_blocks_are_refused(model: Any, ids_NL: Tensor) -> None:
    model.model.extra = nn.Linear(4, 4)
    with pytest.raises(UserError, match=r"model\.extra lies outside the decoder's blocks"):
        next(statistics(model, ids_NL))


def test_blocks_are_the_decoders(family_model: Any) -> None:
    assert len(blocks(family_model)) == family_model.config.num_hidden_layers


def test_calibration_text_is_cut_into_equal_pieces(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "LEAST_TOKENS", 8)
    texts = ["who is Ada", "the river of Rome", "a cat"]
    stream = [i for text in texts for i in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    assert sequences(texts, tokenizer, 5).tolist() == [stream[:5], stream[5:10]]
    assert sequences(texts, tokenizer, 5, count=1).tolist() == [stream[:5]]
    assert sequences(texts, tokenizer, 500).tolist() == [stream]


def test_too_little_calibration_text_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"has 4 tokens; at least 256 are needed[\s\S]*`calibration`"):
        sequences(["who is Ada"], tokenizer, 50)


def test_a_map_that_is_given_nothing_is_named(model: Any, ids_NL: Tensor) -> None:
    model.model.layers[0].extra = nn.Linear(4, 4)
    with pytest.raises(UserError, match=r"model\.layers\.0\.extra is given no inputs"):
        next(statistics(model, ids_NL))


# GPTQ


def by_derivation(weight_OI: Tensor, hessian_II: Tensor, group: int, damp: float) -> Tensor:
    """Optimal brain quantization, left to right, in float64: after each input, the rest is set to what minimises the
    output error given all roundings so far, w_R ← w_R − e/[H⁻¹]₁₁·[H⁻¹]₁,R with H⁻¹ over the inputs that are left."""
    weight_OI, hessian_II = weight_OI.double().clone(), hessian_II.double()
    hessian_II = hessian_II + damp * hessian_II.diagonal().mean() * torch.eye(len(hessian_II), dtype=torch.float64)
    grid = RoundingGrid.of(weight_OI.float().reshape(len(weight_OI), -1, group), 4, True, "full")
    for i in range(weight_OI.shape[1]):
        inverse = hessian_II[i:, i:].inverse()
        column = RoundingGrid(grid.step[:, i // group, 0].double(), torch.zeros(len(weight_OI)), grid.low, grid.high)
        rounded = column.values(column.codes(weight_OI[:, i]))
        error = (weight_OI[:, i] - rounded) / inverse[0, 0]
        weight_OI[:, i + 1 :] -= torch.outer(error, inverse[0, 1:])
        weight_OI[:, i] = rounded
    return weight_OI


def test_gptq_equals_its_derivation(weight_OI: Tensor, x_TI: Tensor) -> None:
    found = gptq(weight_OI, hessian(x_TI), group=32, order="none").values_OI
    expected = by_derivation(weight_OI, hessian(x_TI), 32, 0.01)
    assert (found - expected).abs().lt(1e-5).float().mean() > 0.99  # a tie in rounding may fall otherwise in float32


def test_act_order_is_the_same_with_inputs_sorted(weight_OI: Tensor, x_TI: Tensor) -> None:
    places = hessian(x_TI).diagonal().argsort(descending=True)
    inputs = x_TI[:, places]
    sorted_ones = gptq(weight_OI[:, places], hessian(inputs), group=0, order="none")
    found = gptq(weight_OI, hessian(x_TI), group=0)
    assert (found.codes_OI[:, places] == sorted_ones.codes_OI).float().mean() > 0.99


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"group": 0}, {"bits": 3}, {"order": "none"}])
def test_gptq_errs_less_than_rounding_to_nearest(weight_OI: Tensor, x_TI: Tensor, options: dict[str, Any]) -> None:
    options = {"group": 32} | options
    plain = {name: value for name, value in options.items() if name != "order"}
    nearest = rtn(weight_OI, grid="full", **plain).values_OI
    error, plain_error = (
        float(((weight_OI - values_OI) @ x_TI.T).square().sum())
        for values_OI in (gptq(weight_OI, hessian(x_TI), **options).values_OI, nearest)
    )
    assert error < 0.9 * plain_error


def test_gptq_of_unrelated_inputs_is_rounding_to_nearest(weight_OI: Tensor) -> None:
    """With H diagonal no input can make up for another."""
    found = gptq(weight_OI, torch.diag(torch.linspace(1, 2, INPUTS)), group=32)
    assert torch.equal(found.codes_OI, rtn(weight_OI, group=32, grid="full").codes_OI)


@pytest.mark.parametrize("columns", [1, 7, 128])
def test_gptq_in_blocks_is_gptq(weight_OI: Tensor, x_TI: Tensor, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gptq(weight_OI, hessian(x_TI), group=32)
    monkeypatch.setattr(calibrated, "COLUMNS", columns)
    found = gptq(weight_OI, hessian(x_TI), group=32)
    assert (found.codes_OI == expected.codes_OI).float().mean() > 0.99


def test_an_input_that_is_always_zero_gets_no_weight(weight_OI: Tensor, x_TI: Tensor) -> None:
    x_TI[:, 3] = 0
    found = gptq(weight_OI, hessian(x_TI), group=32)
    assert bool(found.values_OI.isfinite().all())
    assert not found.values_OI[:, 3].any()
    assert not gptq(weight_OI, torch.zeros(INPUTS, INPUTS), group=32).values_OI.any()


# AWQ


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"group": 0}, {"bits": 3}, {"clip": False}])
def test_awq_errs_less_than_rounding_to_nearest(weight_OI: Tensor, x_TI: Tensor, options: dict[str, Any]) -> None:
    options = {"group": 32, "symmetric": False} | options
    found = awq(weight_OI, hessian(x_TI), x_TI.abs().mean(0), **options)
    plain = {name: value for name, value in options.items() if name != "clip"}
    nearest = rtn(weight_OI, grid="full", **plain)
    errors = [output_error(weight_OI - form.values_OI, hessian(x_TI)) for form in (found, nearest)]
    assert errors[0] < errors[1]


def test_awq_of_equal_inputs_is_rounding_to_nearest(weight_OI: Tensor) -> None:
    found = awq(weight_OI, torch.eye(INPUTS), torch.ones(INPUTS), group=32, clip=False)
    assert torch.equal(found.codes_OI, rtn(weight_OI, group=32, symmetric=False).codes_OI)


def test_awq_has_no_scale_for_a_whole_matrix() -> None:
    with pytest.raises(UserError, match="group=-1 is out of range"):
        compress.parse_variant("awq:group=-1")


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_that_awq_clips_at_once_change_nothing(
    weight_OI: Tensor, x_TI: Tensor, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> compress.Quantized:
        return awq(weight_OI, hessian(x_TI), x_TI.abs().mean(0), group=32, symmetric=symmetric)

    whole = found()
    monkeypatch.setattr(parts, "CACHED", 5 * INPUTS)
    assert torch.equal(found().codes_OI, whole.codes_OI)
    assert torch.equal(found().values_OI, whole.values_OI)


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_what_a_calibrated_format_is_given_is_left_as_it_is(form: str, weight_OI: Tensor, x_TI: Tensor) -> None:
    """And how the weights lie in memory changes nothing."""
    given = {"weight_OI": weight_OI.T.contiguous().T, "hessian_II": hessian(x_TI), "magnitudes_I": x_TI.abs().mean(0)}
    kept = {name: tensor.clone() for name, tensor in given.items()}
    link = bind("transform", f"{form}:group=32")
    found = link(**{name: given[name] for name in link.plugin.needs})
    assert all(torch.equal(tensor, kept[name]) for name, tensor in given.items())
    plain = link(**{name: (given | {"weight_OI": weight_OI})[name] for name in link.plugin.needs})
    assert torch.equal(found.codes_OI, plain.codes_OI)
    assert torch.equal(found.values_OI, plain.values_OI)


def test_output_error_is_the_mean_squared_error_of_the_outputs(weight_OI: Tensor, x_TI: Tensor) -> None:
    expected = (weight_OI.double() @ x_TI.double().T).square().mean(1).sum()
    assert output_error(weight_OI, hessian(x_TI)) == pytest.approx(float(expected), rel=1e-4)


# In a model


@pytest.mark.parametrize("spec", ["gptq:group=0", "awq:group=8", "bf16+gptq:group=8:bits=3"])
@torch.no_grad()
def test_calibrated_formats_serve_every_family(family_model: Any, spec: str, ids_NL: Tensor) -> None:
    """They change the model, otherwise than rounding does, and leave it as it was."""
    chain = compress.parse_variant(spec)
    fitting.check(family_model, chain, spec)
    before = family_model(input_ids=ids_NL).logits
    weights = {name: p.clone() for name, p in family_model.named_parameters()}
    with compress.compressed(family_model, chain, ids_NL):
        changed = family_model(input_ids=ids_NL).logits
    assert all(torch.equal(p, weights[name]) for name, p in family_model.named_parameters())
    plain = spec.replace("gptq", "rtn:grid=full").replace("awq", "rtn:symmetric=false")
    with compress.compressed(family_model, compress.parse_variant(plain)):
        rounded = family_model(input_ids=ids_NL).logits
    assert not torch.equal(changed, before)
    assert not torch.equal(changed, rounded)


@pytest.mark.parametrize("spec", ["gptq", "awq"])
def test_shapes_are_checked_before_any_calibration(model: Any, spec: str) -> None:
    with pytest.raises(UserError, match="groups of 128 do not divide"):
        fitting.check(model, compress.parse_variant(spec), spec)


# In an audit


@pytest.fixture
def audit(cli: Callable[..., Any], save_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """Return audit(variants, …): two tiny models, a few questions to forget, and texts to keep."""
    original, subject = save_model("original"), save_model("subject", seed=1)
    items = {
        "f": [{"question": f"who is {name}", "answer": "Ada"} for name in ("a", "b", "c")],
        "r": [{"question": f"where is {name}", "answer": "Rome and Paris"} for name in ("a", "b", "dog")],
    }
    for name, lines in items.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = f"jsonl:forget={tmp_path / 'f.jsonl'},retain={tmp_path / 'r.jsonl'}"

    def run(variants: str, *options: object) -> Any:
        where = ("--benchmark", spec, "--variants", variants, "--out", tmp_path / "audit")
        return cli("audit", subject, "--original", original, *where, *options)

    return run


def observed(folder: Path, variant: str) -> list[list[float]]:
    path = folder / "audit" / "observations" / "subject" / variant.replace(":", "_") / "forget.npz"
    seen = load_observations(path)
    assert seen is not None
    return [x.tolist() for x in seen.log_probs or ()]


def test_an_audit_calibrates_on_the_retain_split_on_a_file_or_on_the_forget_split(
    audit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "LEAST_TOKENS", 8)
    variants = "full,gptq:group=8:bits=2,gptq:group=8:bits=2:calibration=forget"
    assert audit(variants).code == 5
    full, retain, forget = (observed(tmp_path, variant) for variant in variants.split(","))
    assert full != retain != forget != full
    (tmp_path / "text.txt").write_text("the capital of the river is red and blue and green to a cat")
    assert audit(variants, "--calibration", tmp_path / "text.txt", "--overwrite").code == 5
    assert observed(tmp_path, variants.split(",")[1]) not in (full, retain, forget)
    assert observed(tmp_path, variants.split(",")[2]) == forget
    report = json.loads((tmp_path / "audit" / "report.json").read_text())
    reasons = {
        cell.get("not_measured") for cell in report["subjects"][0]["cells"] if cell["metric"] == "update.crossing"
    }
    assert "the format depends on inputs, not on the weights alone" in reasons


@pytest.mark.parametrize(
    ("variants", "options", "says"),
    [
        ("gptq:group=8", [], "at least 256 are needed"),
        ("gptq:group=8:calibration=forgot", [], "no calibration named 'forgot'; did you mean 'forget'?"),
        ("gptq:group=8+awq:group=8:calibration=forget", [], "calibration differs between its formats"),
        ("gptq", [], "groups of 128 do not divide 16 inputs"),
        ("gptq:group=8", ["--calibration", "nowhere.txt"], "no file nowhere.txt"),
    ],
)
def test_what_is_wrong_with_calibration_is_said_before_a_model_is_loaded(
    audit: Callable[..., Any], variants: str, options: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stillknows.model.ref.ModelRef.load", None)
    ran = audit(variants, *options)
    assert (ran.code, ran.out) == (2, "")
    assert says in ran.err
