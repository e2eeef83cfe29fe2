"""The shift, the mask and the chunks: against plain loops and float64 references."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from stillknows.model import logprobs
from stillknows.model.logprobs import (
    Logits,
    answer_index,
    token_kl,
    token_log_probs,
    token_mean_log_probs,
    token_scores,
)

T, D, V = 13, 5, 11


def places(starts: list[int], lengths: list[int]) -> list[tuple[int, int, int]]:
    """(row, column of the predicting hidden state, slot in the answer) of each answer token, by a plain loop."""
    found = []
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        slot = 0
        for position in range(length):
            if position >= start and position > 0:
                found.append((row, position - 1, slot))
                slot += 1
    return found


rows = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=5)


@settings(deadline=None, max_examples=100)
@given(rows)
def test_answer_index_equals_a_plain_loop(sizes: list[tuple[int, int]]) -> None:
    starts = [start for start, _ in sizes]
    lengths = [max(start + count, 2) for start, count in sizes]
    index = answer_index(starts, lengths)
    found = list(zip(index.rows_T.tolist(), index.columns_T.tolist(), index.slots_T.tolist(), strict=True))
    expected = places(starts, lengths)
    assert found == expected
    counts = [sum(row == b for row, _, _ in expected) for b in range(len(sizes))]
    assert index.mask_BA.sum(1).tolist() == counts
    assert index.mask_BA.shape == (len(sizes), max(counts))


@settings(deadline=None, max_examples=50)
@given(rows)
def test_pad_puts_each_value_at_its_slot(sizes: list[tuple[int, int]]) -> None:
    index = answer_index([start for start, _ in sizes], [max(start + count, 2) for start, count in sizes])
    values_T = torch.arange(1.0, len(index.rows_T) + 1, requires_grad=True)
    padded_BA = index.pad(values_T)
    assert padded_BA[index.mask_BA].tolist() == values_T.tolist()
    assert bool((padded_BA[~index.mask_BA] == 0).all())
    padded_BA.sum().backward()
    assert values_T.grad is not None
    assert bool((values_T.grad == 1).all())


@pytest.mark.parametrize(("starts", "lengths"), [([3], [3]), ([0], [1]), ([1, 4], [3, 4])])
def test_a_row_without_an_answer_is_refused(starts: list[int], lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one answer token"):
        answer_index(starts, lengths)


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(D, V)


@pytest.fixture
def hidden_TD() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1)) * 2


@pytest.fixture
def targets_T() -> Tensor:
    return torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(2))


def test_log_probs_in_float64(layer: nn.Linear, hidden_TD: Tensor, targets_T: Tensor) -> None:
    found_T = token_log_probs(hidden_TD, layer, targets_T, V)
    logits_TV = hidden_TD.double() @ layer.weight.double().T + layer.bias.double()
    for t in range(T):
        row = logits_TV[t].tolist()
        expected = row[targets_T[t]] - math.log(math.fsum(math.exp(z) for z in row))
        assert found_T[t].item() == pytest.approx(expected, abs=2e-6)


def test_log_probs_equal_torchs_fused_form_where_there_is_one(
    layer: nn.Linear, hidden_TD: Tensor, targets_T: Tensor
) -> None:
    """torch 2.13 has it and 2.11 has not, so that it is compared with and never relied on."""
    if not hasattr(functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    losses_T = functional.linear_cross_entropy(
        hidden_TD, layer.weight, targets_T, linear_bias=layer.bias, reduction="none"
    )
    torch.testing.assert_close(token_log_probs(hidden_TD, layer, targets_T, layer.out_features), -losses_T)


def test_a_constant_added_to_the_logits_changes_nothing(layer: nn.Linear, hidden_TD: Tensor, targets_T: Tensor) -> None:
    def shifted(h: Tensor) -> Tensor:
        return layer(h) + 5

    torch.testing.assert_close(
        token_log_probs(hidden_TD, shifted, targets_T, V), token_log_probs(hidden_TD, layer, targets_T, V)
    )
    torch.testing.assert_close(
        token_kl(hidden_TD, shifted, hidden_TD + 1, layer, V), token_kl(hidden_TD, layer, hidden_TD + 1, layer, V)
    )


def test_logits_in_bfloat16_are_scored_in_float32(layer: nn.Linear, hidden_TD: Tensor, targets_T: Tensor) -> None:
    found_T = token_log_probs(hidden_TD.bfloat16(), layer.bfloat16(), targets_T, V)
    assert found_T.dtype == torch.float32
    expected_T = layer(hidden_TD.bfloat16()).double().log_softmax(-1).gather(1, targets_T[:, None])[:, 0]
    torch.testing.assert_close(found_T.double(), expected_T, rtol=0, atol=1e-6)


def test_hits(layer: nn.Linear, hidden_TD: Tensor) -> None:
    best_T = layer(hidden_TD).argmax(-1)
    targets_T = torch.where(torch.arange(T) % 2 == 0, best_T, (best_T + 1) % V)
    found = token_scores(hidden_TD, layer, targets_T, V)
    assert found.hits_T.tolist() == [t % 2 == 0 for t in range(T)]
    torch.testing.assert_close(found.log_probs_T, token_log_probs(hidden_TD, layer, targets_T, V))


def test_entropy_and_spread_in_float64(layer: nn.Linear, hidden_TD: Tensor, targets_T: Tensor) -> None:
    """H = −Σ p ln p and the standard deviation of ln p under p, by plain loops."""
    found = token_scores(hidden_TD, layer, targets_T, V)
    for t in range(T):
        log_p = layer(hidden_TD[t]).double().log_softmax(-1).tolist()
        mean = math.fsum(math.exp(x) * x for x in log_p)
        variance = math.fsum(math.exp(x) * (x - mean) ** 2 for x in log_p)
        assert found.entropies_T[t].item() == pytest.approx(-mean, abs=1e-5)
        assert found.spreads_T[t].item() == pytest.approx(math.sqrt(variance), abs=1e-5)


def test_tokens_that_are_ruled_out_do_not_spoil_the_scores(hidden_TD: Tensor, targets_T: Tensor) -> None:
    """A logit of −∞ has p = 0 and counts for nothing: two equal tokens are left, so H = ln 2 and no spread."""

    def two_left(h: Tensor) -> Tensor:
        logits_TV = torch.full((len(h), V), -torch.inf)
        logits_TV[:, :2] = 3.0
        return logits_TV

    found = token_scores(hidden_TD, two_left, torch.zeros_like(targets_T), V)
    for values_T, expected in zip(found, (-math.log(2), 1, math.log(2), 0), strict=True):
        assert values_T.tolist() == pytest.approx([expected] * T, abs=1e-6)


def test_scores_that_are_not_asked_for_are_left_out(layer: nn.Linear, hidden_TD: Tensor, targets_T: Tensor) -> None:
    whole = token_scores(hidden_TD, layer, targets_T, V)
    with_distribution_T = torch.arange(T) % 3 == 1
    found = token_scores(hidden_TD, layer, targets_T, V, with_distribution_T)
    assert torch.equal(found.log_probs_T, whole.log_probs_T)
    for values_T, all_T in zip(found[1:], whole[1:], strict=True):
        torch.testing.assert_close(values_T[with_distribution_T], all_T[with_distribution_T])
    assert bool((found.hits_T == whole.hits_T).all())
    assert bool(found.entropies_T[~with_distribution_T].isnan().all())
    assert bool(found.spreads_T[~with_distribution_T].isnan().all())


@pytest.mark.parametrize("chunk", [1, 4, T - 1])
def test_chunks_change_no_score(
    layer: nn.Linear, hidden_TD: Tensor, targets_T: Tensor, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = token_scores(hidden_TD, layer, targets_T, V)
    monkeypatch.setitem(logprobs.CHUNK_LOGITS, "cpu", chunk * V)
    for a, b in zip(whole, token_scores(hidden_TD, layer, targets_T, V), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_kl_in_float64_and_its_direction(layer: nn.Linear, hidden_TD: Tensor) -> None:
    ref_TD = hidden_TD.flip(0)
    found_T = token_kl(hidden_TD, layer, ref_TD, layer, V)
    p_TV = layer(hidden_TD).double().softmax(-1)
    ref_TV = layer(ref_TD).double().softmax(-1)
    expected_T = (ref_TV * (ref_TV.log() - p_TV.log())).sum(-1)
    torch.testing.assert_close(found_T.double(), expected_T, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found_T, found_T.flip(0), atol=1e-2)  # so the direction matters in this example


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.floats(0.01, 30))
def test_kl_is_never_negative_and_zero_for_equals(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a_TD, b_TD = (torch.randn(T, V, generator=generator) * scale for _ in range(2))
    assert bool((token_kl(a_TD, nn.Identity(), b_TD, nn.Identity(), V) >= -1e-6).all())
    assert bool((token_kl(a_TD, nn.Identity(), a_TD, nn.Identity(), V) == 0).all())


def test_kl_moves_the_model_and_not_the_reference(layer: nn.Linear, hidden_TD: Tensor) -> None:
    reference = nn.Linear(D, V)
    hidden_TD.requires_grad_(True)
    ref_TD = hidden_TD.detach().flip(0).requires_grad_(True)
    token_kl(hidden_TD, layer, ref_TD, reference, V).sum().backward()
    assert hidden_TD.grad is not None
    assert layer.weight.grad is not None
    assert ref_TD.grad is None
    assert reference.weight.grad is None


@pytest.mark.parametrize("chunk", [1, 4, T - 1, T])
@pytest.mark.parametrize("name", ["token_log_probs", "token_mean_log_probs", "token_kl"])
def test_chunks_change_nothing(
    layer: nn.Linear, hidden_TD: Tensor, targets_T: Tensor, name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients, of the hidden states and of the output layer, of T tokens taken `chunk` at a time."""
    calls: list[int] = []

    def counted(h: Tensor) -> Tensor:
        calls.append(len(h))
        return layer(h)

    def run() -> list[Tensor]:
        layer.zero_grad()
        h = hidden_TD.clone().requires_grad_(True)
        match name:
            case "token_log_probs":
                values = token_log_probs(h, counted, targets_T, V)
            case "token_mean_log_probs":
                values = token_mean_log_probs(h, counted, V)
            case _:
                values = token_kl(h, counted, hidden_TD.flip(0), layer, V)
        (values * torch.arange(1.0, T + 1)).sum().backward()
        assert h.grad is not None
        assert layer.weight.grad is not None
        assert layer.bias.grad is not None
        return [values.detach(), h.grad, layer.weight.grad.clone(), layer.bias.grad.clone()]

    whole = run()
    assert max(calls) == T
    calls.clear()
    monkeypatch.setitem(logprobs.CHUNK_LOGITS, "cpu", chunk * V)
    parts = run()
    assert max(calls) == chunk
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # sums of terms up to T, which cancel in part


def test_a_chunk_holds_at_least_one_token(
    layer: nn.Linear, hidden_TD: Tensor, targets_T: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected_T = token_log_probs(hidden_TD, layer, targets_T, V)
    monkeypatch.setitem(logprobs.CHUNK_LOGITS, "cpu", 1)
    torch.testing.assert_close(token_log_probs(hidden_TD, layer, targets_T, V), expected_T)
    with torch.no_grad():
        torch.testing.assert_close(token_log_probs(hidden_TD, layer, targets_T, V), expected_T)


@pytest.mark.parametrize("chunk", [1, 2 * V, 10**6])
def test_logits_of_two_models_are_given_in_chunks(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Values and gradients are those of whole tables; the targets may be others; the other model gets no gradient."""
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", {"cpu": chunk})
    generator = torch.Generator().manual_seed(0)
    index = answer_index([1, 2], [4, 4])
    count = len(index.rows_T)
    hidden_TD, other_TD = (torch.randn(count, D, generator=generator, requires_grad=True) for _ in range(2))
    layers = nn.Linear(D, V, bias=False), nn.Linear(D, V, bias=False)
    tokens_BA = torch.randint(0, V, index.mask_BA.shape, generator=generator)
    own = Logits(hidden_TD, layers[0], torch.zeros(count, dtype=torch.long), index)
    other = Logits(other_TD, layers[1], torch.zeros(count, dtype=torch.long), index)
    sizes = []

    def function(logits_CV: Tensor, targets_C: Tensor, others_CV: Tensor) -> Tensor:
        sizes.append(len(targets_C))
        return (logits_CV * others_CV).gather(1, targets_C[:, None])[:, 0]

    found_BA = own.towards(tokens_BA).each(function, other)
    targets_T = tokens_BA[index.mask_BA]
    expected_T = (layers[0](hidden_TD) * layers[1](other_TD))[torch.arange(count), targets_T]
    torch.testing.assert_close(found_BA[index.mask_BA], expected_T)
    assert max(sizes) == min(count, max(1, chunk // V))
    found_BA.sum().backward()
    assert other_TD.grad is None
    torch.testing.assert_close(hidden_TD.grad, layers[1](other_TD)[torch.arange(count), targets_T][:, None]
                               * layers[0].weight[targets_T])  # fmt: skip
