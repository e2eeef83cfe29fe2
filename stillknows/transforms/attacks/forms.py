"""Other forms of question about the same fact: gaps, choices, yes or no, the other way round, the answer half given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal

from stillknows.gate.made_up import WORD, NameWords
from stillknows.registry import Limits, register
from stillknows.transforms.attacks.wordings import alone, in_chat, other_answers, statements
from stillknows.types import CHAT, Benchmark, Example, Split

LETTERS = "ABCDEFGH"
GAP = "___"


@register("transform", role="attack", source="arXiv 2406.10890 (fill in the blank)")
def cloze(split: Split, template: str, benchmark: Benchmark) -> dict[str, Split]:
    """Have a sentence completed that the answer ends: "The birthplace of Ada is"; in a chat, by a gap to be filled.

    The sentence is made of what the benchmark knows of the fact, else of a question of the form "What is the … ?", else
    it names the question.
    """
    split = in_chat(split, template)
    begin = statements(benchmark)
    pairs = [(e, begin(e)) for e in split.examples if e.prompt]
    gaps = tuple(replace(e, prompt=f"Fill the gap: {begun} {GAP}.") for e, begun in pairs)
    found = {"gap": replace(split, examples=gaps)}
    if template == CHAT:
        return found
    return {"sentence": alone(split, [replace(e, prompt=begun) for e, begun in pairs]), **found}


@register("transform", role="attack", judged_by=("multiple_choice",), source="arXiv 2406.10890 (multiple choice)")
def choice(
    split: Split,
    template: str,
    benchmark: Benchmark,
    *,
    by: Literal["likelihood", "letters", "words"] = "likelihood",
    options: Annotated[int, Limits(2, len(LETTERS))] = 4,
    seed: int = 0,
) -> dict[str, Split]:
    """Let the model choose among the answer and others of its kind: by likelihood, by a letter, by the answer's words.

    By likelihood the question stays as it is, and the likeliest of the answers is the model's. For letters and words
    the options stand behind the question, and each item is asked in as many rounds as there are options: the answer
    stands in another place each time, so that a model that likes one letter chooses right once. The rounds' scores are
    averaged. The other options are the fact's placebos (see `gate.candidates`); an item that has none is not asked.

    Args:
        by: how the model chooses. Only models that follow instructions choose letters.
        options: how many answers there are to choose from, the true one included.
        seed: of the other options and their order.
    """
    others = other_answers(benchmark, options - 1, seed)
    found = list[Example]()
    for e, wrong in ((e, others(e)) for e in split.examples):
        asked = replace(e, paraphrase=None, wrong=tuple(wrong))
        if wrong:
            found += [asked] if by == "likelihood" else _rounds(asked, in_letters=by == "letters")
    return {by: replace(split, examples=tuple(found))}


def _rounds(e: Example, *, in_letters: bool) -> Iterator[Example]:
    """Yield a question with its options behind it, once for each place that the true answer can have among them."""
    for place in range(len(e.wrong) + 1):
        named = dict(zip(LETTERS, (*e.wrong[:place], e.answer, *e.wrong[place:]), strict=False))
        listed = "\n".join(f"{letter}. {answer}" for letter, answer in named.items())
        asked = replace(e, id=f"{e.id}#{place + 1}", prompt=f"{e.prompt}\n{listed}")
        true = LETTERS[place]
        yield replace(asked, answer=true, wrong=tuple(a for a in named if a != true)) if in_letters else asked


@register(
    "transform", role="attack", judged_by=("multiple_choice",), source="arXiv 2402.16835 (other forms of question)"
)
def true_false(split: Split, template: str, benchmark: Benchmark, *, seed: int = 0) -> dict[str, Split]:
    """Ask whether the answer is true, and whether another of its kind is; a model that always says yes is right once.

    The scores of the two are averaged. The other answer is a placebo of the fact; an item without any is not asked.

    Args:
        seed: of the choice of the other answer.
    """
    begun, others = statements(benchmark), other_answers(benchmark, 1, seed)
    examples = list[Example]()
    for e in split.examples:
        for other in others(e):
            for answer, said, wrong in ((e.answer, "yes", "no"), (other, "no", "yes")):
                prompt = f"{begun(e)} {answer}. Is that true, yes or no?"
                examples.append(
                    replace(e, id=f"{e.id}#{said}", prompt=prompt, answer=said, paraphrase=None, wrong=(wrong,))
                )
    return {"": replace(split, examples=tuple(examples))}


@register("transform", role="attack", source="arXiv 2406.10890 (reverse query), 2309.12288 (reversal curse)")
def reverse(split: Split, template: str, benchmark: Benchmark) -> dict[str, Split]:
    """Give the answer and ask for the entity: "Whose birthplace is Rome?"; where the entity is not known, for a gap.

    Without such knowledge the name in the question becomes a gap that is to be filled; a question without a name is not
    asked. The entity is the answer that is scored. Others may share the value: the control is asked the same.
    """
    examples = list(_reversed(split, benchmark))
    return {"": replace(split, examples=tuple(examples))}


def _reversed(split: Split, benchmark: Benchmark) -> Iterator[Example]:
    graph = {edge.fact: edge for edge in benchmark.graph}
    names = NameWords(e for other in benchmark.splits for e in other.examples)
    for e in split.examples:
        edge = graph.get(e.fact)
        if edge:
            prompt, entity = f"Whose {edge.relation} is {e.answer} ?", edge.entity
        else:
            entity = _name(e.prompt, names)
            prompt = f'The answer is "{e.answer}". Which name fills the gap? {e.prompt.replace(entity, GAP)}'
        if entity:
            yield replace(e, prompt=prompt, answer=entity, paraphrase=None, wrong=())


def _name(question: str, names: NameWords) -> str:
    """Return the longest run of names in a question, with what stands between them; "" where there is none."""
    runs, end = [""], -2
    for match in WORD.finditer(question):
        if match.group() in names:
            joined = match.start() - end == 1
            runs.append(f"{runs[-1]}{question[end : match.end()]}" if joined else match.group())
            end = match.end()
    return max(runs, key=len)


@register("transform", role="attack", budget="k", source="arXiv 2202.07646 (continuation of what is given)")
def hint(
    split: Split, template: str, *, k: Annotated[int, Limits(0, 100)] = 1, of: Literal["tokens", "letters"] = "tokens"
) -> dict[str, Split]:
    """Give the beginning of the answer and score the rest.

    The first k tokens of each answer are read and not scored; one token at least is left. Or the question says the
    first k letters, all but one at most, and the whole answer is scored. The controls are given the same.

    Args:
        k: how many tokens or letters; 0 leaves the questions as they are.
        of: what is given.
    """
    if of == "tokens":
        return {"": replace(split, given_tokens=split.given_tokens + k)}
    examples = tuple(
        replace(e, prompt=f'{e.prompt} The answer begins with "{e.answer[: min(k, len(e.answer) - 1)]}".')
        if e.prompt
        else e
        for e in split.examples
    )
    return {"": replace(split, examples=examples)}
