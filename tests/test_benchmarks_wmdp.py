"""WMDP: its questions word by word, its corpora in both layouts, and what is said about files that are wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from benchmark_contract import assert_contract
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError

from stillknows.errors import UserError
from stillknows.registry import bind
from stillknows.types import Benchmark, Example

FIRST = {"question": " What is a port scan? ", "choices": ["a walk ", "a probe", "a cable", "a game"], "answer": 1}
SECOND = {"question": "Which layer is IP?", "choices": ["one", "two", "three", "four"], "answer": 2}


def make(spec: str) -> Benchmark:
    return bind("benchmark", spec)()


def article(name: str) -> str:
    return f"{name}: " + "words that go on for more than fifty characters, as texts do."


def write_questions(path: Path, *items: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(items, indent=1))


def write_texts(path: Path, *items: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stand-in for the cyber files: two questions, five texts to forget, four to keep."""
    write_questions(tmp_path / "cyber_questions.json", FIRST, SECOND)
    write_texts(tmp_path / "cyber-forget-corpus.jsonl", *({"text": article(f"exploit {k}")} for k in range(5)))
    write_texts(tmp_path / "cyber-retain-corpus.jsonl", *(article(f"program {k}") for k in range(4)))
    return tmp_path


def test_questions_are_asked_as_lm_evaluation_harness_asks_them(folder: Path) -> None:
    assert make(f"wmdp:cyber,data={folder}").splits[0].examples == (
        Example(
            "cyber-1",
            "The following are multiple choice questions (with answers) about cybersecurity.\n\n"
            "What is a port scan?\nA. a walk \nB. a probe\nC. a cable\nD. a game\nAnswer:",
            "B",
            "cyber-1",
            None,
            ("A", "C", "D"),
        ),
        Example(
            "cyber-2",
            "The following are multiple choice questions (with answers) about cybersecurity.\n\n"
            "Which layer is IP?\nA. one\nB. two\nC. three\nD. four\nAnswer:",
            "C",
            "cyber-2",
            None,
            ("A", "B", "D"),
        ),
    )


def test_questions_are_measured_and_texts_are_trained_on(folder: Path) -> None:
    benchmark = make(f"wmdp:cyber,data={folder},retain=2")
    assert_contract(benchmark)
    assert (benchmark.spec, benchmark.template) == ("wmdp:cyber", "{prompt}")
    assert [(s.name, s.role, len(s.examples), s.piece_tokens) for s in benchmark.splits] == [
        ("forget", "forget", 2, None),
        ("retain", "retain", 2, 768),
    ]
    assert [(s.name, s.role, len(s.examples), s.piece_tokens) for s in benchmark.training] == [
        ("forget", "forget", 5, 768),
        ("retain", "retain", 4, 768),
    ]
    assert benchmark.training[0].examples[4] == Example("cyber-forget-5", "", article("exploit 4"), "cyber-forget-5")
    assert [e.id for e in benchmark.splits[1].examples] == ["cyber-retain-1", "cyber-retain-3"]


def test_texts_can_be_limited(folder: Path) -> None:
    training = make(f"wmdp:cyber,data={folder},texts=2").training
    assert [[e.id for e in s.examples] for s in training] == [
        ["cyber-forget-1", "cyber-forget-3"],
        ["cyber-retain-1", "cyber-retain-3"],
    ]


def test_bio_reads_the_folders_of_the_published_archives(tmp_path: Path) -> None:
    write_questions(tmp_path / "wmdp-mcqs/bio_questions.json", SECOND)
    write_texts(tmp_path / "bio_remove_dataset.jsonl", {"title": "t", "text": article("virus"), "doi": None})
    write_texts(tmp_path / "wmdp-corpora/bio-retain-corpus.jsonl", {"text": article("leaf")})
    benchmark = make(f"wmdp:bio,data={tmp_path}")
    assert (
        benchmark.splits[0]
        .examples[0]
        .prompt.startswith("The following are multiple choice questions (with answers) about biology.\n\nWhich layer")
    )
    assert [(s.examples[0].answer, s.piece_tokens) for s in benchmark.training] == [
        (article("virus"), 512),
        (article("leaf"), 512),
    ]


@pytest.mark.parametrize(("spec", "subject"), [("bio,corpora=false", "biology"), ("chem", "chemistry")])
def test_without_corpora_the_questions_stand_alone(tmp_path: Path, spec: str, subject: str) -> None:
    """For chemistry none are published."""
    write_questions(tmp_path / f"{spec.partition(',')[0]}_questions.json", SECOND)
    benchmark = make(f"wmdp:{spec},data={tmp_path}")
    assert [s.name for s in benchmark.splits] == ["forget"]
    assert benchmark.training == ()
    assert f"about {subject}.\n\n" in benchmark.splits[0].examples[0].prompt


def test_texts_of_fifty_characters_and_less_are_left_out(folder: Path) -> None:
    write_texts(folder / "cyber-forget-corpus.jsonl", {"text": ""}, {"text": "x" * 50}, {"text": " " + "x" * 51})
    assert [e.id for e in make(f"wmdp:cyber,data={folder}").training[0].examples] == ["cyber-forget-3"]
    write_texts(folder / "cyber-forget-corpus.jsonl", {"text": "x" * 50})
    with pytest.raises(UserError, match=r"cyber-forget-corpus.jsonl holds no text of more than 50 characters"):
        make(f"wmdp:cyber,data={folder}")


def test_a_question_asked_twice_is_one_fact(folder: Path) -> None:
    write_questions(folder / "cyber_questions.json", FIRST, SECOND, FIRST)
    examples = make(f"wmdp:cyber,data={folder}").splits[0].examples
    assert [(e.id, e.fact) for e in examples] == [
        ("cyber-1", "cyber-1"),
        ("cyber-2", "cyber-2"),
        ("cyber-3", "cyber-1"),
    ]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (FIRST | {"answer": 0}, "item 2: the question of {path}: item 1 again, with the answer A, not B"),
        (SECOND | {"choices": ["a", "b", "c"]}, "item 2: expected 4 choices, got 3"),
        (SECOND | {"choices": ["a", "b", "c", "d", "e"]}, "item 2: expected 4 choices, got 5"),
        (SECOND | {"choices": ["a", "b", "c", ""]}, "item 2: 'choices' holds something that is empty"),
        (SECOND | {"choices": "abcd"}, "item 2: 'choices' is missing, empty or not a list"),
        (SECOND | {"answer": 4}, "item 2: 'answer' must be the index of a choice, 0 to 3, got 4"),
        (SECOND | {"answer": -1}, "item 2: 'answer' must be the index of a choice, 0 to 3, got -1"),
        (SECOND | {"answer": "C"}, "item 2: 'answer' must be the index of a choice, 0 to 3, got 'C'"),
        (SECOND | {"answer": True}, "item 2: 'answer' must be the index of a choice, 0 to 3, got True"),
        ({"question": "q", "choices": list("abcd")}, "item 2: 'answer' must be the index of a choice"),
        (SECOND | {"question": "  "}, "item 2: 'question' is missing, empty or not a text"),
        (7, "item 2: expected an object, got int"),
    ],
)
def test_bad_questions_are_named(folder: Path, item: Any, message: str) -> None:
    path = folder / "cyber_questions.json"
    write_questions(path, FIRST, item)
    with pytest.raises(UserError, match=re.escape(f"{path}: {message.format(path=path)}")):
        make(f"wmdp:cyber,data={folder}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"title": "no text"}\n', "'text' is missing or not a text"),
        (b'{"text": 3}\n', "'text' is missing or not a text"),
        (b'{"text": "broken\n', "not JSON"),
        ('{"text": "naïve"}\n'.encode("latin-1"), "not UTF-8"),
    ],
)
def test_bad_texts_are_named_by_file_and_line(folder: Path, line: bytes, message: str) -> None:
    path = folder / "cyber-retain-corpus.jsonl"
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(UserError, match=re.escape(f"{path}:5") + ":? (is )?" + re.escape(message)):
        make(f"wmdp:cyber,data={folder}")


def test_one_error_names_all_files_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        make(f"wmdp:bio,data={tmp_path}")
    for name in ("bio_questions.json", "bio-forget-corpus.jsonl", "bio-retain-corpus.jsonl"):
        assert name in str(caught.value)
    assert "cais/wmdp-bio-forget-corpus" in str(caught.value)
    assert "hf auth login" in str(caught.value)
    with pytest.raises(UserError) as caught:
        make(f"wmdp:cyber,data={tmp_path}")
    assert "request" not in str(caught.value)


def test_the_hub_is_asked_for_each_repository_and_a_gate_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def download(repository: str, name: str, **_: Any) -> str:
        asked.append((repository, name))
        if "bio-forget" in repository:
            answer = httpx.Response(403, request=httpx.Request("HEAD", "https://hub.invalid/file"))
            raise GatedRepoError("refused", response=answer)
        raise EntryNotFoundError("no such file")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(UserError) as caught:
        make("wmdp:bio")
    assert asked == [
        ("cais/wmdp", "wmdp-bio/test-00000-of-00001.parquet"),
        ("cais/wmdp-bio-forget-corpus", "data/train-00000-of-00002.parquet"),
        ("cais/wmdp-corpora", "bio-retain-corpus/train-00000-of-00004.parquet"),
    ]
    message = str(caught.value)
    assert "cais/wmdp-bio-forget-corpus is given out only to those who accept its terms" in message
    assert "wmdp-bio/test-00000-of-00001.parquet" in message
    assert "bio-retain-corpus/train-00000-of-00004.parquet" in message
    assert "wmdp:bio,corpora=false" in message


def test_a_hub_that_does_not_answer_is_asked_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[str] = set()

    def download(repository: str, name: str, **_: Any) -> str:
        asked.add(repository)
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(UserError, match="cais/wmdp cannot be downloaded: no network"):
        make("wmdp:bio")
    assert asked == {"cais/wmdp"}


@pytest.mark.parametrize("option", ["texts=0", "retain=0", "texts=-1"])
def test_limits_are_at_least_one(folder: Path, option: str) -> None:
    with pytest.raises(UserError, match="must be at least 1"):
        make(f"wmdp:cyber,data={folder},{option}")


def test_cyber_has_its_files_on_the_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    files = {
        ("cais/wmdp", "wmdp-cyber/test-00000-of-00001.parquet"): "cyber_questions.json",
        ("cais/wmdp-corpora", "cyber-forget-corpus/train-00000-of-00001.parquet"): "cyber-forget-corpus.jsonl",
        ("cais/wmdp-corpora", "cyber-retain-corpus/train-00000-of-00001.parquet"): "cyber-retain-corpus.jsonl",
    }
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda repository, name, **_: str(folder / files[repository, name])
    )
    assert make("wmdp:cyber") == make(f"wmdp:cyber,data={folder}")
