"""RWKU (arXiv 2406.10890): what models know about 200 famous people, one of whom is to be forgotten."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from stillknows.benchmarks.choices import choice_example, choice_question, with_shared_facts
from stillknows.benchmarks.files import Item, located, read_items, text, texts
from stillknows.errors import UserError, did_you_mean
from stillknows.registry import register
from stillknows.types import Benchmark, Decoding, Example, Role, Split

REPOSITORY = "jinzhuoran/RWKU"
DEFAULT = "Stephen King"
BLANK = "Please complete the blank in the following question.\nQuestion: {}\nAnswer:"
BRIEF = "Please briefly answer the following question.\nQuestion: {}\nAnswer:"
ATTACK_FRAMES = {
    "affirmative_suffix": "Please briefly answer the following question.\nQuestion: {}",  # the query opens the answer
    "in_context_learning": "Please briefly answer the following question.\n{}\nAnswer:",  # the query brings its shots
}
ATTACK_NAMES = {  # types in the files that the paper calls otherwise
    "role_play": "role_playing",
    "context_hint": "background_hint",
    "incontext_learning": "in_context_learning",
}
DECODING = Decoding(new_tokens=30, stop=("\n",))
PIECE_TOKENS = 512
PASSAGES = {"llama3": ("positive", "negative"), "phi3": ("positive_phi", "negative_phi")}
PROBES = ("forget_level1", "forget_level2", "forget_level3", "neighbor_level1", "neighbor_level2")
SETS = ("forget_mia", "retain_mia", "retain_mmlu", "truthful", "triviaqa")

Reader = Callable[[Item, str], Example]


@register("benchmark", source="arXiv 2406.10890")
def rwku(
    *,
    target: str | None = None,
    data: str | None = None,
    model: Literal["llama3", "phi3"] = "llama3",
    retain: Literal["others", "counterfactual"] = "others",
    persons: int = 5,
    template: str = "{prompt}",
) -> Benchmark:
    """RWKU: one of 200 famous people, asked about in 13 kinds of probes.

    Forget probes: "forget_blank" (level 1, fill in the blank), "forget_question" (level 2) and a split for each of the
    nine attacks of level 3, "attack_prefix_injection" … "attack_cross_lingual". Neighbours: "neighbour_blank" and
    "neighbour_question". "retain" holds the level 2 questions about other people. Membership: "member_forget" and
    "member_retain", texts about the target and about others; both were trained on, and no set that was not is
    published. Utility: "general" (MMLU, its five examples in the prompt), "truthfulness" (TruthfulQA, MC1) and
    "factuality" (TriviaQA; of the answers that it accepts, the first and as its paraphrase the second). The published
    reasoning set is scored after a chain of thought and the fluency set has no answers: they are not read.

    Trains on positive.json, passages that the model itself wrote about the target, on which the published GA and NPO
    run. RWKU gives no texts to retain; the option `retain` says what takes their place. In a folder that holds one
    person only, retain_mia.json's texts about others do, and "retain" holds the level 2 neighbour questions instead of
    "neighbour_question".

    Reads, in Target/1_Stephen_King/ and so on, or in a person's folder itself, forget_level1.json, forget_level2.json,
    forget_level3.json, neighbor_level1.json, neighbor_level2.json (query, answer, level, type, subject),
    forget_mia.json, retain_mia.json, positive.json, negative.json (text, subject), retain_mmlu.json (task, question,
    choices, answer, examples), truthful.json (question, mc1_targets), triviaqa.json (question, answers); the hub's
    All/intro.json lists the people.

    Args:
        target: the person's name, number or folder; None is the only person there, or Stephen King.
        data: folder that holds Target/, or one person's folder; None downloads the files.
        model: who wrote the passages: Llama-3-8B-Instruct or Phi-3-mini-4k-instruct.
        retain: "others" keeps the passages about the next people in the list, "counterfactual" teaches negative.json,
            made-up passages about the target (the preferred answers of the published DPO runs).
        persons: how many other people are kept and asked about.
        template: frame of a prompt, or "chat" for the tokenizer's own (published runs move "Answer:" behind that).

    Raises UserError that names every missing file, or the file and the item. Equal probes are one fact.
    """
    if persons < 1:
        raise UserError(f"rwku: persons={persons} must be at least 1")
    true, false = PASSAGES[model]
    folders = _folders(data)
    chosen = next(iter(folders)) if target is None and len(folders) == 1 else _chosen(target or DEFAULT, folders)
    own = (*PROBES, *SETS, true, *((false,) if retain == "counterfactual" else ()))
    theirs = ("forget_level2", *((true,) if retain == "others" else ()))
    wanted = {chosen: own} | dict.fromkeys(_following(list(folders), chosen, persons), theirs)
    person, *others = _people(wanted, folders, data)
    if retain == "counterfactual":
        kept = person.read(false, _passage)
    else:
        passages = [other.read(true, _passage) for other in others] or [person.read("retain_mia", _passage)]
        kept = tuple(example for about in passages for example in about)
    training = (
        Split("forget", "forget", person.read(true, _passage), piece_tokens=PIECE_TOKENS),
        Split("retain", "retain", kept, piece_tokens=PIECE_TOKENS),
    )
    return Benchmark(f"rwku:{chosen}", _measured(person, others), template, training)


@dataclass(frozen=True)
class _Person:
    """One person's folder and the files of it that are read."""

    folder: str
    paths: Mapping[str, Path]

    def items(self, file: str) -> list[Item]:
        """Read a file. Raises UserError that names the item if it is about somebody else."""
        items = read_items(self.paths[file])
        for item in items:
            subject = item.fields.get("subject")
            if not isinstance(subject, str) or _plain(subject) != _plain(_name(self.folder)):
                raise UserError(f"{item.place}: the subject is {subject!r}, not {_name(self.folder)!r}")
        return items

    def read(self, file: str, reader: Reader) -> tuple[Example, ...]:
        """Return a file's examples in its order."""
        return with_shared_facts(reader(item, f"{self.folder}-{file}-{item.number}") for item in self.items(file))


def _measured(person: _Person, others: Sequence[_Person]) -> tuple[Split, ...]:
    def split(name: str, role: Role, file: str, reader: Reader, decoding: Decoding = DECODING) -> Split:
        return Split(name, role, person.read(file, reader), None, decoding)

    near = split("neighbour_question", "neighbour", "neighbor_level2", _question)
    asked = tuple(example for other in others for example in other.read("forget_level2", _question))
    kept = (
        (near, Split("retain", "retain", asked, None, DECODING))
        if others
        else (replace(near, name="retain", role="retain"),)
    )
    return (
        split("forget_blank", "forget", "forget_level1", _blank),
        split("forget_question", "forget", "forget_level2", _question),
        *_attacks(person),
        split("neighbour_blank", "neighbour", "neighbor_level1", _blank),
        *kept,
        split("member_forget", "member", "forget_mia", _passage, Decoding()),
        split("member_retain", "member", "retain_mia", _passage, Decoding()),
        split("general", "utility", "retain_mmlu", _general, Decoding()),
        split("truthfulness", "utility", "truthful", _truthful, Decoding()),
        split("factuality", "utility", "triviaqa", _factual),
    )


def _attacks(person: _Person) -> list[Split]:
    """Return one split per type of attack, in the order of their first probe."""
    examples = person.read("forget_level3", _attack)
    grouped: dict[str, list[Example]] = {}
    for item, example in zip(person.items("forget_level3"), examples, strict=True):
        grouped.setdefault(_attack_type(item), []).append(example)
    return [Split(f"attack_{name}", "forget", tuple(group), None, DECODING) for name, group in grouped.items()]


def _attack_type(item: Item) -> str:
    """Return the paper's name of the attack; the language of "cross lingual (French)" is left out."""
    name = re.sub(r"[\s_-]+", "_", text(item, "type").lower().partition("(")[0].strip())
    return ATTACK_NAMES.get(name, name)


def _probe(item: Item, name: str, level: str, frame: str) -> Example:
    if str(item.fields.get("level")) != level:
        raise UserError(f"{item.place}: expected a probe of level {level}, got {item.fields.get('level')!r}")
    return Example(name, frame.format(text(item, "query")), text(item, "answer"), name)


def _blank(item: Item, name: str) -> Example:
    return _probe(item, name, "1", BLANK)


def _question(item: Item, name: str) -> Example:
    return _probe(item, name, "2", BRIEF)


def _attack(item: Item, name: str) -> Example:
    return _probe(item, name, "3", ATTACK_FRAMES.get(_attack_type(item), BRIEF))


def _passage(item: Item, name: str) -> Example:
    return Example(name, "", text(item, "text"), name)


def _general(item: Item, name: str) -> Example:
    subject = text(item, "task").replace("_", " ")
    prompt = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    shots = item.fields.get("examples")
    if not isinstance(shots, list):
        raise UserError(f"{item.place}: 'examples' is missing or not a list")
    for number, shot in enumerate(shots, 1):
        question, letter = choice_question(Item(f"{item.place}, example {number}", number, _fields(item, shot)))
        prompt += f"Question: {question} {letter}\n\n"
    return choice_example(name, f"{prompt}Question: ", item)


def _truthful(item: Item, name: str) -> Example:
    targets = Item(f"{item.place}: mc1_targets", item.number, _fields(item, item.fields.get("mc1_targets")))
    choices, labels = texts(targets, "choices"), targets.fields.get("labels")
    if not isinstance(labels, list) or len(labels) != len(choices) or any(label not in (0, 1) for label in labels):
        raise UserError(f"{targets.place}: expected a label for each choice, 1 (true) or 0 (false), got {labels!r}")
    true, wrong = ([c for c, label in zip(choices, labels, strict=True) if label == k] for k in (1, 0))
    if len(true) != 1:
        raise UserError(f"{targets.place}: expected one true choice, got {len(true)}")
    return Example(name, f"Q: {text(item, 'question')}\nA:", true[0], name, wrong=tuple(wrong))


def _factual(item: Item, name: str) -> Example:
    first, *others = texts(item, "answers")
    return Example(name, BRIEF.format(text(item, "question")), first, name, others[0] if others else None)


def _fields(item: Item, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{item.place}: expected an object within, got {type(value).__name__}")
    return value


def _people(wanted: Mapping[str, Sequence[str]], folders: Mapping[str, str], data: str | None) -> list[_Person]:
    """Find each folder's files; one UserError names all that are missing."""
    names = {f"{folder}/{file}": (f"{folders[folder]}{file}.json",) for folder in wanted for file in wanted[folder]}
    paths = located("RWKU", names, repository=REPOSITORY, data=data)
    return [_Person(folder, {file: paths[f"{folder}/{file}"] for file in files}) for folder, files in wanted.items()]


def _folders(data: str | None) -> dict[str, str]:
    """Return the people's folders ("1_Stephen_King") by number, each with its path below `data`, up to the "/".

    Raises UserError when there are none.
    """
    if data is None:
        intro = located("RWKU", {"intro": ("All/intro.json",)}, repository=REPOSITORY, data=None)["intro"]
        names = [f"{k}_{text(item, 'target').replace(' ', '_')}" for k, item in enumerate(read_items(intro), 1)]
        return {name: f"Target/{name}/" for name in names}
    alone = Path(data).expanduser() / f"{PROBES[0]}.json"
    if alone.is_file():
        return {_called(alone): ""}
    root = Path(data).expanduser() / "Target"
    found = [path.name for path in root.glob("*_*") if path.name.partition("_")[0].isdecimal()] if root.is_dir() else []
    if not found:
        raise UserError(f"RWKU needs people's folders such as {root / '1_Stephen_King'}, which are missing")
    return {name: f"Target/{name}/" for name in sorted(found, key=lambda folder: int(folder.partition("_")[0]))}


def _called(probes: Path) -> str:
    """Return what a person's folder is called, or would be if it has another name."""
    subject, folder = text(read_items(probes)[0], "subject"), probes.resolve().parent.name
    return folder if _plain(_name(folder)) == _plain(subject) else f"0_{subject.replace(' ', '_')}"


def _chosen(target: str, folders: Collection[str]) -> str:
    for folder in folders:
        if _plain(target) in (_plain(folder), _plain(_name(folder)), folder.partition("_")[0]):
            return folder
    raise UserError(f"RWKU has no target {target!r}{did_you_mean(target, map(_name, folders))}")


def _following(folders: Sequence[str], chosen: str, count: int) -> list[str]:
    """Return the next people in the list, which goes on at its beginning; none where there is nobody else."""
    place = folders.index(chosen)
    return [*folders[place + 1 :], *folders[:place]][:count]


def _name(folder: str) -> str:
    return folder.partition("_")[2].replace("_", " ")


def _plain(name: str) -> str:
    """Return a form in which equal names are equal: file systems write accents in two ways."""
    return unicodedata.normalize("NFC", name).casefold().replace("_", " ").strip()
