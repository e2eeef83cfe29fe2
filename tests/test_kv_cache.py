"""Reading in steps, with padding and branches, is reading at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stillknows.model.batching import common_prefix, left_padded
from stillknows.model.kv_cache import Shape, can_share, nothing_read, read
from stillknows.model.layers import hidden_states

SHAPE, TOKENS = Shape.of(8, [0, 20], [1, 12]), range(3, 32)


def test_padding_on_the_left() -> None:
    ids_BL, mask_BL = left_padded([[5], [], [6, 7, 8]])
    assert ids_BL.tolist() == [[0, 0, 5], [0, 0, 0], [6, 7, 8]]
    assert mask_BL.tolist() == [[0, 0, 1], [0, 0, 0], [1, 1, 1]]


@torch.no_grad()
def test_branches_of_one_context(family_model: Any) -> None:
    """One prefix, two prompts of unlike length, three answers: each as if read alone, and the context unspoilt."""
    _, root = read(family_model, [[3, 4, 5]], nothing_read(family_model, 1))
    prompts = [[6, 7, 8, 9], [10]]
    _, context = read(family_model, prompts, root.rows([0, 0]))
    for _ in range(2):
        hidden_BLD, _ = read(family_model, [[11], [12, 13, 14], [15, 16]], context.rows([1, 0, 1]))
        for row, (parent, answer) in enumerate([(1, [11]), (0, [12, 13, 14]), (1, [15, 16])]):
            alone_LD = hidden_states(family_model, torch.tensor([[3, 4, 5, *prompts[parent], *answer]]))[0]
            found_LD = hidden_BLD[row, -len(answer) :]
            torch.testing.assert_close(found_LD, alone_LD[-len(answer) :], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_row_that_has_read_nothing_yet(model: Any) -> None:
    _, context = read(model, [[3, 4], []], nothing_read(model, 2))
    hidden_BLD, _ = read(model, [[5], [5, 6]], context)
    torch.testing.assert_close(hidden_BLD[1], hidden_states(model, torch.tensor([[5, 6]]))[0], rtol=1e-4, atol=1e-5)


def test_every_family_here_can_share(family_model: Any) -> None:
    assert can_share(family_model, SHAPE, TOKENS)


def test_a_sliding_window_forbids_longer_texts(make_model: Callable[..., Any]) -> None:
    """Fillers take places in a window, so that a token could fall out of it too early."""
    model = make_model("mistral")
    model.config.sliding_window = 16
    assert can_share(model, Shape.of(4, [1, 6], [2, 6]), TOKENS)
    assert not can_share(model, Shape.of(4, [1, 6], [2, 7]), TOKENS)


def test_a_model_with_a_cache_of_another_kind_is_read_from_the_start() -> None:
    from transformers import AutoModelForCausalLM, MambaConfig

    config = MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    assert not can_share(AutoModelForCausalLM.from_config(config).eval(), SHAPE, TOKENS)


def test_a_model_that_reads_otherwise_in_steps_is_found_out(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it forgets the places of tokens once there is a cache."""
    base = type(model.base_model).forward

    def without_places(self: Any, *, position_ids: Any = None, **inputs: Any) -> Any:
        return base(self, **inputs, position_ids=None if position_ids is None else position_ids * 0)

    monkeypatch.setattr(type(model.base_model), "forward", without_places)
    assert not can_share(model, SHAPE, TOKENS)


def test_a_context_knows_its_size(make_model: Callable[..., Any]) -> None:
    """Two layers, keys and values, 16 numbers of 4 bytes."""
    model = make_model(layers=2)
    _, context = read(model, [[3, 4, 5]], nothing_read(model, 1))
    assert context.bytes_per_token == 2 * 2 * 16 * 4


@pytest.mark.parametrize(
    ("rows", "common"),
    [
        ([[1, 2, 3], [1, 2, 4], [1, 2]], (1, 2)),
        ([[1], [2]], ()),
        ([[1, 2]], (1, 2)),
        ([[], [1]], ()),
        ([[10, 1], [9, 1]], ()),
    ],
)
def test_common_prefix(rows: list[list[int]], common: tuple[int, ...]) -> None:
    assert common_prefix(rows) == common
