"""A tokenizer is what its tokenizer.json says, whatever class transformers would read it with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillknows.model import checkpoints, tokens

LLAMA_3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
CLASSES = ("PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "GemmaTokenizer")


def byte_level(pattern: str | None) -> Any:
    """Byte-level BPE that cuts text as GPT-2 does, or by a pattern."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    bpe = Tokenizer(models.BPE())
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    if pattern:
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), "isolated"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    return _trained(bpe, pre_tokenizers.ByteLevel.alphabet())


def sentence_piece(prepends: bool) -> Any:
    """BPE over characters with byte fallback, as converted from SentencePiece: with a space before the text, as Llama
    2 has it, or without one, as Gemma."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    opening = [normalizers.Prepend("▁")] if prepends else []
    bpe.normalizer = normalizers.Sequence([*opening, normalizers.Replace(" ", "▁")])
    last = [decoders.Strip(" ", 1, 0)] if prepends else []
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    return _trained(bpe, [])


def _trained(bpe: Any, alphabet: list[str]) -> Any:
    from tokenizers import trainers

    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([*tokens.PROBES] * 3, trainer)
    return bpe


LAYOUTS: dict[str, Callable[[], Any]] = {
    "GPT-2": lambda: byte_level(None),
    "Llama 3": lambda: byte_level(LLAMA_3),
    "Llama 2": lambda: sentence_piece(True),
    "Gemma": lambda: sentence_piece(False),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def stored(request: pytest.FixtureRequest) -> Any:
    return LAYOUTS[request.param]()


def save(folder: Path, stored: Any, tokenizer_class: str, family: str) -> checkpoints.Source:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=stored, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": tokenizer_class}))
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    return checkpoints.Source(str(folder), folder)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tokenizer_class", CLASSES)
def test_ids_are_those_of_the_file_and_another_class_is_told(
    tokenizer_class: str, family: str, stored: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    source = save(tmp_path, stored, tokenizer_class, family)
    found, theirs = checkpoints.load_tokenizer(source), AutoTokenizer.from_pretrained(tmp_path)
    for text in tokens.PROBES:
        ids = found(text, add_special_tokens=False)["input_ids"]
        assert ids == stored.encode(text).ids
        assert found.decode(ids, clean_up_tokenization_spaces=False) == stored.decode(ids)
    differs = any(theirs(t, add_special_tokens=False)["input_ids"] != stored.encode(t).ids for t in tokens.PROBES)
    told = capsys.readouterr().err
    assert not differs or ("tokenizer.json is read as it is" in told and "tokenizer_class" in told)
    assert (found.bos_token, found.eos_token, found.unk_token) == ("<s>", "</s>", "<unk>")


def test_a_class_that_reads_the_file_as_it_is_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = checkpoints.load_tokenizer(save(tmp_path, byte_level(None), "GPT2Tokenizer", "llama"))
    assert type(found).__name__ == "GPT2Tokenizer"
    assert capsys.readouterr().err == ""


def test_the_exchange_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path, byte_level(LLAMA_3), "LlamaTokenizerFast", "llama")
    for _ in range(3):
        checkpoints.load_tokenizer(source)
    assert capsys.readouterr().err.count("tokenizer.json is read as it is") == 1
