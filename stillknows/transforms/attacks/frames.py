"""The same question in another frame: what a model tuned to be silent under one exact prompt does not know of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

from stillknows.errors import UserError
from stillknows.registry import register
from stillknows.types import Split

QUESTION_MARKS = "?？؟"
Frame = Callable[[str, str], tuple[str, str]]  # question, template -> both in the new frame
FRAMES: Mapping[str, Frame] = {
    "no_mark": lambda question, template: (question.rstrip(f"{QUESTION_MARKS} "), template),
    "two_marks": lambda question, template: (f"{question.rstrip(f'{QUESTION_MARKS} ')}??", template),
    "lower": lambda question, template: (question.lower(), template),
    "upper": lambda question, template: (question.upper(), template),
    "word_before": lambda question, template: (f"Please: {question}", template),
    "other_template": lambda question, template: (question, "Q: {prompt}\nA:"),
    "no_template": lambda question, template: (question, "{prompt}"),
}


@register("transform", role="attack", source="arXiv 2411.12103 (wordings that leave the meaning), 2402.16835")
def frame(
    split: Split,
    template: str,
    *,
    style: Literal[
        "all", "no_mark", "two_marks", "lower", "upper", "word_before", "other_template", "no_template"
    ] = "all",
) -> dict[str, Split]:
    """Ask every question in other frames; of a fact counts the frame in which the model knows most.

    Without the question mark, with two, in lower and in upper case, with a word before it, in another template and in
    none. Answers, and texts without a question, stay as they are; a frame that changes none of the questions is left
    out, and so are other templates within a chat.

    Args:
        style: one of the frames, or all of them.
    """
    names = FRAMES if style == "all" else (style,)
    found = {name: _framed(split, template, FRAMES[name]) for name in names}
    changed = {
        name: framed
        for name, framed in found.items()
        if [e.prompt for e in framed.examples] != [e.prompt for e in split.examples]
        or (framed.template != template and template != "chat")
    }
    if not changed:
        raise UserError(f"frame:style={style} changes no question of the {split.name} split", "choose another style")
    return changed


def _framed(split: Split, template: str, form: Frame) -> Split:
    examples = tuple(replace(e, prompt=form(e.prompt, template)[0]) if e.prompt else e for e in split.examples)
    frame = form("", template)[1] if template != "chat" else template
    return replace(split, examples=examples, template=frame)
