"""The only measuring loop: (subject, split) -> observations, which are saved and scored without the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from stillknows.forward import EVALUATION_BATCH, ItemScores, score_items
from stillknows.models import output_layer
from stillknows.text import Encoded, left_padded_prompts
from stillknows.types import Observations

SLACK = 8  # tokens that a generation may be longer than the true answer before it is cut


@torch.no_grad()
def observe(model: nn.Module, tokenizer, items: Sequence[Encoded], *, generate: bool = True) -> Observations:
    """Return what the model does on the items: answer token log-probabilities and hits, greedy generations.

    One teacher-forced pass serves every likelihood metric. Items without a prompt are not continued.
    """
    layer = output_layer(model)
    scores: dict[int, ItemScores] = dict(score_items(model, layer, items))
    texts: dict[int, str] = _generate(model, tokenizer, items) if generate else {}
    examples = [item.example for item in items]
    return Observations(
        ids=tuple(e.id for e in examples),
        facts=tuple(e.fact for e in examples),
        prompts=tuple(e.prompt for e in examples),
        answers=tuple(e.answer for e in examples),
        log_probs=tuple(scores[i].log_probs.double().numpy() for i in range(len(items))),
        hits=tuple(scores[i].hits.numpy() for i in range(len(items))),
        ends=torch.tensor([item.ends for item in items]).numpy(),
        generations=tuple(texts.get(i) for i in range(len(items))),
    )


def _generate(model: nn.Module, tokenizer, items: Sequence[Encoded]) -> dict[int, str]:
    """Continue every prompt greedily, in batches whose prompts and answers are of like length."""
    asked = [i for i, item in enumerate(items) if item.example.prompt]
    order = sorted(asked, key=lambda i: (items[i].start, len(items[i].ids), i))
    texts: dict[int, str] = {}
    for begin in range(0, len(order), EVALUATION_BATCH):
        rows = order[begin : begin + EVALUATION_BATCH]
        ids_BL, mask_BL = left_padded_prompts([items[i] for i in rows], next(model.parameters()).device)
        longest = max(len(items[i].ids) - items[i].start for i in rows)
        output_BL = model.generate(  # type: ignore[operator]
            input_ids=ids_BL, attention_mask=mask_BL, generation_config=_greedy(tokenizer, model, longest + SLACK)
        )
        for i, ids in zip(rows, output_BL[:, ids_BL.shape[1] :], strict=True):
            texts[i] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return texts


def _greedy(tokenizer, model: nn.Module, new_tokens: int):
    """Return plain greedy decoding; a model's own settings (penalties, sampling) must not colour an audit."""
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    ends = {tokenizer.eos_token_id}
    listed = getattr(own, "eos_token_id", None)
    ends |= set(listed if isinstance(listed, list) else [listed])
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=sorted(e for e in ends if e is not None),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
