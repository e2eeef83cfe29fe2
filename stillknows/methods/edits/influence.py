"""Edits that go one step along a quadratic model of the loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated

from stillknows.errors import UserError
from stillknows.lazy import Tensor, nn, torch
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.layers import matching, output_layer
from stillknows.model.parameters import add, named
from stillknows.registry import Limits, bind, register
from stillknows.training.objective_inputs import Draw, Inputs, Term

Values = Mapping[str, Tensor]  # by name, of the tensors that move


@register("edit", source="arXiv 1911.03030 (Newton removal); for language models arXiv 2402.08787, 2403.10557")
def influence(
    model: nn.Module,
    forget: Sequence[EncodedAnswer],
    retain: Sequence[EncodedAnswer],
    *,
    scale: float = 1.0,
    radius: Annotated[float, Limits(0, above=True)] = 1e-5,
    damping: Annotated[float, Limits(0, above=True)] = 1.0,
    names: str = "*",
) -> None:
    """Influence unlearning: one Newton step from all items to the retained ones, θ ← θ + η·(H + λ)⁻¹·ḡ_f.

    ḡ_f is the mean gradient of the forget items' loss, H the diagonal of the retain items' empirical Fisher matrix:
    the mean of squared gradients of single items. At a minimum over all items η is n_f/n_r; since H is small where a
    model fits its items well, η is lowered to where ½·Σ (H + λ)·Δ², the quadratic model of what the retain loss grows
    by, is `radius`. The model holds near θ only, so a small radius is meant seriously; `influence + equal_retain` finds
    out how much of a larger step can be afforded.

    Args:
        scale: η in units of n_f/n_r.
        radius: most that the retain loss may grow by, as modelled, in nats per token, > 0; inf for the plain step.
        damping: λ, in means of H over all of these weights, > 0.
        names: patterns of the tensors that move, separated by "|".
    """
    every = named(model)
    parameters = {name: every[name] for name in matching(every, names)}
    gradients = _mean(_gradients(model, forget, parameters), parameters, squared=False)
    curvature = _mean(_gradients(model, retain, parameters), parameters, squared=True)
    step = newton_step(gradients, curvature, scale * len(forget) / len(retain), radius, damping)
    add(parameters, step.items())


def newton_step(gradients: Values, curvature: Values, rate: float, radius: float, damping: float) -> dict[str, Tensor]:
    """Return η·g/(h + λ) with λ = damping·mean(h) and η = rate, or lower where ½·Σ (h + λ)·step² would pass `radius`.

    Raises UserError where h is 0 throughout.
    """
    mean = sum(float(h.sum(dtype=torch.float64)) for h in curvature.values()) / sum(
        h.numel() for h in curvature.values()
    )
    if not mean > 0:
        raise UserError("influence: the retain items' loss has no gradient in these tensors", "choose other names")
    added = damping * mean
    step = {name: rate * g / (curvature[name] + added) for name, g in gradients.items()}
    growth = (
        sum(float(((curvature[name] + added) * s.square()).sum(dtype=torch.float64)) for name, s in step.items()) / 2
    )
    shorter = min(1.0, (radius / growth) ** 0.5) if growth else 1.0
    return {name: shorter * s for name, s in step.items()}


def _gradients(model: nn.Module, items: Sequence[EncodedAnswer], parameters: Values) -> Iterator[tuple[Tensor, ...]]:
    """Yield the gradient of each item's mean loss in nats per token, in the order of the parameters."""
    model.requires_grad_(False)
    for p in parameters.values():
        p.requires_grad_(True)
    objective = bind("objective", "nll")
    inputs = Inputs(model, output_layer(model), Term(objective, items), {}, ())
    for i in range(len(items)):
        loss = objective(**inputs([Draw(i, 0)])).sum()
        yield torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    model.requires_grad_(False)


def _mean(gradients: Iterator[tuple[Tensor, ...]], names: Iterable[str], *, squared: bool) -> dict[str, Tensor]:
    """Return the mean of gradients, or of their squares."""
    total: list[Tensor] = []
    count = 0
    for found in gradients:
        terms = [g.square() if squared else g.clone() for g in found]
        total = [t.add_(g) for t, g in zip(total, terms, strict=True)] if total else terms
        count += 1
    return {name: t / count for name, t in zip(names, total, strict=True)}
