"""How weights are kept between two steps, and what is lost there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from stillknows.lazy import Tensor, no_grad, torch
from stillknows.model.parameters import update

WeightStorage = Literal["float32", "bfloat16", "stochastic", "compensated"]
MIX = 1_000_003  # combines a seed with a counter into another seed


class Storage:
    """Rounds weights, in place, to what is kept of them after a step.

    "float32" holds everything. The others hold bfloat16 values: "bfloat16" rounds to the nearest, as a run without a
    float32 master copy does; "stochastic" up or down at random, so that small updates survive on average;
    "compensated" to the nearest, and adds what rounding took away, itself kept in bfloat16, to the next step
    (Kahan summation, as arXiv 2010.06192 uses it).

    `rest` holds what "compensated" still owes to each weight; it is a part of a run's state.
    """

    def __init__(self, parameters: Mapping[str, Tensor], how: WeightStorage, seed: int) -> None:
        self.parameters, self.how, self.seed = parameters, how, seed
        self.rest: dict[str, Tensor] = {}
        if how != "float32":
            update(parameters, lambda _, p: p.bfloat16())
        if how == "compensated":
            self.rest = {name: torch.zeros_like(p, dtype=torch.bfloat16) for name, p in parameters.items()}

    @no_grad
    def keep(self, step: int) -> None:
        """Round the weights as they are after a step; the random bits depend on seed and step alone."""
        if self.how == "bfloat16":
            update(self.parameters, lambda _, p: p.bfloat16())
        elif self.how == "stochastic":
            device = next(iter(self.parameters.values())).device
            generator = torch.Generator(device).manual_seed((self.seed * MIX + step) % 2**63)
            update(self.parameters, lambda _, p: stochastic_bfloat16(p, generator))
        elif self.how == "compensated":
            update(self.parameters, self._compensated)

    def _compensated(self, name: str, p: Tensor) -> Tensor:
        wanted = p + self.rest[name]
        kept = wanted.bfloat16().to(p)
        self.rest[name].copy_(wanted - kept)
        return kept


def stochastic_bfloat16(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to bfloat16 up or down at random, P(up) = distance from below / spacing, so E[result] = values.

    Adds 16 random bits below the ones that bfloat16 keeps and cuts them off. Infinities and NaN stay as they are.
    """
    bits = values.float().contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=bits.device)
    rounded = (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(values.dtype)
