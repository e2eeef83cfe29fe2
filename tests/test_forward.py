"""One pass over a batch gives what the plain model gives, for every family, whatever the padding and the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stillknows.errors import UserError
from stillknows.model import forward
from stillknows.model.batching import batches, right_padded
from stillknows.model.forward import answer_states, mean_probability, score_items
from stillknows.model.kv_cache import read
from stillknows.model.layers import OutputLayer, decoder, hidden_states, output_layer
from stillknows.model.logprobs import token_log_probs
from stillknows.training.cost import CostMeter

Items = Callable[..., list[Any]]
LENGTHS = [1, 9, 4, 4, 2, 17, 3, 8, 1, 5]


def plain_scores(model: Any, item: Any) -> tuple[Tensor, Tensor]:
    """ln p and hits of one item's answer in float64 from the model's own logits: no batch, no padding, no chunks."""
    with torch.no_grad():
        logits_LV = model(input_ids=torch.tensor([item.ids])).logits[0].double()
    log_probs_LV = logits_LV.log_softmax(-1)
    positions = range(max(1, item.start), len(item.ids))
    log_probs = torch.stack([log_probs_LV[i - 1, item.ids[i]] for i in positions])
    return log_probs, torch.tensor([int(logits_LV[i - 1].argmax()) == item.ids[i] for i in positions])


@torch.no_grad()
def test_output_layer_equals_the_models_own_logits(family_model: Any) -> None:
    ids_BL = torch.arange(24).reshape(2, 12) % 32
    own = output_layer(family_model)(hidden_states(family_model, ids_BL))
    torch.testing.assert_close(own, family_model(input_ids=ids_BL).logits, rtol=1e-5, atol=1e-5)


def test_scores_equal_the_plain_model(family_model: Any, make_items: Items) -> None:
    """Batches, padding, answer positions and the output layer together, for every family."""
    items = make_items(LENGTHS)
    scores = dict(score_items(family_model, output_layer(family_model), items, batch_size=4))
    assert sorted(scores) == list(range(len(items)))
    for i, item in enumerate(items):
        log_probs, hits = plain_scores(family_model, item)
        assert scores[i].log_probs.dtype == torch.float32
        torch.testing.assert_close(scores[i].log_probs.double(), log_probs, rtol=1e-4, atol=1e-5)
        assert scores[i].hits.tolist() == hits.tolist()


def test_batch_size_changes_nothing(family_model: Any, make_items: Items) -> None:
    items = make_items(LENGTHS)
    one, many = (dict(score_items(family_model, output_layer(family_model), items, size)) for size in (1, 64))
    for i in range(len(items)):
        torch.testing.assert_close(one[i].log_probs, many[i].log_probs, rtol=0, atol=1e-5)
        assert torch.equal(one[i].hits, many[i].hits)


def asked_items(make_items: Items, root: int = 4) -> list[Any]:
    """Nine questions of unlike length with four answers each; all begin with the same tokens."""
    opening = tuple(range(3, 3 + root))
    items = []
    for question in range(9):
        prompt = opening + make_items([question % 5 + 6], prompt=0, seed=question)[0].ids
        for answer in range(4):
            tail = make_items([2 * answer + 1], prompt=0, seed=100 + 9 * question + answer)[0].ids
            items.append(replace(make_items([1])[0], ids=prompt + tail, start=len(prompt)))
    return items


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("root", [0, 4])
def test_what_items_share_is_read_once_with_the_same_result(
    family_model: Any, make_items: Items, root: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Common prefixes from a cache, against each item from its own start, for every family."""
    items = asked_items(make_items, root)
    monkeypatch.setattr(forward, "answer_states", None)  # the plain way must not be taken
    shared = dict(score_items(family_model, output_layer(family_model), items, batch_size))
    assert sorted(shared) == list(range(len(items)))
    for i, item in enumerate(items):
        log_probs, hits = plain_scores(family_model, item)
        torch.testing.assert_close(shared[i].log_probs.double(), log_probs, rtol=1e-4, atol=1e-5)
        assert shared[i].hits.tolist() == hits.tolist()


def test_shared_prefixes_save_tokens(model: Any, make_items: Items, monkeypatch: pytest.MonkeyPatch) -> None:
    """The root once, each prompt once without its last token, each answer with the token before it."""
    items, read_tokens = asked_items(make_items), []

    def counted(model: Any, tokens: Any, before: Any) -> Any:
        read_tokens.append(sum(map(len, tokens)))
        return read(model, tokens, before)

    monkeypatch.setattr(forward, "read", counted)
    list(score_items(model, output_layer(model), items))
    prompts = [question % 5 + 6 for question in range(9)]
    assert sum(read_tokens) == 4 + sum(n - 1 for n in prompts) + 9 * sum(2 * a + 1 for a in range(4))


def test_unshared_items_are_read_in_one_pass(model: Any, make_items: Items, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "read", None)
    assert len(dict(score_items(model, output_layer(model), make_items(LENGTHS)))) == len(LENGTHS)


@pytest.mark.parametrize("padding", [0, 2, 31])
def test_padding_is_never_seen(model: Any, make_items: Items, padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever token pads, even the end of sequence, and also where answers hold that token themselves."""

    def padded(rows: Any, device: Any) -> Tensor:
        ids_BL = right_padded(rows, device)
        for b, row in enumerate(rows):
            ids_BL[b, len(row) :] = padding
        return ids_BL

    items = [i for seed in range(4) for i in make_items(LENGTHS, vocabulary=6, seed=seed)]
    expected = dict(score_items(model, output_layer(model), items, 1))
    monkeypatch.setattr("stillknows.model.forward.right_padded", padded)
    for i, scores in score_items(model, output_layer(model), items, 64):
        torch.testing.assert_close(scores.log_probs, expected[i].log_probs, rtol=0, atol=1e-5)


def test_plain_text_is_scored_from_its_second_token(model: Any, make_items: Items) -> None:
    item = make_items([5], prompt=0)[0]
    [(_, scores)] = score_items(model, output_layer(model), [item])
    torch.testing.assert_close(scores.log_probs.double(), plain_scores(model, item)[0], rtol=1e-4, atol=1e-5)
    assert len(scores.log_probs) == 4


def test_answer_states_can_be_trained_through(model: Any, make_items: Items) -> None:
    model.requires_grad_(True)
    layer = output_layer(model)
    states = answer_states(model, make_items([3, 5]))
    token_log_probs(states.hidden_TD, layer, states.targets_T, layer.vocabulary).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_a_batch_begins_with_is_read_once_in_training_too(family_model: Any, make_items: Items) -> None:
    """With the gradients of reading every item from its start; a short beginning is not worth it."""
    items = asked_items(make_items, 12)
    gradients, tokens = [], []
    for chosen in ([items], [[item] for item in items]):
        model = copy.deepcopy(family_model).requires_grad_(True)
        layer = output_layer(model)
        with CostMeter(model) as meter:
            for batch in chosen:
                states = answer_states(model, batch)
                token_log_probs(states.hidden_TD, layer, states.targets_T, layer.vocabulary).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        tokens.append(meter.tokens)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))
    assert tokens[0] < tokens[1]


def test_mean_probability_is_the_mean_over_items_of_the_geometric_mean(model: Any, make_items: Items) -> None:
    items = make_items(LENGTHS)
    expected = [plain_scores(model, item)[0].mean().exp().item() for item in items]
    found = mean_probability(score_items(model, output_layer(model), items))
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_a_frozen_output_layer_stays_while_the_model_trains(family_model: Any) -> None:
    layer = output_layer(family_model)
    frozen = layer.frozen()
    hidden_TD = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    before = layer(hidden_TD)
    torch.testing.assert_close(frozen(hidden_TD), before, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in family_model.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(layer(hidden_TD), before, atol=1e-3)
    torch.testing.assert_close(frozen(hidden_TD), before, rtol=0, atol=0)
    assert not any(p.requires_grad for p in frozen.linear.parameters())


def test_an_unknown_way_to_make_logits_is_refused(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here they depend on the tokens themselves, and not on the last hidden states alone."""
    model = make_model()
    own = type(model).forward

    def copying(self: Any, input_ids: Tensor, **others: Any) -> Any:
        output = own(self, input_ids=input_ids, **others)
        output.logits = output.logits + 0.1 * torch.nn.functional.one_hot(input_ids, output.logits.shape[-1])
        return output

    monkeypatch.setattr(type(model), "forward", copying)
    with pytest.raises(UserError, match="LlamaForCausalLM computes its logits in a way that stillknows does not know"):
        output_layer(model)


def test_what_goes_wrong_in_a_models_own_code_is_one_message(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    with monkeypatch.context() as patch:
        patch.setattr(type(model.model), "forward", lambda *_, **__: {}["clip_qkv"])
        with pytest.raises(UserError, match="LlamaForCausalLM cannot be read as a causal language model: 'clip_qkv'"):
            output_layer(model)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "get_output_embeddings", lambda _: None)
        with pytest.raises(UserError, match="has no output layer"):
            output_layer(model)
    monkeypatch.setattr(type(model), "base_model_prefix", "nothing")
    assert decoder(model) is model.model
    del model.model
    with pytest.raises(UserError, match="has no decoder"):
        decoder(model)


def test_memory_that_runs_out_is_no_fault_of_the_model(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(type(model.model), "forward", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        output_layer(model)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "phi"])
def test_soft_cap_scale_and_bias_are_all_at_work(make_model: Callable[..., Any], family: str) -> None:
    """So that the families above test what they are there for."""
    model, hidden_TD = make_model(family), torch.randn(4, 16)
    plain_TV = hidden_TD @ model.get_output_embeddings().weight.T
    assert (OutputLayer(model)(hidden_TD) - plain_TV).abs().max() > 0.1


def test_batches_hold_every_item_once_and_alike(make_items: Items) -> None:
    items = make_items(LENGTHS)
    order = batches([len(item.ids) for item in items], 3, 1000)
    assert sorted(i for batch in order for i in batch) == list(range(len(items)))
    assert [len(batch) for batch in order] == [3, 3, 3, 1]
    lengths = [len(items[i].ids) for batch in order for i in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_batches_of_long_items_hold_fewer() -> None:
    """At most so many tokens with padding, and at least one row."""
    assert [len(rows) for rows in batches([300, 50, 50, 50, 4, 4], 64, 100)] == [1, 2, 2, 1]


def test_a_model_whose_outputs_are_no_numbers_is_named_as_such(model) -> None:
    with torch.no_grad():
        for p in (model.model.norm.weight, model.lm_head.weight):  # sums of +∞ and −∞
            p.copy_(torch.sign(p) * 3e38)
    with pytest.raises(UserError, match="what it says of four tokens is NaN"):
        output_layer(model)
