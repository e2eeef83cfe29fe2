"""Formats of activations and of the cache: by hand, as their libraries round, and in models of every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from stillknows.auditing.observe import observe
from stillknows.errors import UserError
from stillknows.model.encoding import encode_split
from stillknows.model.forward import score_items
from stillknows.model.generate import generate
from stillknows.model.layers import hidden_states, linears, output_layer
from stillknows.model.target import LocalTarget
from stillknows.observations import load_observations
from stillknows.registry import plugins
from stillknows.transforms.compression import activations
from stillknows.transforms.compression.activations import (
    fp8_activations,
    int8_activations,
    mxfp4_activations,
    nvfp4_activations,
)
from stillknows.transforms.compression.cache import kv, kv_fp8, kv_gguf
from stillknows.transforms.compression.int8 import int8
from stillknows.types import Example, Split
from stillknows.variants import fitting
from stillknows.variants.activations import CACHED, INPUTS, attention_name, rounded
from stillknows.variants.compress import compressed, parse_variant, quantize

# the libraries use what will go from torch; transformers imports those of them that it finds
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TOKENS, WIDTH = 20, 64
FORMS = ["int8_activations", "int8_activations:threshold=0", "fp8_activations", "mxfp4_activations"]
FORMS += ["mxfp4_activations:scale=even", "nvfp4_activations", "kv", "kv:bits=3:group=0:symmetric=true", "kv_fp8"]
FORMS += [f"kv_gguf:{name}" for name in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")]
every_form = pytest.mark.parametrize("form", FORMS)


def rows(seed: int = 0, outliers: bool = False) -> Tensor:
    """Tokens of unlike size; with outliers at a few places."""
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(TOKENS, WIDTH, generator=generator) * torch.linspace(0.1, 1.5, TOKENS)[:, None]
    if outliers:
        x_TI[torch.arange(0, TOKENS, 3), torch.arange(0, TOKENS, 3)] = 20.0
        x_TI[:, 5] = -9.0
    return x_TI


def apply(form: str, x_TI: Tensor) -> Tensor:
    [link] = parse_variant(form)
    return link(**{link.plugin.needs[0]: x_TI})


# What they round to


def test_every_format_of_rows_is_under_test() -> None:
    found = {
        name for name, plugin in plugins("transform", "deployment").items() if plugin.needs in ((INPUTS,), (CACHED,))
    }
    assert found == {form.partition(":")[0] for form in FORMS}, "add the new format to FORMS"


@every_form
@pytest.mark.parametrize("outliers", [False, True])
def test_a_token_is_rounded_by_itself(form: str, outliers: bool) -> None:
    """Who shares the batch does not matter, the input is left alone, zeros stay zeros, and something is rounded."""
    x_TI = rows(outliers=outliers)
    before_TI = x_TI.clone()
    found_TI = apply(form, x_TI)
    assert torch.equal(x_TI, before_TI)
    assert (found_TI.shape, found_TI.dtype) == (x_TI.shape, torch.float32)
    assert not torch.equal(found_TI, x_TI)
    for t in range(TOKENS):
        assert torch.equal(found_TI[t], apply(form, x_TI[t : t + 1])[0])
    assert not apply(form, torch.zeros(2, WIDTH)).any()


def test_int8_by_hand() -> None:
    """6 is an outlier, and stays; the largest of the rest, 1.27, makes steps of .01."""
    x_TI = torch.tensor([[6.0, 1.27, -0.502, 0.0149, 5.99]])
    torch.testing.assert_close(
        int8_activations(x_TI[:, :4]), torch.tensor([[6.0, 1.27, -0.5, 0.01]]), rtol=1e-3, atol=0
    )
    step = 5.99 / 127  # 5.99 is none, and makes the steps
    expected = torch.tensor([[6.0, 27 * step, -11 * step, 0.0, 5.99]])
    torch.testing.assert_close(int8_activations(x_TI), expected, rtol=1e-3, atol=0)
    every = torch.tensor([[6.0, 27 * 6 / 127, -11 * 6 / 127, 0.0, 127 * 6 / 127]])
    torch.testing.assert_close(int8_activations(x_TI, threshold=0), every, rtol=1e-3, atol=0)


def test_an_outlier_keeps_the_bits_that_float16_lacks() -> None:
    x_TI = torch.tensor([[7.0001, 1e6, -0.5]])
    assert int8_activations(x_TI)[0, :2].tolist() == x_TI[0, :2].tolist()


def test_kv_by_hand() -> None:
    """2 bits in groups of 4: a range of 0..3 and of −1..2, in steps of 1; symmetric: 3/1.5 = 2 and codes −2..1."""
    x_TD = torch.tensor([[0.0, 3.0, 1.4, 1.6, -1.0, 2.0, 0.4, 0.6]])
    assert kv(x_TD, bits=2, group=4).tolist() == [[0, 3, 1, 2, -1, 2, 0, 1]]
    assert kv(x_TD[:, :4], bits=2, group=0, symmetric=True).tolist() == [[0, 2, 2, 2]]


def test_kv_fp8_has_no_scale() -> None:
    assert kv_fp8(torch.tensor([[448.0, 1e4, -17.0, 19.0, 2**-10]])).tolist() == [[448, 448, -16, 20, 0]]


@pytest.mark.parametrize("name", ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_a_cache_of_llama_cpp_holds_what_its_blocks_hold(name: Any) -> None:
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[name]
    x_TD = rows()
    stored = gguf.quants.quantize(x_TD.numpy(), kind)
    assert torch.equal(kv_gguf(x_TD, type=name), torch.tensor(gguf.quants.dequantize(stored, kind)))


# As the libraries round


def in_bitsandbytes(weight_OI: Tensor, x_TI: Tensor, threshold: float = 6.0) -> Tensor:
    """What its layer puts out, from its own form of the weights."""
    library = pytest.importorskip("bitsandbytes")
    layer = library.nn.Linear8bitLt(*weight_OI.T.shape, bias=False, has_fp16_weights=False, threshold=threshold)
    layer.weight = library.nn.Int8Params(weight_OI.clone(), requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu").eval()(x_TI)


def ours(weight_OI: Tensor, x_TI: Tensor, threshold: float = 6.0) -> Tensor:
    return linear(int8_activations(x_TI, threshold=threshold), int8(weight_OI).values_OI)


@pytest.fixture
def weight_OI() -> Tensor:
    """In float16's grid, to which the library casts weights first."""
    return (torch.randn(48, WIDTH, generator=torch.Generator().manual_seed(9)) / 8).half().float()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("threshold", [6.0, 3.0, 0.0])
@torch.no_grad()
def test_llm_int8_equals_bitsandbytes_token_by_token(weight_OI: Tensor, outliers: bool, threshold: float) -> None:
    """To 2 in 10⁵ of the largest output: it multiplies by .00006200124 for 1/127², which is 1.8 in 10⁵ too much."""
    x_TI = rows(outliers=outliers)
    theirs_TO = torch.cat([in_bitsandbytes(weight_OI, x_I[None], threshold) for x_I in x_TI])
    found_TO = ours(weight_OI, x_TI, threshold)
    assert (found_TO - theirs_TO).abs().max() < 2e-5 * theirs_TO.abs().max()
    assert (linear(x_TI, int8(weight_OI).values_OI) - theirs_TO).abs().max() > 1e-3 * theirs_TO.abs().max()


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_llm_int8_equals_bitsandbytes_in_a_batch_whose_outliers_stand_in_columns(weight_OI: Tensor) -> None:
    """As in large models, where the same features are outliers of every token; and where there are none."""
    for columns in ([], [5, 17]):
        x_TI = rows()
        x_TI[:, columns] = torch.linspace(-30, -7, TOKENS)[:, None]
        theirs_TO = in_bitsandbytes(weight_OI, x_TI)
        assert (ours(weight_OI, x_TI) - theirs_TO).abs().max() < 2e-5 * theirs_TO.abs().max()


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_llm_int8_differs_from_bitsandbytes_by_what_it_rounds_besides(weight_OI: Tensor) -> None:
    """One token's outlier keeps its column for all tokens of the batch there; here others' numbers of that column are
    rounded as all of theirs are: by half of a step at most, times the weight."""
    x_TI = rows()
    x_TI[3, 11] = 50.0
    weights_OI = int8(weight_OI).values_OI
    gap_TO = (ours(weight_OI, x_TI) - in_bitsandbytes(weight_OI, x_TI)).abs()
    step_T = x_TI.abs().where(x_TI.abs() < 6, 0.0).amax(1) / 127
    allowed_TO = 0.501 * step_T[:, None] * weights_OI[:, 11].abs() + 2e-4
    assert bool((gap_TO <= allowed_TO).all())
    assert gap_TO.max() > 10 * 2e-4
    assert gap_TO[3].max() < 2e-4


def in_compressed_tensors(x_TI: Tensor, form: str) -> Tensor:
    """Round with the library's dynamic scales, as its schemes of the same name have them."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp, generate_gparam

    name = {"fp8_activations": "FP8_DYNAMIC", "mxfp4_activations:scale=even": "MXFP4", "nvfp4_activations": "NVFP4"}
    options = quantization.preset_name_to_scheme(name[form], ["Linear"]).input_activations
    overall = generate_gparam(x_TI.min(), x_TI.max()) if form.startswith("nvfp4") else None
    scale, zero = compute_dynamic_scales_and_zp(x_TI[None], options, nn.Module(), overall)
    zeros = None if form.startswith("nvfp4") else zero
    return fake_quantize(x_TI[None], scale.float(), zeros, options, global_scale=overall)[0]


@pytest.mark.parametrize("form", ["fp8_activations", "mxfp4_activations:scale=even", "nvfp4_activations"])
@pytest.mark.parametrize("outliers", [False, True])
def test_equal_to_compressed_tensors_bit_by_bit(form: str, outliers: bool) -> None:
    for x_I in rows(outliers=outliers):
        assert torch.equal(apply(form, x_I[None]), in_compressed_tensors(x_I[None], form))


# In a model


CHAINS = ["int8_activations:threshold=0", "rtn:group=0+int8_activations:threshold=1.5", "fp8+fp8_activations"]
CHAINS += ["kv:group=0", "kv_fp8", "int8+int8_activations+kv:bits=3:group=8"]


@pytest.mark.parametrize("chain", CHAINS)
@torch.no_grad()
def test_every_family_is_rounded_and_then_as_it_was(family_model: Any, chain: str) -> None:
    ids_BL = torch.randint(3, 32, (2, 12), generator=torch.Generator().manual_seed(0))
    before, attention = family_model(input_ids=ids_BL).logits, attention_name(family_model)
    fitting.check(family_model, parse_variant(chain), chain)

    def look_and_fail() -> None:
        output_layer(family_model)
        assert not torch.equal(family_model(input_ids=ids_BL).logits, before)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), compressed(family_model, parse_variant(chain)):
        look_and_fail()
    assert torch.equal(family_model(input_ids=ids_BL).logits, before)
    assert attention_name(family_model) == attention
    assert not any(module._forward_pre_hooks for module in family_model.modules())


@torch.no_grad()
def test_exactly_the_linear_maps_are_given_rounded_inputs(make_model: Callable[..., Any]) -> None:
    """Against a model whose maps are replaced by functions that round first. GPT-2 has maps of another class."""

    class Rounding(nn.Module):
        def __init__(self, plain: nn.Module) -> None:
            super().__init__()
            self.plain = plain

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(int8_activations(x.flatten(0, -2), threshold=0).reshape(x.shape))

    ids_BL = torch.tensor([[5, 6, 7, 8, 9]])
    for family in ("llama", "gpt2"):
        model, other = make_model(family), make_model(family)
        for layer in list(linears(other)):
            parent, _, name = layer.name.rpartition(".")
            setattr(other.get_submodule(parent), name, Rounding(layer.module))
        with compressed(model, parse_variant("int8_activations:threshold=0")):
            assert torch.equal(model(input_ids=ids_BL).logits, other(input_ids=ids_BL).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_attention_reads_what_a_cache_of_rounded_keys_and_values_gives(family_model: Any, attention: str) -> None:
    """Against transformers' own cache with rounding where it is written; bit by bit."""
    from transformers import DynamicCache

    class RoundedCache(DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, *others: Any, **named: Any) -> Any:
            key_states, value_states = (kv(x.flatten(0, -2), bits=3, group=0).reshape(x.shape) for x in (
                key_states, value_states,
            ))  # fmt: skip
            return super().update(key_states, value_states, *others, **named)

    ids_BL = torch.randint(3, 32, (3, 9), generator=torch.Generator().manual_seed(1))
    family_model.set_attn_implementation(attention)
    plain = family_model(input_ids=ids_BL).logits
    expected = family_model(input_ids=ids_BL, past_key_values=RoundedCache()).logits
    with compressed(family_model, parse_variant("kv:bits=3:group=0")):
        found = family_model(input_ids=ids_BL, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - plain).abs().max() > 1e-3


@torch.no_grad()
def test_a_cache_that_is_not_rounded_is_the_model_itself(family_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plugins("transform", "deployment")["kv_fp8"].__dict__, "function", lambda cached_TD: cached_TD)
    ids_BL = torch.randint(3, 32, (2, 9), generator=torch.Generator().manual_seed(2))
    plain = hidden_states(family_model, ids_BL)
    with compressed(family_model, parse_variant("kv_fp8")):
        assert torch.equal(hidden_states(family_model, ids_BL), plain)


@torch.no_grad()
def test_more_bits_of_the_cache_are_nearer_to_the_model(make_model: Callable[..., Any]) -> None:
    model = make_model(hidden=64, layers=2)
    ids_BL = torch.randint(3, 32, (8, 30), generator=torch.Generator().manual_seed(3))
    plain = model(input_ids=ids_BL).logits
    gaps = []
    for bits in range(2, 9):
        with compressed(model, parse_variant(f"kv:bits={bits}:group=0")):
            gaps.append(float((model(input_ids=ids_BL).logits - plain).square().mean()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 100 * gaps[-1] > 0


def log_probs(model: Any, items: list[Any], batch_size: int) -> list[Tensor]:
    found = dict(score_items(model, output_layer(model), items, batch_size))
    return [found[i].log_probs for i in range(len(items))]


@pytest.mark.parametrize("chain", ["int8+int8_activations:threshold=1", "kv:bits=4:group=0", "kv_fp8"])
def test_batches_and_shared_prefixes_change_nothing(
    make_model: Callable[..., Any], make_items: Callable[..., list[Any]], chain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items share their questions; once read from the start one by one, once together with the cache shared out."""
    model = make_model(layers=2)
    items = make_items([4, 2, 6, 3], prompt=12)
    items = [replace(item, ids=items[i % 2].ids[:12] + item.ids[12:]) for i, item in enumerate(items)]
    with compressed(model, parse_variant(chain)):
        together = log_probs(model, items, 4)
        monkeypatch.setattr("stillknows.model.forward.can_share", lambda *_: False)
        alone = log_probs(model, items, 1)
    plain = log_probs(model, items, 1)
    for a, b, c in zip(together, alone, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(a, c, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("chain", ["int8+int8_activations:threshold=1", "kv:bits=3:group=0", "kv_gguf:Q4_0"])
@torch.no_grad()
def test_what_is_generated_is_most_likely_when_it_is_read(make_model: Callable[..., Any], chain: str) -> None:
    """Tokens one by one out of a cache, and all at once without one."""
    model = make_model(hidden=64, layers=2)
    prompts = [[3, 4, 5, 6], [7, 8], [9, 10, 11]]
    with compressed(model, parse_variant(chain)):
        layer = output_layer(model)
        texts = generate(model, layer, prompts, [12, 12, 12], ends=())
        for prompt, text in zip(prompts, texts, strict=True):
            logits_LV = layer(hidden_states(model, torch.tensor([prompt + text])))[0]
            assert logits_LV[len(prompt) - 1 : -1].argmax(1).tolist() == text
    plain = generate(model, output_layer(model), prompts, [12, 12, 12], ends=())
    assert texts != plain


def test_gradients_pass_through(model: Any) -> None:
    x_TI = rows().requires_grad_(True)
    rounded(x_TI, parse_variant("int8_activations"), INPUTS).mul(rows(1)).sum().backward()
    assert x_TI.grad is not None
    assert torch.equal(x_TI.grad, rows(1))


def test_gradient_norms_are_observed_under_rounding(model: Any, tokenizer: Any) -> None:
    split = Split("s", "forget", tuple(Example(str(i), "who is Ada", word, str(i)) for i, word in enumerate("abc")))
    items = encode_split(split, tokenizer, "{prompt}", 64, "error", 32)
    plain = observe(LocalTarget("m", model, tokenizer), items, fields={"gradient_norms"}).gradient_norms
    with compressed(model, parse_variant("int8+int8_activations:threshold=0+kv:group=0")):
        found = observe(LocalTarget("m", model, tokenizer), items, fields={"gradient_norms"}).gradient_norms
    assert plain is not None
    assert found is not None
    assert found == pytest.approx(plain, rel=0.2)
    assert not (found == plain).any()


# In a chain


def test_the_weights_of_a_chain_are_those_of_its_formats_of_weights() -> None:
    weight = rows()
    chains = [("int8+int8_activations+kv_fp8", "int8"), ("kv:bits=2", "full")]
    for chain, plain in [*chains, ("bf16+fp8_activations+rtn:group=8", "bf16+rtn:group=8")]:
        a, b = (quantize(weight, parse_variant(spec)) for spec in (chain, plain))
        assert torch.equal(a.values_OI, b.values_OI)
        assert torch.equal(a.codes_OI, b.codes_OI)


@torch.no_grad()
def test_links_of_one_kind_are_applied_from_left_to_right(model: Any) -> None:
    ids_BL = torch.tensor([[5, 6, 7, 8, 9]])
    found = []
    for chain in ("kv:bits=2:group=0+kv_fp8", "kv_fp8+kv:bits=2:group=0"):
        with compressed(model, parse_variant(chain)):
            found.append(model(input_ids=ids_BL).logits)
    assert not torch.equal(*found)


@torch.no_grad()
def test_calibrated_weights_with_rounded_inputs(model: Any) -> None:
    ids_NL = torch.randint(3, 32, (4, 24), generator=torch.Generator().manual_seed(2))
    chain = parse_variant("gptq:bits=8:group=0+int8_activations:threshold=0")
    fitting.check(model, chain, "mine")
    with compressed(model, parse_variant("gptq:bits=8:group=0"), ids_NL):
        written = [layer.read().clone() for layer in linears(model)]
        plain = model(input_ids=ids_NL).logits
    with compressed(model, chain, ids_NL):
        assert all(torch.equal(a, layer.read()) for a, layer in zip(written, linears(model), strict=True))
        assert not torch.equal(model(input_ids=ids_NL).logits, plain)


# What is refused


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ("mxfp4_activations", r"mine: layer .*q_proj \(16, 16\): mxfp4: its blocks of 32 do not divide 16 inputs"),
        ("int8+nvfp4_activations", r"mine: layer .*down_proj \(16, 24\): nvfp4: its blocks of 16 do not divide 24"),
        ("int8_activations:threshold=-1", r"threshold=-1 is out of range\n.*at least 0"),
        ("kv", r"mine: keys and values: groups of 32 do not divide 8 inputs"),
        ("kv:group=-1", r"kv:group=-1 is out of range\n.*at least 0"),
        ("kv:bits=16:group=0", r"bits=16 is out of range"),
        ("kv_gguf:Q4_0", r"blocks of 32 do not divide a head's 8 numbers\n.*group=0"),
    ],
)
def test_what_shapes_do_not_allow_is_the_users_to_mend(model: Any, chain: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fitting.check(model, parse_variant(chain), "mine")


def test_a_model_without_attention_by_name_has_no_cache_to_round() -> None:
    from transformers import AutoModelForCausalLM, MambaConfig

    config = MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=r"mine: keys and values: MambaForCausalLM has no attention whose keys"):
        fitting.check(model, parse_variant("kv_fp8"), "mine")


# In an audit


def test_an_audit_passes_through_them(cli: Callable[..., Any], save_model: Any, tmp_path: Path) -> None:
    original, subject = save_model("original"), save_model("subject", seed=1)
    for name, answer in (("f", "Ada"), ("r", "Rome")):
        lines = [json.dumps({"question": f"who is {who}", "answer": answer}) for who in ("a", "b", name)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    spec = f"jsonl:forget={tmp_path / 'f.jsonl'},retain={tmp_path / 'r.jsonl'}"
    variants = ["full", "int8", "int8+int8_activations", "int8+int8_activations:threshold=0.5", "kv:bits=2:group=0"]
    where = ("--benchmark", spec, "--variants", ",".join(variants), "--out", tmp_path / "audit")
    assert cli("audit", subject, "--original", original, *where).code == 5
    seen = [load_observations(path) for path in sorted((tmp_path / "audit/observations/subject").glob("*/forget.npz"))]
    texts = {str([x.tolist() for x in found.log_probs]) for found in seen if found is not None and found.log_probs}
    assert len(seen) == len(texts) == len(variants)
    cells = json.loads((tmp_path / "audit/report.json").read_text())["subjects"][0]["cells"]
    crossing = {cell["variant"]: cell["value"] for cell in cells if cell["metric"] == "update.crossing"}
    assert crossing["int8"] == crossing["int8+int8_activations"] < crossing["kv:bits=2:group=0"] == crossing["full"]


def test_the_formats_import_what_they_round_with() -> None:
    """One rounding per format: activations are rounded by the functions that round weights."""
    x_TI = rows()
    assert torch.equal(fp8_activations(x_TI), quantize(x_TI, parse_variant("fp8")).values_OI)
    assert torch.equal(mxfp4_activations(x_TI), quantize(x_TI, parse_variant("mxfp4")).values_OI)
    assert torch.equal(nvfp4_activations(x_TI[:1]), quantize(x_TI[:1], parse_variant("nvfp4")).values_OI)
    assert activations.FLOAT16_MAX == 65504
