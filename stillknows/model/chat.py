"""Frames of a question: templates in words, and chat templates as tokenizers bring them along.

A chat template is a program. It is rendered by `chat_worker`, a process that the system ends when it takes too long;
where the system sets no limits (Windows), a thread here measures the process and ends it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillknows.errors import UserError, blamed_on
from stillknows.json_text import LONE_SURROGATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "\ue001"  # a question that no one asks
SECONDS = 5.0  # of processor time; published templates take thousandths
MEMORY = 2**30  # bytes of a process that renders
SYSTEM_LIMITS = sys.platform != "win32"  # whether the system can bound the process
POLL_SECONDS = 0.02  # between two looks at a process that the system does not limit
WORKER = Path(__file__).with_name("chat_worker.py")
FIX = "correct the template, or leave out `template` chat"


def require_questions(tokenizer: PreTrainedTokenizerBase, questions: Iterable[str]) -> None:
    """Raise UserError for a chat template that makes the same text of two questions, or that fails on one."""
    asked: dict[str, str] = {}
    for question in dict.fromkeys([*questions, PROBE]):
        text = render(tokenizer, question)
        other = asked.setdefault(text, question)
        if other.strip() != question.strip():
            one, two = (repr(part) if part != PROBE else "any other" for part in (other, question))
            raise UserError(f"{_named(tokenizer)} makes the same text of two questions: {one} and {two}", FIX)


def render(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    answer: str | None = None,
    earlier: Sequence[tuple[str, str]] = (),
) -> str:
    """Return what a tokenizer's chat template makes of a question, up to where an answer begins, or with an answer.

    Args:
        earlier: questions and answers that come before it.

    Raises UserError for a tokenizer without a chat template, and for one that fails, or takes more than SECONDS or
    MEMORY.
    """
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template", "leave out `template` chat")
    before = (turn for asked, said in earlier for turn in (("user", asked), ("assistant", said)))
    turns = (*before, ("user", question), *([] if answer is None else [("assistant", answer)]))
    with blamed_on(_named(tokenizer), FIX):
        template = tokenizer.get_chat_template()
        return _rendered(template, tuple(sorted(tokenizer.special_tokens_map.items())), turns)


def _named(tokenizer: PreTrainedTokenizerBase) -> str:
    place = str(tokenizer.name_or_path)
    return f"the chat template of {place}" if place else "the chat template"


@functools.lru_cache(maxsize=100_000)
def _rendered(template: str, special: tuple[tuple[str, str], ...], turns: tuple[tuple[str, str], ...]) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    variables = {**dict(special), "messages": messages, "add_generation_prompt": turns[-1][0] == "user"}
    answer = _worker().ask({"template": template, "variables": variables})
    if "error" in answer:
        raise ValueError(answer["error"])
    if LONE_SURROGATE.search(answer["text"]):
        raise ValueError("it writes half of a surrogate pair, which is no character")
    return answer["text"]


class _Worker:
    """A process that renders; one that was ended is started again when asked."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", str(WORKER), str(SECONDS), str(MEMORY)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8"
        )

    def ask(self, request: dict[str, Any]) -> dict[str, str]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            with contextlib.nullcontext([]) if SYSTEM_LIMITS else _watched(self.process) as exceeded:
                with contextlib.suppress(BrokenPipeError):
                    print(json.dumps(request), file=self.process.stdin, flush=True)
                line = self.process.stdout.readline()
        except BaseException:  # an answer that was not read would be taken for the next one's
            self.end()
            raise
        if not line:
            self.end()
            raise ValueError(next(iter(exceeded), f"it takes more than {SECONDS:g} s of processor time"))
        return json.loads(line)

    def end(self) -> None:
        """End the process and forget it."""
        _worker.cache_clear()
        with contextlib.suppress(BrokenPipeError), self.process:  # which closes its pipes and waits for it
            self.process.kill()


@contextlib.contextmanager
def _watched(process: subprocess.Popen[str]) -> Iterator[list[str]]:
    """Run a block while a thread kills a process that takes more than SECONDS of processor time or MEMORY meanwhile.

    The list that is yielded then says that it was the memory, if so.
    """
    import psutil

    done, exceeded = threading.Event(), []

    def watch() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            seen = psutil.Process(process.pid)
            most = sum(seen.cpu_times()[:2]) + SECONDS
            while not done.wait(POLL_SECONDS):
                is_large = seen.memory_info().rss > MEMORY
                if is_large or sum(seen.cpu_times()[:2]) > most:
                    exceeded.extend(["it takes too much memory"] * is_large)
                    process.kill()
                    return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield exceeded
    finally:
        done.set()
        watcher.join()


@functools.cache
def _worker() -> _Worker:
    found = _Worker()
    atexit.register(found.end)
    return found
