"""Numbers of architectures that differ most, against their own forward passes.

`python -m perf.families` runs all. The property stands in perf/agreement.py, the tiny models in
perf/architectures.py.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from perf import agreement, families
from perf.architectures import build, cases, configuration
from perf.tiny_settings import SKIPPED
from stillknows.errors import UserError
from stillknows.model.layers import blocks, output_layer

CASES = {case.name: case for case in cases()}
KINDS = sorted({case.kind for case in CASES.values()})
READING = ("log-probabilities", "generation", "training")
SAMPLE = (
    "bloom",  # places as a bias of attention
    "deepseek_v3",  # keys and values through a bottleneck, experts
    "gemma2",  # windows, capped logits
    "gemma3",  # reads pictures too
    "gpt_neo",  # windows that the cache does not tell
    "gpt2",  # places learned, matrices transposed
    "llama, rope longrope",  # factors by the length that is read
    "llama4_text",  # chunks; the language model is its own base model
    "mamba",  # a state instead of keys and values
    "mistral",  # windows in every layer
    "minimax",  # a state that padding would change
    "mixtral",  # experts
    "opt, post-norm, narrow embedding",
    "qwen3_next",  # linear attention beside full
)


@pytest.mark.parametrize("name", SAMPLE)
def test_numbers_are_the_same_alone_and_in_company(name: str, tmp_path: Path) -> None:
    found = families.measure(CASES[name], tmp_path, (*READING, "nf4"))
    assert {cell: found[cell]["outcome"] for cell in READING} == dict.fromkeys(READING, families.EQUAL), found
    assert found["nf4"]["outcome"] != families.WRONG, found


def test_files_of_a_model_are_read_as_measured(tmp_path: Path) -> None:
    files = [name for name in families.CELLS if name.startswith(("file", "gguf"))]
    found = families.measure(CASES["llama"], tmp_path, files)
    assert [cell["outcome"] for cell in found.values()] == [families.EQUAL] * len(files), found


def test_every_causal_architecture_is_built_or_skipped_with_a_reason() -> None:
    assert sorted({*KINDS, *SKIPPED}) == sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert not {*KINDS} & {*SKIPPED}


@pytest.mark.parametrize("field", ["layer_types", "mlp_layer_types", "layers_block_type", "attention_layers"])
def test_tiny_models_hold_every_kind_of_layer_of_their_configuration(field: str) -> None:
    for kind in KINDS:
        named = getattr(CONFIG_MAPPING[kind](), field, None)
        if named:
            assert set(getattr(configuration(CASES[kind]), field)) >= set(named), kind


def test_blocks_are_those_that_read_text() -> None:
    """Though those that read pictures hold more linear maps."""
    vision = {"image_size": 28, "patch_size": 2, "num_hidden_layers": 6}
    model = build(CASES["gemma3"]._replace(settings={"vision_config": vision}))
    assert blocks(model) == list(model.model.language_model.layers)


def test_only_a_refusal_is_not_wrong() -> None:
    def ends_with(error: Exception) -> dict[str, Any]:
        def check() -> float:
            raise error

        return families.outcome(check)

    assert ends_with(UserError("no", "do this")) == {"outcome": "refused", "reason": "no"}
    assert ends_with(agreement.Disagreement("off by 1"))["outcome"] == "wrong"
    assert ends_with(RuntimeError("shapes"))["reason"] == "RuntimeError: shapes"
    assert families.outcome(lambda: 0.5) == {"outcome": "equal", "gap": 0.5}


@pytest.mark.parametrize(
    "check", [agreement.check_log_probs, agreement.check_generation, agreement.check_training], ids=READING
)
def test_a_model_that_differs_a_little_is_seen(check: agreement.Check) -> None:
    model = build(CASES["llama"])
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].self_attn.k_proj.weight[3] *= 1.1
    assert check(model, output_layer(model), agreement.Own(model)) < agreement.TOLERANCE
    with pytest.raises(agreement.Disagreement):
        check(other, output_layer(other), agreement.Own(model))


def test_the_page_names_each_reason_once() -> None:
    cells = {name: {"outcome": "equal", "gap": 0.0} for name in families.CELLS}
    refused = {"outcome": "refused", "reason": "/tmp/a/model: layer 3 of XForCausalLM is strange"}
    again = {"outcome": "refused", "reason": "/tmp/b/model: layer 4 of YForCausalLM is strange"}
    page = families.page({"x": cells | {"nf4": refused}, "y": cells | {"nf4": again}})
    assert page.count("refused 1 ") == 2
    assert "1. layer 3 of XForCausalLM is strange\n\n## Not built" in page
