"""Frames of a question: what is done to its text, and the templates around it. An audit asks in all of them, as an
attack; unlearning trains in some and looks at others."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from stillknows.types import PLACE

QUESTION_MARKS = "?？؟"


def without_mark(question: str) -> str:
    """Return a question without the marks that end it."""
    return question.rstrip(f"{QUESTION_MARKS} ")


QUESTIONS: Mapping[str, Callable[[str], str]] = {
    "no_mark": without_mark,
    "two_marks": lambda question: f"{without_mark(question)}??",
    "lower": str.lower,
    "upper": str.upper,
    "sentence": lambda question: question[:1].upper() + question[1:].lower(),
    "spaces": lambda question: f"  {question.replace(' ', '  ')}  ",
    "token_before": lambda question: f". {question}",
    "word_before": lambda question: f"Please: {question}",
}
TEMPLATES: Mapping[str, str] = {
    "other_template": f"Q: {PLACE}\nA:",
    "question_answer": f"Question: {PLACE}\nAnswer:",
    "user_assistant": f"User: {PLACE}\nAssistant:",
    "instruction": f"### Instruction:\n{PLACE}\n\n### Response:",
    "no_template": PLACE,
}
