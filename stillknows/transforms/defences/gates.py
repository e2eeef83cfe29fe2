"""Which questions are read with a passage before them: those of which the model seems to know too little."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from stillknows.depth.thrust import Clusters, thrust_score
from stillknows.registry import Limits, register
from stillknows.types import Floats


@register("transform", role="defence", source="arXiv 2307.10442 (Thrust)")
def thrust(
    known_ND: Floats, asked_MD: Floats, *, share: Annotated[float, Limits(0, 1)] = 0.25, seed: int = 0
) -> NDArray[np.bool_]:
    """Retrieval where the model's own knowledge score is low: such a question gets a passage before it.

    The score is `thrust_score` against clusters of the questions to keep, whose states are taken as one class, as the
    published code does for open questions: K-means with ⌊N^¼⌋ centres, at least 3. A question is flagged when its
    score is below that of a share of the questions to keep. What is published reads an encoder's or a decoder's first
    state; here it is the last state before the answer, which in a decoder is the one that has seen the question.

    Args:
        share: of the questions to keep whose scores count as low; 0 flags only what scores below them all.
        seed: of the clusters.

    Returns:
        bool [M]: which of the questions are read with a passage.
    """
    clusters = Clusters.of(known_ND, seed)
    usual = np.sort(thrust_score(known_ND, *clusters))
    threshold = usual[int(share * (len(usual) - 1))]
    return thrust_score(asked_MD, *clusters) < threshold
