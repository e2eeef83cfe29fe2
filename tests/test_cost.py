"""What work costs, counted by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stillknows.registry import bind
from stillknows.training import loop
from stillknows.training.cost import CostMeter, peak_memory
from stillknows.training.loop import fit
from stillknows.training.objective_inputs import Term
from stillknows.training.settings import Settings


def test_tokens_are_counted_by_whether_gradients_are_kept(model: Any) -> None:
    ids_BL = torch.ones(2, 5, dtype=torch.long)
    model(input_ids=ids_BL)
    with CostMeter(model) as meter:
        model(input_ids=ids_BL)
        with torch.no_grad():
            model.base_model(ids_BL[:1])
            copy.deepcopy(model)(input_ids=ids_BL[:, :3])
    model(input_ids=ids_BL)
    assert (meter.tokens, meter.forward_tokens) == (10, 5 + 6)
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
    assert meter.flops == weights * (6 * 10 + 2 * 11)


def test_time_stands_still_after_the_block(model: Any) -> None:
    with CostMeter(model) as meter:
        assert 0 <= meter.seconds <= meter.seconds
    assert meter.seconds == meter.seconds > 0


def test_a_meter_lets_go_of_the_model_when_the_block_fails(model: Any) -> None:
    with pytest.raises(ValueError, match="broken"), CostMeter(model):
        raise ValueError("broken")
    assert not model.base_model._forward_pre_hooks


def test_memory_is_that_of_a_process_with_torch_loaded() -> None:
    assert 50 * 2**20 < peak_memory(torch.device("cpu")) < 2**40


def test_training_books_trained_and_forward_tokens(
    model: Any, make_model: Callable[..., Any], make_items: Callable[..., list[Any]]
) -> None:
    """Two items of 5 tokens: 3 steps of both; the reference reads each once; one check the first.

    Whether they may share a pass is tried once, together and alone.
    """
    items = make_items([2, 2])
    terms = [Term(bind("objective", "npo"), items)]
    settings = Settings(lr=1e-3, max_steps=3, batch_size=2, check_every=3, forget_below=1e-9)
    done = fit(model, terms, settings, monitor=(items[:1], ()))
    fresh = make_model()
    with CostMeter(fresh) as opening:
        loop.output_layer(fresh)  # checked once for each model
    assert done.tokens == 30
    assert done.forward_tokens == opening.forward_tokens + 10 + 5 + 20
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
    assert done.flops == weights * (6 * 30 + 2 * done.forward_tokens)
    assert done.peak_memory_bytes is not None


def test_a_resumed_run_adds_to_what_was_spent_before(
    make_model: Callable[..., Any],
    make_items: Callable[..., list[Any]],
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terms, path = [Term(bind("objective", "ga"), make_items([2, 2]))], tmp_path / "checkpoint.safetensors"
    settings = Settings(lr=1e-3, max_steps=4, batch_size=2, check_every=1, save_seconds=0)
    whole = fit(make_model(), terms, settings)
    step = loop._Loop.step

    def interrupted(self: loop._Loop, total: int) -> float:
        if self.done.steps == 2:
            raise KeyboardInterrupt
        return step(self, total)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(make_model(), terms, settings, checkpoint=path)
    resumed = fit(make_model(), terms, settings, checkpoint=path)
    opened_twice = resumed.forward_tokens - whole.forward_tokens
    assert opened_twice == whole.forward_tokens  # nothing but what is tried at the start is read without gradients
    weights = make_model().num_parameters(exclude_embeddings=True)
    assert resumed.flops == whole.flops + 2 * weights * opened_twice
