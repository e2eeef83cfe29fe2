"""An item's numbers are those of the item read alone, for models in which that is not a matter of course."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor

from stillknows.auditing.observe import observe
from stillknows.errors import UserError
from stillknows.model import alone
from stillknows.model.encoding import EncodedItem, encode_split
from stillknows.model.forward import answer_states, score_items
from stillknows.model.generate import generate
from stillknows.model.kv_cache import together
from stillknows.model.layers import decoder, output_layer
from stillknows.model.lengths import restart_rotations, shared_limit
from stillknows.model.logprobs import token_log_probs
from stillknows.model.target import LocalTarget
from stillknows.types import Example, Split
from stillknows.variants.compress import compressed, parse_variant

Items = Callable[..., list[Any]]
SWITCH = 20
SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": SWITCH,
    "short_factor": [1.0] * 8, "long_factor": [1.0, 2, 3, 4, 6, 9, 14, 20],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
BY_LAYER = {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}, "full_attention": LONG}
ODD: dict[str, Callable[[], Any]] = {
    "local windows": lambda: t.GPTNeoConfig(
        vocab_size=32, hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
        window_size=8, max_position_embeddings=64, intermediate_size=48, initializer_range=0.2,
    ),
    "long rope": lambda: t.Phi3Config(**SIZES, original_max_position_embeddings=SWITCH, rope_parameters=LONG),
    "dynamic rope": lambda: t.LlamaConfig(**SIZES | {"max_position_embeddings": SWITCH}, rope_parameters=DYNAMIC),
    "long rope in some layers": lambda: t.Gemma3TextConfig(
        **SIZES, head_dim=16, query_pre_attn_scalar=16, sliding_window=64, rope_parameters=BY_LAYER,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "chunks": lambda: t.Llama4TextConfig(
        **SIZES, head_dim=16, num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=48,
        attention_chunk_size=8,
    ),
    "states and a multiplier": lambda: t.FalconH1Config(
        **SIZES, lm_head_multiplier=0.3, mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16, mamba_d_state=8,
        mamba_chunk_size=8,
    ),
    "a scale that multiplies": lambda: t.HyperCLOVAXConfig(**SIZES, logits_scaling=0.25, head_dim=16),
    "recurrence and a soft cap": lambda: t.RecurrentGemmaConfig(
        **SIZES | {"num_hidden_layers": 3}, lru_width=32, attention_window_size=8, logits_soft_cap=2.0
    ),
    "linear attention": lambda: t.MiniMaxConfig(
        **SIZES, head_dim=16, num_local_experts=2, num_experts_per_tok=1, block_size=8,
        layer_types=["linear_attention", "full_attention"],
    ),
}  # fmt: skip
CHANGING = ("long rope", "dynamic rope", "long rope in some layers")


@cache
def built(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return t.AutoModelForCausalLM.from_config(ODD[name]()).eval().requires_grad_(False)


@pytest.fixture(params=ODD)
def odd_model(request: pytest.FixtureRequest) -> Any:
    return copy.deepcopy(built(request.param))


def mixed_items(make_items: Items) -> list[Any]:
    """Items of 9 to 44 tokens; all begin with the same six, and three answers each with one of four questions."""
    items = []
    for question, length in enumerate((2, 9, 14, 30)):
        prompt = tuple(range(3, 9)) + make_items([length], prompt=0, seed=question)[0].ids
        for answer in range(3):
            tail = make_items([4 * answer + 1], prompt=0, seed=50 + 3 * question + answer)[0].ids
            items.append(replace(make_items([1])[0], ids=prompt + tail, start=len(prompt)))
    return items


@torch.no_grad()
def log_probs_alone(model: Any, item: Any) -> Tensor:
    """By a model that has read nothing before, from its own logits."""
    logits_LV = copy.deepcopy(model)(input_ids=torch.tensor([item.ids]), use_cache=False).logits[0]
    log_probs_LV = logits_LV.double().log_softmax(-1)
    return torch.stack([log_probs_LV[i - 1, item.ids[i]] for i in range(item.start, len(item.ids))])


def test_scores_do_not_depend_on_what_is_read_beside_or_before(odd_model: Any, make_items: Items) -> None:
    """Prefixes shared or not, in batches, alone, and in the other order, which leaves another state behind."""
    items, layer = mixed_items(make_items), output_layer(odd_model)
    expected = [log_probs_alone(built_like(odd_model), item) for item in items]
    for order in (range(len(items)), range(len(items))[::-1], range(0, len(items), 3), [0]):
        for k, scores in score_items(odd_model, layer, [items[i] for i in order], batch_size=5):
            torch.testing.assert_close(scores.log_probs.double(), expected[order[k]], rtol=1e-4, atol=2e-5)


def built_like(model: Any) -> Any:
    """The same model, of which no text has been asked yet."""
    return next(built(name) for name in ODD if type(built(name)) is type(model) and built(name).config == model.config)


def test_the_loss_does_not_depend_on_the_batch(odd_model: Any, make_items: Items) -> None:
    """Nor do the gradients: their sum over a batch is the sum over its items."""
    items, layer = mixed_items(make_items)[::2], output_layer(odd_model)
    model = odd_model.requires_grad_(True)
    expected = [log_probs_alone(built_like(model), item) for item in items]

    def gradient(batch: list[Any]) -> Tensor:
        states = answer_states(model, batch)
        log_probs_T = token_log_probs(states.hidden_TD, layer, states.targets_T, layer.vocabulary)
        assert log_probs_T.tolist() == pytest.approx(
            [p for i in batch for p in expected[items.index(i)].tolist()], 1e-3
        )
        return torch.autograd.grad(log_probs_T.sum(), model.get_input_embeddings().weight)[0]

    together_VD, apart_VD = gradient(items), torch.stack([gradient([item]) for item in items]).sum(0)
    torch.testing.assert_close(together_VD, apart_VD, rtol=1e-3, atol=1e-4 * float(apart_VD.abs().max()))


@torch.no_grad()
def test_texts_do_not_depend_on_the_batch(odd_model: Any, make_items: Items) -> None:
    """Rows that cross a switch while they are continued, too: each token is the likeliest after the text before it."""
    prompts = [list(item.ids[: item.start]) for item in mixed_items(make_items)[::3]]
    prompts.append(prompts[0][: SWITCH - 3])
    limits = [6, 9, 6, 6, 8]
    found = generate(odd_model, output_layer(odd_model), prompts, limits, {2})
    for prompt, limit, row in zip(prompts, limits, found, strict=True):
        read, alone = list(prompt), []
        while len(alone) < limit:
            logits_V = copy.deepcopy(built_like(odd_model))(input_ids=torch.tensor([read]), use_cache=False).logits[
                0, -1
            ]
            if int(logits_V.argmax()) == 2:
                break
            alone.append(int(logits_V.argmax()))
            read.append(alone[-1])
        assert row == alone


@pytest.mark.parametrize("name", CHANGING)
def test_rows_beyond_a_switch_are_read_alone(name: str) -> None:
    model = copy.deepcopy(built(name))
    assert shared_limit(model) == SWITCH
    assert together(model, [[5] * length for length in (SWITCH + 1, 7, SWITCH, SWITCH + 1)]) == [[1, 2], [0], [3]]


def test_most_models_have_no_limit(family_model: Any) -> None:
    assert shared_limit(family_model) == float("inf")
    assert together(family_model, [[5] * 9, [6] * 40]) == [[0, 1]]


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGING)
def test_what_was_read_leaves_no_trace_in_rotations(name: str) -> None:
    model, ids_BL = copy.deepcopy(built(name)), torch.arange(3, 3 + SWITCH)[None]
    first = decoder(model)(input_ids=ids_BL, use_cache=False).last_hidden_state
    for _ in range(2):
        restart_rotations(model)
        decoder(model)(input_ids=torch.full((1, 60), 5), use_cache=False)
    restart_rotations(model)
    assert torch.equal(decoder(model)(input_ids=ids_BL, use_cache=False).last_hidden_state, first)


# One item in a hundred is measured alone in every audit.

EXAMPLES = [
    Example(f"{k}", f"{'the red dog of ' * (k % 3)}capital of {word}", answer, f"{k}", None, ("blue", "a cat"))
    for k, (word, answer) in enumerate([("Ada", "Paris and Rome"), ("Bela", "green"), ("Rome", "in the river")] * 6)
]


@pytest.fixture
def asked(tokenizer: Any) -> list[EncodedItem]:
    return encode_split(Split("s", "forget", tuple(EXAMPLES)), tokenizer, "what {prompt} is", 60)


def plant(model: Any, size: float) -> None:
    """Let a model answer otherwise in large batches, which nothing that is tried before has."""

    def disturb(module: Any, given: Any, named: Any, output: Any) -> Any:
        if len(output.last_hidden_state) > 4:
            output.last_hidden_state = output.last_hidden_state * (1 + size * torch.linspace(-1, 1, 16).to(output[0]))
        return output

    model.model.register_forward_hook(disturb, with_kwargs=True)


FORMATS = ("full", "rtn:bits=4,group=8+int8_activations", "fp8_activations", "kv:bits=4,group=8")


@pytest.mark.parametrize("variant", FORMATS)
@pytest.mark.parametrize("fields", [(), ("generations",)])
def test_a_model_that_answers_otherwise_in_batches_is_refused(
    make_model: Callable[..., Any], tokenizer: Any, asked: list[EncodedItem], variant: str, fields: tuple[str, ...]
) -> None:
    """And one that does not is observed, also where steps of a format make much of roundings."""
    chain = parse_variant(variant)
    for size in (0.0, 0.5):
        model = make_model(layers=3)
        plant(model, size)
        expected = pytest.raises(UserError, match="LlamaForCausalLM does not say the same of") if size else None
        with compressed(model, chain), expected or contextlib.nullcontext():
            observe(LocalTarget("m", model, tokenizer), asked, fields=fields)


def test_in_16_bits_rounding_is_no_fault(
    make_model: Callable[..., Any], tokenizer: Any, asked: list[EncodedItem]
) -> None:
    model = make_model(layers=3).to(torch.bfloat16)
    observe(LocalTarget("m", model, tokenizer), asked, fields=["generations"])
    plant(model, 2.0)
    with pytest.raises(UserError, match="does not say the same"):
        observe(LocalTarget("m", model, tokenizer), asked)


def test_texts_are_checked_as_well_as_scores(
    make_model: Callable[..., Any], tokenizer: Any, asked: list[EncodedItem], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    monkeypatch.setattr("stillknows.model.target.require_scores_alone", lambda *_: None)
    plant(model, 0.9)
    with pytest.raises(UserError, match="does not say the same of what follows"):
        observe(LocalTarget("m", model, tokenizer), asked, fields=["generations"])


def test_one_item_in_a_hundred_from_the_shortest_on() -> None:
    assert alone.chosen([5]) == [0]
    assert alone.chosen([9, 3, 4, 3]) == [1]
    assert alone.chosen(list(range(250))[::-1]) == [249, 149, 49]
