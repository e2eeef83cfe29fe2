"""TOFU: which files it reads, what it trains on, what it measures, and the published files themselves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from benchmark_contract import assert_contract

from stillknows.errors import UserError
from stillknows.registry import bind
from stillknows.types import Benchmark, Decoding, Example

PERTURBED = ("forget10_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")


def make(spec: str) -> Benchmark:
    return bind("benchmark", spec)()


def items(letter: str, count: int, *, paraphrase: bool = False, wrong: int = 0) -> list[dict[str, Any]]:
    """Items in TOFU's form: {"question": "F0?", "answer": "f0", "paraphrased_answer": "it is f0", …}."""
    found = []
    for i in range(count):
        item: dict[str, Any] = {"question": f"{letter}{i}?", "answer": f"{letter.lower()}{i}"}
        if paraphrase:
            item |= {"paraphrased_answer": f"it is {letter.lower()}{i}", "paraphrased_question": f"Again {letter}{i}?"}
        if wrong:
            item["perturbed_answer"] = [f"not {letter.lower()}{i}, {k}" for k in range(wrong)]
        found.append(item)
    return found


def write(path: Path, found: list[Any]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in found))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stand-in for TOFU's files: 4 forgotten and 12 retained questions, 6 of them measured, and 2 utility sets."""
    for share in (1, 5, 10):
        write(tmp_path / f"forget{share:02d}.json", items("F", 4))
        write(tmp_path / f"forget{share:02d}_perturbed.json", items("F", 4, paraphrase=True, wrong=5))
        write(tmp_path / f"retain{100 - share}.json", items("R", 12))
    write(tmp_path / "retain_perturbed.json", items("R", 6, paraphrase=True, wrong=5))
    write(tmp_path / "real_authors_perturbed.json", items("A", 3, wrong=3))
    write(tmp_path / "world_facts_perturbed.json", items("W", 2, wrong=3))
    (tmp_path / "idontknow.jsonl").write_text("I don't know.\n I'm not sure. \n\n")
    return tmp_path


def asked(examples: tuple[Example, ...]) -> list[str]:
    return [e.prompt for e in examples]


def test_it_keeps_the_contract(folder: Path) -> None:
    assert_contract(make(f"tofu:subset=true:data={folder}"))


def test_what_is_trained_on_and_what_is_measured(folder: Path) -> None:
    benchmark = make(f"tofu:forget05:subset=true:data={folder}")
    assert benchmark.spec == "tofu:forget05"
    assert [(s.name, s.role, len(s.examples)) for s in benchmark.training] == [
        ("forget", "forget", 4),
        ("retain", "retain", 12),
    ]
    assert [(s.name, s.role, len(s.examples)) for s in benchmark.splits] == [
        ("forget", "forget", 4),
        ("retain", "retain", 6),
        ("real_authors", "utility", 3),
        ("world_facts", "utility", 2),
    ]
    assert {s.decoding for s in benchmark.splits} == {Decoding(new_tokens=200)}
    assert benchmark.figures == ("forget_quality", "model_utility")
    assert benchmark.refusals == ("I don't know.", "I'm not sure.")


def test_a_measured_item_with_its_other_answers(folder: Path) -> None:
    forget, retain, authors, _ = make(f"tofu:forget01:subset=true:data={folder}").splits
    wrong = ("not f1, 0", "not f1, 1", "not f1, 2", "not f1, 3", "not f1, 4")
    assert forget.examples[1] == Example("forget01-2", "F1?", "f1", "forget01-2", "it is f1", wrong)
    assert retain.examples[0].id == "retain-1"
    assert retain.examples[0].paraphrase == "it is r0"
    assert authors.examples[2] == Example(
        "real_authors-3", "A2?", "a2", "real_authors-3", None, ("not a2, 0", "not a2, 1", "not a2, 2")
    )


@pytest.mark.parametrize(("split", "complement"), [("forget01", 99), ("forget05", 95), ("forget10", 90)])
def test_the_complement_is_trained_on(folder: Path, split: str, complement: int) -> None:
    (folder / f"retain{complement}.json").write_text('{"question": "the right one", "answer": "a"}\n')
    assert asked(make(f"tofu:{split}:subset=true:data={folder}").split("retain").examples) == ["the right one"]


def test_a_limit_on_the_retained(folder: Path) -> None:
    """Every third of 12 are trained on, 4 of 6 measured."""
    benchmark = make(f"tofu:subset=true:retain=4:data={folder}")
    assert asked(benchmark.split("retain").examples) == ["R0?", "R3?", "R6?", "R9?"]
    assert asked(benchmark.splits[1].examples) == ["R0?", "R1?", "R3?", "R4?"]
    assert len(benchmark.splits[0].examples) == 4


def test_without_the_perturbed_files_the_trained_items_are_measured(folder: Path) -> None:
    for name in PERTURBED:
        (folder / f"{name}.json").unlink()
    (folder / "idontknow.jsonl").unlink()
    benchmark = make(f"tofu:subset=true:data={folder}")
    assert [(s.name, len(s.examples)) for s in benchmark.splits] == [("forget", 4), ("retain", 12)]
    assert [s.examples for s in benchmark.splits] == [s.examples for s in benchmark.training]
    assert all(e.paraphrase is None and e.wrong == () for s in benchmark.splits for e in s.examples)
    assert benchmark.refusals == ()


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    """A stand-in for files that hold requests that follow one another: 3 of 4 questions each."""
    folder = tmp_path / "requests"
    folder.mkdir()
    for name, more in (("forget10", {}), ("forget10_perturbed", {"paraphrase": True, "wrong": 5})):
        found = [item | {"task_id": str(k)} for k in (1, 2, 3) for item in items(f"T{k}", 4, **more)]
        write(folder / f"{name}.json", found)
    write(folder / "world_facts_perturbed.json", items("W", 2, wrong=3))
    return folder


def test_requests_as_published(tmp_path: Path) -> None:
    """9 of 400 questions: 3,600 items in a file that is called forget10, without an option."""
    write(tmp_path / "forget10.json", [i | {"task_id": str(k)} for k in range(1, 10) for i in items(f"T{k}", 400)])
    write(tmp_path / "retain10.json", items("R", 400))
    benchmark = make(f"tofu:data={tmp_path}")
    assert [len(split.examples) for split in benchmark.training] == [400, 8 * 400 + 400]


def test_one_of_several_requests_is_forgotten(requests: Path) -> None:
    """Without a number the first; later ones are kept, earlier ones neither; ids stay those of the file."""
    first = make(f"tofu:subset=true:data={requests}")
    assert_contract(first)
    assert first.spec == "tofu:forget10:task=1"
    assert asked(first.split("forget").examples) == [f"T1{i}?" for i in range(4)]
    assert asked(first.split("retain").examples) == [f"T{k}{i}?" for k in (2, 3) for i in range(4)]
    second = make(f"tofu:subset=true:task=2:data={requests}")
    assert second.splits[0].examples[0] == Example(
        "forget10-5", "T20?", "t20", "forget10-5", "it is t20", tuple(f"not t20, {k}" for k in range(5))
    )
    assert asked(second.split("retain").examples) == [f"T3{i}?" for i in range(4)]
    assert [s.name for s in second.splits] == ["forget", "retain", "world_facts"]
    write(requests / "retain10.json", items("R", 5))
    third = make(f"tofu:subset=true:task=3:data={requests}")
    assert asked(third.split("retain").examples) == [f"R{i}?" for i in range(5)]


def test_requests_that_cannot_be_read(requests: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=r"nothing is kept with task=3: retain10.json is missing"):
        make(f"tofu:subset=true:task=3:data={requests}")
    with pytest.raises(UserError, match=r"forget10.json holds 4 items, 400 were published"):
        make(f"tofu:data={requests}")
    with pytest.raises(UserError, match="task=2, but forget05"):
        make(f"tofu:forget05:task=2:subset=true:data={folder}")
    write(
        requests / "forget10.json",
        [{"task_id": "1", "question": "q?", "answer": "a"}, {"question": "r?", "answer": "b"}],
    )
    with pytest.raises(UserError, match=r"forget10.json:2: 'task_id' is None, not the number of a request"):
        make(f"tofu:subset=true:data={requests}")


def test_every_missing_file_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        make(f"tofu:data={tmp_path}")
    assert str(error.value) == (
        f"TOFU needs files that are missing in {tmp_path}: forget10.json, retain90.json\n"
        "  give a folder with TOFU's files as `data`"
    )


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"TOFU needs the folder .*none, which does not exist\n.*`data`"):
        make(f"tofu:data={tmp_path / 'none'}")


@pytest.mark.parametrize("name", [*PERTURBED, "forget10", "retain90"])
def test_a_file_without_its_published_number_of_items(folder: Path, name: str) -> None:
    """Each file is checked; all others hold as many items as were published."""
    published = {"forget10": 400, "retain90": 3600, "forget10_perturbed": 400, "retain_perturbed": 400}
    published |= {"real_authors_perturbed": 100, "world_facts_perturbed": 117}
    for other, count in published.items():
        write(folder / f"{other}.json", items(other, count))
    assert len(make(f"tofu:data={folder}").splits) == 4
    write(folder / f"{name}.json", items("X", 7))
    message = f"{folder / name}.json holds 7 items, {published[name]} were published"
    with pytest.raises(UserError, match=re.escape(message) + r"\n.*subset=true"):
        make(f"tofu:data={folder}")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ('{"question": "q", "answer": ""}', "'answer' is missing, empty or not a text"),
        ('{"prompt": "q"}', "'question' is missing"),
        (
            '{"question": "q", "answer": "a", "perturbed_answer": "b"}',
            "'perturbed_answer' is missing, empty or not a l",
        ),
        ('{"question": "q", "answer": "a", "perturbed_answer": []}', "'perturbed_answer' is missing, empty"),
        ('{"question": "q", "answer": "a", "paraphrased_answer": 1}', "'paraphrased_answer' is missing, empty or not"),
        ('{"question": "q"', "is not JSON: "),
    ],
)
def test_bad_items_are_named_with_file_and_line(folder: Path, item: str, message: str) -> None:
    path = folder / "forget10_perturbed.json"
    path.write_text(f'{{"question": "q", "answer": "a"}}\n\n{item}\n')
    with pytest.raises(UserError, match=re.escape(f"{path}:3") + ":? " + re.escape(message)):
        make(f"tofu:subset=true:data={folder}")


def test_it_knows_its_splits() -> None:
    with pytest.raises(UserError, match=r"forget50 is not known; did you mean 'forget\d\d'"):
        make("tofu:forget50")


@pytest.mark.gold
@pytest.mark.parametrize(("split", "count"), [("forget01", 40), ("forget05", 200), ("forget10", 400)])
def test_as_published(shared: Path, split: str, count: int) -> None:
    """4,000 questions about 200 authors: forgotten or retained, none both. 400 of the retained are measured."""
    data = shared / "data" / "tofu"
    benchmark = make(f"tofu:{split}:data={data}")
    assert_contract(benchmark)
    training, measured = ({s.name: s.examples for s in part} for part in (benchmark.training, benchmark.splits))
    everything = [json.loads(line)["question"] for line in (data / "full.json").read_text().splitlines()]
    assert sorted(asked(training["forget"]) + asked(training["retain"])) == sorted(everything)
    assert {name: len(examples) for name, examples in measured.items()} == {
        "forget": count,
        "retain": 400,
        "real_authors": 100,
        "world_facts": 117,
    }
    assert [(e.id, e.prompt, e.answer) for e in measured["forget"]] == [
        (e.id, e.prompt, e.answer) for e in training["forget"]
    ]
    assert set(asked(measured["retain"])) < set(asked(training["retain"]))
    assert {len(e.wrong) for name in ("forget", "retain") for e in measured[name]} == {5}
    assert {len(e.wrong) for name in ("real_authors", "world_facts") for e in measured[name]} == {3}
    assert all(e.paraphrase for name in ("forget", "retain") for e in measured[name])
    assert len(benchmark.refusals) == 100


@pytest.mark.gold
def test_the_first_forgotten_author(shared: Path) -> None:
    benchmark = make(f"tofu:forget01:data={shared / 'data' / 'tofu'}")
    first = benchmark.split("forget").examples[0]
    assert first.prompt == "What is the full name of the author born in Kuwait City, Kuwait on 08/09/1956?"
    assert first.answer.endswith("is Basil Mahfouz Al-Kuwaiti.")
    assert first.id == "forget01-1"
    assert benchmark.refusals[0] == "I'm not certain about that."
