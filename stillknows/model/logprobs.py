"""Token log-probabilities: the only place that shifts labels against hidden states and selects answer tokens.

Everything here works at answer positions only (T of them, flat over the batch) and applies the output layer in
chunks, so that no [batch, length, vocabulary] tensor ever exists. Letters: see types.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from stillknows.lazy import Tensor, checkpoint, torch

ToLogits = Callable[[Tensor], Tensor]  # hidden [*, D] -> logits [*, V]
MIN_LOG_PROB = -1e4  # nats: p is 0 in float32 long before, so that p·ln p is 0 for tokens that are ruled out
LARGE_CHUNK = 2**26  # logits in memory at once: 256 MiB in float32
CHUNK_LOGITS = {"cpu": 2**22}  # 16 MiB: a CPU gains nothing from more


class AnswerIndex(NamedTuple):
    """Where the answers of a right-padded batch are. Row b's answer is tokens starts[b] .. lengths[b]−1.

    rows_T, columns_T: the hidden state that PREDICTS each answer token (one position before it).
    slots_T: the token's place within its answer, so that [T] values scatter to [B, A].
    mask_BA: true where the answer has a token.
    """

    rows_T: Tensor
    columns_T: Tensor
    slots_T: Tensor
    mask_BA: Tensor

    def pad(self, values_T: Tensor) -> Tensor:
        """Scatter per-token values [T, …] to [B, A, …], with 0 outside the mask; differentiable."""
        padded_BA = values_T.new_zeros((*self.mask_BA.shape, *values_T.shape[1:]))
        return padded_BA.index_put((self.rows_T, self.slots_T), values_T)


def answer_index(starts: Sequence[int], lengths: Sequence[int], device: torch.device | str = "cpu") -> AnswerIndex:
    """Locate the answer tokens of a batch from lengths alone: pad ids are never looked at, so pad = eos is safe.

    A first token (start 0) has no prediction and is left out of the answer.
    """
    first_B = torch.tensor([max(1, start) for start in starts])
    count_B = torch.tensor(lengths) - first_B
    if bool((count_B < 1).any()):
        raise ValueError("every row needs at least one answer token that has a token before it")
    mask_BA = torch.arange(int(count_B.max())) < count_B[:, None]
    rows_T, slots_T = mask_BA.nonzero(as_tuple=True)
    columns_T = first_B[rows_T] + slots_T - 1
    return AnswerIndex(rows_T.to(device), columns_T.to(device), slots_T.to(device), mask_BA.to(device))


def token_log_probs(hidden_TD: Tensor, output_layer: ToLogits, targets_T: Tensor, vocabulary: int) -> Tensor:
    """Return ln p(target) in float32, [T], computed in chunks that are recomputed in the backward pass.

    p = softmax(logits), so a constant added to all logits of a token changes nothing.
    """

    def part(hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
        log_probs_CV = output_layer(hidden_CD).float().log_softmax(-1)
        return log_probs_CV.gather(-1, targets_C[:, None]).squeeze(-1)

    return _in_chunks(part, vocabulary, hidden_TD, targets_T)


def token_mean_log_probs(hidden_TD: Tensor, output_layer: ToLogits, vocabulary: int) -> Tensor:
    """Return the mean of ln p over the vocabulary, [T] float32; −ln V − KL(uniform ‖ p)."""
    return _in_chunks(lambda hidden_CD: output_layer(hidden_CD).float().log_softmax(-1).mean(-1), vocabulary, hidden_TD)


class TokenScores(NamedTuple):
    """Per answer token: ln p(target) [T], whether the target is the most likely token [T] bool, the entropy of p in
    nats [T] ≥ 0, and the standard deviation of ln p(z) over z ~ p [T] ≥ 0; float32."""

    log_probs_T: Tensor
    hits_T: Tensor
    entropies_T: Tensor
    spreads_T: Tensor


def token_scores(
    hidden_TD: Tensor,
    output_layer: ToLogits,
    targets_T: Tensor,
    vocabulary: int,
    with_distribution_T: Tensor | None = None,
) -> TokenScores:
    """Return what likelihood metrics need to know about each token, in one pass over the vocabulary.

    Args:
        with_distribution_T: bool, which tokens need their distribution's entropy and spread; NaN elsewhere.
    """
    with_distribution_T = (
        torch.ones_like(targets_T, dtype=torch.bool) if with_distribution_T is None else with_distribution_T
    )

    def part(hidden_CD: Tensor, targets_C: Tensor, chosen_C: Tensor) -> Tensor:
        log_probs_CV = output_layer(hidden_CD).float().log_softmax(-1)
        found_4C = log_probs_CV.new_full((4, len(targets_C)), torch.nan)
        found_4C[0] = log_probs_CV.gather(-1, targets_C[:, None]).squeeze(-1)
        found_4C[1] = (log_probs_CV.argmax(-1) == targets_C).float()
        if not bool(chosen_C.all()):
            log_probs_CV = log_probs_CV[chosen_C]
        probs_CV = log_probs_CV.exp()
        log_probs_CV.clamp_(min=MIN_LOG_PROB)
        entropies_C = -torch.einsum("cv,cv->c", probs_CV, log_probs_CV)
        variances_C = log_probs_CV.add_(entropies_C[:, None]).square_().mul_(probs_CV).sum(-1)
        found_4C[2:, chosen_C] = torch.stack([entropies_C, variances_C.sqrt()])
        return found_4C

    with torch.no_grad():
        log_probs_T, hits_T, *others = _in_chunks(part, vocabulary, hidden_TD, targets_T, with_distribution_T, dim=1)
    return TokenScores(log_probs_T, hits_T == 1, *others)


def token_kl(
    hidden_TD: Tensor, output_layer: ToLogits, ref_hidden_TD: Tensor, ref_output_layer: ToLogits, vocabulary: int
) -> Tensor:
    """Return KL(p_ref ‖ p) in nats per token, [T] float32 ≥ 0, over the whole vocabulary, exact.

    The reference is given by its last hidden states, so its layers need not run again. Gradients reach `hidden_TD`
    and `output_layer` only.
    """

    def part(hidden_CD: Tensor, ref_hidden_CD: Tensor) -> Tensor:
        log_p_CV = output_layer(hidden_CD).float().log_softmax(-1)
        with torch.no_grad():
            log_ref_CV = ref_output_layer(ref_hidden_CD).float().log_softmax(-1)
        return (log_ref_CV.exp() * (log_ref_CV - log_p_CV)).sum(-1)

    return _in_chunks(part, vocabulary, hidden_TD, ref_hidden_TD)


class Logits:
    """The logits of a batch's answer tokens, handed to functions in chunks: no [B, A, V] tensor exists."""

    def __init__(self, hidden_TD: Tensor, output_layer: ToLogits, targets_T: Tensor, places: AnswerIndex) -> None:
        self.hidden_TD, self.output_layer, self.targets_T, self.places = hidden_TD, output_layer, targets_T, places

    def towards(self, tokens_BA: Tensor) -> Logits:
        """Return the same logits with these tokens, instead of the answer's own, for targets."""
        return type(self)(
            self.hidden_TD, self.output_layer, tokens_BA[self.places.rows_T, self.places.slots_T], self.places
        )

    def each(self, function: Callable[..., Tensor], *others: Logits) -> Tensor:
        """Return function(logits_CV, targets_C, *logits_CV of the others) for every answer token: [B, A], 0 outside it.

        The function gets float32 logits of C tokens and returns [C]; it may run again in the backward pass. Gradients
        reach these logits, not those of the others.
        """
        layers = [other.output_layer for other in others]

        def part(targets_C: Tensor, hidden_CD: Tensor, *others_CD: Tensor) -> Tensor:
            with torch.no_grad():
                constants = [layer(o_CD).float() for layer, o_CD in zip(layers, others_CD, strict=True)]
            return function(self.output_layer(hidden_CD).float(), targets_C, *constants)

        states = [self.hidden_TD, *(other.hidden_TD for other in others)]
        vocabulary = self.output_layer(self.hidden_TD[:1]).shape[-1]
        return self.places.pad(_in_chunks(part, vocabulary, self.targets_T, *states))


def _in_chunks(part: Callable[..., Tensor], vocabulary: int, *columns: Tensor, dim: int = 0) -> Tensor:
    size = max(1, CHUNK_LOGITS.get(columns[0].device.type, LARGE_CHUNK) // vocabulary)
    chunks = list(zip(*(column.split(size) for column in columns), strict=True))
    if len(chunks) == 1:
        return part(*chunks[0])
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(part, *chunk, use_reentrant=False) for chunk in chunks], dim)  # type: ignore[misc]
    return torch.cat([part(*chunk) for chunk in chunks], dim)
