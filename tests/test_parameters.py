"""Parameters as values, and that nothing else in the package writes into them."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import stillknows
from stillknows.model import parameters
from stillknows.model.layers import linears

ROOT = Path(stillknows.__file__).parent


@pytest.fixture
def model(make_model: Callable[..., Any]) -> Any:
    """One in which embedding and output layer are one matrix."""
    return make_model("llama_tied")


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_copies_keep_what_was_there_and_are_written_back(model: Any) -> None:
    before = parameters.copies(model)
    assert before.keys() == dict(model.named_parameters()).keys()
    assert len(before) < len(list(model.named_parameters(remove_duplicate=False)))
    parameters.update(model, lambda _, p: p.double() + 1)
    moved = parameters.copies(model, "cpu")
    assert not any(torch.equal(moved[name], before[name]) for name in before)
    parameters.write(model, before)
    assert equal(parameters.copies(model), before)
    with pytest.raises(KeyError):
        parameters.write(model, dict(list(before.items())[1:]))


def test_steps_are_added_to_the_parameters_that_they_name(model: Any) -> None:
    before = parameters.copies(model)
    name, other = list(before)[:2]
    parameters.add(model, [(name, torch.ones_like(before[name]))], -0.5)
    after = parameters.copies(model)
    assert torch.equal(after[name], before[name] - 0.5)
    assert torch.equal(after[other], before[other])
    with pytest.raises(KeyError):
        parameters.add(model, [("nothing", torch.ones(1))])


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("some", [False, True])
def test_a_block_leaves_no_trace_whatever_happens_in_it(model: Any, some: bool, fails: bool) -> None:
    """Of a whole model, or of one matrix that is seen from the side."""
    layer = next(linears(model))
    chosen = {layer.name: layer.read().T} if some else model
    before = parameters.copies(model)
    with pytest.raises(ZeroDivisionError) if fails else parameters.restored({}), parameters.restored(chosen) as held:
        assert equal(held, parameters.copies(chosen))
        parameters.update(chosen, lambda _, p: p * 2)
        assert not torch.equal(layer.read(), before[f"{layer.name}.weight"])
        assert not fails or 1 / 0
    assert equal(parameters.copies(model), before)


IN_PLACE = ("copy_", "add_", "sub_", "mul_", "div_", "fill_", "zero_", "lerp_", "clamp_", "addmm_")


def written(source: str) -> Iterator[int]:
    """Yield the lines in which a loop over parameters writes into them, or which write into a parameter's data."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in IN_PLACE:
            value = ast.unparse(node.func.value)
            if ".data" in value or value.endswith((".weight", ".bias")) or "parameters[" in value:
                yield node.lineno
        if not isinstance(node, ast.For) or "parameters" not in ast.unparse(node.iter):
            continue
        names = {part.id for part in ast.walk(node.target) if isinstance(part, ast.Name)}
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in IN_PLACE:
                value = call.func.value
                if isinstance(value, ast.Name) and value.id in names:
                    yield call.lineno


def test_writes_are_seen() -> None:
    assert [*written("for n, p in model.named_parameters():\n    p.copy_(x)")] == [2]
    assert [*written("w[n].data.add_(b)"), *written("layer.weight.mul_(2)")] == [1, 1]
    assert not [*written("for n, p in given.items():\n    p.copy_(x)")]


def test_nothing_else_writes_into_parameters() -> None:
    """But an optimizer, whose step is its own."""
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in ROOT.rglob("*.py")
        if path.name not in ("parameters.py", "clipped_steps.py")
        for line in written(path.read_text())
    }
    assert not found


def test_a_snapshot_holds_the_bits_and_no_memory(model: Any, tmp_path: Path) -> None:
    model.to(torch.bfloat16).get_input_embeddings().to(torch.float32)
    before = parameters.copies(model)
    snapshot = parameters.Snapshot(model, tmp_path)
    with parameters.restored(model, snapshot), torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    assert list(snapshot) == list(before)
    assert all(
        torch.equal(value, snapshot[name]) and value.dtype == snapshot[name].dtype for name, value in before.items()
    )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(tmp_path.iterdir())
