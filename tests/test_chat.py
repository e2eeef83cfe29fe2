"""Chat templates of every family: what the model reads, what is scored, and that what was learned is found again."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stillknows.auditing.observe import observe
from stillknows.model.encoding import EncodedAnswer, EncodedItem, encode, encode_split
from stillknows.model.target import LocalTarget
from stillknows.registry import bind
from stillknows.scoring import score
from stillknows.training.loop import fit
from stillknows.training.objective_inputs import Term
from stillknows.training.settings import Settings
from stillknows.types import Example, Split

PAIRS = [("Where is Ada?", "in Paris"), ("Where does Bela live?", "in Rome"), ("Who end?", "end"), ("Is it?", "A")]
EXAMPLES = [Example(str(i), question, answer, str(i)) for i, (question, answer) in enumerate(PAIRS)]
PADS = [None, "eos", "unk"]


class Family(NamedTuple):
    """A chat template, the tokenizer's special tokens, and what "Q" asked and "A" answered must look like."""

    template: str
    special: tuple[str, ...]
    bos: str | None
    eos: str
    prompt: str
    answer: str


def turns(before: str, after: str, opening: str) -> str:
    """A template that frames every turn alike and opens the assistant's."""
    return (
        "{% for m in messages %}{{ '" + before + "' + m['content'] + '" + after + "' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + opening + "' }}{% endif %}"
    )


def instructions(before: str, after: str) -> str:
    """Llama 2's and Mistral's: a question between marks, an answer with a space before it."""
    return (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '" + before + "' + m['content'] + '"
        "" + after + "' }}{% else %}{{ ' ' + m['content'] | trim + end }}{% endif %}{% endfor %}"
    )


HEADER = "<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n"
FAMILIES = {
    "llama 2": Family(
        instructions("[INST] ", " [/INST]").replace("end }}", "' ' + eos_token }}"),
        (), "<s>", "</s>", "<s>[INST] Q [/INST]", " A</s>",
    ),
    "llama 3": Family(
        "{{ bos_token }}" + turns(HEADER, "<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\\n\\n"),
        ("<|start_header_id|>", "<|end_header_id|>"), "<|begin_of_text|>", "<|eot_id|>",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "A<|eot_id|>",
    ),
    "llama 3, ends of texts": Family(
        "{{ bos_token }}" + turns(HEADER, "<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\\n\\n"),
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|begin_of_text|>", "<|end_of_text|>",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "A<|eot_id|>",
    ),
    "qwen": Family(
        turns("<|im_start|>' + m['role'] + '\\n", "<|im_end|>\\n", "<|im_start|>assistant\\n"),
        ("<|im_start|>",), None, "<|im_end|>", "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "A<|im_end|>",
    ),
    "gemma": Family(
        "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>",
        "<bos><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n", "A<end_of_turn>",
    ),
    "mistral 3": Family(
        instructions("[INST] ", "[/INST]").replace("end }}", "eos_token }}"),
        ("[INST]", "[/INST]"), "<s>", "</s>", "<s>[INST] Q[/INST]", " A</s>",
    ),
    "phi 3": Family(
        turns("<|' + m['role'] + '|>\\n", "<|end|>\\n", "<|assistant|>\\n").replace(
            "{% endif %}", "{% else %}{{ eos_token }}{% endif %}"
        ),
        ("<|user|>", "<|assistant|>", "<|end|>"), "<s>", "<|endoftext|>",
        "<|user|>\nQ<|end|>\n<|assistant|>\n", "A<|end|>",
    ),
    "zephyr": Family(
        turns("<|' + m['role'] + '|>\\n", "' + eos_token + '\\n", "<|assistant|>\\n"),
        (), "<s>", "</s>", "<|user|>\nQ</s>\n<|assistant|>\n", "A</s>",
    ),
    "nothing": Family("{% for m in messages %}{{ m['content'] }}{% endfor %}", (), "<s>", "</s>", "Q", "A</s>"),
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def make_tokenizer(family: Family, pad: str | None = None) -> Any:
    """A byte-level BPE with the family's special tokens, which opens texts with the family's first token itself."""
    named = ["<unk>", *([family.bos] if family.bos else []), family.eos]
    special = list(dict.fromkeys([*named, *family.special]))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300 + len(special),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([f"[INST] {question} [/INST] {answer}" for question, answer in PAIRS] * 9, trainer)
    if family.bos:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, special.index(family.bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token={"eos": family.eos, "unk": "<unk>", None: None}[pad],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = family.template
    return tokenizer


def read(tokenizer: Any, item: EncodedAnswer) -> tuple[str, str]:
    return tokenizer.decode(item.ids[: item.start]), tokenizer.decode(item.ids[item.start :])


@pytest.mark.parametrize("pad", PADS)
def test_the_prompt_is_the_rendered_template_and_the_answer_is_the_answer(family: Family, pad: str | None) -> None:
    tokenizer = make_tokenizer(family, pad)
    for example, item in zip(EXAMPLES, encode(EXAMPLES, tokenizer, "chat", 500), strict=True):
        turn = [{"role": "user", "content": example.prompt}]
        prompt = family.prompt.replace("Q", example.prompt)
        assert prompt == tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        assert read(tokenizer, item) == (prompt, family.answer.replace("A", example.answer))
        assert item.ids[: item.start] == tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        assert item.ends
        assert item.ids.count(tokenizer.bos_token_id) == (family.prompt.count(family.bos) if family.bos else 0)


def test_the_scored_text_is_what_the_template_makes_of_the_conversation(family: Family) -> None:
    """Up to the answer's end, after which templates break the line or close the text."""
    tokenizer = make_tokenizer(family)
    for example, item in zip(EXAMPLES, encode(EXAMPLES, tokenizer, "chat", 500), strict=True):
        turns = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.answer}]
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        before, after = read(tokenizer, item)
        words = after.removesuffix(tokenizer.decode(item.ids[-1:]))
        assert whole.startswith(before + words)
        rest = whole.removeprefix(before + words).strip()
        assert not rest or rest.startswith(tokenizer.decode(item.ids[-1:]))


def test_every_answer_to_a_prompt_is_framed_alike(family: Family) -> None:
    tokenizer = make_tokenizer(family)
    example = Example("0", "Where is Ada?", "in Paris", "0", "Paris", ("in Rome", "it"))
    [item] = encode_split(Split("s", "forget", (example,)), tokenizer, "chat", 500, lowered=True)
    found = [read(tokenizer, e) for e in (item.answer, item.paraphrase, *item.wrong, item.lowered)]
    answers = ["in Paris", "Paris", "in Rome", "it", "in paris"]
    prompt = family.prompt.replace("Q", example.prompt)
    assert found == [(prompt, family.answer.replace("A", answer)) for answer in answers]


def learned(items: list[EncodedAnswer], tokenizer: Any) -> LlamaForCausalLM:
    """Train a small Llama from nothing on the items' answers, with the end of a text that its tokenizer names."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=48,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=128,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=None,
            )
        )
        fit(model, [Term(bind("objective", "nll"), items)], Settings(lr=4e-3, epochs=150, batch_size=4, warmup=10))
    return model.eval()


def test_what_was_learned_is_found_in_full(family: Family) -> None:
    """pad = eos, where masks made from pad ids lose the ends of the prompt's turns."""
    tokenizer = make_tokenizer(family, "eos")
    items = encode(EXAMPLES, tokenizer, "chat", 120)
    model = learned(items, tokenizer)
    seen = observe(LocalTarget("m", model, tokenizer), [EncodedItem(item) for item in items], fields=["generations"])
    assert seen.generations == tuple(answer for _, answer in PAIRS)
    for name in ("rouge_l", "exact_memorisation", "extraction_strength"):
        assert score(bind("metric", name), seen).tolist() == [1, 1, 1, 1]
    assert score(bind("metric", "answer_probability"), seen).min() > 0.9


def test_the_pad_token_changes_nothing(family: Family) -> None:
    seen = []
    for pad in PADS:
        tokenizer = make_tokenizer(family, pad)
        items = encode(EXAMPLES, tokenizer, "chat", 120)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                num_attention_heads=2, pad_token_id=tokenizer.pad_token_id, bos_token_id=1, eos_token_id=2,
            )  # fmt: skip
            model = LlamaForCausalLM(config)
            model.model.embed_tokens.weight.data.normal_()  # also that of the pad token, which is made as zeros
        target = LocalTarget("m", model.eval(), tokenizer)
        seen.append(observe(target, [EncodedItem(item) for item in items], fields=["generations"]))
    for other in seen[1:]:
        assert other.generations == seen[0].generations
        for a, b in zip(other.log_probs, seen[0].log_probs, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_space_that_belongs_to_the_first_word_is_scored_with_it() -> None:
    """Llama 2's pieces mark the space before a word: "[/INST]" and then "▁in", as in training."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "▁in", "in", "▁Paris"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    words.add_special_tokens(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = FAMILIES["llama 2"].template
    [item] = encode(EXAMPLES[:1], tokenizer, "chat", 50)
    assert tokenizer.convert_ids_to_tokens(item.ids[item.start :]) == ["▁in", "▁Paris", "</s>"]


# templates in words


def test_a_template_that_writes_the_first_token_itself_does_not_double_it() -> None:
    tokenizer = make_tokenizer(FAMILIES["llama 2"])
    [item] = encode(EXAMPLES[:1], tokenizer, "<s>[INST] {prompt} [/INST]", 500)
    assert read(tokenizer, item) == ("<s>[INST] Where is Ada? [/INST]", " in Paris</s>")


@pytest.mark.parametrize("closes", [False, True])
def test_a_template_that_ends_a_turn_leaves_its_end_in_the_prompt(closes: bool) -> None:
    """Also with a tokenizer that closes texts by itself."""
    tokenizer = make_tokenizer(FAMILIES["zephyr"])
    if closes:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    [item] = encode(EXAMPLES[:1], tokenizer, "{prompt}</s>", 500)
    assert read(tokenizer, item) == ("<s>Where is Ada?</s>", " in Paris</s>")
