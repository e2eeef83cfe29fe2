"""`--variants deployed`: what it stands for, what is left out of it, and that the report says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from transformers import LlamaConfig, LlamaForCausalLM

from stillknows import defaults
from stillknows.auditing import calibration, plan
from stillknows.errors import UserError
from stillknows.model.adapters import Parts
from stillknows.needs import OF_DEFENCES
from stillknows.registry import plugins
from stillknows.reporting import report
from stillknows.transforms.compression import calibrated
from stillknows.types import Benchmark, Example, Split
from stillknows.variants import calibrate, compress, fitting
from stillknows.variants.variant import OF_MODELS, expand, parse_variant

FORMATS = [
    *("full", "bf16", "fp8", "int8", "nf4", "fp4", "rtn:grid=full", "gptq", "awq", "hqq", "mxfp4", "nvfp4"),
    *("gguf:Q8_0", "gguf:Q6_K", "gguf:Q5_K_M", "gguf:Q4_K_M", "gguf:Q4_0", "gguf:Q3_K_M", "gguf:Q2_K"),
]
LEFT_OUT = ["rtn:grid=full", "gptq", "awq", "hqq", "mxfp4", "nvfp4"]  # of a model with 16 and 24 inputs
Run = Callable[..., Any]


# What is left out


@pytest.fixture
def audit(cli: Run, save_model: Callable[..., Path], tmp_path: Path) -> Run:
    """Return audit(variants, …): two Llamas with 16 and 24 inputs, a few questions."""
    original, subject = save_model("original"), save_model("subject", seed=1)
    for name, answer in (("f", "Ada"), ("r", "Rome")):
        lines = [json.dumps({"question": f"who is {who}", "answer": answer}) for who in ("a", "b", name)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    spec = f"jsonl:forget={tmp_path / 'f.jsonl'},retain={tmp_path / 'r.jsonl'}"

    def run(variants: str, *options: object) -> Any:
        where = ("--benchmark", spec, "--variants", variants, "--out", tmp_path / "audit")
        return cli("audit", subject, "--original", original, *where, *options)

    return run


def test_formats_that_the_shapes_do_not_allow_are_left_out_and_reported(audit: Run, tmp_path: Path) -> None:
    ran = audit("deployed")
    assert ran.code == 5
    result = json.loads((tmp_path / "audit" / "report.json").read_text())
    schema = json.loads(files("stillknows.reporting").joinpath("report.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator(schema).validate(result)
    saved = report.read(tmp_path / "audit")
    assert result["variants"] == [name for name in FORMATS if name not in LEFT_OUT]
    reasons = {left["variant"]: left["because"] for left in result["left_out"]}
    assert list(reasons) == LEFT_OUT
    for name in ("rtn:grid=full", "gptq", "awq"):
        assert reasons[name].endswith("groups of 128 do not divide 16 inputs")
    assert reasons["gptq"].startswith("layer model.layers.0.self_attn.q_proj (16, 16): ")
    assert "(16, 24)" in reasons["nvfp4"]  # the down projection: 16 does not divide 24
    for name, because in reasons.items():
        assert f"{name} is left out: {because}\n" in ran.err
        for shown in (ran.out, report.markdown(saved)):
            assert f"{name} was left out: {because}" in shown
        assert f"<li>{name} was left out: {because}</li>" in report.html(saved)


def test_formats_without_enough_calibration_text_are_left_out(
    audit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(defaults.PLANS, "deployed", ("full", "gptq:group=8", "int8"))
    assert audit("deployed").code == 5
    result = report.read(tmp_path / "audit")
    assert result.variants == ("full", "int8")
    [left] = result.left_out
    assert left.variant == "gptq:group=8"
    assert left.because.startswith("the calibration text has ")
    monkeypatch.setattr(calibrate, "LEAST_TOKENS", 8)
    assert audit("deployed", "--overwrite").code == 5
    result = report.read(tmp_path / "audit")
    assert (result.variants, result.left_out) == (("full", "gptq:group=8", "int8"), ())


@pytest.mark.parametrize(
    ("variants", "options", "says"),
    [
        ("deployed,gptq", [], "groups of 128 do not divide 16 inputs"),
        ("mxfp4,deployed", [], "mxfp4: layer"),
        ("deployed,gptq:group=8", [], "at least 256 are needed"),
        ("deployed", ["--calibration", "nowhere.txt"], "no file nowhere.txt"),
    ],
)
def test_what_the_user_named_is_not_left_out(
    audit: Run, variants: str, options: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stillknows.model.ref.ModelRef.load", None)
    ran = audit(variants, *options)
    assert (ran.code, ran.out) == (2, "")
    assert says in ran.err.partition("stillknows: ")[2]


def test_a_benchmark_without_a_retain_split_says_what_to_calibrate_on() -> None:
    benchmark = Benchmark("mine", (Split("forget", "forget", (Example("0", "p", "a", "f"),)),))
    with pytest.raises(UserError, match=r"mine has no retain split to calibrate on\n.*`calibration`"):
        calibration._retain_texts(benchmark)


# Shapes are checked without the work


def test_checking_shapes_solves_for_no_weight(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On 14336 inputs it would take a minute for each layer."""
    monkeypatch.setattr(calibrated, "_round_in_order", lambda *_: pytest.fail("weights were solved for"))
    monkeypatch.setattr(calibrated, "_clipped", lambda *_: pytest.fail("weights were solved for"))
    for spec in ("gptq:group=8", "awq:group=8"):
        fitting.check(model, compress.parse_variant(spec), spec)


def test_each_shape_is_tried_once(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    monkeypatch.setattr(fitting, "_try_shape", lambda inputs, *_: tried.append(inputs))
    fitting.check(make_model(layers=3), compress.parse_variant("rtn:group=8"), "mine")
    assert tried == [16, 24]


def test_inputs_that_leave_weights_undetermined_are_the_users_error() -> None:
    """One token, undamped: x·xᵀ has rank 1."""
    hessian_II = torch.ones(8, 8)
    with pytest.raises(UserError, match="leave weights undetermined"):
        calibrated.gptq(torch.ones(2, 8), hessian_II, group=8, damp=0.0)
    assert bool(calibrated.gptq(torch.ones(2, 8), hessian_II, group=8).values_OI.isfinite().all())


# What is copied to compare updates


@pytest.mark.parametrize(("specs", "wider"), [(("full", "int8"), False), (("int8", "bf16+gguf"), True), ((), True)])
def test_embedding_and_output_layer_are_copied_for_formats_of_files_alone(
    model: Any, specs: tuple[str, ...], wider: bool
) -> None:
    names = set(compress.weights(model, *map(compress.parse_variant, specs)))
    assert ({"model.embed_tokens", "lm_head"} <= names) == wider
    assert "model.layers.0.mlp.up_proj" in names
    assert len(names) == 7 + 2 * wider


CHANGING = [
    name
    for name, plugin in plugins("transform").items()
    if plugin.level in OF_MODELS and not {*OF_DEFENCES} & {*plugin.needs}
]


@pytest.mark.parametrize("name", CHANGING)
def test_every_transform_of_a_model_leaves_all_weights_as_they_were(name: str, make_items) -> None:
    """Norms and embeddings too, bit by bit."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=64, **sizes)).eval()
    before = {key: p.clone() for key, p in model.named_parameters()}
    variant = parse_variant(name)._replace(ids_NL=torch.arange(64).reshape(4, 16) % 30)
    other = LlamaForCausalLM(model.config).eval()
    others = {"original": other, "sibling": other, "adapter": Parts({}, before), "ordinary": range(3, 30)}
    with variant.applied(model, lambda link, need: others.get(need, make_items([3, 2]))):
        pass
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())


# Plans


@pytest.mark.parametrize("plan_name", list(defaults.PLANS))
def test_every_plan_names_variants_that_exist_once_and_begins_with_the_full_model(plan_name: str) -> None:
    named, chains = expand(plan_name)
    assert named == frozenset()
    assert next(iter(chains)) == "full"
    assert [parse_variant(spec).spec for spec in defaults.PLANS[plan_name]] == list(chains)
    assert len({tuple(variant.identity) for variant in chains.values()}) == len(chains)


def test_plans_grow() -> None:
    quick, standard, exhaustive = (set(expand(word)[1]) for word in ("quick", "standard", "exhaustive"))
    assert quick < standard < exhaustive
    assert set(defaults.DEPLOYED) <= exhaustive


def test_plans_hold_no_variant_twice_and_leave_out_what_is_named() -> None:
    named, chains = expand("quick,deployed,frame,int4")
    assert named == {"frame", "int4"}
    assert len({tuple(variant.identity) for variant in chains.values()}) == len(chains)
    assert set(chains) == {*expand("quick")[1], *expand("deployed")[1]}


def test_teaching_that_leaves_too_few_facts_is_left_out_of_plans_and_done_if_named(
    save_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 40 facts 20 are left: too few to exclude that 10 % are known, so no model could be found to have forgotten."""
    monkeypatch.setitem(defaults.PLANS, "quick", ("full", "relearn"))
    facts = tuple(Example(f"f{i}", f"who is {i}", "Ada", f"f{i}") for i in range(40))
    kept = Split("retain", "retain", (Example("r", "who is a", "Rome", "r"),))
    benchmark = Benchmark("mine", (Split("forget", "forget", facts), kept), "{prompt}")
    folder = str(save_model("model"))
    found = {}
    for variants in ("quick", "full,relearn"):
        request = plan.AuditConfig(folder, {"subject": folder}, benchmark, variants=variants)
        found[variants] = plan.plan(request, tmp_path / "out")
    assert list(found["quick"].variants) == ["full"]
    [left] = found["quick"].left_out
    assert left.variant == "relearn"
    assert left.because == "it teaches facts and leaves 20 of the forget split to be asked, fewer than 29"
    assert list(found["full,relearn"].variants) == ["full", "relearn"]


def test_the_page_on_plans_names_what_they_hold() -> None:
    page = (Path(__file__).parents[1] / "docs" / "plans.md").read_text(encoding="utf-8")
    missing = {spec for specs in defaults.PLANS.values() for spec in specs if f"`{spec}`" not in page}
    assert missing == set()
