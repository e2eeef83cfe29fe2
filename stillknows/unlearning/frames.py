"""The same question in other frames: some are trained, others tell whether a model forgot the fact or the frame."""

from __future__ import annotations

from stillknows.model.encoding import framed
from stillknows.types import CHAT
from stillknows.variants.frames import QUESTIONS, TEMPLATES

AS_ASKED = ""
TRAINED = ("no_mark", "lower", "other_template", "no_template")
HELD_OUT = ("two_marks", "word_before", "user_assistant")


def in_frame(name: str, question: str, template: str) -> tuple[str, str]:
    """Return a question and its template in a frame of `variants.frames`, or as they are; a chat stays one."""
    if name in QUESTIONS:
        return QUESTIONS[name](question), template
    return question, template if template == CHAT else TEMPLATES.get(name, template)


def changes(name: str, question: str, template: str) -> bool:
    """Tell whether a frame changes what a model reads of a question."""
    found, frame = in_frame(name, question, template)
    return found != question if template == CHAT else framed(found, frame) != framed(question, template)
