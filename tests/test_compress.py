"""Formats put in place and taken back: which matrices, in which order, what of the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stillknows.errors import UserError
from stillknows.model.architecture import placed
from stillknows.model.layers import linears
from stillknows.registry import Bound, Plugin, bind
from stillknows.variants import compress
from stillknows.variants.calibrate import statistics
from stillknows.variants.compress import compressed, forms, matrices, parse_variant, quantize, weights

Make = Callable[..., Any]


def sample(seed: int = 0, scale: float = 0.05) -> Tensor:
    return scale * torch.randn(6, 128, generator=torch.Generator().manual_seed(seed))


SMALL = (
    *("full", "bf16", "int8", "nf4", "rtn:group=8", "rtn:group=0:symmetric=false", "bf16+rtn:bits=4:group=8"),
    *("fp8:scale=block", "hqq:group=8", "sparse", "sparse+nf4:double=true"),
)


@pytest.mark.parametrize("form", SMALL)
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2"])
def test_compressed_quantizes_and_restores_bit_by_bit(form: str, family: str, make_model: Make) -> None:
    """Exactly the decoder's linear maps; nothing stays behind, also after an error."""
    model, chain = make_model(family), parse_variant(form)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = {f"{layer.name}.weight" for layer in linears(model)}

    def look_and_fail() -> None:
        for name, tensor in model.state_dict().items():
            expected = before[name]
            if name in names:
                expected = quantize(expected.T, chain).values_OI.T if family == "gpt2" else quantize(expected, chain)[0]
            assert torch.equal(tensor, expected), name
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), compressed(model, chain):
        look_and_fail()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_compressed_restores_when_a_later_layer_cannot_be_quantized(model: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match="groups of 16"), compressed(model, parse_variant("rtn:bits=2:group=16")):
        pytest.fail("it ran")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_conv1d_rows_are_its_outputs(make_model: Make) -> None:
    """A format with one scale per output must follow each output's own largest weight, though GPT-2 stores [I, O]."""
    model = make_model("gpt2")
    layer = next(iter(linears(model)))
    with torch.no_grad():
        layer.read()[3] *= 100  # a view of the stored weight[:, 3]
    others = [i for i in range(48) if i != 3]
    with compressed(model, parse_variant("rtn:bits=4:group=0")):
        compared = layer.read().clone()
    error_O = (compared - layer.read()).abs().amax(1) / layer.read().abs().amax(1)
    assert bool((error_O[others] < 1 / 13.9).all())
    assert all(len(row.unique()) > 4 for row in compared)


def test_a_chain_is_applied_from_left_to_right() -> None:
    weight_OI = sample()
    both = quantize(weight_OI, parse_variant("bf16+rtn:bits=4"))
    second = quantize(weight_OI.bfloat16().float(), parse_variant("rtn:bits=4"))
    assert torch.equal(both.values_OI, second.values_OI)
    assert torch.equal(both.codes_OI, second.codes_OI)
    assert not torch.equal(both.values_OI, quantize(weight_OI, parse_variant("rtn:bits=4+bf16")).values_OI)
    assert [link.spec for link in parse_variant("bf16+rtn:bits=4")] == ["bf16", "rtn:bits=4"]


@pytest.mark.parametrize("need", [compress.WEIGHTS, compress.INPUTS, compress.CACHED])
def test_a_link_that_is_a_format_of_nothing_is_refused(need: str) -> None:
    """Were it skipped, the variant would be measured as if it were not there."""

    def strange(prompt: str) -> None: ...

    link = Bound(Plugin("quantizer", "strange", strange, "a paper", 1), {}, "strange")
    with pytest.raises(UserError, match="strange is a format of nothing that is known here: it asks for prompt"):
        compress.links_of((*parse_variant("nf4"), link), need)


@torch.no_grad()
def test_layers_that_share_their_weights_are_quantized_once(make_model: Make) -> None:
    """And are as before after it."""
    model = make_model(layers=2)
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = quantize(first.up_proj.weight, parse_variant("rtn:bits=2:group=0:grid=paper")).values_OI
    with compressed(model, parse_variant("rtn:bits=2:group=0:grid=paper")):
        assert torch.equal(second.up_proj.weight, expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_file_formats_and_calibrated_ones_are_not_chained() -> None:
    for spec in ("gguf:Q4_0+gptq", "awq+bf16+gguf"):
        with pytest.raises(UserError) as told:
            parse_variant(spec)
        message = f"{spec}: a file format cannot be chained with a calibrated one\n  audit them one by one"
        assert str(told.value) == message
    for spec in ("gguf:Q4_0+int8", "gptq+int8", "bf16+gguf:Q4_0"):
        assert len(parse_variant(spec)) == 2


def test_links_are_told_apart_by_what_they_are_given() -> None:
    chain = parse_variant("bf16+gptq+int8_activations+kv_fp8")
    needs = (compress.WEIGHTS, compress.INPUTS, compress.CACHED)
    found = [[link.spec for link in compress.links_of(chain, need)] for need in needs]
    assert found == [["bf16", "gptq"], ["int8_activations"], ["kv_fp8"]]
    assert [compress.is_calibrated(link) for link in chain] == [False, True, False, False]
    assert [compress.is_placed(link) for link in parse_variant("bf16+gguf:Q4_0")] == [False, True]
    relearn = bind("transform", "relearn")
    assert [compress.rounds(link) for link in (*chain, relearn)] == [True] * 4 + [False]


def test_without_a_format_of_weights_the_bits_are_the_codes() -> None:
    weight_OI = sample().bfloat16()
    for chain in ((), parse_variant("int8_activations")):
        found = quantize(weight_OI, chain)
        assert found.values_OI.dtype == torch.bfloat16
        assert torch.equal(found.values_OI, weight_OI)
        assert torch.equal(found.codes_OI, weight_OI.float().view(torch.int32))
        assert found.stored is None


def test_a_strided_weight_without_a_format_has_codes_too() -> None:
    weight_OI = sample().T
    assert torch.equal(quantize(weight_OI, ()).codes_OI, weight_OI.contiguous().view(torch.int32))


def test_a_format_that_makes_weights_infinite_is_refused_by_name() -> None:
    for huge in (3.4e38, -3.4e38):
        weight_OI = sample()
        weight_OI[2, 5] = huge
        with pytest.raises(UserError) as told:
            quantize(weight_OI, parse_variant("full+bf16"))
        assert str(told.value).splitlines() == [
            "bf16 makes infinity of weights as large as 3.4e+38",
            "  leave that format out: no file of it holds this model",
        ]


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2"])
def test_file_formats_reach_embedding_and_output_layer_and_the_others_linear_maps_alone(
    family: str, make_model: Make
) -> None:
    model = make_model(family)
    alone = [(layer.name, place) for layer, place in matrices(model, parse_variant("bf16+int8"))]
    assert alone == [(layer.name, None) for layer in linears(model)]
    wider = [(layer.name, place) for layer, place in matrices(model, parse_variant("bf16+gguf:Q4_0"))]
    assert {name for name, _ in alone} < {name for name, _ in wider}
    assert None not in [place for _, place in wider]
    assert len({name for name, _ in wider}) == len(wider)
    unshared = {id(layer.module.weight): layer.name for layer, _ in reversed(list(placed(model)))}
    assert sorted(name for name, _ in wider) == sorted(unshared.values())


def test_file_formats_go_by_the_place(make_model: Make) -> None:
    model, chain = make_model(hidden=32), parse_variant("gguf:Q2_K")
    found = {layer.name: form for layer, form in forms(model, chain)}
    for layer, place in matrices(model, chain):
        assert torch.equal(found[layer.name].values_OI, quantize(layer.read(), chain, place=place).values_OI)
    assert len(found) == 9


def test_calibrated_forms_are_of_what_each_matrix_is_multiplied_with(model: Any) -> None:
    chain, ids_NL = parse_variant("gptq:group=8"), torch.arange(64).reshape(4, 16) % 30
    expected = {
        layer.name: quantize(layer.read(), chain, inputs).values_OI
        for block in statistics(model, ids_NL)
        for layer, inputs in block.values()
    }
    found = {layer.name: form.values_OI for layer, form in forms(model, chain, ids_NL)}
    assert found.keys() == expected.keys() == {layer.name for layer in linears(model)}
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    with pytest.raises(ValueError, match="needs calibration tokens"):
        list(forms(model, chain))


@torch.no_grad()
def test_calibrated_formats_quantize_shared_weights_once(make_model: Make) -> None:
    model, ids_NL = make_model(layers=2), torch.arange(64).reshape(4, 16) % 30
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    names = [layer.name for layer, _ in forms(model, parse_variant("gptq:group=8"), ids_NL)]
    assert len(names) == 13
    assert first.up_proj.weight is second.up_proj.weight


@pytest.mark.parametrize("form", ["int8_activations", "kv_fp8", "int8_activations+kv_fp8"])
def test_formats_of_what_flows_change_outputs_while_the_block_runs_and_no_weight(form: str, make_model: Make) -> None:
    model, ids = make_model(layers=2), torch.arange(3, 23)[None]
    before, outputs = {name: p.clone() for name, p in model.state_dict().items()}, []
    assert list(forms(model, parse_variant(form))) == []
    with torch.no_grad():
        outputs.append(model(ids).logits)
        with compressed(model, parse_variant(form)):
            assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
            outputs.append(model(ids).logits)
        outputs.append(model(ids).logits)
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])


def test_parts_of_a_chain_that_flow_and_that_stay_both_work(make_model: Make) -> None:
    model, ids = make_model(layers=2), torch.arange(3, 23)[None]
    specs, outputs = ("full", "int8", "kv_fp8", "int8_activations", "int8+int8_activations+kv_fp8"), {}
    with torch.no_grad():
        for spec in specs:
            with compressed(model, parse_variant(spec)):
                outputs[spec] = model(ids).logits
    assert all(not torch.equal(outputs[a], outputs[b]) for a in specs for b in specs if a < b)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2"])
def test_copies_of_weights_are_on_the_cpu_under_every_name_and_stay(family: str, make_model: Make) -> None:
    model = make_model(family)
    narrow, wide = weights(model, parse_variant("int8")), weights(model)
    assert list(narrow) == [layer.name for layer in linears(model)]
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    assert wide.keys() >= {*narrow, embedding, "lm_head"} - ({"lm_head"} if family == "gpt2" else set())
    assert torch.equal(wide[embedding], model.get_input_embeddings().weight)
    mixed = weights(model, parse_variant("int8"), parse_variant("bf16+gguf:Q4_0"))
    assert mixed.keys() == wide.keys()
    before = {name: copy.clone() for name, copy in wide.items()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert all(torch.equal(wide[name], copy) for name, copy in before.items())
    assert all(copy.device.type == "cpu" and not copy.requires_grad for copy in wide.values())
