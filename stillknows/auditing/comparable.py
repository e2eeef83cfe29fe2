"""Whether models of an audit can be compared: the same tokens for the same items, and the same arithmetic.

Weights are compared, so everything else has to be equal. A tokenizer that rewrites what was to be forgotten, or that
ends answers otherwise, changes no weight and would look like forgetting. So would a configuration that reads long
questions through a narrow window, or rotates them otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from stillknows.auditing.asking import Items, Questions, Reader
from stillknows.errors import UserError
from stillknows.model.encoding import EncodedAnswer, EncodedItem
from stillknows.model.ref import ModelRef
from stillknows.variants.defences import Defence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FIX = (
    "give it the original's tokenizer.json, tokenizer_config.json and chat_template.jinja: an audit measures what "
    "weights know, which other tokens for the same words hide"
)
SHOWN = 6  # tokens that a message shows
# Settings of a configuration that change no answer: of training, of a cache, what `Reader` and the weights decide, and
# those that layer_types and sliding_window say again.
UNREAD = re.compile(
    r".*(dropout|pdrop|layerdrop|init_std|initializer.*|_token_id|_loss.*|_jitter_noise|use_cache|vocab_size)"
    r"|tie_word_embeddings|pretraining_tp|output_router_logits|use_sliding_window|max_window_layers"
)
ROTATION = re.compile(r'"rope_type": "(\w*)"')
READ = ("model_type", "is_decoder", "is_causal", "head_dim")  # though not every configuration declares them


def require_same_vocabulary(original: Reader, model: Reader) -> None:
    """Raise UserError for tokenizers with different tokens."""
    if model.tokenizer.get_vocab() != original.tokenizer.get_vocab():
        raise UserError(
            f"{model.name} has another tokenizer than {original.name}",
            "probabilities of different tokens cannot be compared; audit models of one tokenizer",
        )


def require_same_settings(original: ModelRef, model: ModelRef) -> None:
    """Raise UserError that names the first setting by which two models of the same shapes compute otherwise.

    Of a .gguf file nothing is compared: it says less, and in other words.
    """
    if original.gguf or model.gguf:
        return
    ours, theirs = (_settings(ref.skeleton) for ref in (original, model))
    for name in dict.fromkeys(["model_type", "rope_parameters", *sorted({*ours, *theirs})]):  # causes come first
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"{model.name} computes otherwise than {original.name}: its config.json says {name} = "
                f"{theirs.get(name)}, not {ours.get(name)}",
                "give it the original's config.json: an audit measures what weights know, which other settings hide",
            )


def _settings(model: PreTrainedModel) -> dict[str, Any]:
    """Return what answers depend on of what a configuration says: of what its kind declares, and READ."""
    from transformers import PreTrainedConfig

    config = model.config.get_text_config()
    said = json.loads(json.dumps(config.to_dict(), default=str))
    declared = type(config)().to_dict().keys() - PreTrainedConfig().to_dict().keys()
    if {*ROTATION.findall(json.dumps(said.get("rope_parameters")))} <= {"default"}:
        said.pop("max_position_embeddings", None)  # which other rotations depend on
    return {name: said[name] for name in {*declared, *READ} & said.keys() if not UNREAD.fullmatch(name)}


def require_same_tokens(
    questions: Questions, original: Reader, model: Reader, expected: Items, defences: Sequence[Defence] = ()
) -> None:
    """Raise UserError that names the first item that a model would read otherwise than the original does.

    Args:
        expected: the items as the original reads them, through the defences if there are any.
    """
    try:
        found = questions.encoded(model.tokenizer, defences)
    except UserError as error:
        first = str(error).partition("\n")[0]
        raise UserError(f"{model.name} does not read the items as {original.name} does: {first}", FIX) from error
    for split, items in expected.items():
        for ours, theirs in zip_longest(_answers(items), _answers(found[split])):
            if ours is None or theirs is None or _read(ours) != _read(theirs):
                raise UserError(_difference(split, original, model, ours, theirs), FIX)


def _answers(items: list[EncodedItem]) -> Iterator[EncodedAnswer]:
    """Yield everything of items that is scored."""
    for item in items:
        yield from filter(None, (item.answer, item.paraphrase, *item.wrong, item.lowered, *item.placebos))


def _read(item: EncodedAnswer) -> tuple[tuple[int, ...], int, bool]:
    return item.ids, item.start, item.ends


def _difference(
    split: str, original: Reader, model: Reader, ours: EncodedAnswer | None, theirs: EncodedAnswer | None
) -> str:
    if ours is None or theirs is None:
        return f"{model.name} cuts the texts of the {split} split into other pieces than {original.name}"
    place = f"item {ours.example.id!r} of the {split} split"
    if ours.ids == theirs.ids:
        return f"{model.name} begins or ends the answer of {place} at another token than {original.name}"
    pairs = enumerate(zip_longest(ours.ids, theirs.ids))
    first = next(i for i, (a, b) in pairs if a != b)
    mine, its = (
        reader.tokenizer.convert_ids_to_tokens(list(item.ids[first : first + SHOWN]))
        for reader, item in ((original, ours), (model, theirs))
    )
    return (
        f"{model.name} reads {place} otherwise than {original.name}: from token {first + 1} on "
        f"{' '.join(its) or 'nothing'}, not {' '.join(mine) or 'nothing'}"
    )


def notes(original: Reader, model: Reader, *, in_chat: bool) -> tuple[str, ...]:
    """Say what users of a model meet and what was not measured, for all models are asked alike.

    in_chat: the items are asked through the chat template, and both models' write them in the same way.
    """
    found = []
    if model.tokenizer.chat_template != original.tokenizer.chat_template:
        what = "another chat template than the original" if model.tokenizer.chat_template else "no chat template"
        known = "which writes these items alike" if in_chat else "and what users meet in a chat was not measured"
        found.append(f"it comes with {what}, {known}")
    if model.ends != original.ends:
        found.append("its own settings end generations at other tokens than the original's, which end them here")
    return tuple(found)
