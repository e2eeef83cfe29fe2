"""Scores without a model: of the observations that an audit saved, and of logs that other projects published.

Every number is computed from probabilities and texts, never read from a log; where a log records its own, the two are
compared and disagreements are told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from stillknows.auditing import evidence
from stillknows.auditing.cells import aggregate_cells
from stillknows.auditing.evidence import CellKey
from stillknows.errors import UserError
from stillknows.json_text import json_able
from stillknows.ledger import LEDGER, Ledger
from stillknows.likelihood import mean_log_probs, normalised_probability, truth_ratio
from stillknows.observations import OBSERVATIONS, load_observations
from stillknows.registry import bind, bind_all
from stillknows.reporting import report
from stillknows.reporting.published_logs import ROUGE, Attacks, Generations, TofuLog, read_muse, read_tofu
from stillknows.reporting.scored import (
    EXACT,
    SINGLE,
    Agreement,
    Json,
    as_json,
    compare,
    compare_one,
    measured,
    summed,
    told,
)
from stillknows.scoring import score
from stillknows.specs import Specs
from stillknows.stats import auc, mean_interval
from stillknows.store import slug
from stillknows.types import Cell, Observations

NUMBER = ("value", "low", "high", "n")
ATTACK = "Min-40%"  # MUSE's PrivLeak is that of this attack
ROUGE_METRICS = {
    "rougeL": "rouge_l:score=fmeasure:stemmer=false",
    "rougeL_recall": "rouge_l:score=recall:stemmer=false",
    "rouge1": "rouge_1:score=fmeasure:stemmer=false",
    "rouge1_recall": "rouge_1:score=recall:stemmer=false",
}
# AUC of MUSE's retrained models, forget against holdout: "forget_holdout_…" of AUC_RETRAIN in its constants.py.
AUC_RETRAIN: Mapping[str, Mapping[str, float]] = {
    "news": {
        "PPL": 0.4652, "PPL/ref": 0.2755, "PPL/lower": 0.3542, "PPL/zlib": 0.4328, "Min-5%": 0.5116,
        "Min-10%": 0.5021, "Min-20%": 0.4931, "Min-30%": 0.484, "Min-40%": 0.4772, "Min-50%": 0.4711, "Min-60%": 0.4671,
    },
    "books": {
        "PPL": 0.4746, "PPL/ref": 0.3403, "PPL/lower": 0.3957, "PPL/zlib": 0.2773, "Min-5%": 0.5325,
        "Min-10%": 0.5424, "Min-20%": 0.5582, "Min-30%": 0.557, "Min-40%": 0.5393, "Min-50%": 0.5167, "Min-60%": 0.4841,
    },
}  # fmt: skip


def saved(folder: Path, metrics: Specs, figures: Specs = ()) -> Json:
    """Score the observations that an audit saved below `folder` by metrics and figures.

    Returns {"cells": …}, one for every model, variant, split and metric, with the mean over facts and its bounds or the
    reason why it was not measured. Raises UserError when there are none or a file cannot be read.
    """
    scored = bind_all("metric", metrics, "example")
    suites = bind_all("metric", figures, "model")
    observations = _load(folder)
    table = evidence.tabulate(observations, scored, {})
    cells = [Cell(*place, name, evidence.mean(table, place, name)) for place in observations for name in scored]
    for model in dict.fromkeys(place.model for place in observations):
        variants = dict.fromkeys(place.variant for place in observations if place.model == model)
        cells += aggregate_cells(observations, model, variants, suites)
    return {"cells": [json_able(cell.to_json()) for cell in cells], "warnings": []}


def _load(folder: Path) -> dict[CellKey, Observations]:
    files = sorted((folder / OBSERVATIONS).glob("*/*/*.npz"))
    reported = report.read(folder) if (folder / report.JSON).is_file() else None
    typed = {slug(variant): variant for variant in (reported.variants if reported else ())}
    places = {file: CellKey(file.parts[-3], typed.get(file.parts[-2], file.parts[-2]), file.stem) for file in files}
    if reported is not None:  # without observations of an earlier audit
        of_this_audit = report.observed(reported)
        places = {file: place for file, place in places.items() if place in of_this_audit}
    if not places:
        raise UserError(
            f"{folder} holds no observations of an audit",
            "give the folder that an audit wrote, or name a log's `log_format`",
        )
    found, ledger = {}, Ledger.read(folder) if (folder / LEDGER).is_file() else None
    for file, place in places.items():
        if ledger is not None:
            ledger.require(file, "the audit")
        seen = load_observations(file)
        if seen is None:
            raise UserError(f"{file} is damaged or of another version", "run the audit again: it makes what is missing")
        found[place] = seen
    return found


def muse(path: Path, reference: Path | None = None, corpus: str | None = None) -> Json:
    """Score a log of MUSE; see logs.read_muse for the layouts.

    VerbMem and KnowMem: `aggregate` under MUSE's names (0..1) and intervals of the means. PrivLeak: `auc` of every pair
    of splits and attack under MUSE's names (the first split counts as no members), what each attack shows between
    forget and holdout, and PrivLeak in percent against the retrained model: its log as `reference`, or MUSE's own
    AUC for its `corpus`, "news" or "books".
    """
    log = read_muse(path)
    if isinstance(log, Attacks):
        return {"format": "muse", "file": str(path), **_privleak(path, log, reference, corpus)}
    if reference or corpus:
        raise UserError(f"{path} is a log of generations, which are not compared", "leave out `reference` and `corpus`")
    return {"format": "muse", "file": str(path), **_rouge(log)}


def _rouge(log: Generations) -> Json:
    scores = {name: score(bind("metric", spec), log.seen) for name, spec in ROUGE_METRICS.items()}
    aggregate = {f"{how}_{name}": float(getattr(x, how)()) for name, x in scores.items() for how in ("max", "mean")}
    compared = [compare(name, scores[name], log.recorded[name], EXACT) for name in ROUGE if name in log.recorded]
    kept = [key for key in aggregate if key in log.aggregate]
    compared += [compare_one(key, aggregate[key], log.aggregate[key], EXACT) for key in kept]
    return {
        "kind": "rouge",
        "n": len(log.seen.ids),
        "aggregate": aggregate,
        "intervals": {f"mean_{name}": as_json(mean_interval(x, log.seen.facts)) for name, x in scores.items()},
        **told(compared),
    }


def _privleak(path: Path, log: Attacks, reference: Path | None, corpus: str | None) -> Json:
    if reference and corpus:
        raise UserError("`reference` and `corpus` both name a retrained model", "leave one of them out")
    known = None if reference is None else _read_reference(path, log, reference)
    attacks = list(log.values["forget"])
    aucs = {
        f"{outside}_{inside}_{attack}": auc(-log.values[inside][attack], -log.values[outside][attack])
        for outside in log.values
        for inside in log.values
        for attack in attacks
    }
    privleak = {attack: _privleak_of(log, known, corpus, attack) for attack in attacks}
    compared = [compare_one(key, aucs[key], log.auc[key], EXACT) for key in aucs if key in log.auc]
    return {
        "kind": "privleak",
        "n": {split: len(columns[attacks[0]]) for split, columns in log.values.items()},
        "auc": aucs,
        "privleak": privleak.get(ATTACK, {"not_measured": f"the log has no {ATTACK}"}),
        "attacks": {attack: {"privleak": privleak[attack], **_shown(log, attack)} for attack in attacks},
        **told([summed("auc", compared)] if compared else []),
    }


def _read_reference(path: Path, log: Attacks, reference: Path) -> Attacks:
    known = read_muse(reference)
    if not isinstance(known, Attacks):
        raise UserError(f"{reference} is no PrivLeak log", f"give that of the retrained model, as {path} is one")
    sizes, others = ({s: len(next(iter(c.values()))) for s, c in x.values.items()} for x in (log, known))
    if sizes != others or log.values["forget"].keys() != known.values["forget"].keys():
        raise UserError(f"{path} and {reference} are not of the same texts and attacks: {sizes} and {others}")
    return known


def _privleak_of(log: Attacks, known: Attacks | None, corpus: str | None, attack: str) -> Json:
    """PrivLeak by one attack, in percent, or the reason why there is none."""
    spec = "privleak:members=forget:holdouts=holdout"
    if corpus is not None and attack not in AUC_RETRAIN[corpus]:
        return {"not_measured": f"MUSE gives no AUC of its retrained model for {attack}"}
    if corpus is not None:
        spec += f":auc_retrain={AUC_RETRAIN[corpus][attack]}"
    elif known is None:
        return {"not_measured": "there is no retrained model to compare with: its log or its corpus is needed"}
    control = None if known is None else known.observations(attack)
    return measured(spec, log.observations(attack), control)["privleak"]


def _shown(log: Attacks, attack: str) -> Json:
    """What an attack shows of forget against holdout; AUC here counts forget as members, as everywhere but in MUSE."""
    numbers = measured("membership:attacks=loss:members=forget:holdouts=holdout", log.observations(attack), None)
    return {name.partition(".")[2]: number for name, number in numbers.items()}


def tofu(path: Path, reference: Path | None = None) -> Json:
    """Score TOFU's evaluation logs; see logs.read_tofu for the layouts.

    Returns `model_utility`, its nine `parts` and three scores of the `forget` split for both averages of the truth
    ratio, and `forget_quality` with `ks_statistic` against the retrained model's log as `reference`.
    """
    log = read_tofu(path)
    control = None if reference is None else read_tofu(reference).splits
    if reference is not None:
        _check_items(path, log.splits, reference, control or {})
    result: Json = {
        "format": "tofu", "file": str(path), "n": {name: len(seen.ids) for name, seen in log.splits.items()},
        "model_utility": {}, "parts": {}, "forget": {}, "forget_quality": {}, "ks_statistic": {},
    }  # fmt: skip
    for mean in ("geometric", "arithmetic"):
        utility = measured(f"model_utility:mean={mean}", log.splits, control)
        quality = measured(f"forget_quality:mean={mean}", log.splits, control)
        result["model_utility"][mean] = utility.pop("model_utility")
        result["parts"][mean] = utility
        result["forget"][mean] = measured(f"forget_scores:mean={mean}", log.splits, control)
        result["forget_quality"][mean] = quality["forget_quality"]
        result["ks_statistic"][mean] = quality.get("ks_statistic", quality["forget_quality"])
    compared = [comparison for name in log.splits for comparison in _compare_tofu(log, name)]
    return result | told(compared)


def _check_items(path: Path, splits: Mapping, reference: Path, others: Mapping) -> None:
    for name in splits.keys() & others.keys():
        odd = set(splits[name].ids) ^ set(others[name].ids)
        if odd:
            raise UserError(f"{path} and {reference} are not of the same {name} items, such as item {min(odd)}")


def _compare_tofu(log: TofuLog, name: str) -> Iterable[Agreement]:
    seen, recorded = log.splits[name], log.recorded[name]
    true, paraphrase, wrong = seen.log_probs or (), seen.paraphrase_log_probs or (), seen.wrong_log_probs or ()
    computed = {
        "rougeL_recall": lambda: score(bind("metric", "rouge_l:score=recall:stemmer=true"), seen),
        "rouge1_recall": lambda: score(bind("metric", "rouge_1:score=recall:stemmer=true"), seen),
        "truth_ratio": lambda: truth_ratio(true, paraphrase, wrong),
        "normalized_gt_loss": lambda: -np.log(normalised_probability(true, wrong)),
        "gt_loss": lambda: -mean_log_probs(true) * [len(answer) for answer in true],
        "paraphrased_loss": lambda: -mean_log_probs(paraphrase) * [len(answer) for answer in paraphrase],
    }
    for key, values in recorded.items():
        yield compare(f"{name}.{key}", computed[key](), values, EXACT if "rouge" in key else SINGLE)


def text(result: Json) -> str:
    """Return a result of this module as a table for a terminal."""
    if "cells" in result:
        header = ["model", "variant", "split", "metric", *NUMBER]
        rows = [[c["subject"], c["variant"], c["split"], c["metric"], *_columns(c)] for c in result["cells"]]
    elif "values" in result:
        header = ["number", *NUMBER]
        rows = [[name, *_columns(number)] for name, number in result["values"].items()]
    elif result["format"] == "tofu":
        header, rows = ["figure", "truth ratio", *NUMBER], list(_tofu_rows(result))
    elif result["kind"] == "rouge":
        header = ["score", *NUMBER]
        rows = [[name, *_columns(number)] for name, number in result["intervals"].items()]
    else:
        header = ["attack", "figure", *NUMBER]
        rows = [[attack, name, *_columns(x)] for attack, xs in result["attacks"].items() for name, x in xs.items()]
        rows.append([ATTACK, "PrivLeak", *_columns(result["privleak"])])
    return _aligned([header, *rows])


def _tofu_rows(result: Json) -> Iterable[list[str]]:
    for table in ("parts", "forget"):
        for mean, parts in result[table].items():
            for name, number in parts.items():
                yield [name, mean, *_columns(number)]
    for name in ("model_utility", "ks_statistic", "forget_quality"):
        for mean, number in result[name].items():
            yield [name, mean, *_columns(number)]


def _columns(number: Json) -> list[str]:
    if "not_measured" in number:
        return ["not measured: " + number["not_measured"], "", "", ""]
    *numbers, n = (number[name] for name in NUMBER)
    return [*("?" if x is None else f"{x:.4g}" for x in numbers), str(n)]


def _aligned(rows: list[list[str]]) -> str:
    """Return rows in columns; a reason why there is no number may be longer than its column."""
    widths = [max(len(row[i]) for row in rows if not row[i].startswith("not measured")) for i in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
