"""GGUF files with damaged headers: one message that names the file, and no more work than the file is long."""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stillknows.errors import UserError
from stillknows.experiments import tiny_models
from stillknows.model.packed import gguf_header
from stillknows.model.ref import ModelRef
from stillknows.variants import export

EXTREMES = [
    b"\xff" * 8,
    b"\0" * 8,
    struct.pack("<Q", 2**63),
    struct.pack("<I", 2**31),
    struct.pack("<I", 9),
    b"\xff\xfe",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model as a GGUF file."""
    root = tmp_path_factory.mktemp("gguf")
    tokenizer = tiny_models.subword_tokenizer(["Ada was born in Paris."], 300)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng():
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    record = export.export(export.ExportConfig(str(root / "model"), "gguf:Q4_0"), root / "out")
    return root / "out" / record["file"]


@pytest.fixture(scope="module")
def header(whole: Path) -> int:
    """Where the whole file's tensors begin."""
    return int(gguf.GGUFReader(whole).data_offset)


class Overworked(BaseException):
    """A reader took more steps than it may."""


@contextmanager
def at_most(steps: int) -> Iterator[list[int]]:
    """Let a block make so many calls of functions, and give how many it made."""
    made = [0]

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        made[0] += event in ("call", "c_call")
        if made[0] > steps:
            sys.setprofile(None)
            raise Overworked

    sys.setprofile(count)
    try:
        yield made
    finally:
        sys.setprofile(None)


def read(path: Path) -> None:
    """Do what commands do with a model before its weights are loaded."""
    source = ModelRef.open(str(path), packed=True)
    assert source.skeleton
    assert source.context_length
    assert source.tokenizer


def refusal(path: Path) -> str | None:
    try:
        read(path)
    except UserError as error:
        return str(error)
    return None


def mutated(content: bytes, header: int, seed: int) -> bytes:
    """Return the file with some places of its header overwritten, or with its end cut off."""
    drawn, changed = random.Random(seed), bytearray(content)
    if seed % 10 == 0:
        return content[: drawn.randrange(header)]
    for _ in range(drawn.randint(1, 3)):
        at, new = drawn.randrange(4, header - 8), drawn.choice([*EXTREMES, drawn.randbytes(1)])
        changed[at : at + len(new)] = new
    return bytes(changed)


@pytest.mark.parametrize("seeds", [range(k, k + 20) for k in range(0, 60, 20)], ids=str)
def test_a_mutated_header_is_read_or_refused_by_name(seeds: range, whole: Path, header: int, tmp_path: Path) -> None:
    read(whole)  # what is imported then does not count
    with at_most(10**9) as needed:
        read(whole)
    content, path = whole.read_bytes(), tmp_path / "mutated.gguf"
    for seed in seeds:
        path.write_bytes(mutated(content, header, seed))
        with at_most(2 * needed[0]):
            message = refusal(path)
        assert message is None or str(path) in message, seed
        assert message is None or message.count("\n") <= 1, (seed, message)


def extremes(content: bytes, field: gguf.ReaderField) -> Iterator[bytes]:
    """Yield the file with a field's value, the last of a list, at the least and the greatest that it can be."""
    start, last = field.offset + sum(part.nbytes for part in field.parts[:-1]), field.parts[-1].nbytes
    for byte in (b"\0", b"\xff"):
        yield content[:start] + byte * last + content[start + last :]


@pytest.mark.parametrize("made", [False, True], ids=["tokenizer of Hugging Face", "tokenizer made of its tokens"])
def test_a_field_at_its_extremes_is_read_or_refused_by_name(made: bool, whole: Path, tmp_path: Path) -> None:
    content, path = whole.read_bytes(), tmp_path / "extreme.gguf"
    if made:
        content = content.replace(b"tokenizer.huggingface.json", b"tokenizer.huggingface.jsoX")
        path.write_bytes(content)
        read(path)
    fields = [field for name, field in gguf.GGUFReader(whole).fields.items() if not name.startswith("GGUF.")]
    refusals = 0
    for field in fields:
        for changed in extremes(content, field):
            path.write_bytes(changed)
            message = refusal(path)
            assert message is None or str(path) in message, (field.name, message)
            refusals += message is not None
    assert refusals > 10


def test_the_walk_takes_no_more_steps_than_the_file_has_bytes(whole: Path, header: int, tmp_path: Path) -> None:
    content, path, refusals = whole.read_bytes(), tmp_path / "mutated.gguf", 0
    gguf_header.check(whole)
    for seed in range(400):
        path.write_bytes(mutated(content, header, seed))
        try:
            with at_most(4 * len(content)):
                gguf_header.check(path)
        except gguf_header.Damaged:
            refusals += 1
    assert refusals > 200


def set_field(name: str, value: Any, kind: gguf.GGUFValueType) -> Callable[[bytes], bytes]:
    """Return what overwrites the first value of a field's type with a value of the same length."""

    def change(content: bytes) -> bytes:
        place = content.index(name.encode()) + len(name)
        assert struct.unpack_from("<I", content, place)[0] == kind
        return content[: place + 4] + value + content[place + 4 + len(value) :]

    return change


U32, TEXT = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.STRING
LIST = gguf.GGUFValueType.ARRAY
SET: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "layers beyond the tensors": (
        set_field("llama.block_count", struct.pack("<I", 2**31), U32),
        "block_count is 21474",
    ),
    "negative layers": (set_field("llama.block_count", b"\xff" * 4, U32), "block_count is 42949"),
    "heads": (set_field("llama.attention.head_count", b"\0" * 4, U32), "describes no model that can be built"),
    "width": (set_field("llama.embedding_length", struct.pack("<I", 2**30), U32), "more than the"),
    "vocabulary": (set_field("llama.vocab_size", struct.pack("<I", 2**31), U32), "more than the"),
    "text not UTF-8": (set_field("general.architecture", struct.pack("<Q", 5) + b"\xff\xfe", TEXT), "is not UTF-8"),
    "long text": (set_field("general.architecture", b"\xff" * 8, TEXT), "more than fit into it"),
    "long list": (set_field("tokenizer.ggml.tokens", struct.pack("<IQ", 8, 2**40), LIST), "more than fit into it"),
    "list of lists": (set_field("tokenizer.ggml.tokens", struct.pack("<I", 9), LIST), "a list of the type 9"),
    "tensors": (lambda content: content[:8] + struct.pack("<Q", 2**60) + content[16:], "speaks of 1,152,921,504,606,8"),
    "fields": (lambda content: content[:16] + struct.pack("<Q", 2**60) + content[24:], "speaks of 1,152,921,504,606,8"),
    "version": (lambda content: content[:4] + struct.pack("<I", 7) + content[8:], "it is of version 7"),
    "empty": (lambda content: b"", "it ends within its header"),
    "cut": (lambda content: content[:-500], "lies beyond its end"),
    "other kind": (lambda content: b"PK" + content[2:], "it does not begin with GGUF"),
}


@pytest.mark.parametrize("name", SET)
def test_a_count_that_does_not_fit_is_named(name: str, whole: Path, tmp_path: Path) -> None:
    change, words = SET[name]
    path = tmp_path / "changed.gguf"
    path.write_bytes(change(whole.read_bytes()))
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_tensors_that_lie_over_one_another_are_refused(tmp_path: Path) -> None:
    """Else a small file could stand for any amount of memory."""
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for name in ("a", "b"):
        writer.add_tensor(name, torch.zeros(8, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    gguf_header.check(tmp_path / "a.gguf")
    content = (tmp_path / "a.gguf").read_bytes()
    place = content.rindex(struct.pack("<Q", 1024))
    (tmp_path / "b.gguf").write_bytes(content[:place] + struct.pack("<Q", 0) + content[place + 8 : -1024])
    with pytest.raises(gguf_header.Damaged, match="over one another"):
        gguf_header.check(tmp_path / "b.gguf")


def test_a_file_with_the_highest_byte_first_is_walked_through_too(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_array("numbers", [1, 2, 3])
    writer.add_tensor("a", torch.zeros(8, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    gguf_header.check(tmp_path / "a.gguf")
