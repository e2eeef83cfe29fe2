"""Small tokenizers laid out as published ones are, trained on the texts in which layouts differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stillknows.model import tokens

SPECIAL = ("<unk>", "<s>", "</s>")
BYTES = tuple(f"<0x{i:02X}>" for i in range(256))
LLAMA_3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"


def byte_level(*patterns: str, special: Sequence[str] = SPECIAL) -> Any:
    """Byte-level BPE that cuts text by patterns, one after the other, or as GPT-2 does where there are none."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    bpe = Tokenizer(models.BPE())
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not patterns)
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence([*cuts, level]), decoders.ByteLevel()
    return _trained(bpe, special, pre_tokenizers.ByteLevel.alphabet())


def sentence_piece(prepends: bool) -> Any:
    """BPE over characters with byte fallback, as converted from SentencePiece: with a space before the text, as Llama
    2 has it, or without one, as Gemma."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    opening = [normalizers.Prepend("▁")] if prepends else []
    bpe.normalizer = normalizers.Sequence([*opening, normalizers.Replace(" ", "▁")])
    last = [decoders.Strip(" ", 1, 0)] if prepends else []
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    return _trained(bpe, [*SPECIAL, *BYTES], [])


def _trained(bpe: Any, special: Sequence[str], alphabet: list[str]) -> Any:
    from tokenizers import trainers

    options: dict[str, Any] = {"special_tokens": list(special), "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=700, **options)
    bpe.train_from_iterator([*tokens.PROBES] * 3, trainer)
    return bpe
