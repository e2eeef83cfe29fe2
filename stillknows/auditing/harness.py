"""General utility: the tasks of lm-evaluation-harness (lm-eval), run on a model in memory, quantized or not.

An extra: `pip install 'stillknows[harness]'`. Tasks are loaded with their documents before any model is, by `load`;
`measure` runs them. Nothing is downloaded but data: metrics and tasks that bring code from elsewhere are refused. A
folder of one's own tasks is different: its Python files run, as lm-eval's do, so name only folders that you trust.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from stillknows.auditing.harness_isolation import (
    CountedWarnings,
    quiet_output,
    restored_settings,
    seeded,
    unlimited_perplexity,
    without_downloaded_code,
)
from stillknows.errors import UserError, did_you_mean, first_line
from stillknows.model.lengths import shared_limit
from stillknows.progress import warn
from stillknows.stats import LEVEL, RESAMPLES
from stillknows.store import digest
from stillknows.types import Interval

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GENERAL = ("mmlu", "ifeval", "truthfulqa_mc2", "truthfulqa_gen", "triviaqa", "gsm8k")
SEED = 1234  # lm-eval's own: the few-shot examples of published results
BATCH_SIZE = 8
INSTALL = "pip install 'stillknows[harness]'"
Results = dict[tuple[str, str], Interval | str]


@dataclass(frozen=True)
class Suite:
    """Tasks that are ready to run, by name, the groups among them (mmlu is one), and lm-eval's version.

    `identity` is a short hash of the tasks' configurations, the documents they ask and lm-eval's version: with the same
    model and the same arguments of `measure`, equal identities give equal results.
    """

    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]
    identity: str
    version: str


def check(include: Path | None) -> None:
    """Raise UserError for what can be told before torch is imported: the extra is not installed, a folder of tasks that
    holds none or files that lm-eval would skip."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("general tasks need lm-eval (it is not installed)", INSTALL)
    if include is not None:
        _check_folder(include)


def load(names: Sequence[str], *, include: Path | None = None) -> Suite:
    """Return the tasks of these names with their documents, from the disk or, for what is not there, from the hub.

    Args:
        names: of lm-eval's tasks, groups and tags, or of tasks in `include`.
        include: a folder with YAML files in lm-eval's format, searched below too; its names come before lm-eval's.

    Raises UserError: the extra is not installed, an unknown or unreadable task, data that is neither on the disk nor
    on the hub, a task twice (alone and in a group), tasks that run generated code, read images or need code from the
    hub.
    """
    if not names:
        raise UserError("no task is named", f"name some of lm-eval's, such as {', '.join(GENERAL)}")
    check(include)
    with quiet_output():
        _require_installed()
        manager = _manager(names, include)
        unknown = [name for name in names if name not in manager.all_tasks]
        if unknown:
            raise UserError(f"no task {unknown[0]!r}{did_you_mean(unknown[0], manager.all_tasks)}", "lm-eval ls tasks")
        found = [item for name in dict.fromkeys(names) for item in _load_one(manager, name)]
        try:
            loaded = manager.load(found)
        except ValueError as error:  # one task in two places
            raise UserError(str(error), "name the group or the task, not both") from error
        for name, task in loaded["tasks"].items():
            _check_task(name, task)
        return Suite(loaded["tasks"], loaded.get("groups", {}), _identity(loaded["tasks"]), _version())


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite,
    *,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = SEED,
    chat: bool = False,
) -> Results:
    """Return lm-eval's numbers, by (task, metric), with bounds; a group that averages its tasks stands for them.

    Args:
        limit: ask only the first so many documents of every task; None asks all.
        batch_size: prompts that are read together; one where a model reads a text otherwise beside a longer one.
        seed: of few-shot examples, and of sampling in tasks that ask for it.
        chat: frame prompts with the tokenizer's chat template, as models tuned to follow instructions expect.

    Metrics are called as lm-eval calls them, "acc" or "exact_match,strict-match"; ranges and directions are theirs.
    Bounds are value ± z·SE with lm-eval's standard error and z = 1.64, each one-sided at 95 %, over n documents;
    infinite where lm-eval knows no standard error, and of no width where all documents agree. A metric without a number
    has the reason in its place.

    Weights, mode, generation settings, tokenizer and random states are left as they were. Decoding follows the task
    alone, never the model's own settings (penalties, sampling).

    Raises UserError for a limit below 1, for a tokenizer without an end-of-sequence token or without the chat template
    that is asked for, and for tasks that do not fit into the model's context.
    """
    _check_run(tokenizer, limit, chat)
    heard = CountedWarnings()
    with (
        quiet_output(heard),
        restored_settings(model),
        seeded(seed),
        without_downloaded_code("one of the tasks"),
        unlimited_perplexity(),
    ):
        from lm_eval.evaluator import evaluate  # its simple_evaluate spends 15 s on describing the machine

        for task in suite.tasks.values():
            task.set_fewshot_seed(seed=seed)
        try:
            evaluated: Any = evaluate(  # None in a distributed run's other processes only
                _wrap(model, tokenizer, batch_size if shared_limit(model) == math.inf else 1),
                {"tasks": dict(suite.tasks), "groups": dict(suite.groups)},
                limit=limit,
                bootstrap_iters=RESAMPLES,
                log_samples=False,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )
        except (AssertionError, ValueError) as error:  # how lm-eval and transformers refuse what a task asks for
            raise UserError(
                f"lm-eval: {first_line(error)}", "leave that task out, or measure a model that it fits"
            ) from error
    for line, count in heard.lines.items():
        warn(f"  lm-eval, {count} times: {line}" if count > 1 else f"  lm-eval: {line}")
    return dict(_results(evaluated, suite))


def _wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """Return lm-eval's view of a model in memory."""
    from lm_eval.models import huggingface

    logger = logging.getLogger(huggingface.__name__)
    logger.disabled = True  # it warns of every model that it did not load itself
    try:
        wrapper: Any = huggingface.HFLM
        return wrapper(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # it may be given a padding token
            batch_size=batch_size,
            softmax_dtype="float32",  # in 16 bits two answers are often equally likely
        )
    finally:
        logger.disabled = False


def _check_run(tokenizer: PreTrainedTokenizerBase, limit: int | None, chat: bool) -> None:
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} documents leaves nothing to ask", "give at least 1, or no limit")
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token, so no answer can end",
            'add "eos_token" to its tokenizer_config.json',
        )
    if chat and not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template", "measure without it")


def _results(evaluated: Mapping[str, Any], suite: Suite) -> Iterator[tuple[tuple[str, str], Interval | str]]:
    """Yield one result per task and metric out of rows like {"acc,none": 0.5, "acc_stderr,none": 0.1, …}."""
    averaged = {
        part
        for group in suite.groups.values()
        if group.has_aggregation
        for part in [*(t.task_name for t in group.get_all_tasks()), *(g.name for g in group.get_all_groups())]
    }
    for task, row in evaluated["results"].items():
        for name, value in row.items():
            metric, comma, chosen = name.partition(",")  # `chosen` names what picks the answer out of the text
            if task in averaged or not comma or metric.endswith("_stderr"):
                continue
            n = row.get("sample_count", {}).get(name, row["sample_len"])
            result = _interval(value, row.get(f"{metric}_stderr,{chosen}"), n)
            yield (task, metric if chosen == "none" else name), result


def _interval(value: Any, stderr: Any, n: int) -> Interval | str:
    if not isinstance(value, Real) or math.isnan(value):
        return f"lm-eval returned NaN (n={n})"
    if math.isinf(value):
        return f"lm-eval returned infinity (n={n})"
    known = isinstance(stderr, Real) and not math.isnan(stderr)
    spread = NormalDist().inv_cdf(LEVEL) * float(stderr) if known else math.inf
    return Interval(float(value), float(value) - spread, float(value) + spread, n)


def _require_installed() -> None:
    try:
        import lm_eval.models.huggingface  # noqa: F401  # also asks for accelerate
    except ModuleNotFoundError as error:
        raise UserError(f"general tasks need lm-eval ({error})", INSTALL) from error


def _check_folder(include: Path) -> None:
    """Raise UserError for a folder without tasks, and for files that lm-eval would skip without a word."""
    import yaml

    if not include.is_dir():
        raise UserError(f"no folder {include}", "give the folder that holds the tasks' YAML files")
    files = sorted(include.rglob("*.yaml"))
    if not files:
        raise UserError(f"{include} holds no task", "put lm-eval's YAML files there, named *.yaml")
    for file in files:
        try:
            yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)  # syntax only; runs no tags
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise UserError(f"{file}:{line} is not YAML: {error.problem}", "correct the file") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{file} is not YAML: {first_line(error)}", "correct the file") from error


def _manager(names: Sequence[str], include: Path | None) -> TaskManager:
    """Return an index of tasks; of lm-eval's own 14 thousand, which take ten seconds, only when one is asked for."""
    from lm_eval.tasks import TaskManager

    if include is not None:
        own = TaskManager(include_path=include, include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=include)


def _load_one(manager: TaskManager, name: str) -> list[Any]:
    """Return the group of this name, the task, or all tasks of the tag; their documents are read here."""
    try:
        with without_downloaded_code(f"task {name}"):
            loaded = manager.load([name])
    except UserError:
        raise
    except Exception as error:  # tasks read data of many kinds and run functions of their own
        raise UserError(*_why_not_loaded(name, error)) from error
    groups = loaded.get("groups", {})
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def _why_not_loaded(name: str, error: Exception) -> tuple[str, str]:
    """Return what is wrong with a task, and what to do."""
    if isinstance(error, ModuleNotFoundError):
        return f"task {name} needs a package that is not installed: {error.name}", f"pip install {error.name}"
    if isinstance(error, OSError):  # of `datasets`: a file, a hub or a data set that is not there
        return (
            f"the data of task {name} is neither on this disk nor can it be downloaded: {first_line(error)}",
            "check the path in its YAML file, the network, and `hf auth login` for gated data",
        )
    return f"task {name} cannot be loaded: {type(error).__name__}: {first_line(error)}", "correct its YAML file"


def _check_task(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"task {name} runs code that the model writes", "leave that task out")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"task {name} reads images or sound", "leave that task out")


def _version() -> str:
    from lm_eval import __version__

    return __version__


def _identity(tasks: Mapping[str, Any]) -> str:
    parts = []
    for name, task in sorted(tasks.items()):
        shown = list(task.fewshot_docs() or []) if task.config.num_fewshot else []
        parts.append([name, task.VERSION, task.dump_config(), list(task.eval_docs), shown])
    return digest(_version(), json.dumps(parts, default=lambda value: getattr(value, "__qualname__", str(value))))
