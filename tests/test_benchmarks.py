"""What is asked for: the fictional world, a user's own files; every benchmark's contract."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmark_contract import assert_contract

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


@pytest.fixture(params=["world", "jsonl"])
def benchmark(request: pytest.FixtureRequest, write: Write) -> Benchmark:
    if request.param == "jsonl":
        files = [write(name, {"question": name, "answer": "x"}, {"text": f"a {name}"}) for name in ("f", "r", "n")]
        return make("jsonl:forget={}:retain={}:neighbour={}".format(*files))
    return make("world")


def test_every_registered_benchmark_is_under_test() -> None:
    """Here, or in a file of its own."""
    own = {path.stem.removeprefix("test_benchmarks_") for path in Path(__file__).parent.glob("test_benchmarks_*.py")}
    assert plugins("benchmark").keys() == {"world", "jsonl"} | own


def test_every_benchmark_keeps_the_contract(benchmark: Benchmark) -> None:
    assert_contract(benchmark)


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
        (GOOD + "\n" + '{"question": "q", "answer"\n', ":3 is not JSON: "),
        (GOOD + '["q", "a"]\n', ":2: expected an object, got list"),
        (GOOD + '{"question": "q"}\n', ":2: 'answer' is missing, empty or not a text"),
        (GOOD + '{"answer": "a"}\n', ":2: 'question' is missing"),
        (GOOD + '{"question": "q", "answer": "  "}\n', ":2: 'answer' is missing, empty"),
        (GOOD + '{"question": "q", "answer": 3}\n', ":2: 'answer' is missing, empty or not a text"),
        (GOOD + '{"question": "q", "answer": null}\n', ":2: 'answer' is missing"),
        (GOOD + '{"prompt": "q", "completion": "a"}\n', ":2: 'text' is missing"),
        (GOOD + "null\n", ":2: expected an object, got NoneType"),
        (GOOD + '{"question": "q", "answer": "a", "wrong": []}\n', ":2: 'wrong' is missing, empty or not a list"),
        (GOOD + '{"question": "q", "answer": "a", "wrong": "b"}\n', ":2: 'wrong' is missing, empty or not a list"),
        (GOOD + '{"question": "q", "answer": "a", "wrong": ["b", ""]}\n', ":2: 'wrong' holds something that is empty"),
        (GOOD + '{"question": "q", "answer": "a", "wrong": ["b", "a "]}\n', ":2: 'wrong' holds the true answer 'a'"),
        (GOOD + '{"question": "q", "answer": "a", "paraphrase": " "}\n', ":2: 'paraphrase' is missing, empty"),
        (GOOD + '{"text": "t", "wrong": ["b"]}\n', ":2: 'wrong' belongs to a question"),
        (GOOD + '{"text": "t", "paraphrase": "b"}\n', ":2: 'paraphrase' belongs to a question"),
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


def test_an_array_of_items_is_read(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('[{"question": "q", "answer": "a"},\n {"text": "t"}]')
    assert read_examples(tmp_path / "mine.json") == (
        Example("mine-1", "q", "a", "mine-1"),
        Example("mine-2", "", "t", "mine-2"),
    )


def test_other_answers_are_read(write: Write) -> None:
    path = write("mine.jsonl", {"question": "q", "answer": "a", "paraphrase": " an a ", "wrong": ["b", " c"]})
    assert read_examples(path) == (Example("mine-1", "q", "a", "mine-1", "an a", ("b", "c")),)


def test_jsonl_needs_both_files_and_takes_a_template(write: Write) -> None:
    forget, retain = write("f.jsonl", {"text": "a"}), write("r.jsonl", {"text": "b"})
    with pytest.raises(UserError, match="jsonl needs two files"):
        make(f"jsonl:forget={forget}")
    benchmark = make(f"jsonl:forget={forget}:retain={retain}:template=chat")
    assert benchmark.template == "chat"
    assert [(split.name, split.role) for split in benchmark.splits] == [("forget", "forget"), ("retain", "retain")]
