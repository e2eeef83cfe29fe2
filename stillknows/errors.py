"""Errors that are the user's to mend: each says what is wrong, why, and what to type."""

from __future__ import annotations

import contextlib
import difflib
import errno
import re
from collections.abc import Generator, Iterable

MOST_KNOWN = 100  # words that a message lists
SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")


class NotMeasured(LookupError):
    """A number could not be made; the message says why. It is reported as such and never as 0."""


class UserError(Exception):
    """Bad input. The command line prints the message without a traceback and exits with code 2.

    Options have their Python names, in backticks: "choose another `out`". The command line shows its flags there.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(f"{what}\n  {fix}" if fix else what)


class Misfit(UserError):
    """What a certificate or an audit says of files is not what lies there; the command line exits with code 6."""

    exit_code = 6


OUT_OF_MEMORY = (
    *("out of memory", "can't allocate memory", "cannot allocate memory", "unable to allocate", "not enough memory"),
    *("(os error 12)", "bad_alloc", "bad allocation", "alloc_failed", "failed to allocate"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory has run out, of the machine or of the accelerator."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return any(sign in str(error).lower() for sign in OUT_OF_MEMORY)


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error says that a disk, or a user's share of it, is full."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "(os error 28)" in str(error) or bool(SHORT_WRITE.fullmatch(str(error)))  # of Rust, of numpy


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, its kind where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextlib.contextmanager
def blamed_on(what: str, fix: str) -> Generator[None]:
    """Turn whatever a library raises over a user's file into a UserError: "what: the error's first line", then the fix.

    Libraries raise all kinds of error there, and those that are written in Rust a panic, which is no Exception. That
    memory or disk ran out is no fault of the file and is raised as it is, and so are messages of our own.
    """
    try:
        yield
    except (UserError, NotMeasured):
        raise
    except BaseException as error:
        is_of_library = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if not is_of_library or is_out_of_memory(error) or is_disk_full(error):
            raise
        raise UserError(f"{what}: {first_line(error)}", fix) from error


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'beta'?" for the nearest known word, else "; known: a, b, c" (not beyond MOST_KNOWN)."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    more = ["…"] if len(known) > MOST_KNOWN else []
    return f"; known: {', '.join([*known[:MOST_KNOWN], *more])}" if known else ""
