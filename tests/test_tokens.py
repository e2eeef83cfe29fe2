"""A tokenizer is what its tokenizer.json says, whatever class transformers would read it with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizer_layouts import LLAMA_3, byte_level, sentence_piece

from stillknows.model import modelfiles, tokens
from stillknows.model.ref import ModelRef

CLASSES = ("PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "GemmaTokenizer")


LAYOUTS: dict[str, Callable[[], Any]] = {
    "GPT-2": lambda: byte_level(),
    "Llama 3": lambda: byte_level(LLAMA_3),
    "Llama 2": lambda: sentence_piece(True),
    "Gemma": lambda: sentence_piece(False),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def stored(request: pytest.FixtureRequest) -> Any:
    return LAYOUTS[request.param]()


def save(folder: Path, stored: Any, tokenizer_class: str, family: str) -> ModelRef:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=stored, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": tokenizer_class}))
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    return ModelRef(str(folder), modelfiles.ModelFiles(folder))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tokenizer_class", CLASSES)
def test_ids_are_those_of_the_file_and_another_class_is_told(
    tokenizer_class: str, family: str, stored: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoTokenizer

    source = save(tmp_path, stored, tokenizer_class, family)
    found, theirs = source.tokenizer, AutoTokenizer.from_pretrained(tmp_path)
    for text in tokens.PROBES:
        ids = found(text, add_special_tokens=False)["input_ids"]
        assert ids == stored.encode(text).ids
        assert found.decode(ids, clean_up_tokenization_spaces=False) == stored.decode(ids)
    differs = any(theirs(t, add_special_tokens=False)["input_ids"] != stored.encode(t).ids for t in tokens.PROBES)
    told = caplog.text
    assert not differs or ("tokenizer.json is read as it is" in told and "tokenizer_class" in told)
    assert (found.bos_token, found.eos_token, found.unk_token) == ("<s>", "</s>", "<unk>")


def test_a_class_that_reads_the_file_as_it_is_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = save(tmp_path, byte_level(), "GPT2Tokenizer", "llama").tokenizer
    assert type(found).__name__ == "GPT2Tokenizer"
    assert caplog.messages == []


def test_the_exchange_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        assert save(tmp_path, byte_level(LLAMA_3), "LlamaTokenizerFast", "llama").tokenizer
    assert caplog.text.count("tokenizer.json is read as it is") == 1
