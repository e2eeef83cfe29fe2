"""The same question in other frames: some are trained, others tell whether a model forgot the fact or the frame."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from stillknows.model.encoding import framed
from stillknows.types import CHAT, PLACE

Frame = Callable[[str, str], tuple[str, str]]  # question, template -> both in the frame

MARKS = "?？؟ "


def as_asked(question: str, template: str) -> tuple[str, str]:
    """Change nothing."""
    return question, template


def without_mark(question: str, template: str) -> tuple[str, str]:
    """Drop the question mark."""
    return question.rstrip(MARKS), template


def in_lower_case(question: str, template: str) -> tuple[str, str]:
    """Write the question in lower case."""
    return question.lower(), template


def short_template(question: str, template: str) -> tuple[str, str]:
    """Ask in another template; a chat stays one."""
    return question, template if template == CHAT else f"Q: {PLACE}\nA:"


def no_template(question: str, template: str) -> tuple[str, str]:
    """Ask the bare question; a chat stays one."""
    return question, template if template == CHAT else PLACE


def two_marks(question: str, template: str) -> tuple[str, str]:
    """End the question with two marks."""
    return f"{question.rstrip(MARKS)}??", template


def word_before(question: str, template: str) -> tuple[str, str]:
    """Put a word before the question."""
    return f"Please: {question}", template


def dialogue(question: str, template: str) -> tuple[str, str]:
    """Ask as one of two speakers; a chat stays one."""
    return question, template if template == CHAT else f"User: {PLACE}\nAssistant:"


TRAINED: tuple[Frame, ...] = (without_mark, in_lower_case, short_template, no_template)
HELD_OUT: Mapping[str, Frame] = {
    "two question marks": two_marks,
    "a word before": word_before,
    "a dialogue": dialogue,
}


def changes(frame: Frame, question: str, template: str) -> bool:
    """Tell whether a frame changes what a model reads of a question."""
    return framed(*frame(question, template)) != framed(question, template) or (
        template == CHAT and frame(question, template)[0] != question
    )
