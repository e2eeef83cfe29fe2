"""The tokenizer that a GGUF file describes: its tokens, how text is cut and merged into them, what begins and ends it.

The file decides, as in llama.cpp, whose defaults stand for what it leaves unsaid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from stillknows.errors import UserError
from stillknows.model.packed import library

GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_2, LLAMA_3 = f"{_LETTERS}\\p{{N}}{_REST}", f"{_LETTERS}\\p{{N}}{{1,3}}{_REST}"
BYTES, PIECES = "gpt2", "llama"  # llama.cpp's names for byte-level BPE and for SentencePiece's BPE
NUMBER = r"\p{N}"
SPACE = "▁"

Field = Callable[..., Any]  # (key, default=None) -> what the file's metadata hold


class Cut(NamedTuple):
    """How byte-level BPE cuts text before it merges.

    patterns: one after the other; what matches stands alone.
    whole: a piece that is a token itself is taken as it is, whatever the merges give.
    begins: text begins with the token that begins a sequence, unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    whole: bool = False
    begins: bool = False


CUTS = {  # by llama.cpp's names, tokenizer.ggml.pre
    **dict.fromkeys(("gpt-2", "phi-2", "roberta-bpe", "mpt", "olmo", "jais"), Cut((GPT_2,))),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), Cut((NUMBER, GPT_2))),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), Cut((LLAMA_3,), whole=True, begins=True)),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Cut((LLAMA_3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), Cut((QWEN_2,))),
}


def read(field: Field, place: str) -> Any:
    """Return the tokenizer: that of Hugging Face where the file holds it, else one made of its tokens; special tokens,
    what begins and ends a text, and the chat template as the file's own metadata say.

    Raises UserError, which names the `place`, for kinds of tokenizers that are not read here.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    keys = library("gguf").Keys.Tokenizer
    stored = field(keys.HF_JSON)
    fast, begins = (Tokenizer.from_str(stored), None) if stored is not None else _made(field, place)
    special: dict[str, str] = {}
    for name, number in _special(field).items():
        token = fast.id_to_token(number)
        if token is None:
            raise ValueError(f"its {name} is not among its tokens")
        special[name] = token
    _frame(fast, special, field(keys.ADD_BOS, begins), field(keys.ADD_EOS, None if begins is None else False))
    found = PreTrainedTokenizerFast(tokenizer_object=fast, **special)
    found.chat_template = _chat_template(field)
    return found


def ends(field: Field) -> list[int]:
    """Return the tokens that end what a model generates: of a sequence, of a turn, of a message."""
    keys = library("gguf").Keys.Tokenizer
    named = [_special(field).get("eos_token"), field(keys.EOT_ID), field(keys.EOM_ID)]
    return list(dict.fromkeys(number for number in named if number is not None))


def _special(field: Field) -> dict[str, int]:
    """Return the numbers of the special tokens that the file names, and of SentencePiece's own where it names none."""
    keys = library("gguf").Keys.Tokenizer
    plain = {"bos_token": 1, "eos_token": 2, "unk_token": 0} if field(keys.MODEL) == PIECES else {}
    places = {"bos_token": keys.BOS_ID, "eos_token": keys.EOS_ID, "unk_token": keys.UNK_ID, "pad_token": keys.PAD_ID}
    numbers = {name: field(key, plain.get(name)) for name, key in places.items()}
    return {name: int(number) for name, number in numbers.items() if number is not None}


def _made(field: Field, place: str) -> tuple[Any, bool]:
    """Return a tokenizer made of the file's tokens, and whether its texts begin with a token of their own."""
    keys, kinds = library("gguf").Keys.Tokenizer, library("gguf").TokenType
    model, tokens = field(keys.MODEL), field(keys.LIST)
    types = field(keys.TOKEN_TYPE) or [kinds.NORMAL] * len(tokens)
    unused = {i for i, kind in enumerate(types) if kind == kinds.UNUSED and tokens[i] == f"[PAD{i}]"}
    vocabulary = {token: i for i, token in enumerate(tokens) if i not in unused}
    if model == BYTES:
        fast, begins = _of_bytes(field, vocabulary, place)
    elif model == PIECES:
        fast, begins = _of_pieces(field, vocabulary, tokens), True
    else:
        raise UserError(f"{place}: its tokenizer is of the kind {model!r}", f"read are {BYTES} and {PIECES}")
    _add(fast, [t for t, kind in zip(tokens, types, strict=True) if kind == kinds.CONTROL], special=True)
    _add(fast, [t for t, kind in zip(tokens, types, strict=True) if kind == kinds.USER_DEFINED], special=False)
    return fast, begins


def _of_bytes(field: Field, vocabulary: dict[str, int], place: str) -> tuple[Any, bool]:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    keys = library("gguf").Keys.Tokenizer
    name = field(keys.PRE)
    if name not in CUTS:
        raise UserError(
            f"{place}: its tokenizer cuts text in a way that is not read here ({name})", f"read are {', '.join(CUTS)}"
        )
    merges = [tuple(pair.split(" ", 1)) for pair in field(keys.MERGES) or []]
    fast = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=CUTS[name].whole))
    level = pre_tokenizers.ByteLevel(add_prefix_space=field(keys.ADD_PREFIX, False), use_regex=False)
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in CUTS[name].patterns]
    fast.pre_tokenizer = pre_tokenizers.Sequence([*cuts, level])
    fast.decoder = decoders.ByteLevel()
    return fast, CUTS[name].begins


def _of_pieces(field: Field, vocabulary: dict[str, int], tokens: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    keys = library("gguf").Keys.Tokenizer
    unknown = tokens[_special(field)["unk_token"]]
    merges = _merges(vocabulary, field(keys.SCORES))
    fast = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    opening = [normalizers.Prepend(SPACE)] if field(keys.ADD_PREFIX, True) else []
    fast.normalizer = normalizers.Sequence([*opening, normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if opening else [])])
    return fast


def _merges(vocabulary: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return the merges that SentencePiece makes: of two neighbours that form a token, the best score first."""
    found = []
    for token, number in vocabulary.items():
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [(left, right) for left, right in cuts if left in vocabulary and right in vocabulary]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(-scores[number], number, pair) for pair in pairs]
    found.sort(key=lambda merge: merge[:2])
    return [pair for _, _, pair in found]


def _add(fast: Any, tokens: Sequence[str], *, special: bool) -> None:
    from tokenizers import AddedToken

    added = [AddedToken(token, normalized=False, special=special) for token in tokens]
    (fast.add_special_tokens if special else fast.add_tokens)(added)


def _frame(fast: Any, special: dict[str, str], begins: bool | None, ends: bool | None) -> None:
    """Put the tokens that begin and end a sequence around every text, where that is asked for and not done already.

    begins, ends: None where nothing is said, and a tokenizer of Hugging Face's does as it does.
    """
    from tokenizers.processors import TemplateProcessing

    tokens, plain = fast.encode("a").tokens, fast.encode("a", add_special_tokens=False).tokens
    at = next((i for i in range(len(tokens)) if tokens[i : i + len(plain)] == plain), 0)
    before, after = tokens[:at], tokens[at + len(plain) :]
    around = _asked(before, special.get("bos_token"), begins), _asked(after, special.get("eos_token"), ends)
    if around == (before, after) or not plain:
        return
    known = {token: fast.token_to_id(token) for token in (*around[0], *around[1])}
    pieces = [*around[0], "$A", *around[1]]
    fast.post_processor = TemplateProcessing(single=pieces, special_tokens=list(known.items()))


def _asked(present: list[str], token: str | None, asked: bool | None) -> list[str]:
    """Return what stands before or after a text, given what does and whether this token should."""
    if token is None or asked is None or asked == (token in present):
        return present
    return [token] if asked else []


def _chat_template(field: Field) -> str | dict[str, str] | None:
    """Return the file's chat template; all of them by name where it holds several."""
    keys = library("gguf").Keys.Tokenizer
    plain = field(keys.CHAT_TEMPLATE)
    named = {name: field(keys.CHAT_TEMPLATE_N.format(name=name)) for name in field(keys.CHAT_TEMPLATES) or []}
    return {**({"default": plain} if plain else {}), **named} if named else plain
