"""Where an answer starts and ends in tokens, for the kinds of tokenizer that models come with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from stillknows.auditing.observe import observe
from stillknows.errors import UserError
from stillknows.model import encoding
from stillknows.model.batching import right_padded
from stillknows.model.encoding import EncodedItem, encode, encode_split, framed
from stillknows.model.layers import output_layer
from stillknows.model.target import LocalTarget
from stillknows.types import Example, Split

TEMPLATE = "Question: {prompt}\nAnswer:"
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = ["Question: Where does Ada live ?\nAnswer: in Paris", "Question: Where does Bela live ?\nAnswer: in Rome"]


def example(prompt: str = "Where does Ada live ?", answer: str = "in Paris", name: str = "a") -> Example:
    return Example(name, prompt, answer, name)


def byte_level() -> Any:
    """As GPT-2 and Llama 3: a space belongs to the word after it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", clean_up_tokenization_spaces=False)


def character_pieces() -> Any:
    """A BPE without word boundaries: a token can span the end of the prompt and the start of the answer."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "</s>"], show_progress=False)
    bpe.train_from_iterator(["Answer: in", "Answer: is", "? Rome", *"".join(TEXTS), *"Zürich, 1871"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", unk_token="<unk>")


def metaspace() -> Any:
    """As SentencePiece in Llama 2: a mark before each word, also before the first."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    bpe.train_from_iterator(TEXTS * 9, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte-level": byte_level,
    "character pieces": character_pieces,
    "metaspace": metaspace,
}


@pytest.fixture(params=TOKENIZERS)
def subwords(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize("template", [TEMPLATE, "{prompt}", "Question: {prompt}\nAnswer: "])
@pytest.mark.parametrize("answer", ["in Paris", "Rome", "Zürich, 1871?", "?"])
def test_an_item_is_the_joint_tokens_and_one_end(subwords: Any, template: str, answer: str) -> None:
    [item] = encode([example(answer=answer)], subwords, template, 500)
    text = template.replace("{prompt}", "Where does Ada live ?") + " " + answer
    assert list(item.ids) == [*subwords(text)["input_ids"], subwords.eos_token_id]
    assert item.ends
    assert not item.truncated


@pytest.mark.parametrize("template", [TEMPLATE, "{prompt}", "Question: {prompt}\nAnswer: "])
@pytest.mark.parametrize("answer", ["in Paris", "Rome", "is Rome", "live"])
def test_the_answer_starts_where_the_joint_tokens_leave_the_prompts(subwords: Any, template: str, answer: str) -> None:
    """Everything before the start is what the model reads as the prompt; nothing of the answer is before it."""
    [item] = encode([example(answer=answer)], subwords, template, 500)
    prompt = subwords(template.replace("{prompt}", "Where does Ada live ?"))["input_ids"]
    assert list(item.ids[: item.start]) == prompt[: item.start]
    assert item.start == len(prompt) or item.ids[item.start] != prompt[item.start]
    read = subwords.decode(item.ids[item.start : -1]).replace(" ", "")
    assert read.endswith(answer.replace(" ", ""))


def test_a_token_over_the_border_belongs_to_the_answer() -> None:
    tokenizer = character_pieces()
    [item] = encode([example(answer="in Paris")], tokenizer, TEMPLATE, 500)
    prompt = tokenizer(TEMPLATE.replace("{prompt}", "Where does Ada live ?"))["input_ids"]
    assert item.start < len(prompt)  # the merge reaches into the prompt, or this test shows nothing
    assert len(item.ids) - item.start >= 2


def test_a_template_that_ends_in_a_space_keeps_the_whole_answer() -> None:
    tokenizer = byte_level()
    [item] = encode([example(answer="Paris")], tokenizer, "{prompt} Answer: ", 500)
    assert tokenizer.decode(item.ids[item.start : -1]).strip() == "Paris"


@pytest.mark.parametrize("opens", [False, True])
def test_a_tokenizer_that_closes_texts_itself_gives_one_end_at_the_end(tokenizer: Any, opens: bool) -> None:
    before = len(encode([example("who is Ada", "a cat")], tokenizer, "{prompt}", 50)[0].ids)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if opens else "$A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    [item] = encode([example("who is Ada", "a cat")], tokenizer, "{prompt}", 50)
    words = tokenizer.convert_ids_to_tokens(item.ids)
    assert words == ["<s>"] * opens + ["who", "is", "Ada", "a", "cat", "</s>"]
    assert len(words) == before + opens
    assert words[item.start :] == ["a", "cat", "</s>"]
    [text] = encode([example("", "a cat and a dog")], tokenizer, "{prompt}", 50)
    assert tokenizer.convert_ids_to_tokens(text.ids) == ["<s>"] * opens + ["a", "cat", "and", "a", "dog"]
    assert not text.ends


def test_plain_text_is_an_answer_from_its_second_token_on(tokenizer: Any) -> None:
    [item] = encode([example("", "who is Ada")], tokenizer, TEMPLATE, 50)
    assert tokenizer.convert_ids_to_tokens(item.ids) == ["who", "is", "Ada"]
    assert (item.start, item.ends) == (1, False)


@pytest.fixture
def chat_tokenizer() -> Any:
    tokenizer = byte_level()
    tokenizer.chat_template = CHAT
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    return tokenizer


def test_chat_with_pad_equal_to_eos_keeps_the_whole_answer_and_nothing_else(chat_tokenizer: Any) -> None:
    [item] = encode([example(answer="in Paris")], chat_tokenizer, "chat", 500)
    end = chat_tokenizer.eos_token_id
    prompt = "<|im_start|>user\nWhere does Ada live ?<|im_end|>\n<|im_start|>assistant\n"
    assert chat_tokenizer.decode(item.ids[: item.start]) == prompt
    assert chat_tokenizer.decode(item.ids[item.start :]) == "in Paris<|im_end|>"
    assert item.ids.count(end) == 2  # the user's turn and the answer's


def test_chat_without_a_template_says_so(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="no chat template"):
        encode([example()], tokenizer, "chat", 500)


def test_pad_equal_to_eos_or_absent_changes_no_observation(model: Any, tokenizer: Any) -> None:
    examples = [example("who is Ada", "a cat", "a"), example("the capital of the river", "Rome and Paris", "b")]
    seen = []
    for pad in (None, "</s>", "<s>"):
        tokenizer.pad_token = pad
        items = [EncodedItem(item) for item in encode(examples, tokenizer, "{prompt}", 50)]
        seen.append(observe(LocalTarget("m", model, tokenizer), items, fields=["generations"]))
    for other in seen[1:]:
        assert other.generations == seen[0].generations
        for a, b in zip(other.log_probs, seen[0].log_probs, strict=True):
            assert a.tolist() == b.tolist()
    assert [len(x) for x in seen[0].log_probs] == [3, 4]


def test_a_long_item_is_an_error_that_names_it(tokenizer: Any) -> None:
    examples = [example("who is", "Ada", "short"), example("who is", "Ada and a dog", "long")]
    with pytest.raises(UserError, match="'long' has 7 tokens, the model reads 6"):
        encode(examples, tokenizer, "{prompt}", 6)
    assert len(encode(examples, tokenizer, "{prompt}", 7)) == 2


@pytest.mark.parametrize("long_items", ["error", "truncate"])
@pytest.mark.parametrize("field", ["prompt", "answer"])
def test_megabytes_are_not_tokenized_to_find_them_too_long(
    field: str, long_items: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work is bounded by the context: what is read of an item of ten megabytes is what is read of a short one."""
    read: list[int] = []
    plain = encoding._plain_ids
    monkeypatch.setattr(encoding, "_plain_ids", lambda t, part: read.append(len(part)) or plain(t, part))
    texts = {"prompt": "where is Ada", "answer": "Paris"} | {field: "the river flows to Rome " * 400_000}
    example = Example("huge", texts["prompt"], texts["answer"], "huge")
    if long_items == "error" or field == "prompt":
        with pytest.raises(UserError, match=r"item 'huge' has more than \d+ tokens, the model reads 64"):
            encode([example], tokenizer, "{prompt}", 64, long_items)
    else:
        short = replace(example, answer=texts["answer"][:2000])
        found = encode([example, short], tokenizer, "{prompt}", 64, long_items)
        assert found[0].ids == found[1].ids
        assert found[0].example.answer == example.answer
    assert sum(read) < 64 * 200


def test_a_long_word_that_is_one_token_is_read(tokenizer: Any) -> None:
    assert encode([Example("one", "where is", "x" * 5000, "one")], tokenizer, "{prompt}", 64)[0].ids[-1] == 2


def test_a_long_item_is_cut_at_its_end_and_marked(tokenizer: Any) -> None:
    [item] = encode([example("who is", "Ada and a dog")], tokenizer, "{prompt}", 5, "truncate")
    assert tokenizer.convert_ids_to_tokens(item.ids) == ["who", "is", "Ada", "and", "a"]
    assert (item.start, item.ends, item.truncated) == (2, False, True)


def test_a_prompt_that_fills_the_context_leaves_no_answer_to_cut(tokenizer: Any) -> None:
    for context in (2, 3):
        item = example("who is the", "Ada", "full")
        with pytest.raises(
            UserError,
            match=r"'full'[\s\S]*shorten its prompt, or what .* no token of the answer fits",
        ):
            encode([item], tokenizer, "{prompt}", context, "truncate")
    assert len(encode([example("who is the", "Ada")], tokenizer, "{prompt}", 4, "truncate")[0].ids) == 4


@pytest.mark.parametrize("answer", ["", "  ", "\u200b"])
def test_an_answer_that_gives_no_token_is_an_error_that_names_it(tokenizer: Any, answer: str) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(UserError, match=r"item 'empty': its answer .* gives no token"):
        encode([example(), example("who is", answer, "empty")], tokenizer, "{prompt}", 50)


def test_a_text_of_one_token_has_nothing_to_predict(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="item 'one'"):
        encode([example("", "Ada", "one")], tokenizer, "{prompt}", 50)


def test_questions_need_an_end_of_sequence_token_and_texts_do_not(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        encode([example()], tokenizer, TEMPLATE, 50)
    assert len(encode([example("", "who is Ada")], tokenizer, TEMPLATE, 50)[0].ids) == 3


def test_only_the_place_for_the_prompt_is_replaced(tokenizer: Any) -> None:
    """Braces in data are data."""
    [item] = encode([example("{prompt} {0} Ada", "a {cat}")], tokenizer, "who {x} {prompt}", 50)
    plain = tokenizer("who {x} {prompt} {0} Ada a {cat}")["input_ids"]
    assert list(item.ids) == [*plain, tokenizer.eos_token_id]


def test_padding_on_the_right(make_items: Callable[..., list[Any]]) -> None:
    items = make_items([1, 3], prompt=2)
    assert right_padded([item.ids for item in items]).tolist() == [[*items[0].ids, 0, 0], [*items[1].ids]]


def test_generation_does_not_depend_on_the_batch(family_model: Any, tokenizer: Any) -> None:
    """Prompts of unlike length, padded on the left, are continued as each would be alone."""
    prompts = ["who is Ada", "the capital of the river in Rome", "a", "red green"]
    examples = [example(prompt, "a cat", str(i)) for i, prompt in enumerate(prompts)]
    items = [EncodedItem(item) for item in encode(examples, tokenizer, "{prompt}", 50)]
    together, *alone = (
        observe(LocalTarget("m", family_model, tokenizer), part, fields=["generations"]).generations
        for part in (items, *([item] for item in items))
    )
    assert together == tuple(text for [text] in alone)
    assert any(together)
    assert output_layer(family_model).vocabulary == 32


def test_text_without_a_prompt_is_not_continued(model: Any, tokenizer: Any) -> None:
    examples = [example("", "who is Ada"), example("who is", "Ada", "b")]
    items = [EncodedItem(item) for item in encode(examples, tokenizer, "{prompt}", 50)]
    text, question = observe(LocalTarget("m", model, tokenizer), items, fields=["generations"]).generations
    assert text is None
    assert isinstance(question, str)
    assert observe(LocalTarget("m", model, tokenizer), items).generations is None


def test_a_prompt_takes_the_last_place_of_a_template() -> None:
    assert framed("who {prompt}", "say {prompt}\nQ: {prompt}\nA:") == "say {prompt}\nQ: who {prompt}\nA:"


def read(item: Any, tokenizer: Any) -> tuple[str, str]:
    """Return what a model is given of an item, and what is scored."""
    return tokenizer.decode(item.ids[: item.start]), tokenizer.decode(item.ids[item.start :])


@pytest.mark.parametrize(
    ("template", "given"),
    [
        ("b {prompt} c", "b the dog is c blue b who is Ada c red b who is Ada c the colour is"),
        ("chat", "what the dog is to blue </s> what who is Ada to red </s> what who is Ada to the colour is"),
    ],
)
def test_turns_and_an_opening_are_read_and_not_scored(tokenizer: Any, template: str, given: str) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'what' if m.role == 'user' else 'to' }} {{ m.content }} "
        "{{ '</s> ' if m.role != 'user' else '' }}{% endfor %}{% if add_generation_prompt %}to{% endif %}"
    )
    split = Split(
        "forget",
        "forget",
        (example("who is Ada", "red and blue"),),
        turns=(("the dog is", "blue"), ("{prompt}", "red")),
        opening="the colour is",
    )
    [item] = encode_split(split, tokenizer, template, 64)
    assert read(item.answer, tokenizer) == (given, "red and blue </s>")


def test_given_tokens_belong_to_the_prompt_and_one_is_left_to_score(tokenizer: Any) -> None:
    asked = replace(example("who is Ada", "red and blue"), paraphrase="blue and red", wrong=("Rome", "a b c d"))
    split = Split("forget", "forget", (asked, example("who is Bela", "Rome", "b")), given_tokens=2)
    long, short = encode_split(split, tokenizer, "{prompt}", 64)
    assert read(long.answer, tokenizer) == ("who is Ada red and", "blue </s>")
    assert read(long.wrong[1], tokenizer) == ("who is Ada a b", "c d </s>")
    assert (long.answer.example.answer, long.wrong[1].example.answer) == ("blue", "c d")
    assert long.paraphrase.start == long.answer.start
    assert read(short.answer, tokenizer) == ("who is Bela", "Rome </s>")
    with pytest.raises(UserError, match="the answers of the forget split are of one token each"):
        encode_split(replace(split, examples=split.examples[1:]), tokenizer, "{prompt}", 64)
