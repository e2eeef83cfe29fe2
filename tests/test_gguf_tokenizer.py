"""A GGUF file that others made: its own metadata say what tokens are, and what begins, ends and frames them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("gguf")
import gguf as library
from tokenizer_layouts import BYTES, SPECIAL, byte_level, sentence_piece

from stillknows.errors import UserError
from stillknows.model import tokens
from stillknows.model.modelfiles import ModelFiles
from stillknows.model.packed import gguf, gguf_tokenizer, gguf_writer
from stillknows.model.ref import ModelRef

Case = Callable[..., Any]
KINDS = library.TokenType
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"


class Layout(NamedTuple):
    """How a family's files are laid out.

    made: the tokenizer of Hugging Face that its files are converted from.
    special: its special tokens, the first with number 0.
    fields: what the file says, by the names of gguf's writer. ids: its special tokens by name.
    opens: whether a text begins with the token that begins a sequence.
    ends: what ends a generation.
    """

    made: Callable[[], Any]
    special: Sequence[str]
    fields: dict[str, Any]
    ids: dict[str, int]
    opens: bool
    ends: set[int]


def bytes_of(special: Sequence[str], *patterns: str) -> Callable[[], Any]:
    return lambda: byte_level(*patterns, special=special)


LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LAYOUTS = {
    "Llama 3": Layout(
        bytes_of(LLAMA, gguf_tokenizer.LLAMA_3),
        LLAMA,
        {"tokenizer_model": "gpt2", "tokenizer_pre": "llama-bpe"},
        {"bos": 0, "eos": 1, "eot": 2, "eom": 3},
        opens=True,
        ends={1, 2, 3},
    ),
    "SmolLM2": Layout(  # transformers' own reader takes <|im_start|> for the end
        bytes_of(CHATML, r"\p{N}", gguf_tokenizer.GPT_2),
        CHATML,
        {"tokenizer_model": "gpt2", "tokenizer_pre": "smollm", "add_bos_token": False, "add_space_prefix": False},
        {"bos": 1, "eos": 2, "unk": 0, "pad": 2},
        opens=False,
        ends={2},
    ),
    "Qwen 2.5": Layout(
        bytes_of(CHATML, gguf_tokenizer.QWEN_2),
        CHATML,
        {"tokenizer_model": "gpt2", "tokenizer_pre": "qwen2", "add_bos_token": False},
        {"bos": 0, "eos": 2, "pad": 0},
        opens=False,
        ends={2},
    ),
    "GPT-2": Layout(
        bytes_of(CHATML[:1]),
        CHATML[:1],
        {"tokenizer_model": "gpt2", "tokenizer_pre": "gpt-2"},
        {"bos": 0, "eos": 0},
        opens=False,
        ends={0},
    ),
    "Llama 2": Layout(lambda: sentence_piece(True), SPECIAL, {"tokenizer_model": "llama"}, {}, opens=True, ends={2}),
    "Gemma": Layout(
        lambda: sentence_piece(False),
        SPECIAL,
        {"tokenizer_model": "llama", "add_space_prefix": False, "add_bos_token": True, "add_eos_token": False},
        {"bos": 1, "eos": 2, "unk": 0, "pad": 0, "eot": 3},
        opens=True,
        ends={2, 3},
    ),
}


def write(path: Path, layout: Layout, templates: Any = TEMPLATE, fillers: int = 2) -> Any:
    """Write a file's metadata, as llama.cpp's converter does, and return the tokenizer that it was made from."""
    made = layout.made()
    stored = json.loads(made.to_str())["model"]
    names = sorted(stored["vocab"], key=stored["vocab"].get)
    writer = library.GGUFWriter(path, "llama")
    writer.add_vocab_size(len(names) + fillers)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, value in layout.fields.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_token_list([*names, *(f"[PAD{len(names) + i}]" for i in range(fillers))])
    kinds = dict.fromkeys(layout.special, KINDS.CONTROL) | dict.fromkeys(BYTES, KINDS.BYTE)
    writer.add_token_types([*(kinds.get(name, KINDS.NORMAL) for name in names), *[KINDS.UNUSED] * fillers])
    if layout.fields["tokenizer_model"] == "llama":
        writer.add_token_scores([-float(i) for i in range(len(names) + fillers)])
    else:
        writer.add_token_merges([" ".join(pair) for pair in stored["merges"]])
    for name, number in layout.ids.items():
        getattr(writer, f"add_{name}_token_id")(number)
    if templates:
        writer.add_chat_template(templates)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return made


def pieces(text: str, vocabulary: dict[str, int], prepends: bool) -> list[int]:
    """SentencePiece's BPE from its definition: join the neighbours that form the token with the best score, here the
    lowest number, the leftmost first; what is no token is spelled in bytes."""
    parts = list(("▁" if prepends else "") + text.replace(" ", "▁"))
    while True:
        joined = [(vocabulary.get(a + b, 10**9), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        best, i = min(joined, default=(10**9, 0))
        if best == 10**9:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    bytes_ = ([part] if part in vocabulary else [f"<0x{byte:02X}>" for byte in part.encode()] for part in parts)
    return [vocabulary[token] for found in bytes_ for token in found]


def opened(path: Path) -> ModelRef:
    """As a model is opened, but for the check that it has tensors."""
    return ModelRef(str(path), ModelFiles(path), packing="GGUF", gguf=gguf.GgufFile(path))


def cut(made: Any) -> str:
    from transformers import PreTrainedTokenizerFast

    return gguf_writer._cut(PreTrainedTokenizerFast(tokenizer_object=made), "model")


@pytest.mark.parametrize(
    "name", [name for name, layout in LAYOUTS.items() if layout.fields["tokenizer_model"] == "gpt2"]
)
def test_a_written_file_names_the_cut_of_its_tokenizer(name: str) -> None:
    assert cut(LAYOUTS[name].made()) == LAYOUTS[name].fields["tokenizer_pre"]


def test_a_cut_is_known_however_its_steps_are_written() -> None:
    from tokenizers import Regex, pre_tokenizers

    made, level = byte_level(special=CHATML), pre_tokenizers.ByteLevel
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, level(add_prefix_space=False)])  # as SmolLM2 is published
    assert cut(made) == "smollm"
    for steps in (
        [pre_tokenizers.Digits(individual_digits=False), level(add_prefix_space=False)],
        [digits, level(add_prefix_space=True)],
        [pre_tokenizers.Split(Regex(gguf_tokenizer.QWEN_2), "isolated")],
        [pre_tokenizers.Split(Regex(gguf_tokenizer.QWEN_2), "removed"), level(add_prefix_space=False, use_regex=False)],
    ):
        made.pre_tokenizer = pre_tokenizers.Sequence(steps)
        with pytest.raises(UserError, match="are not written with its tokenizer"):
            cut(made)


@pytest.mark.parametrize("name", LAYOUTS)
def test_tokens_are_those_that_the_file_was_made_from(name: str, tmp_path: Path) -> None:
    layout, path = LAYOUTS[name], tmp_path / "model.gguf"
    made, read = write(path, layout), gguf.GgufFile(path).tokenizer()
    assert read.get_vocab() == made.get_vocab()
    for text in tokens.PROBES:
        ids = read(text, add_special_tokens=False)["input_ids"]
        if layout.fields["tokenizer_model"] == "llama":
            assert ids == pieces(text, made.get_vocab(), prepends=name == "Llama 2")
        else:
            assert ids == made.encode(text).ids
        assert read.decode(ids) == text


@pytest.mark.parametrize("name", LAYOUTS)
def test_special_tokens_are_those_that_the_file_names(name: str, tmp_path: Path) -> None:
    layout, path = LAYOUTS[name], tmp_path / "model.gguf"
    write(path, layout)
    read, number = gguf.GgufFile(path).tokenizer(), {"Llama 2": {"bos": 1, "eos": 2, "unk": 0}}.get(name, layout.ids)
    assert read.bos_token_id == number["bos"]
    assert read.eos_token_id == number["eos"]
    assert read.pad_token_id == number.get("pad")
    assert read.unk_token_id == number.get("unk")
    ids, plain = read("word")["input_ids"], read("word", add_special_tokens=False)["input_ids"]
    assert ids == [number["bos"], *plain] if layout.opens else ids == plain
    for token in layout.special:
        assert read(token, add_special_tokens=False)["input_ids"] == [read.convert_tokens_to_ids(token)]
    source = opened(path)
    assert source.end_tokens == layout.ends


@pytest.mark.parametrize("name", ["SmolLM2", "Llama 2"])
@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("ends", [True, False])
def test_what_the_file_says_of_beginning_and_end_is_done(name: str, begins: bool, ends: bool, tmp_path: Path) -> None:
    layout, path = LAYOUTS[name], tmp_path / "model.gguf"
    write(path, layout._replace(fields=layout.fields | {"add_bos_token": begins, "add_eos_token": ends}))
    read = gguf.GgufFile(path).tokenizer()
    plain = read("word", add_special_tokens=False)["input_ids"]
    assert read("word")["input_ids"] == [read.bos_token_id] * begins + plain + [read.eos_token_id] * ends


def test_the_files_say_counts_beside_a_tokenizer_of_hugging_face(tmp_path: Path) -> None:
    layout, path = LAYOUTS["SmolLM2"], tmp_path / "model.gguf"
    stored = layout.made().to_str()
    write(path, layout._replace(fields=layout.fields | {"add_bos_token": True}))
    reader = library.GGUFReader(path)

    def field(key: str, default: Any = None) -> Any:
        found = reader.get_field(key)
        return stored if key == library.Keys.Tokenizer.HF_JSON else default if found is None else found.contents()

    read = gguf_tokenizer.read(field, "here")
    assert read("word")["input_ids"][0] == read.bos_token_id == 1
    assert read.eos_token_id == 2


NAMED = [{"name": "default", "template": TEMPLATE}, {"name": "tools", "template": "x"}]


@pytest.mark.parametrize("templates", [TEMPLATE, None, NAMED])
def test_the_chat_template_is_the_files(templates: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, LAYOUTS["SmolLM2"], templates)
    named = {t["name"]: t["template"] for t in templates} if isinstance(templates, list) else templates
    assert gguf.GgufFile(path).tokenizer().chat_template == named


def test_files_beside_it_change_nothing(tmp_path: Path) -> None:
    alone, among = tmp_path / "alone", tmp_path / "among"
    for folder in (alone, among):
        folder.mkdir()
        write(folder / "model.gguf", LAYOUTS["SmolLM2"])
    byte_level().save(str(among / "tokenizer.json"))
    (among / "tokenizer_config.json").write_text('{"eos_token": "<s>", "tokenizer_class": "GPT2Tokenizer"}')
    (among / "chat_template.jinja").write_text("other")
    (among / "config.json").write_text('{"model_type": "gpt2", "n_positions": 8}')
    (among / "generation_config.json").write_text('{"eos_token_id": 7}')
    first, second = (gguf.GgufFile(folder / "model.gguf").tokenizer() for folder in (alone, among))
    assert not tokens.differences(first, second)
    configs = [gguf.GgufFile(f / "model.gguf").config().to_dict() | {"_name_or_path": ""} for f in (alone, among)]
    assert configs[0] == configs[1]
    sources = [opened(f / "model.gguf") for f in (alone, among)]
    assert sources[0].end_tokens == sources[1].end_tokens == {2}


NOT_READ: dict[str, tuple[dict[str, Any], dict[str, int], str]] = {
    "another kind": ({"tokenizer_model": "t5"}, {}, "is of the kind 't5'\n.*gpt2 and llama"),
    "another cut": ({"tokenizer_pre": "poro-chat"}, {}, r"cuts text in a way that is not read here \(poro-chat\)"),
    "an end that is no token": (
        {},
        {"eos": 100_000},
        "no tokenizer that can be loaded: its eos_token is not among",
    ),
}


@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_not_read_is_refused(name: str, tmp_path: Path) -> None:
    layout, path = LAYOUTS["SmolLM2"], tmp_path / "model.gguf"
    fields, ids, words = NOT_READ[name]
    write(path, layout._replace(fields=layout.fields | fields, ids=layout.ids | ids))
    with pytest.raises(UserError, match=words):
        gguf.GgufFile(path).tokenizer()


def test_a_file_without_a_cut_is_refused(tmp_path: Path) -> None:
    layout, path = LAYOUTS["GPT-2"], tmp_path / "model.gguf"
    write(path, layout._replace(fields={"tokenizer_model": "gpt2"}))
    with pytest.raises(UserError, match=r"not read here \(None\)"):
        gguf.GgufFile(path).tokenizer()
