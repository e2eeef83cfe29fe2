"""What lm-evaluation-harness may not touch while it runs: output, settings, random states, code from the hub."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import random
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from stillknows.errors import UserError
from stillknows.lazy import torch
from stillknows.model.lengths import restart_rotations

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def without_downloaded_code(what: str) -> Iterator[None]:
    """Refuse `evaluate.load`, which runs code from the hub and which lm-eval turns to for metrics that it lacks.

    Raises UserError at the end as well, since lm-eval goes on without such a metric.
    """
    import evaluate

    refused: list[str] = []

    def refuse(path: str, *_: Any, **__: Any) -> None:
        refused.append(path)
        raise RuntimeError(path)

    original, evaluate.load = evaluate.load, refuse
    try:
        yield
    finally:
        evaluate.load = original
        if refused:
            raise UserError(
                f"{what} measures with code from the hub ({refused[0]})", "leave it out: stillknows runs no such code"
            )


@contextlib.contextmanager
def unlimited_perplexity() -> Iterator[None]:
    """Let the perplexity of a collapsed model be infinite, where lm-eval would stop with an OverflowError."""
    from lm_eval.api import metrics

    def exp(x: float) -> float:
        try:
            return math.exp(x)
        except OverflowError:
            return math.inf

    plain, metrics.math = metrics.math, SimpleNamespace(**(vars(math) | {"exp": exp}))  # type: ignore[assignment]
    try:
        yield
    finally:
        metrics.math = plain


class CountedWarnings(logging.Handler):
    """Counts lm-eval's warnings by the place in its code they come from, each with its first wording."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: Counter[str] = Counter()
        self._wording: dict[tuple[str, int], str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.lines[self._wording.setdefault((record.pathname, record.lineno), record.getMessage())] += 1


@contextlib.contextmanager
def quiet_output(heard: CountedWarnings | None = None) -> Iterator[None]:
    """Keep what lm-eval prints and warns of out of the output; its bars are shown on a terminal's standard error.

    Its bootstrap stays in this process: copies of one that holds torch's threads can hang.
    """
    sink = sys.stderr if sys.stderr.isatty() else io.StringIO()
    logger, one_process = logging.getLogger("lm_eval"), os.environ.get("DISABLE_MULTIPROC")
    handlers, propagate = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [heard or logging.NullHandler()], False
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        if one_process is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = one_process


@contextlib.contextmanager
def restored_settings(model: PreTrainedModel) -> Iterator[None]:
    """Let a model generate without settings of its own but for special tokens, and in evaluation mode; then go back.

    What it has read before does not turn what it reads.
    """
    from transformers import GenerationConfig

    own, training = model.generation_config, [module for module in model.modules() if module.training]
    restarting = model.register_forward_pre_hook(lambda module, _: restart_rotations(module))
    special = {name: getattr(own, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**special)
    try:
        yield
    finally:
        restarting.remove()
        model.generation_config = own
        for module in training:
            module.training = True


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed all random generators for a block; afterwards they go on as if nothing had been drawn."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
