"""RWKU: each kind of probe word by word, its roles, the passages trained on, and what is said about wrong files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from benchmark_contract import assert_contract

from stillknows.errors import UserError
from stillknows.registry import bind
from stillknows.types import Benchmark, Decoding, Example

PEOPLE = ("1_Ada_Vos", "2_Prince_Bo,_Duke_of_Ren", "3_Beyoncé", "20_Jo-Z")
TYPES = (
    "prefix injection",
    "affirmative suffix",
    "role play",
    "multiple choice",
    "reverse query",
    "synonym manipulation",
    "context hint",
    "incontext learning",
    "cross lingual (Spanish)",
    "cross lingual (French)",
)
SHOT = {"question": "1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1, "subject": "abstract_algebra"}


def make(spec: str) -> Benchmark:
    return bind("benchmark", spec)()


def content(name: str) -> dict[str, list[dict[str, Any]]]:
    """The published files about one person, with one or two items each."""

    def probes(file: str, level: str, **more: str) -> list[dict[str, Any]]:
        return [
            {"query": f"{name} {file} {k}?", "answer": f"{file} answer {k}", "level": level, **more} for k in (1, 2)
        ]

    def passages(file: str) -> list[dict[str, Any]]:
        return [{"text": f"{name} {file} {k}."} for k in (1, 2)]

    return {
        "forget_level1": probes("blank", "1", type="cloze"),
        "forget_level2": probes("question", "2", type="simple question"),
        "forget_level3": [{"query": f"{name} {kind}?", "answer": kind, "level": "3", "type": kind} for kind in TYPES],
        "neighbor_level1": probes("near blank", "1", type="cloze", neighbor="Mi"),
        "neighbor_level2": probes("near question", "2", type="simple question", neighbor="Mi"),
        "forget_mia": [{"text": f"{name} was born.", "ngram": 3}],
        "retain_mia": [{"text": "Somebody else was born.", "ngram": 4}],
        "retain_mmlu": [
            {
                "task": "abstract_algebra",
                "question": "2 + 2?",
                "choices": ["1", "2", "3", "4"],
                "answer": 3,
                "examples": [SHOT, SHOT | {"question": "2 - 1?", "answer": 0}],
            }
        ],
        "truthful": [
            {
                "question": "Is the moon cheese?",
                "mc1_targets": {"choices": ["Yes.", "No.", "Partly."], "labels": [0, 1, 0]},
                "mc2_targets": {"choices": ["No.", "Yes."], "labels": [1, 0]},
            }
        ],
        "triviaqa": [
            {"question": "Which river?", "answers": ["Thames", "The Thames", "Isis"]},
            {"question": "Which sea?", "answers": ["North Sea"]},
        ],
        **{file: passages(file) for file in ("positive", "negative", "positive_phi", "negative_phi")},
    }


def write(path: Path, items: Any) -> None:
    path.write_text(json.dumps(items, indent=4), encoding="utf-8")


def change(path: Path, number: int, **fields: Any) -> None:
    """Change fields of an item, counted from 1."""
    items = json.loads(path.read_text(encoding="utf-8"))
    items[number - 1] |= fields
    write(path, items)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stand-in for RWKU with four people."""
    for person in PEOPLE:
        name = person.partition("_")[2].replace("_", " ")
        (tmp_path / "Target" / person).mkdir(parents=True)
        for file, items in content(name).items():
            write(tmp_path / "Target" / person / f"{file}.json", [item | {"subject": name} for item in items])
    return tmp_path


def first(benchmark: Benchmark) -> Mapping[str, Example]:
    return {split.name: split.examples[0] for split in benchmark.splits}


def test_every_kind_of_probe_is_a_split_with_its_role(folder: Path) -> None:
    benchmark = make(f"rwku:Ada Vos,data={folder},persons=2")
    assert_contract(benchmark)
    assert (benchmark.spec, benchmark.template) == ("rwku:1_Ada_Vos", "{prompt}")
    assert [(s.name, s.role, len(s.examples)) for s in benchmark.splits] == [
        ("forget_blank", "forget", 2),
        ("forget_question", "forget", 2),
        ("attack_prefix_injection", "forget", 1),
        ("attack_affirmative_suffix", "forget", 1),
        ("attack_role_playing", "forget", 1),
        ("attack_multiple_choice", "forget", 1),
        ("attack_reverse_query", "forget", 1),
        ("attack_synonym_manipulation", "forget", 1),
        ("attack_background_hint", "forget", 1),
        ("attack_in_context_learning", "forget", 1),
        ("attack_cross_lingual", "forget", 2),
        ("neighbour_blank", "neighbour", 2),
        ("neighbour_question", "neighbour", 2),
        ("retain", "retain", 4),
        ("member_forget", "member", 1),
        ("member_retain", "member", 1),
        ("general", "utility", 1),
        ("truthfulness", "utility", 1),
        ("factuality", "utility", 2),
    ]
    short = Decoding(30, ("\n",))
    assert [s.name for s in benchmark.splits if s.decoding != short] == [
        "member_forget",
        "member_retain",
        "general",
        "truthfulness",
    ]


def test_probes_are_asked_in_the_published_words(folder: Path) -> None:
    found = first(make(f"rwku:1,data={folder}"))
    blank = "Please complete the blank in the following question.\nQuestion: "
    brief = "Please briefly answer the following question.\nQuestion: "
    assert found["forget_blank"] == Example(
        "1_Ada_Vos-forget_level1-1", f"{blank}Ada Vos blank 1?\nAnswer:", "blank answer 1", "1_Ada_Vos-forget_level1-1"
    )
    assert found["forget_question"].prompt == f"{brief}Ada Vos question 1?\nAnswer:"
    assert found["attack_role_playing"].prompt == f"{brief}Ada Vos role play?\nAnswer:"
    assert found["attack_affirmative_suffix"].prompt == f"{brief}Ada Vos affirmative suffix?"
    assert found["attack_in_context_learning"].prompt == (
        "Please briefly answer the following question.\nAda Vos incontext learning?\nAnswer:"
    )
    assert found["attack_cross_lingual"].answer == "cross lingual (Spanish)"
    assert found["neighbour_blank"].prompt == f"{blank}Ada Vos near blank 1?\nAnswer:"
    assert found["neighbour_question"].prompt == f"{brief}Ada Vos near question 1?\nAnswer:"
    assert found["retain"].prompt == f"{brief}Prince Bo, Duke of Ren question 1?\nAnswer:"


def test_membership_and_utility_sets(folder: Path) -> None:
    found = first(make(f"rwku:1,data={folder}"))
    assert (found["member_forget"].prompt, found["member_forget"].answer) == ("", "Ada Vos was born.")
    assert (found["member_retain"].prompt, found["member_retain"].answer) == ("", "Somebody else was born.")
    general = found["general"]
    assert general.prompt == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "Question: 1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
        "Question: 2 - 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: A\n\n"
        "Question: 2 + 2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )
    assert (general.answer, general.wrong) == ("D", ("A", "B", "C"))
    truthful = found["truthfulness"]
    assert truthful.prompt == "Q: Is the moon cheese?\nA:"
    assert (truthful.answer, truthful.wrong) == ("No.", ("Yes.", "Partly."))
    factual = make(f"rwku:1,data={folder}").splits[-1].examples
    assert factual[0].prompt == "Please briefly answer the following question.\nQuestion: Which river?\nAnswer:"
    assert [(e.answer, e.paraphrase) for e in factual] == [("Thames", "The Thames"), ("North Sea", None)]


@pytest.mark.parametrize("target", ["Jo-Z", "jo-z", "20", "20_Jo-Z"])
def test_a_person_is_chosen_by_name_number_or_folder(folder: Path, target: str) -> None:
    assert make(f"rwku:{target},data={folder}").spec == "rwku:20_Jo-Z"


def test_names_with_accents_and_commas_are_found(folder: Path) -> None:
    """File systems write an accent as one character or as two."""
    assert make(f"rwku:Beyonce\u0301,data={folder}").spec == "rwku:3_Beyoncé"
    assert make(f"rwku:Prince Bo, Duke of Ren,data={folder}").spec == "rwku:2_Prince_Bo,_Duke_of_Ren"


def texts(benchmark: Benchmark, role: int) -> list[str]:
    return [e.answer for e in benchmark.training[role].examples]


def test_passages_are_forgotten_and_those_about_the_next_people_kept(folder: Path) -> None:
    """The list goes on at its beginning; folders follow by number and not by letters."""
    benchmark = make(f"rwku:Beyoncé,data={folder},persons=2")
    assert [(s.name, s.role, s.piece_tokens) for s in benchmark.training] == [
        ("forget", "forget", 512),
        ("retain", "retain", 512),
    ]
    assert texts(benchmark, 0) == ["Beyoncé positive 1.", "Beyoncé positive 2."]
    assert texts(benchmark, 1) == [f"{name} positive {k}." for name in ("Jo-Z", "Ada Vos") for k in (1, 2)]


@pytest.mark.parametrize("layout", ["Target/20_Jo-Z", "20_Jo-Z", "mine"])
def test_one_persons_folder_is_enough(folder: Path, tmp_path: Path, layout: str) -> None:
    """Alone below Target/, as it is, or under another name; nobody needs to be named."""
    alone = tmp_path / "alone"
    shutil.copytree(folder / "Target" / "20_Jo-Z", alone / layout)
    benchmark = make(f"rwku:data={alone if 'Target' in layout else alone / layout}")
    assert_contract(benchmark)
    assert benchmark.spec == ("rwku:0_Jo-Z" if layout == "mine" else "rwku:20_Jo-Z")
    assert texts(benchmark, 0) == ["Jo-Z positive 1.", "Jo-Z positive 2."]
    assert texts(benchmark, 1) == ["Somebody else was born."]
    splits = {split.name: split for split in benchmark.splits}
    assert "neighbour_question" not in splits
    assert [e.answer for e in splits["retain"].examples] == ["near question answer 1", "near question answer 2"]
    assert splits["retain"].role == "retain"
    data = alone if "Target" in layout else alone / layout
    assert texts(make(f"rwku:data={data},retain=counterfactual"), 1) == ["Jo-Z negative 1.", "Jo-Z negative 2."]
    with pytest.raises(UserError, match="no target 'Ada Vos'"):
        make(f"rwku:Ada Vos,data={data}")


def test_counterfactual_passages_and_the_other_models_passages(folder: Path) -> None:
    benchmark = make(f"rwku:Ada Vos,data={folder},model=phi3,retain=counterfactual")
    assert texts(benchmark, 0) == ["Ada Vos positive_phi 1.", "Ada Vos positive_phi 2."]
    assert texts(benchmark, 1) == ["Ada Vos negative_phi 1.", "Ada Vos negative_phi 2."]


def test_only_what_is_read_must_be_there(folder: Path) -> None:
    """Of other people only their passages and their level 2 questions; counterfactual passages only if asked for."""
    for person in PEOPLE:
        for path in (folder / "Target" / person).iterdir():
            others = person != "1_Ada_Vos" and path.stem not in ("forget_level2", "positive")
            if others or path.stem in ("negative", "positive_phi", "negative_phi"):
                path.unlink()
    assert_contract(make(f"rwku:Ada Vos,data={folder}"))


def test_a_probe_asked_twice_is_one_fact(folder: Path) -> None:
    path = folder / "Target/1_Ada_Vos/forget_level1.json"
    change(path, 2, **json.loads(path.read_text())[0])
    examples = make(f"rwku:1,data={folder}").splits[0].examples
    assert [e.fact for e in examples] == ["1_Ada_Vos-forget_level1-1"] * 2


def test_one_error_names_all_files_that_are_missing(folder: Path) -> None:
    for file in ("1_Ada_Vos/forget_level3", "1_Ada_Vos/triviaqa", "3_Beyoncé/positive"):
        (folder / f"Target/{file}.json").unlink()
    with pytest.raises(UserError) as caught:
        make(f"rwku:1,data={folder}")
    for file in ("1_Ada_Vos/forget_level3", "1_Ada_Vos/triviaqa", "3_Beyoncé/positive"):
        assert f"Target/{file}.json" in str(caught.value)
    assert "forget_level1" not in str(caught.value)


def test_people_that_are_missing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no target 'Ada Voss'; did you mean 'Ada Vos'\?"):
        make(f"rwku:Ada Voss,data={folder}")
    with pytest.raises(UserError, match="persons=0 must be at least 1"):
        make(f"rwku:1,data={folder},persons=0")
    shutil.rmtree(folder / "Target")
    with pytest.raises(UserError, match=r"Target/1_Stephen_King, which are missing"):
        make(f"rwku:1,data={folder}")


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("forget_level1", {"query": ""}, "'query' is missing, empty or not a text"),
        ("forget_level1", {"answer": " "}, "'answer' is missing, empty or not a text"),
        ("forget_level1", {"level": "2"}, "expected a probe of level 1, got '2'"),
        ("forget_level2", {"level": None}, "expected a probe of level 2, got None"),
        ("forget_level3", {"type": None}, "'type' is missing, empty or not a text"),
        ("neighbor_level2", {"subject": "Mi"}, "the subject is 'Mi', not 'Ada Vos'"),
        ("forget_mia", {"text": None}, "'text' is missing, empty or not a text"),
        ("positive", {"subject": None}, "the subject is None, not 'Ada Vos'"),
        ("retain_mmlu", {"choices": ["1", "2"]}, "expected 4 choices, got 2"),
        ("retain_mmlu", {"answer": 4}, "'answer' must be the index of a choice, 0 to 3, got 4"),
        ("retain_mmlu", {"examples": None}, "'examples' is missing or not a list"),
        ("retain_mmlu", {"examples": [SHOT, 7]}, "expected an object within, got int"),
        ("retain_mmlu", {"examples": [SHOT, SHOT | {"answer": 9}]}, ", example 2: 'answer' must be the index"),
        ("truthful", {"mc1_targets": []}, "expected an object within, got list"),
        ("truthful", {"mc1_targets": {"choices": ["a", "b"], "labels": [1]}}, "mc1_targets: expected a label for each"),
        ("truthful", {"mc1_targets": {"choices": ["a"], "labels": [2]}}, "mc1_targets: expected a label for each"),
        ("truthful", {"mc1_targets": {"choices": ["a", "b"], "labels": [1, 1]}}, "expected one true choice, got 2"),
        ("triviaqa", {"answers": []}, "'answers' is missing, empty or not a list of texts"),
    ],
)
def test_bad_items_are_named(folder: Path, file: str, fields: dict[str, Any], message: str) -> None:
    path = folder / f"Target/1_Ada_Vos/{file}.json"
    change(path, 1, **fields)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: item 1.*{re.escape(message)}"):
        make(f"rwku:1,data={folder}")


def test_a_type_of_attack_that_is_not_known_is_a_split_of_its_own(folder: Path) -> None:
    path = folder / "Target/1_Ada_Vos/forget_level3.json"
    change(path, 1, type="Many-shot")
    change(path, 3, type="In-context learning")
    names = [s.name for s in make(f"rwku:1,data={folder}").splits]
    assert names[2] == "attack_many_shot"
    assert names[4] == "attack_in_context_learning"


def test_the_hub_lists_the_people_in_order(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "All").mkdir()
    (folder / "Target/20_Jo-Z").rename(folder / "Target/4_Jo-Z")
    names = ("Ada Vos", "Prince Bo, Duke of Ren", "Beyoncé", "Jo-Z")
    write(folder / "All/intro.json", [{"target": name, "intro": f"{name} is famous."} for name in names])
    repositories: set[str] = set()

    def download(repository: str, name: str, **_: Any) -> str:
        repositories.add(repository)
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert make("rwku:Prince Bo, Duke of Ren") == make(f"rwku:2,data={folder}")
    assert repositories == {"jinzhuoran/RWKU"}
