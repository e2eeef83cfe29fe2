"""Where an update lies: in which parts of the weights, and in how few directions."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stillknows.analysis.changed_parts import ChangedParts, changed_parts
from stillknows.model.layers import linears
from stillknows.model.ref import ModelRef

Change = Callable[[Any], None]


@pytest.fixture
def compared(make_model: Any, tokenizer: Any, tmp_path: Path) -> Callable[..., ChangedParts]:
    """Return compared(change, family="llama"): what differs between a model and itself after a change."""

    def compare(change: Change, family: str = "llama") -> ChangedParts:
        model = make_model(family, hidden=64)
        for name in ("original", "changed"):
            model.save_pretrained(tmp_path / name)
            tokenizer.save_pretrained(tmp_path / name)
            with torch.no_grad():
                change(model)
        refs = [ModelRef.open(str(tmp_path / name)).check() for name in ("original", "changed")]
        return changed_parts(*refs)

    return compare


def low_rank(model: Any) -> None:
    for linear in linears(model):
        weight = linear.read()
        linear.write(weight + 0.1 * torch.randn(len(weight), 2) @ torch.randn(2, weight.shape[1]))


def everywhere(model: Any) -> None:
    for weight in model.parameters():
        weight += 0.1 * torch.randn_like(weight)


def test_nothing_changed(compared: Any) -> None:
    found = compared(lambda model: None)
    assert found[:4] == (0, 0, 0, 0)
    assert math.isnan(found.low_rank)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("embeddings", lambda model: model.get_input_embeddings().weight.mul_(1.5)),
        ("output_layer", lambda model: model.get_output_embeddings().weight.mul_(1.5)),
    ],
)
def test_a_part_alone_is_named_with_its_size(compared: Any, part: str, change: Change) -> None:
    found = compared(change)._asdict()
    assert found.pop(part) == pytest.approx(0.5)
    assert math.isnan(found.pop("low_rank"))
    assert set(found.values()) == {0}


def test_an_update_of_low_rank_lies_in_few_directions_and_any_other_does_not(compared: Any) -> None:
    adapter = compared(low_rank)
    assert (adapter.embeddings, adapter.output_layer, adapter.matrices) == (0, 0, 1)
    assert adapter.low_rank == pytest.approx(1, abs=1e-4)
    assert compared(everywhere).low_rank < 0.6


def test_one_changed_matrix_is_a_share_of_all(compared: Any) -> None:
    found = compared(lambda model: next(linears(model)).read().mul_(2))
    assert 0 < found.matrices < 0.5


def test_a_shared_output_layer_is_the_embeddings(compared: Any) -> None:
    found = compared(lambda model: model.get_input_embeddings().weight.mul_(1.5), "llama_tied")
    assert found.embeddings == pytest.approx(0.5)
    assert math.isnan(found.output_layer)
