"""Text to token ids and back: where the answer starts, and what is too long."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from stillknows.errors import UserError
from stillknows.model import chat, own_tokens
from stillknows.model.batching import common_prefix
from stillknows.types import CHAT, PLACE, Example, Split, require_place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LongItems = Literal["error", "truncate"]
CHARACTERS = 10  # that twice as many tokens take up nearly always
ANSWER = "\ue000"  # stands for the answer where a chat template is asked how it writes one; no template holds it


@dataclass(frozen=True)
class EncodedAnswer:
    """One example as tokens. The answer is ids[start:]; `ends` tells whether its last token is the one that ends it."""

    example: Example
    ids: tuple[int, ...]
    start: int
    ends: bool
    truncated: bool = False


@dataclass(frozen=True)
class EncodedItem:
    """One example with everything that is scored as an answer to its prompt; `wording` names how an attack words it."""

    answer: EncodedAnswer
    paraphrase: EncodedAnswer | None = None
    wrong: tuple[EncodedAnswer, ...] = ()
    lowered: EncodedAnswer | None = None
    wording: str = ""
    placebos: tuple[EncodedAnswer, ...] = ()


class Frame(NamedTuple):
    """What a model reads around a question: a template, and `turns`, `opening`, `before` and `after` of a Split."""

    template: str
    turns: Sequence[tuple[str, str]] = ()
    opening: str = ""
    before: int = 0
    after: int = 0

    @classmethod
    def of(cls, split: Split, template: str) -> Frame:
        """Return a split's own; `template` is the one of a split that has none."""
        return cls(split.template or template, split.turns, split.opening, split.before, split.after)


def encode_split(
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    context: int,
    long_items: LongItems = "error",
    vocabulary: int | None = None,
    *,
    lowered: bool = False,
    placebos: Callable[[Example], Sequence[str]] = lambda example: (),
) -> list[EncodedItem]:
    """Tokenise a split as `encode` does, with its paraphrases and wrong answers, in its own frame and lengths.

    Args:
        lowered: add the answers in lower case.
        placebos: other answers to an item's question, which are scored as its own is; one that is too long is cut.

    Raises UserError also where tokens are to be given of answers that have a single one each.
    """

    frame = Frame.of(split, template)

    def encoded(examples: Iterable[Example], long_items: LongItems = long_items) -> list[EncodedAnswer]:
        found = encode(list(examples), tokenizer, frame, context, long_items, vocabulary)
        return [_given(item, tokenizer, split.given_tokens) for item in found]

    examples = [_shortened(example, tokenizer, split.answer_tokens) for example in split.examples]
    if split.piece_tokens is not None:
        size = min(split.piece_tokens, context)
        return [EncodedItem(item) for text in examples for item in _pieces(text, tokenizer, size)]
    items = encoded(examples)
    if split.given_tokens and [item.example.answer for item in items] == [e.answer for e in examples]:
        raise UserError(f"the answers of the {split.name} split are of one token each, and none can be given of them")
    return [
        EncodedItem(
            item,
            paraphrase=next(iter(encoded([replace(e, answer=e.paraphrase)])), None) if e.paraphrase else None,
            wrong=tuple(encoded(replace(e, answer=answer) for answer in e.wrong)),
            lowered=encoded([replace(e, answer=e.answer.lower())])[0] if lowered else None,
            placebos=tuple(encoded((replace(e, answer=answer) for answer in placebos(given)), "truncate")),
        )
        for item, e, given in zip(items, examples, split.examples, strict=True)
    ]


def _given(item: EncodedAnswer, tokenizer: PreTrainedTokenizerBase, tokens: int) -> EncodedAnswer:
    """Return an item whose answer's first tokens belong to the prompt; one token at least stays the answer's own."""
    start = min(item.start + tokens, (end := len(item.ids) - item.ends) - 1)
    if start <= item.start:
        return item
    rest = str(tokenizer.decode(list(item.ids[start:end]))).strip()
    return replace(item, start=start, example=replace(item.example, answer=rest))


def _shortened(example: Example, tokenizer: PreTrainedTokenizerBase, tokens: int | None) -> Example:
    """Keep the first tokens of the true answer, as MUSE cuts what a generation is compared with."""
    ids = _plain_ids(tokenizer, _first_part(example.answer, tokenizer, tokens)) if tokens is not None else []
    return replace(example, answer=str(tokenizer.decode(ids[:tokens]))) if len(ids) > (tokens or 0) else example


def _pieces(example: Example, tokenizer: PreTrainedTokenizerBase, size: int) -> list[EncodedAnswer]:
    """Cut a text into pieces of at most `size` tokens; each opens as a text of its own does."""
    ids, whole = _plain_ids(tokenizer, example.answer), _ids(tokenizer, example.answer)
    opening = whole[: len(whole) - len(ids)]
    step = size - len(opening)
    parts = [ids[i : i + step] for i in range(0, len(ids), step)]
    return [
        EncodedAnswer(
            replace(example, id=f"{example.id}#{k}", answer=str(tokenizer.decode(part))), (*opening, *part), 1, False
        )
        for k, part in enumerate(parts, 1)
        if len(opening) + len(part) > 1
    ]


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: str | Frame,
    context: int,
    long_items: LongItems = "error",
    vocabulary: int | None = None,
) -> list[EncodedAnswer]:
    """Tokenise examples; answers end with the end-of-sequence token (in a chat the turn's), plain text does not.

    Args:
        template: the prompt's frame, "{prompt}" replaced; "chat" uses the tokenizer's own chat template. A Frame says
            what else is read.
        context: the most tokens that the model can read.
        long_items: "error" refuses items over the context, "truncate" cuts their end and marks them.
        vocabulary: how many tokens the model embeds; None leaves that unchecked.

    Prompt and answer are tokenised together, as a model meets them in training, and the answer starts at the first
    token in which that differs from the prompt alone.

    Raises UserError that names the item for an answer that gives no token, for an item that is too long and for a
    token that the model lacks.
    """
    if any(example.prompt for example in examples) and tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token, so no answer can end",
            'add "eos_token" to its tokenizer_config.json',
        )
    frame = template if isinstance(template, Frame) else Frame(template)
    questions = [example.prompt for example in examples if example.prompt]
    if questions:
        require_place(frame.template)
    if questions and frame.template == CHAT:
        chat.require_questions(tokenizer, (_first_part(question, tokenizer, context) for question in questions))
    items = [_encode_one(example, tokenizer, frame, context, long_items) for example in examples]
    for item in items:
        if vocabulary is not None and max(item.ids) >= vocabulary:
            raise UserError(
                f"item {item.example.id!r} gives token {max(item.ids)}, but the model embeds only {vocabulary} tokens",
                "put the tokenizer that belongs to the model into its folder",
            )
    return items


def _encode_one(
    example: Example, tokenizer: PreTrainedTokenizerBase, frame: Frame, context: int, long_items: LongItems
) -> EncodedAnswer:
    try:
        f"{example.prompt}{example.answer}".encode()
    except UnicodeEncodeError as error:
        raise UserError(f"item {example.id!r} holds half a character: {error.reason}", "correct the item") from error
    read = replace(example, **{n: _first_part(getattr(example, n), tokenizer, context) for n in ("prompt", "answer")})
    if not example.prompt:
        ids, end = _ids(tokenizer, read.answer), None
        start = min(1, len(ids))
    else:
        ids, start, end = _join(read, tokenizer, frame)
    if len(ids) - start < 1 or not example.answer.strip():
        raise UserError(
            f"item {example.id!r}: its answer {example.answer!r} gives no token", "correct or remove the item"
        )
    if end is not None:
        ids = [*ids, end]
    if len(ids) <= context:
        return EncodedAnswer(example, tuple(ids), start, end is not None)
    if long_items == "error" or start >= context:
        raise UserError(
            f"item {example.id!r} has {'more than ' * (read != example)}{len(ids)} tokens, the model reads {context}",
            "shorten the item, or cut such items with `long_items` truncate"
            if start < context
            else "shorten its prompt, or what an attack puts before it: no token of the answer fits",
        )
    return EncodedAnswer(example, tuple(ids[:context]), start, False, truncated=True)


def _first_part(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """Return a text, or of one that is much longer than so many tokens a first part that is twice as long in tokens.

    To tokenize megabytes takes minutes, and what lies beyond the context is not looked at.
    """
    size = CHARACTERS * max(tokens, 1)
    while size < len(text):
        if len(_plain_ids(tokenizer, text[:size])) > 2 * tokens:
            return text[:size]
        size *= 2
    return text


def _join(example: Example, tokenizer: PreTrainedTokenizerBase, frame: Frame) -> tuple[list[int], int, int]:
    """Return prompt and answer as tokens, where the answer starts, and the token that ends it."""
    prompt, space, end = prompt_text(example.prompt, tokenizer, frame)
    ids = _plain_ids if frame.template == CHAT else _ids
    head, both = ids(tokenizer, prompt), ids(tokenizer, f"{prompt}{space}{example.answer}")
    start = max(1, len(common_prefix([head, both])))
    if not (frame.before or frame.after):
        return both, start, end
    bare = ids(tokenizer, prompt_text("", tokenizer, frame)[0])
    head = own_tokens.placed(both[:start], bare, frame.before, frame.after)
    return [*head, *both[start:]], len(head), end


def prompt_text(question: str, tokenizer: PreTrainedTokenizerBase, frame: Frame) -> tuple[str, str, int]:
    """Return all that is read before an answer, the space that goes before the answer, and the token that ends it."""
    turns = [(asked.replace(PLACE, question), said) for asked, said in frame.turns]
    if frame.template == CHAT:
        prompt, space, end = _chat(question, tokenizer, turns)
    else:
        before = "".join(f"{framed(asked, frame.template)} {said}\n\n" for asked, said in turns)
        prompt, space = f"{before}{framed(question, frame.template)}", " "
        end = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    return (f"{prompt}{space}{frame.opening}", " ", end) if frame.opening else (prompt, space, end)


def framed(prompt: str, template: str) -> str:
    """Put a prompt in the place of the template's last "{prompt}": in-context examples may hold the same text."""
    before, _, after = template.rpartition(PLACE)
    return f"{before}{prompt}{after}"


def preceded(context: str, question: str, template: str) -> tuple[str, str]:
    """Return question and template with a text before them, in a chat within the user's turn."""
    return (f"{context}\n{question}", CHAT) if template == CHAT else (question, f"{context}\n{template}")


def _chat(question: str, tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]]) -> tuple[str, str, int]:
    """Return what the model reads of a question, the space that goes before an answer, and the token after it.

    The last two are read off the template's rendering of an answer: some write " Paris" (Llama 2, Mistral), and some
    end a turn with another token than the tokenizer's end of sequence (Gemma, Phi-3).
    """
    prompt = chat.render(tokenizer, question, earlier=turns)
    before, _, after = chat.render(tokenizer, question, ANSWER, turns).partition(ANSWER)
    space = before.removeprefix(prompt)
    following = _plain_ids(tokenizer, after.lstrip())[:1]
    end = following if following and following[0] in tokenizer.added_tokens_decoder else [tokenizer.eos_token_id]
    return prompt, "" if space.strip() else space, int(end[0])  # type: ignore[arg-type]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise with the tokenizer's opening special tokens, each once, but without a closing one."""
    ids, plain = list(tokenizer(text)["input_ids"]), _plain_ids(tokenizer, text)  # type: ignore[arg-type]
    if plain and ids[:-1][-len(plain) :] == plain:  # the last one is not the text's own
        ids.pop()
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:  # the template writes it too
        ids.pop(0)
    return ids


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]


def without_end(items: Sequence[EncodedAnswer]) -> list[EncodedAnswer]:
    """Return the items without their end-of-sequence token: it is no knowledge, and losing it harms every answer."""
    return [replace(item, ids=item.ids[:-1], ends=False) if item.ends else item for item in items]
