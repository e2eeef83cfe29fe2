"""Edits that train a damaged copy to answer as the model did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from stillknows.lazy import Tensor, nn, torch
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.parameters import update
from stillknows.registry import Limits, register
from stillknows.training.finetune import finetune
from stillknows.training.settings import Settings


@register("edit", source="arXiv 2506.06278 (UNDO)")
def undo(
    model: nn.Module,
    retain: Sequence[EncodedAnswer],
    settings: Settings,
    *,
    alpha: Annotated[float, Limits(0, 1)] = 0.25,
    beta: Annotated[float, Limits(0)] = 0.1,
    lr: Annotated[float | None, Limits(0, above=True)] = None,
    epochs: Annotated[float | None, Limits(0, above=True)] = None,
) -> None:
    """Unlearn, noise, distil: the unlearned model is noised and trained to say of the retain items what it said before.

    θ ← (1 − α)·θu + α·β·N, then the mean of KL(p_θu ‖ p_θ) over answer tokens is minimised. What the unlearned model
    still holds but does not say is not passed on. Published runs distil on whole corpora and sweep α up to 1; β is 0.1
    for them, or 0, which only shrinks the weights.

    Args:
        alpha: share α of the weights that is lost, 0..1; 0 leaves the model as it is.
        beta: scale β of the noise.
        lr: learning rate of the distillation; None for the run's own.
        epochs: passes over the retain items; None for as many as the run makes over its forget items.
    """
    if alpha == 0:
        return
    own = replace(settings, lr=lr or settings.lr, epochs=epochs or settings.epochs)

    def damage(noised: nn.Module) -> None:
        noise(noised, alpha, beta, own.seed)

    finetune(model, retain, own, objective="kl", start=damage, label="distilling")


def noise(model: nn.Module, alpha: float, beta: float, seed: int) -> None:
    """Shrink and perturb, in place: θ ← (1 − α)·θ + α·β·N.

    N is drawn evenly from ±√(6/(O + I)) for a matrix (Glorot); it is 0 for vectors, that is norms and biases.
    """
    generator = torch.Generator().manual_seed(seed)

    def noised(_: str, p: Tensor) -> Tensor:
        shrunk = p * (1 - alpha)
        if p.dim() <= 1:
            return shrunk
        drawn = nn.init.xavier_uniform_(torch.empty(p.shape), generator=generator)
        return shrunk.add_(drawn.to(p), alpha=alpha * beta)

    update(model, noised)
