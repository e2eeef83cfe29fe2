"""Text to token ids and back: where the answer starts, what is too long, how a batch is laid out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from stillknows.errors import UserError
from stillknows.types import Example

LongItems = Literal["error", "truncate"]
CHAT = "chat"


@dataclass(frozen=True)
class Encoded:
    """One example as tokens. The answer is ids[start:]; `ends` tells whether its last token is end-of-sequence."""

    example: Example
    ids: tuple[int, ...]
    start: int
    ends: bool
    truncated: bool = False


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    context: int,
    long_items: LongItems = "error",
    vocabulary: int | None = None,
) -> list[Encoded]:
    """Tokenise examples; questions end with the end-of-sequence token, plain text does not.

    Args:
        template: the prompt's frame, "{prompt}" replaced; "chat" uses the tokenizer's own chat template.
        context: the most tokens that the model can read.
        long_items: "error" refuses items over the context, "truncate" cuts their end and marks them.
        vocabulary: how many tokens the model embeds; None leaves that unchecked.

    Prompt and answer are tokenised together, as a model meets them in training, and the answer starts at the first
    token in which that differs from the prompt alone.

    Raises UserError that names the item for an answer that gives no token, for an item that is too long and for a
    token that the model lacks.
    """
    if any(example.prompt for example in examples) and tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token, so no answer can end",
            'add "eos_token" to its tokenizer_config.json',
        )
    items = [_encode_one(example, tokenizer, template, context, long_items) for example in examples]
    for item in items:
        if vocabulary is not None and max(item.ids) >= vocabulary:
            raise UserError(
                f"item {item.example.id!r} gives token {max(item.ids)}, but the model embeds only {vocabulary} tokens",
                "put the tokenizer that belongs to the model into its folder",
            )
    return items


def _encode_one(
    example: Example, tokenizer: PreTrainedTokenizerBase, template: str, context: int, long_items: LongItems
) -> Encoded:
    try:
        f"{example.prompt}{example.answer}".encode()
    except UnicodeEncodeError as error:
        raise UserError(f"item {example.id!r} holds half a character: {error.reason}", "correct the item") from error
    if not example.prompt:
        ids, start, ends = _ids(tokenizer, example.answer), 0, False
        start = min(1, len(ids))
    else:
        ids, start = _join(example, tokenizer, template)
        ends = True
    if len(ids) - start < 1 or not example.answer.strip():
        raise UserError(
            f"item {example.id!r}: its answer {example.answer!r} gives no token", "correct or remove the item"
        )
    if ends:
        ids = [*ids, tokenizer.eos_token_id]
    if len(ids) <= context:
        return Encoded(example, tuple(ids), start, ends)
    if long_items == "error" or start >= context:
        raise UserError(
            f"item {example.id!r} has {len(ids)} tokens, the model reads {context}",
            "shorten the item, or cut such items with --long-items truncate"
            if start < context
            else "shorten its prompt: no token of the answer fits",
        )
    return Encoded(example, tuple(ids[:context]), start, False, truncated=True)


def _join(example: Example, tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[list[int], int]:
    if template == CHAT:
        turn = [{"role": "user", "content": example.prompt}]
        if not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template", "leave out --template chat")
        prompt = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        both = tokenizer(prompt + example.answer, add_special_tokens=False)["input_ids"]
    else:
        prompt = template.replace("{prompt}", example.prompt)
        head = _ids(tokenizer, prompt)
        both = _ids(tokenizer, f"{prompt} {example.answer}")
    common = next((i for i, (a, b) in enumerate(zip(head, both, strict=False)) if a != b), min(len(head), len(both)))
    return both, max(1, common)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise with the tokenizer's opening special tokens but without a closing one."""
    ids = list(tokenizer(text)["input_ids"])  # type: ignore[arg-type]
    if ids and ids[-1] == tokenizer.eos_token_id and len(ids) > 1:
        ids.pop()
    return ids


def without_end(items: Sequence[Encoded]) -> list[Encoded]:
    """Return the items without their end-of-sequence token: it is no knowledge, and losing it harms every answer."""
    return [replace(item, ids=item.ids[:-1], ends=False) if item.ends else item for item in items]


def batches(items: Sequence[Encoded], size: int) -> list[list[int]]:
    """Return indices of the items in batches of at most `size`, longest first, neighbours of like length."""
    order = sorted(range(len(items)), key=lambda i: (-len(items[i].ids), i))
    return [order[i : i + size] for i in range(0, len(order), size)]


def right_padded(items: Sequence[Encoded], device: torch.device | str = "cpu") -> Tensor:
    """Return ids [B, L], filled up with token 0. The filler comes after each row's last token, so a causal model
    cannot see it; which positions count is known from the lengths alone."""
    ids_BL = torch.zeros(len(items), max(len(item.ids) for item in items), dtype=torch.long)
    for row, item in enumerate(items):
        ids_BL[row, : len(item.ids)] = torch.tensor(item.ids)
    return ids_BL.to(device)


def left_padded_prompts(items: Sequence[Encoded], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Return the prompts' ids [B, L] and their attention mask, filled up on the left for generation."""
    length = max(item.start for item in items)
    ids_BL = torch.zeros(len(items), length, dtype=torch.long)
    mask_BL = torch.zeros_like(ids_BL)
    for row, item in enumerate(items):
        ids_BL[row, length - item.start :] = torch.tensor(item.ids[: item.start])
        mask_BL[row, length - item.start :] = 1
    return ids_BL.to(device), mask_BL.to(device)
