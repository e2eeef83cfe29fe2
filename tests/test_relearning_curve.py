"""Relearning: disjoint halves, the model left as it was, hidden knowledge back before what was never taught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from stillknows.experiments.relearning_curve import curve, halves
from stillknows.model.forward import mean_probability, score_items
from stillknows.model.layers import output_layer
from stillknows.training.settings import Settings


def test_halves_share_no_fact(make_items: Callable[..., list[Any]]) -> None:
    items = make_items([2, 3, 1, 4, 2])
    taught, asked = halves([*items, *items])
    assert {i.example.fact for i in taught} & {i.example.fact for i in asked} == set()
    assert len(taught) + len(asked) == 10
    assert min(len(taught), len(asked)) > 0


def test_the_model_is_left_as_it_was(model: Any, make_items: Callable[..., list[Any]]) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    items = make_items([2, 3, 1, 4])
    found = curve(model, items, Settings(lr=1e-2, max_steps=6, check_every=2, epochs=99))
    assert len(found) == 4
    assert all(0 <= p <= 1 for p in found)
    assert found[0] == mean_probability(score_items(model, output_layer(model), halves(items)[1]))
    assert len(set(found)) > 1
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
