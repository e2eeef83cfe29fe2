"""Result files of RWKU's evaluation (arXiv 2406.10890): scored from predictions and answers, beside their own numbers.

A person's folder holds forget.json, neighbor.json, mmlu.json, bbh.json, truthful.json, triviaqa.json, forget_mia.json,
retain_mia.json and fluency.json, each {"results": items with their prediction, numbers…}. What an item holds as a mere
score (MC1, MC2, attacks) is averaged, since the file does not hold what it was made of.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stillknows.errors import UserError
from stillknows.registry import bind
from stillknows.reporting.log_values import (
    each,
    is_number,
    kind,
    read_number,
    read_recorded,
    read_rows,
    read_text,
    read_values,
)
from stillknows.reporting.scored import SINGLE, Json, as_json, compare_one, not_measured, told
from stillknows.scoring import score
from stillknows.stats import mean_interval
from stillknows.store import read_json
from stillknows.types import Floats, Observations

Rows = list[dict[str, Any]]
OURS = "rouge_l:score=recall:stemmer=false"
LEVELS = {"forget": ("1", "2", "3"), "neighbor": ("1", "2")}
ATTACKS = {"loss": "loss", "zlib": "zlib", "mink20": "mink++_0.2"}  # RWKU's name of a mean: the scores' own


class Number(NamedTuple):
    """One number of a file: a score for each item, and what to say of its definition."""

    name: str
    scores: Floats
    note: str = ""


def rescore_rwku(path: Path) -> Json:
    """Score one of RWKU's result files, or a person's folder of them.

    Returns `values`, "forget.level_1_rouge_l_r" and so on, with bounds, in RWKU's names and units, `recorded`:
    how the files' own numbers compare, `warnings` where they disagree, and `notes`: where definitions differ. Raises
    UserError that names the file and the item.
    """
    values: Json = {}
    compared, notes = [], []
    for file in _files(path):
        log = read_json(file)
        if not isinstance(log, dict) or "results" not in log:
            raise UserError(f"{file} is no result file of RWKU", "expected a table with 'results'")
        for number in READERS[file.stem](str(file), log["results"]):
            name = f"{file.stem}.{number.name}"
            values[name] = _mean(number.scores)
            if is_number(log.get(number.name)) and "value" in values[name]:
                recorded = read_recorded(f"{file}, {number.name!r}", log[number.name])
                compared.append(compare_one(name, values[name]["value"], recorded, SINGLE))
            if number.note:
                notes.append(f"{name}: {number.note}")
    return {"format": "rwku", "file": str(path), "values": values, **told(compared), "notes": notes}


def _files(path: Path) -> list[Path]:
    found = [path / f"{name}.json" for name in READERS] if path.is_dir() else [path]
    found = [file for file in found if file.is_file() or not path.is_dir()]
    if not found:
        raise UserError(f"{path} holds none of RWKU's result files", f"expected {', '.join(READERS)}, each .json")
    if found[0].stem not in READERS:
        raise UserError(f"{path} is not called as a result file of RWKU", f"expected {', '.join(READERS)}, each .json")
    return found


def _mean(scores: Floats) -> Json:
    kept = scores[~np.isnan(scores)]
    if not kept.size:
        return not_measured("no item could be judged")
    return as_json(mean_interval(kept, [str(i) for i in range(len(kept))]))


def _probes(where: str, results: Any) -> Iterator[Number]:
    rows = read_rows(where, results)
    levels = read_values(where, rows, "level", lambda _, value: str(value))
    answers, predictions = (read_values(where, rows, key, read_text) for key in ("answer", "prediction"))
    for level in LEVELS[Path(where).stem]:
        chosen = [i for i, found in enumerate(levels) if found == level]
        if chosen:
            pairs = [(answers[i], predictions[i]) for i in chosen]
            ours = score(bind("metric", OURS), _observations(pairs)).mean()
            note = f"words as they are written, each counted once; metric {OURS} gives {ours:.6g}"
            yield Number(f"level_{level}_rouge_l_r", np.array([recall(*pair) for pair in pairs]), note)


def _observations(pairs: list[tuple[str, str]]) -> Observations:
    ids = tuple(str(i) for i in range(len(pairs)))
    answers, predictions = zip(*pairs, strict=True)
    return Observations(ids, ids, ids, answers, generations=predictions)


def recall(answer: str, prediction: str) -> float:
    """Return ROUGE-L recall as the package `rouge` gives it: 0..1.

    Sentences end at full stops, words at white space; case and other punctuation count. The longest common subsequence
    of every pair of sentences is taken; the words in any of them, each once, are divided by the answer's, each once.
    """
    true, said = (
        [" ".join(part.split()).split(" ") for part in text.split(".") if part] for text in (answer, prediction)
    )
    found = {word for sentence in true for other in said for word in _common(sentence, other)}
    words = {word for sentence in true for word in sentence}
    return len(found) / len(words) if words else 0.0


def _common(a: list[str], b: list[str]) -> Iterator[str]:
    """Yield the words of the longest common subsequence; of several, the one that uses up `b` first from its end."""
    longest = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    for i, word in enumerate(a, 1):
        for j, other in enumerate(b, 1):
            longest[i, j] = longest[i - 1, j - 1] + 1 if word == other else max(longest[i - 1, j], longest[i, j - 1])
    i, j = len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            yield a[i]
        elif longest[i - 1, j] > longest[i, j - 1]:
            i -= 1
        else:
            j -= 1


def _choices(where: str, results: Any) -> Iterator[Number]:
    rows = read_rows(where, results)
    true, said = (np.array(read_values(where, rows, key, read_number)) for key in ("answer", "prediction"))
    yield Number("acc", (true == said).astype(np.float64))


def _reasoning(where: str, results: Any) -> Iterator[Number]:
    rows = read_rows(where, results)
    note = "against the whole answer; published code compares with each of its letters"
    yield Number("EM", _matches(where, rows, "answer"), note)


def _facts(where: str, results: Any) -> Iterator[Number]:
    rows = read_rows(where, results)
    yield Number("EM", _matches(where, rows, "answers"))
    yield Number(
        "F1", np.array([max(_f1(said, true) for true in known) for said, known in _answered(where, rows, "answers")])
    )


def _matches(where: str, rows: Rows, key: str) -> Floats:
    return np.array([float(any(said == true for true in known)) for said, known in _answered(where, rows, key)])


def _answered(where: str, rows: Rows, key: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Yield the words of each prediction and of every answer that is accepted."""
    known = read_values(
        where, rows, key, lambda w, value: each(read_text)(w, value if isinstance(value, list) else [value])
    )
    for said, accepted in zip(read_values(where, rows, "prediction", read_text), known, strict=True):
        yield _words(said), [_words(answer) for answer in accepted or [""]]


def _words(text: str) -> list[str]:
    """Return the words in lower case, without punctuation and articles."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _f1(said: list[str], true: list[str]) -> float:
    if not said or not true:
        return float(said == true)
    common = sum((Counter(said) & Counter(true)).values())
    return 2 * common / (len(said) + len(true))


def _truth(where: str, results: Any) -> Iterator[Number]:
    rows = read_rows(where, results)
    for name in ("MC1", "MC2"):
        yield Number(name, np.array(read_values(where, rows, name, read_number)), "the items' own scores")


def _membership(where: str, results: Any) -> Iterator[Number]:
    if not isinstance(results, Mapping):
        raise UserError(f"{where}: 'results' is {kind(results)}, not a table of scores")
    for name, key in ATTACKS.items():
        if key not in results:
            raise UserError(f"{where}: 'results' has no {key!r}")
        scores = each(read_number)(f"{where}, {key!r}", results[key])
        yield Number(name, np.array(scores), f"the items' own scores, {key}; higher is more likely a member")


def _fluency(where: str, results: Any) -> Iterator[Number]:
    predictions = read_values(where, read_rows(where, results), "prediction", read_text)
    seen = _observations([("", text) for text in predictions])
    note = "bits; sentences end at . ! ? as in metric fluency, not by Punkt, and texts below three words are left out"
    yield Number("entropy", score(bind("metric", "fluency"), seen), note)


READERS: Mapping[str, Callable[[str, Any], Iterator[Number]]] = {
    "forget": _probes, "neighbor": _probes, "mmlu": _choices, "bbh": _reasoning, "truthful": _truth,
    "triviaqa": _facts, "forget_mia": _membership, "retain_mia": _membership, "fluency": _fluency,
}  # fmt: skip
