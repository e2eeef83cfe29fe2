"""Pruning: the smallest weights become 0, the others stay as they are."""

from __future__ import annotations

from typing import Annotated, Literal

from stillknows.errors import UserError
from stillknows.lazy import Tensor, torch
from stillknows.registry import Limits, register
from stillknows.variants.compress import Quantized


@register(
    "transform", role="deployment", source="arXiv 1506.02626 (magnitude pruning); torch.nn.utils.prune.l1_unstructured"
)
def magnitude(
    weight_OI: Tensor,
    *,
    sparsity: Annotated[float, Limits(0, 1, below=True)] = 0.5,
    scope: Literal["row", "tensor"] = "row",
) -> Quantized:
    """Magnitude pruning: the share `sparsity` of the weights with the smallest |w| becomes 0.

    Args:
        weight_OI: weights [O, I].
        sparsity: share that becomes 0, from 0 to below 1; its number is rounded to the nearest whole.
        scope: "row" compares the weights of one output, "tensor" all of the matrix.

    Of equal magnitudes the first are kept. Codes are the bits of what is left, as those of "full": they differ where a
    weight differs that at least one of two models kept.
    """
    pools = weight_OI if scope == "row" else weight_OI.reshape(1, -1)
    size = pools.shape[1]
    return _keep_largest(weight_OI, pools, size - round(sparsity * size))


@register("transform", role="deployment", source="arXiv 2104.08378 (2:4 sparsity), by magnitude as in arXiv 2301.00774")
def sparse(weight_OI: Tensor, *, n: int = 2, m: int = 4) -> Quantized:
    """Structured sparsity n:m: of every m neighbouring inputs the n with the largest |w| are kept, the others are 0.

    Of equal magnitudes the first are kept. Codes are the bits of what is left, as those of "full". Raises UserError
    when n is not in 1..m or m does not divide I.
    """
    inputs = weight_OI.shape[1]
    if not 1 <= n <= m:
        raise UserError(f"sparse: n={n} is not in 1..{m}", "n of every m weights are kept: sparse:n=2:m=4")
    if inputs % m:
        raise UserError(f"sparse: m={m} does not divide {inputs} inputs", "use an m that divides them, or magnitude")
    return _keep_largest(weight_OI, weight_OI.reshape(-1, m), n)


@register(
    "transform",
    role="attack",
    budget="sparsity",
    source="arXiv 1506.02626, 2104.08378; of pools as the formats magnitude and sparse",
)
def prune(
    weight_OI: Tensor, *, sparsity: Annotated[float, Limits(0, 1, below=True)] = 0.3, block: int = 0
) -> Quantized:
    """Prune the smallest weights of every linear layer, as the formats `magnitude` and `sparse` do, and ask.

    What was hidden by many small changes goes with them, and what was learned by large ones stays. The controls are
    pruned as much. Usual shares are 0.1 to 0.6.

    Args:
        sparsity: share of each output's weights that becomes 0; 0 leaves the model as it is.
        block: compare within so many neighbouring inputs; 0 for all of an output. 2:4 is sparsity=0.5, block=4.
    """
    if not block:
        return magnitude(weight_OI, sparsity=sparsity)
    if block < 0:
        raise UserError(f"prune: block={block} is below 0", "2:4 is prune(sparsity=0.5, block=4)")
    return sparse(weight_OI, n=max(1, block - round(sparsity * block)), m=block)


def _keep_largest(weight_OI: Tensor, pools: Tensor, count: int) -> Quantized:
    """Keep the `count` largest magnitudes of every row of `pools`; the stable order makes ties the same everywhere."""
    order = pools.abs().argsort(dim=1, descending=True, stable=True)
    kept = torch.zeros_like(pools, dtype=torch.bool).scatter(1, order[:, :count], True)
    values_OI = pools.where(kept, 0.0).reshape(weight_OI.shape).contiguous()
    return Quantized(values_OI, values_OI.view(torch.int32))
