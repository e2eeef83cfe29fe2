"""A process of its own that renders chat templates, which come with models and are programs: they can loop for ever.

Run as a script: `python chat_worker.py SECONDS BYTES`. It reads a request a line on standard input and writes an answer
a line on standard output, as JSON. The system ends it when one request takes more than so many seconds of processor
time, and gives it no more than so many bytes of memory. Windows sets no such limits: there, whoever asks watches it.
Templates see what transformers' `apply_chat_template` shows them, in the same sandbox, which lets them reach nothing
but their arguments; a test compares the two.
"""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import sys
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import resource
except ImportError:  # Windows
    resource = None

MOST_CHARACTERS = 2**24  # of a rendered text


class Generation(Extension):
    """{% generation %} … {% endgeneration %}, which marks what an assistant said; its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own)

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        """Return the body as a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@functools.cache
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def rendered(template: str, variables: dict[str, Any]) -> str:
    """Return the text that a template makes of its variables."""
    text = _compiled(template).render(tools=None, documents=None, **variables)
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it makes a text of {len(text):,} characters")
    return text


def answered(line: str) -> dict[str, str]:
    """Return the answer to a request: a text, or what went wrong in one line."""
    try:
        return {"text": rendered(**json.loads(line))}
    except MemoryError:
        return {"error": "it takes too much memory"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}


def main(seconds: float, memory: int) -> None:
    """Answer requests until there are no more."""
    if resource is not None:
        with contextlib.suppress(ValueError, OSError):  # not every system limits that
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        _limit_time(seconds)
        answer = json.dumps(answered(line))
        _limit_time(0)
        print(answer, flush=True)


def _limit_time(seconds: float) -> None:
    """Let the system end this process after so many seconds of processor time; 0 lifts the limit."""
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends a process that does not handle it


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks ends this process
    main(float(sys.argv[1]), int(sys.argv[2]))
