"""Another checkpoint beside the model: what its weights or its answers add brings back what was changed by little."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from stillknows.lazy import nn, no_grad
from stillknows.model import parameters
from stillknows.registry import Limits, register

if TYPE_CHECKING:
    from stillknows.model.adapters import Parts


@register("transform", role="attack", budget="weight", source="arXiv 2212.04089 (task arithmetic), 2203.05482")
def interpolate(model: nn.Module, original: nn.Module, *, weight: Annotated[float, Limits(-1, 1)] = 0.1) -> None:
    """Move the weights a little towards the original's: θ ← θ + λ·(θo − θ).

    A part of an update that hides is undone. The never-taught control is moved by the same share and learns from the
    original too, so that only small λ tell the two apart. Below 0 the update is made larger.

    Args:
        weight: λ, from −1 to 1; 0 leaves the model as it is, and 1 makes it the original.
    """
    _mix(model, original, weight)


@register("transform", role="attack", budget="weight", source="arXiv 2203.05482 (averaged weights)")
def merge(
    model: nn.Module, sibling: nn.Module, *, checkpoint: str = "", weight: Annotated[float, Limits(0, 1)] = 0.5
) -> None:
    """Merge with another model of the same shapes: θ ← (1 − w)·θ + w·θs.

    A sibling that was fine-tuned for something else knows what the original knew, and so does the never-taught control
    after merging with it: what counts is how much more the unlearned model knows.

    Args:
        checkpoint: the sibling, a local folder or a name on the hub.
        weight: w, the sibling's share; 0 leaves the model as it is.
    """
    _mix(model, sibling, weight)


@register("transform", role="attack", level="logits", budget="weight", source="arXiv 2505.24379 (before and after)")
def before_after(model: nn.Module, original: nn.Module, *, weight: float = 2.0) -> nn.Module:
    """Answer with the old checkpoint, pushed away from the new one or towards it: z = z_u + w·(z_o − z_u).

    Possible where the model before unlearning was public. With w above 1 it tells more surely than the original what
    unlearning changed. The never-taught control, put in the place of the unlearned model, is pushed alike.

    Args:
        weight: w; 0 leaves the model as it is, 1 is the original.
    """
    from stillknows.variants.together import Together

    return Together([model, original], [1 - weight, weight])


@register("transform", role="attack", budget="scale", unspent=1, source="arXiv 2106.09685 (LoRA: W + BA)")
def adapter(model: nn.Module, adapter: Parts | None, *, scale: float = 0.0, checkpoint: str = "") -> None:
    """Scale an adapter or take it off: W ← W + (s − 1)·ΔW, where ΔW is what the adapter adds to its base.

    What an adapter hides, its base knows. Each model's own adapter is scaled, of the controls too; a model that is no
    adapter stays as it is. Or it is one that is named: then all models are changed by it alike, as if each held it.

    Args:
        scale: s; 0 takes the adapter off, 1 leaves the model as it is, below 0 the adapter works the other way round.
        checkpoint: a folder that peft wrote; "" for each model's own.
    """
    if adapter is not None:
        weights = dict(model.named_parameters(remove_duplicate=False))
        parameters.add(weights, adapter.update.items(), scale - 1)


@no_grad
def _mix(model: nn.Module, other: nn.Module, weight: float) -> None:
    theirs = parameters.named(other)
    parameters.update(model, lambda name, p: p.lerp(theirs[name].to(p), weight))
