"""Generation against the library's own greedy decoding, and that batches and caches change nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from stillknows.model import generate as loop
from stillknows.model.generate import generate, sampled
from stillknows.model.kv_cache import read
from stillknows.model.layers import output_layer

ENDS = {2, 4}


def prompts(count: int = 23, opening: tuple[int, ...] = (5, 6, 7)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [[*opening, *torch.randint(3, 32, (i % 5 + 1,), generator=generator).tolist()] for i in range(count)]


def expected(model: Any, prompt: list[int], limit: int) -> list[int]:
    """What transformers generates for one prompt, without its end."""
    settings = GenerationConfig(do_sample=False, max_new_tokens=limit, eos_token_id=sorted(ENDS), pad_token_id=0)
    ids_BL = torch.tensor([prompt])
    [row] = model.generate(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL), generation_config=settings)
    tokens = row[len(prompt) :].tolist()
    return tokens[:-1] if tokens[-1] in ENDS else tokens


def test_greedy_equals_the_librarys(family_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends, own limits, common prefixes, batches that lose rows: for every family."""
    for asked in (prompts(9), prompts(9, opening=())):
        limits = [i % 7 + 6 for i in range(len(asked))]
        alone = [expected(family_model, prompt, limit) for prompt, limit in zip(asked, limits, strict=True)]
        assert len({len(tokens) for tokens in alone}) > 3
        for rows in (1, 4, 128):
            monkeypatch.setattr(loop, "GENERATION_BATCH", rows)
            assert generate(family_model, output_layer(family_model), asked, limits, ENDS) == alone


def test_a_model_without_a_usable_cache_gives_the_same(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, layer = prompts(), output_layer(model)
    limits = [9] * len(asked)
    cached = generate(model, layer, asked, limits, ENDS), generate(model, layer, asked, limits, ENDS, sampled(1, 3))
    monkeypatch.setattr(loop, "can_share", lambda *_: False)
    monkeypatch.setattr(loop, "read", None)
    assert cached == (
        generate(model, layer, asked, limits, ENDS),
        generate(model, layer, asked, limits, ENDS, sampled(1, 3)),
    )


def test_memory_limits_the_rows(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of one token take 2·16·4 bytes here: three rows of 4 + 16 tokens fit, at the least one."""
    seen: list[int] = []

    def counted(model: Any, tokens: Any, before: Any) -> Any:
        seen.append(len(tokens))
        return read(model, tokens, before)

    monkeypatch.setattr(loop, "read", counted)
    for rows, size in ((3, 3 * 20 * 128 + 100), (1, 1)):
        monkeypatch.setattr(loop, "CACHE_BYTES", size)
        seen.clear()
        generate(model, output_layer(model), [[5, 6, 7, 8]] * 7, [16] * 7, ENDS)
        assert max(seen) == rows


def test_nothing_asked_nothing_said(model: Any) -> None:
    assert generate(model, output_layer(model), [], [], ENDS) == []


def test_samples_follow_the_models_distribution(model: Any) -> None:
    """4,000 first tokens of one prompt: within five standard errors of softmax(logits / T) for every token."""
    temperature, count, prompt = 0.7, 4000, [5, 9, 3]
    with torch.no_grad():
        chances = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1).tolist()
    found = generate(model, output_layer(model), [prompt] * count, [1] * count, set(), sampled(temperature, 0))
    seen = Counter(token for [token] in found)
    for token, p in enumerate(chances):
        assert abs(seen[token] / count - p) < 5 * (p * (1 - p) / count) ** 0.5 + 1e-3


def test_samples_depend_on_seed_and_prompt_and_not_on_the_batch(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    layer, asked = output_layer(model), [[5, 6, 7]] * 12
    first = generate(model, layer, asked, [8] * 12, set(), sampled(1, 0))
    assert len(set(map(tuple, first))) > 6
    assert first != generate(model, layer, asked, [8] * 12, set(), sampled(1, 1))
    monkeypatch.setattr(loop, "GENERATION_BATCH", 5)
    assert first == generate(model, layer, asked, [8] * 12, set(), sampled(1, 0))
    assert first[:4] == generate(model, layer, asked[:4], [8] * 4, set(), sampled(1, 0))


def test_samples_are_the_same_in_every_python() -> None:
    """The seeds of rows are written down here, and equal what CPython's hash gave for them."""
    for numbers, seed in {
        (0, 0, 0): 3010437511937009226,
        (3, 17, 5): 7053186624310814322,
        (2**40, 1, 2): 763764116915672184,
    }.items():
        assert loop._seed_of(*numbers) == seed


def test_nothing_is_drawn_for_finished_rows(model: Any) -> None:
    drawn: list[int] = []

    def pick(logits_BV: torch.Tensor, rows: Any, step: int) -> list[int]:
        assert len(logits_BV) == len(rows)
        drawn.extend(rows)
        return loop.greedy(logits_BV, rows, step)

    limits = [1, *[4] * 7]
    found = generate(model, output_layer(model), [[5, 6, 7, 8]] * 8, limits, set(), pick)
    assert [len(row) for row in found] == limits
    assert [drawn.count(i) for i in range(8)] == limits
