"""Low-rank updates of a run, kept apart from the weights that they are merged into when it ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stillknows.lazy import nn, parametrize
from stillknows.model.adapters import LowRankUpdate
from stillknows.model.layers import linears
from stillknows.registry import Bound


def collecting(part: Bound, found: dict[str, nn.Module]) -> Bound:
    """Return a step plug-in; the low-rank parts that an adapter puts in are collected by the names of their layers."""
    if part.plugin.role != "adapter":
        return part

    def put(model: nn.Module, **options: Any) -> None:
        part.plugin.function(model=model, **options)
        for name, module in model.named_modules():
            if parametrize.is_parametrized(module, "weight"):
                found[name] = module.parametrizations["weight"][0]  # type: ignore[index]

    return replace(part, plugin=replace(part.plugin, function=put))


def updates(found: dict[str, Any], model: nn.Module) -> dict[str, LowRankUpdate]:
    """Return what was collected as updates of linear maps [O, I], also of those that are kept transposed."""
    turned = {layer.name for layer in linears(model) if layer.transposed}
    factors = {name: ((part.scale * part.b).detach().cpu(), part.a.detach().cpu()) for name, part in found.items()}
    return {
        name: LowRankUpdate(a.T, b.T) if name in turned else LowRankUpdate(b, a) for name, (b, a) in factors.items()
    }
