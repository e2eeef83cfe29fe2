"""One observation holds what a plain loop over single items finds, whatever the batch, and leaves the model alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stillknows.auditing.observe import EXTRA_TOKENS, OPTIONAL, observe
from stillknows.model import generate as generating
from stillknows.model import layers, logprobs
from stillknows.model import target as targets
from stillknows.model.encoding import EncodedAnswer, EncodedItem, encode_split
from stillknows.model.forward import score_items
from stillknows.model.layers import OutputLayer, output_layer
from stillknows.model.target import LocalTarget
from stillknows.registry import bind, plugins
from stillknows.scoring import score
from stillknows.types import Decoding, Example, Floats, Observations, Split
from stillknows.variants.variant import parse_variant

TEMPLATE = "what {prompt} is"
METRICS = list(plugins("metric", "example"))
NAMED = {"wordings"}  # by the attack that words the prompts, not by what the model does
DECODING = Decoding(new_tokens=6, samples=3, temperature=1.5)
EXAMPLES = (
    Example("capital", "the capital of", "Paris", "capital", "the red Paris", ("Rome", "blue and green")),
    Example("river", "river of the dog flows in", "the green Ada", "river", None, ("a cat", "Bela", "red in blue")),
    Example("river again", "river of the dog flows in", "Bela and Ada", "river", "Bela in Rome", ("a dog and a cat",)),
    Example("colour", "colour of Ada", "red and blue", "colour"),
    Example("text", "", "Ada is the dog of Rome and the cat is red", "text"),
    Example("short", "who", "a", "short", "b", ("c", "d")),
)


def asked(tokenizer: Any, examples: Sequence[Example] = EXAMPLES) -> list[EncodedItem]:
    return encode_split(Split("s", "forget", tuple(examples)), tokenizer, TEMPLATE, 60, lowered=True)


def look(model: Any, tokenizer: Any, items: Sequence[EncodedItem], decoding: Decoding = DECODING) -> Observations:
    """Observe everything that can be observed."""
    return observe(LocalTarget("m", model, tokenizer), items, fields=OPTIONAL, decoding=decoding)


def in_batches_of(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "score_items", partial(score_items, batch_size=size))
    monkeypatch.setattr(generating, "GENERATION_BATCH", size)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read no item alone besides."""
    for name in ("require_greedy_alone", "require_scores_alone"):
        monkeypatch.setattr(targets, name, lambda *_: None)


@pytest.fixture
def control(make_model: Callable[..., Any]) -> Any:
    return make_model(seed=9)


def test_every_field_is_observed_and_every_metric_scored(model: Any, control: Any, tokenizer: Any) -> None:
    """So that the comparisons below compare something."""
    items = asked(tokenizer)
    seen, reference = look(model, tokenizer, items), observe(LocalTarget("m", control, tokenizer), items)
    assert {field.name for field in fields(seen) if getattr(seen, field.name) is None} == NAMED
    for name in METRICS:
        assert np.isfinite(score(bind("metric", name), seen, reference)).any(), name


def test_what_costs_more_is_observed_on_request_only(model: Any, tokenizer: Any) -> None:
    items = [replace(item, lowered=None) for item in asked(tokenizer)]
    seen = observe(LocalTarget("m", model, tokenizer), items)
    assert {field.name for field in fields(seen) if getattr(seen, field.name) is None} == OPTIONAL | NAMED


# (a) batches and order


def scores(model: Any, control: Any, tokenizer: Any, items: Sequence[EncodedItem]) -> dict[str, Floats]:
    seen, reference = look(model, tokenizer, items), observe(LocalTarget("m", control, tokenizer), items)
    return {name: score(bind("metric", name), seen, reference) for name in METRICS}


def test_no_metric_depends_on_batch_or_order(
    family_model: Any, control: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples are drawn by an item's place: in another order their metric is another draw, as good as the first."""
    items, order = asked(tokenizer), [3, 5, 0, 4, 2, 1]
    together = scores(family_model, control, tokenizer, items)
    moved = scores(family_model, control, tokenizer, [items[i] for i in order])
    in_batches_of(1, monkeypatch)
    alone = scores(family_model, control, tokenizer, items)
    for name in METRICS:
        np.testing.assert_allclose(alone[name], together[name], rtol=1e-5, atol=1e-5, err_msg=name)
        if "samples" not in bind("metric", name).plugin.fields:
            np.testing.assert_allclose(moved[name], together[name][order], rtol=1e-5, atol=1e-5, err_msg=name)


def test_texts_do_not_depend_on_the_batch(family_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    items, fields = asked(tokenizer), ["generations", "samples"]
    target = LocalTarget("m", family_model, tokenizer)
    together = observe(target, items, fields=fields, decoding=DECODING)
    in_batches_of(1, monkeypatch)
    alone = observe(target, items, fields=fields, decoding=DECODING)
    assert (alone.generations, alone.samples) == (together.generations, together.samples)


# (b) likelihoods


@torch.no_grad()
def plain(model: Any, item: EncodedAnswer) -> dict[str, np.ndarray]:
    """One item at a time, in float64, from the model's own logits: no batch, padding, chunk or cache."""
    log_p_LV = model(input_ids=torch.tensor([item.ids]), use_cache=False).logits[0].log_softmax(-1)
    rows_AV = log_p_LV[max(1, item.start) - 1 : -1]
    targets_A = torch.tensor(item.ids[max(1, item.start) :])
    p_AV = rows_AV.exp()
    entropies_A = -(p_AV * rows_AV).sum(-1)
    variances_A = (p_AV * rows_AV**2).sum(-1) - entropies_A**2
    found = {
        "log_probs": rows_AV.gather(1, targets_A[:, None])[:, 0],
        "hits": rows_AV.argmax(-1) == targets_A,
        "entropies": entropies_A,
        "spreads": variances_A.sqrt(),
    }
    return {name: values.numpy() for name, values in found.items()}


def assert_equal(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_likelihoods_equal_a_plain_loop_in_float64(
    family_model: Any, tokenizer: Any, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With prefixes that are read once, and with every answer read from its own start."""
    monkeypatch.setattr("stillknows.model.forward.WORTH_SHARING", 0.0 if shared else 1.0)
    items = asked(tokenizer)
    seen = observe(LocalTarget("m", family_model, tokenizer), items)
    exact = copy.deepcopy(family_model).double()
    for i, item in enumerate(items):
        expected = plain(exact, item.answer)
        assert seen.hits[i].tolist() == expected["hits"].tolist()
        for name in ("log_probs", "entropies", "spreads"):
            assert_equal(getattr(seen, name)[i], expected[name])
        for name, other in (("paraphrase_log_probs", item.paraphrase), ("lowered_log_probs", item.lowered)):
            assert_equal(getattr(seen, name)[i], np.empty(0) if other is None else plain(exact, other)["log_probs"])
        assert len(seen.wrong_log_probs[i]) == len(item.wrong)
        for found, wrong in zip(seen.wrong_log_probs[i], item.wrong, strict=True):
            assert_equal(found, plain(exact, wrong)["log_probs"])
    assert seen.ends.tolist() == [True, True, True, True, False, True]


def test_placebos_are_scored_as_the_true_answer_would_be_and_change_nothing_else(model: Any, tokenizer: Any) -> None:
    split = Split("forget", "forget", (EXAMPLES[0], replace(EXAMPLES[0], id="other", answer="Rome")))
    plain = encode_split(split, tokenizer, "{prompt}", 32)
    items = encode_split(
        split, tokenizer, "{prompt}", 32, placebos=lambda e: ("Rome", "Ada") if e.answer != "Rome" else ()
    )
    target = LocalTarget("m", model, tokenizer)
    alone, seen = (observe(target, x, fields=fields) for x, fields in ((plain, ()), (items, ["placebo_log_probs"])))
    assert alone.placebo_log_probs is None
    (rome, _), none = seen.placebo_log_probs
    assert none == ()
    np.testing.assert_allclose(rome, seen.log_probs[1], atol=1e-5)
    np.testing.assert_allclose(seen.log_probs[0], alone.log_probs[0], atol=1e-5)
    assert [item.answer for item in items] == [item.answer for item in plain]


def test_a_placebo_that_is_too_long_is_cut(tokenizer: Any) -> None:
    split = Split("forget", "forget", EXAMPLES[:1])
    (item,) = encode_split(split, tokenizer, "{prompt}", 12, placebos=lambda e: ("red " * 30, "Rome"))
    assert [len(placebo.ids) for placebo in item.placebos] == [12, 5]
    assert [placebo.ends for placebo in item.placebos] == [False, True]


def test_lower_case_and_other_answers_are_of_the_same_prompt(tokenizer: Any) -> None:
    [item] = asked(tokenizer, EXAMPLES[:1])
    words = [
        " ".join(tokenizer.convert_ids_to_tokens(e.ids[e.start :]))
        for e in (item.answer, item.paraphrase, *item.wrong, item.lowered)
    ]
    assert words == ["Paris </s>", "the red Paris </s>", "Rome </s>", "blue and green </s>", "<unk> </s>"]
    prompts = {e.ids[: e.start] for e in (item.answer, item.paraphrase, *item.wrong, item.lowered)}
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in prompts] == [["what", "the", "capital", "of", "is"]]


# (c) gradients


def test_gradient_norms_equal_autograd_by_hand(family_model: Any, tokenizer: Any) -> None:
    items = asked(tokenizer)
    seen = observe(LocalTarget("m", family_model, tokenizer), items, fields=["gradient_norms"])
    exact = copy.deepcopy(family_model).double().requires_grad_(True)
    for item, found in zip(items, seen.gradient_norms, strict=True):
        exact.zero_grad(set_to_none=True)
        logits_LV = exact(input_ids=torch.tensor([item.answer.ids])).logits[0]
        start = item.answer.start
        torch.nn.functional.cross_entropy(logits_LV[start - 1 : -1], torch.tensor(item.answer.ids[start:])).backward()
        squares = [p.grad.square().sum() for p in exact.parameters() if p.grad is not None]
        assert found == pytest.approx(torch.stack(squares).sum().sqrt().item(), rel=1e-4)


def test_gradients_leave_no_trace(model: Any, tokenizer: Any) -> None:
    """Which parameters are trained, and the gradients that they hold."""
    first, second, *_ = model.parameters()
    first.requires_grad_(True)
    first.grad = torch.full_like(first, 7.0)
    observe(LocalTarget("m", model, tokenizer), asked(tokenizer), fields=["gradient_norms"])
    assert [p.requires_grad for p in model.parameters()] == [p is first for p in model.parameters()]
    assert bool((first.grad == 7).all())
    assert second.grad is None
    assert torch.is_grad_enabled()


# (d) decoding


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("stops", "text"),
    [
        ((), "red and the dog the cat"),
        (("the",), "red and"),
        (("cat", "dog"), "red and the"),
        (("dog", "the"), "red and"),
        (("red",), ""),
        (("Rome",), "red and the dog the cat"),
    ],
)
def test_generations_are_cut_before_the_first_of_the_stops(
    model: Any, tokenizer: Any, stops: tuple[str, ...], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = tokenizer("red and the dog the cat")["input_ids"]
    monkeypatch.setattr(targets, "generate", lambda _model, _layer, prompts, *_: [row] * len(prompts))
    seen = look(model, tokenizer, asked(tokenizer), Decoding(stop=stops, samples=2))
    assert seen.generations == (*[text] * 4, None, text)
    assert seen.samples == (*[(text, text)] * 4, None, (text, text))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("new_tokens", [1, 5, None])
def test_generations_have_so_many_tokens_at_most(
    model: Any, tokenizer: Any, new_tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not given: the true answer's tokens, its end and EXTRA_TOKENS more."""
    asked_for: list[Sequence[int]] = []

    def generate(_model: Any, _layer: Any, prompts: Any, limits: Sequence[int], *_: Any) -> list[list[int]]:
        asked_for.append(limits)
        return [[5]] * len(prompts)

    monkeypatch.setattr(targets, "generate", generate)
    decoding = Decoding(new_tokens=new_tokens)
    observe(LocalTarget("m", model, tokenizer), asked(tokenizer), fields=["generations"], decoding=decoding)
    words = [len(e.answer.split()) for e in EXAMPLES if e.prompt]
    assert asked_for == [[new_tokens or count + 1 + EXTRA_TOKENS for count in words]]


def test_samples_are_shared_out_among_temperatures_that_draw_independently(model: Any, tokenizer: Any) -> None:
    items, alone = asked(tokenizer), replace(DECODING, samples=3, temperature=3.0)
    mixed = look(model, tokenizer, items, replace(alone, samples=5, temperatures=(1e-3, 3.0))).samples
    greedy = look(model, tokenizer, items, alone).generations
    for samples, likeliest in zip(mixed, greedy, strict=True):
        if likeliest is not None:
            assert samples[:3] == (likeliest,) * 3
            assert len(samples) == 5
    twice = look(model, tokenizer, items, replace(alone, samples=6, temperatures=(3.0, 3.0))).samples
    assert all(samples is None or samples[:3] != samples[3:] for samples in twice)
    assert look(model, tokenizer, items, alone).samples == tuple(samples and samples[:3] for samples in twice)


def test_samples_are_as_many_as_asked_for_and_differ(model: Any, tokenizer: Any) -> None:
    seen = look(model, tokenizer, asked(tokenizer), replace(DECODING, samples=7))
    assert [None if s is None else len(s) for s in seen.samples] == [7, 7, 7, 7, None, 7]
    assert seen.samples[1] != seen.samples[2]  # one prompt asked twice
    assert all(len(set(s)) > 1 for s in seen.samples if s is not None)


def test_samples_follow_the_seed(model: Any, tokenizer: Any) -> None:
    items = asked(tokenizer)
    target = LocalTarget("m", model, tokenizer)
    first, again, other = (
        observe(target, items, fields=["samples"], decoding=replace(DECODING, seed=seed)).samples for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_samples_at_a_low_temperature_are_the_greedy_answer(model: Any, tokenizer: Any) -> None:
    seen = look(model, tokenizer, asked(tokenizer), replace(DECODING, temperature=1e-4))
    assert [s and set(s) for s in seen.samples] == [g if g is None else {g} for g in seen.generations]


def opened(tokenizer: Any) -> Any:
    """Let the tokenizer put <s> before each text."""
    tokenizer.bos_token = "<s>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


TEXT = "the dog of Ada is red and the cat is in Rome"  # 12 tokens


@pytest.mark.parametrize(
    ("size", "context", "lengths"),
    [(5, 60, [5, 5, 5]), (6, 60, [6, 6, 3]), (13, 60, [13]), (50, 60, [13]), (50, 7, [7, 7]), (12, 60, [12, 2])],
)
def test_pieces_hold_every_token_of_a_text_once(tokenizer: Any, size: int, context: int, lengths: list[int]) -> None:
    """Each opens with <s>, the last may be short, none is longer than the model's context."""
    split = Split("s", "forget", (Example("t", "", TEXT, "t"), Example("u", "", "a dog", "u")), piece_tokens=size)
    items = [item.answer for item in encode_split(split, opened(tokenizer), TEMPLATE, context)]
    *pieces, other = [tokenizer.convert_ids_to_tokens(item.ids) for item in items]
    assert [len(piece) for piece in pieces] == lengths
    assert all(piece[0] == "<s>" and "<s>" not in piece[1:] for piece in pieces)
    assert [token for piece in pieces for token in piece[1:]] == TEXT.split()
    assert other == ["<s>", "a", "dog"]
    assert [item.example.id for item in items] == [*(f"t#{k}" for k in range(1, len(pieces) + 1)), "u#1"]
    assert {item.example.fact for item in items[:-1]} == {"t"}
    assert [item.example.answer for item in items[:-1]] == [" ".join(piece[1:]) for piece in pieces]
    assert {(item.start, item.ends, item.truncated) for item in items} == {(1, False, False)}


def test_a_last_piece_that_nothing_predicts_is_left_out(tokenizer: Any) -> None:
    """Without an opening token the first token of a piece is not scored, and a piece of one has nothing to score."""
    split = Split("s", "forget", (Example("t", "", TEXT, "t"),), piece_tokens=11)
    assert [len(item.answer.ids) for item in encode_split(split, tokenizer, TEMPLATE, 60)] == [11]


@pytest.mark.parametrize(("kept", "answer"), [(2, "the green"), (3, "the green Ada"), (9, "the green Ada")])
def test_answer_tokens_shorten_the_true_answer_alone(tokenizer: Any, kept: int, answer: str) -> None:
    example = replace(EXAMPLES[1], paraphrase="in the red dog Rome", wrong=("a cat and Bela",))
    [item] = encode_split(Split("s", "forget", (example,), answer_tokens=kept), opened(tokenizer), TEMPLATE, 60)
    assert item.answer.example.answer == answer
    assert tokenizer.decode(item.answer.ids[item.answer.start : -1]) == answer
    assert item.answer.ends
    assert tokenizer.decode(item.paraphrase.ids[item.paraphrase.start : -1]) == "in the red dog Rome"
    assert tokenizer.decode(item.wrong[0].ids[item.wrong[0].start : -1]) == "a cat and Bela"


def test_a_split_brings_its_own_template(tokenizer: Any) -> None:
    [item] = encode_split(Split("s", "forget", EXAMPLES[:1], "who {prompt}"), tokenizer, TEMPLATE, 60)
    assert tokenizer.decode(item.answer.ids[: item.answer.start]) == "who the capital of"


# (e) memory


class Largest(TorchDispatchMode):
    """Remembers the most elements that a result with one row per token of the vocabulary had."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.elements = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (self.vocabulary,):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_logits_of_a_whole_batch_exist(
    make_model: Callable[..., Any],
    make_items: Callable[..., list[Any]],
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """16 answers of 50 tokens would be 16·50·V logits at once; here 40·V are let be, and each backward pass obeys."""
    vocabulary = 131
    model = make_model(vocabulary=vocabulary)
    items = [EncodedItem(item, paraphrase=item, lowered=item) for item in make_items([50] * 16, vocabulary=vocabulary)]
    monkeypatch.setitem(logprobs.CHUNK_LOGITS, "cpu", 40 * vocabulary)
    with Largest(vocabulary) as largest:
        seen = observe(LocalTarget("m", model, tokenizer), items, fields=["lowered_log_probs", "gradient_norms"])
    assert largest.elements == 40 * vocabulary
    assert [len(answer) for answer in seen.log_probs] == [50] * 16


@pytest.mark.usefixtures("unchecked")
def test_generation_makes_logits_of_one_place_per_row(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    called = OutputLayer.__call__

    def recorded(layer: OutputLayer, hidden: Tensor) -> Tensor:
        shapes.append(tuple(hidden.shape[:-1]))
        return called(layer, hidden)

    items, layer = asked(tokenizer), output_layer(model)
    monkeypatch.setattr(OutputLayer, "__call__", recorded)
    monkeypatch.setattr(targets, "output_layer", lambda _: layer)  # whose own check reads a few places
    observe(LocalTarget("m", model, tokenizer), items, fields=["generations"], decoding=DECODING)
    scored = sum(len(e.ids) - e.start for i in items for e in (i.answer, i.paraphrase, *i.wrong, i.lowered) if e)
    read = [shape for shape in shapes if shape != (scored,)]
    assert len(shapes) == len(read) + 1
    assert read[0] == (5,)
    assert all(len(shape) == 1 and shape <= (5,) for shape in read)


# (f) nothing is left behind


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(model: Any, tokenizer: Any, training: bool) -> None:
    model.train(training)
    model.generation_config.repetition_penalty, model.generation_config.temperature = 1.7, 0.3
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(model.generation_config.to_dict())
    random = torch.get_rng_state(), np.random.get_state()[1].tolist()
    look(model, tokenizer, asked(tokenizer))
    assert [module.training for module in model.modules()] == [training] * len(list(model.modules()))
    assert model.generation_config.to_dict() == before[1]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[0][name])
    assert torch.equal(torch.get_rng_state(), random[0])
    assert np.random.get_state()[1].tolist() == random[1]


def test_the_models_own_generation_settings_are_not_applied(model: Any, tokenizer: Any) -> None:
    items = asked(tokenizer)
    before = look(model, tokenizer, items)
    settings = model.generation_config
    settings.do_sample, settings.temperature, settings.repetition_penalty, settings.max_length = True, 9.0, 3.0, 1
    after = look(model, tokenizer, items)
    assert (after.generations, after.samples) == (before.generations, before.samples)


def test_the_models_own_list_of_ends_is(model: Any, tokenizer: Any) -> None:
    """Chat models end their turn with another token than their texts."""
    items = asked(tokenizer)
    whole = observe(LocalTarget("m", model, tokenizer), items, fields=["generations"], decoding=DECODING).generations
    second = whole[0].split()[1]
    model.generation_config.eos_token_id = [2, tokenizer.convert_tokens_to_ids(second)]
    ended = observe(LocalTarget("m", model, tokenizer), items, fields=["generations"], decoding=DECODING).generations
    assert ended[0] == whole[0].split(f" {second}")[0]


def test_a_model_is_tried_once_for_all_questions(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three passes of four tokens show that its output layer is understood, for all variants and splits together."""
    tried: list[Any] = []
    check = layers._check
    monkeypatch.setattr(layers, "_check", lambda *given: (tried.append(given), check(*given)))
    for spec in ("full", "int8", "bf16+int8_activations"):
        with parse_variant(spec).applied(model):
            for split in (EXAMPLES[:2], EXAMPLES[2:]):
                observe(LocalTarget("m", model, tokenizer), asked(tokenizer, split))
    assert len(tried) == 1
