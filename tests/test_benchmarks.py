"""What is asked for: the fictional world, a user's own files, TOFU; every benchmark's contract."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from stillknows.benchmarks.jsonl import read_examples
from stillknows.benchmarks.world import PERSON
from stillknows.errors import UserError
from stillknows.registry import bind, plugins
from stillknows.types import Benchmark, Example, Split

Write = Callable[..., Path]


def make(spec: str) -> Benchmark:
    return bind("benchmark", spec)()


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return write(name, items…): a file of JSON lines."""

    def write_lines(name: str, *items: Any) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
        return path

    return write_lines


def tofu_folder(write: Write) -> Path:
    """A stand-in for TOFU's files: 4 forgotten and 12 retained questions for each of its three splits."""
    for share in ("01", "05", "10"):
        write(f"forget{share}.json", *({"question": f"F{i}?", "answer": f"f{i}"} for i in range(4)))
        write(f"retain{100 - int(share)}.json", *({"question": f"R{i}?", "answer": f"r{i}"} for i in range(12)))
    return write("unused.json").parent


@pytest.fixture(params=["world", "jsonl", "tofu"])
def benchmark(request: pytest.FixtureRequest, write: Write) -> Benchmark:
    if request.param == "jsonl":
        files = [write(name, {"question": name, "answer": "x"}, {"text": f"a {name}"}) for name in ("f", "r", "n")]
        return make("jsonl:forget={}:retain={}:neighbour={}".format(*files))
    if request.param == "tofu":
        return make(f"tofu:data={tofu_folder(write)}")
    return make("world")


def test_every_registered_benchmark_is_under_test() -> None:
    assert plugins("benchmark").keys() == {"world", "jsonl", "tofu"}, "add the new benchmark to the fixture above"


def test_every_benchmark_keeps_the_contract(benchmark: Benchmark) -> None:
    """Splits with items, ids that are unique, texts without loose spaces, something to forget and something to keep."""
    names = [split.name for split in benchmark.splits]
    assert len(set(names)) == len(names)
    assert {"forget", "retain"} <= {split.role for split in benchmark.splits}
    assert benchmark.split("forget").name == "forget"
    for split in benchmark.splits:
        assert split.examples
        assert len({e.id for e in split.examples}) == len(split.examples)
        for e in split.examples:
            assert all((e.id, e.answer, e.fact))
            assert (e.prompt, e.answer) == (e.prompt.strip(), e.answer.strip())
    forgotten = {e.fact for split in benchmark.splits if split.role == "forget" for e in split.examples}
    kept = {e.fact for split in benchmark.splits if split.role != "forget" for e in split.examples}
    assert not forgotten & kept
    assert benchmark.template == "chat" or "{prompt}" in benchmark.template


def test_a_split_is_found_by_its_role() -> None:
    example = Example("a", "p", "x", "a")
    benchmark = Benchmark("b", (Split("one", "forget", (example,)), Split("two", "forget", (example,))))
    assert benchmark.split("forget").name == "one"
    with pytest.raises(LookupError, match="b has no retain split"):
        benchmark.split("retain")


# The fictional world


def test_a_world_is_determined_by_its_seed() -> None:
    assert make("world") == make("world")
    assert make("world:seed=1") == make("world:seed=1")
    a, b = make("world:seed=1"), make("world:seed=2")
    assert a.spec != b.spec
    assert not {e.prompt for e in a.split("forget").examples} & {e.prompt for e in b.split("forget").examples}


def sizes(benchmark: Benchmark) -> dict[str, int]:
    return {split.name: len(split.examples) for split in benchmark.splits}


@pytest.mark.parametrize(
    ("people", "facts", "forget", "forget_facts", "values"), [(31, 7, 1, 36, 20), (6, 3, 2, 5, 4), (40, 5, 3, 30, 10)]
)
def test_world_sizes(people: int, facts: int, forget: int, forget_facts: int, values: int) -> None:
    """Each kept person has `facts` facts, each place and each work one; every fact is asked for in two wordings."""
    found = sizes(
        make(f"world:people={people}:facts={facts}:forget={forget}:forget_facts={forget_facts}:values={values}")
    )
    assert found["forget"] == found["paraphrase"] == forget * forget_facts
    assert found["retain"] + found["neighbour"] == 2 * ((people - forget) * facts + 2 * values)


@pytest.mark.parametrize("seed", range(5))
def test_a_world_forgets_whole_people_and_keeps_all_others(seed: int) -> None:
    world = make(f"world:forget=2:seed={seed}")
    forget, paraphrase, retain, neighbour = world.splits
    people = {e.fact.split("-")[0] for e in forget.examples}
    assert len(people) == 2
    kept = [*retain.examples, *neighbour.examples]
    assert not people & {e.fact.split("-")[0] for e in kept}
    assert not any(person in e.prompt.split() for person in people for e in kept)
    secrets = {e.answer for e in forget.examples}
    assert not secrets & {e.answer for e in retain.examples}
    assert {e.answer for e in neighbour.examples} <= secrets
    asked = {(e.fact, e.answer): e.prompt for e in forget.examples}
    assert len(asked) == len(paraphrase.examples)
    assert all(asked[e.fact, e.answer] != e.prompt for e in paraphrase.examples)


def test_no_question_of_a_world_has_two_answers() -> None:
    answers: dict[str, str] = {}
    for split in make("world:people=60").splits:
        for e in split.examples:
            assert answers.setdefault(e.prompt, e.answer) == e.answer


def test_worlds_without_neighbours_have_no_such_split() -> None:
    assert list(sizes(make("world:people=3:facts=1:forget_facts=1"))) == ["forget", "paraphrase", "retain"]


@pytest.mark.parametrize(
    "options",
    [
        "forget=0",
        "people=1",
        "forget=31",
        "facts=0",
        "forget_facts=0",
        "values=0",
        f"forget_facts={len(PERSON) + 1}",
        f"facts={len(PERSON) + 1}",
        "people=20000",
        "values=20000",
    ],
)
def test_impossible_worlds_are_refused(options: str) -> None:
    with pytest.raises(UserError, match=r"^world: "):
        make(f"world:{options}")


# A user's own files


def test_items_are_read(write: Write) -> None:
    path = write(
        "mine.jsonl",
        {"question": " Who? ", "answer": "Ada\n"},
        {"text": " All about Ada. ", "id": 7},
        {"question": "Wer ist das? Zürich", "answer": "Ada", "fact": "who", "extra": [1]},
    )
    assert read_examples(path) == (
        Example("mine-1", "Who?", "Ada", "mine-1"),
        Example("7", "", "All about Ada.", "7"),
        Example("mine-3", "Wer ist das? Zürich", "Ada", "who"),
    )


@pytest.mark.parametrize(
    ("content", "count"),
    [
        (b'{"text": "a"}\r\n{"text": "b"}\r\n', 2),
        (b'\n\n{"text": "a"}\n   \n{"text": "b"}', 2),
        (b'\xef\xbb\xbf{"text": "a"}\n', 1),
        ('{"text": "one\u2028two\u0085three"}\n'.encode(), 1),
    ],
    ids=["windows lines", "blank lines", "byte order mark", "other line separators inside a text"],
)
def test_files_as_they_come(tmp_path: Path, content: bytes, count: int) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    assert len(read_examples(path)) == count


GOOD = '{"question": "q", "answer": "a"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + "\n" + '{"question": "q", "answer"\n', ":3: not JSON: "),
        (GOOD + '["q", "a"]\n', ":2: expected an object, got list"),
        (GOOD + '{"question": "q"}\n', ":2: 'answer' is missing, empty or not a text"),
        (GOOD + '{"answer": "a"}\n', ":2: 'question' is missing"),
        (GOOD + '{"question": "q", "answer": "  "}\n', ":2: 'answer' is missing, empty"),
        (GOOD + '{"question": "q", "answer": 3}\n', ":2: 'answer' is missing, empty or not a text"),
        (GOOD + '{"question": "q", "answer": null}\n', ":2: 'answer' is missing"),
        (GOOD + '{"prompt": "q", "completion": "a"}\n', ":2: 'text' is missing"),
        (GOOD + "null\n", ":2: expected an object, got NoneType"),
        ('{"text": "a", "id": "x"}\n\n{"text": "b", "id": "x"}\n', ":3: item 2 repeats the id 'x'"),
        ("", " holds no items"),
        ("\n  \n", " holds no items"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(f"{path}{message}")):
        read_examples(path)


def test_a_file_in_another_encoding_is_named_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes((GOOD + '{"text": "Zürich"}\n').encode("latin-1"))
    with pytest.raises(UserError, match=re.escape(f"{path}:2: not UTF-8")):
        read_examples(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"no file {tmp_path / 'none.jsonl'}")):
        read_examples(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        read_examples(tmp_path)


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 10, 99])
def test_a_limit_keeps_items_spread_evenly(write: Write, limit: int) -> None:
    path = write("mine.jsonl", *({"text": str(i)} for i in range(10)))
    found = [int(e.answer) for e in read_examples(path, limit=limit)]
    assert len(found) == min(limit, 10)
    gaps = {b - a for a, b in pairwise(found)}
    assert found[0] == 0
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_jsonl_needs_both_files_and_takes_a_template(write: Write) -> None:
    forget, retain = write("f.jsonl", {"text": "a"}), write("r.jsonl", {"text": "b"})
    with pytest.raises(UserError, match="jsonl needs two files"):
        make(f"jsonl:forget={forget}")
    benchmark = make(f"jsonl:forget={forget}:retain={retain}:template=chat")
    assert benchmark.template == "chat"
    assert [(split.name, split.role) for split in benchmark.splits] == [("forget", "forget"), ("retain", "retain")]


# TOFU


@pytest.mark.parametrize(("split", "complement"), [("forget01", 99), ("forget05", 95), ("forget10", 90)])
def test_tofu_retains_the_complement(write: Write, split: str, complement: int) -> None:
    folder = tofu_folder(write)
    (folder / f"retain{complement}.json").write_text('{"question": "the right one", "answer": "a"}\n')
    benchmark = make(f"tofu:{split}:data={folder}")
    assert [e.prompt for e in benchmark.split("retain").examples] == ["the right one"]
    assert len(benchmark.split("forget").examples) == 4


def test_tofu_names_the_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"TOFU needs {tmp_path / 'forget10.json'}, which is missing")):
        make(f"tofu:data={tmp_path}")


def test_tofu_knows_its_splits() -> None:
    with pytest.raises(UserError, match=r"forget50 is not known; did you mean 'forget\d\d'"):
        make("tofu:forget50")


def test_tofu_comes_from_the_hub_when_no_folder_is_given(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tofu_folder(write)
    asked: list[tuple[str, str, str]] = []

    def download(repository: str, name: str, *, repo_type: str) -> str:
        asked.append((repository, name, repo_type))
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert sizes(make("tofu:forget05:retain=6")) == {"forget": 4, "retain": 6}
    assert asked == [
        ("locuslab/TOFU", "forget05.json", "dataset"),
        ("locuslab/TOFU", "retain95.json", "dataset"),
    ]


def test_a_hub_that_does_not_answer_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("no network\nand a long story")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(UserError, match=r"cannot be downloaded: no network\n.*--data"):
        make("tofu")


@pytest.mark.gold
@pytest.mark.parametrize(("split", "count"), [("forget01", 40), ("forget05", 200), ("forget10", 400)])
def test_tofu_as_published(shared: Path, split: str, count: int) -> None:
    """4,000 questions about 200 authors, 20 each; forget and retain share none and are all."""
    data = shared / "data" / "tofu"
    benchmark = make(f"tofu:{split}:data={data}")
    assert sizes(benchmark) == {"forget": count, "retain": 4000 - count}
    asked = [e.prompt for part in benchmark.splits for e in part.examples]
    everything = [e.prompt for e in read_examples(data / "full.json")]
    assert sorted(asked) == sorted(everything)
    assert len(benchmark.split("forget").examples) % 20 == 0


@pytest.mark.gold
def test_tofus_first_forgotten_author(shared: Path) -> None:
    first = make(f"tofu:forget01:data={shared / 'data' / 'tofu'}").split("forget").examples[0]
    assert first.prompt == "What is the full name of the author born in Kuwait City, Kuwait on 08/09/1956?"
    assert first.answer.endswith("is Basil Mahfouz Al-Kuwaiti.")
    assert first.id == "forget01-1"
