"""lm-eval's tasks on tiny models: numbers that can be computed by hand, and nothing left behind."""

from __future__ import annotations

import copy
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM

from stillknows.auditing import harness
from stillknows.errors import UserError
from stillknows.model.encoding import encode
from stillknows.model.forward import score_items
from stillknows.model.layers import output_layer
from stillknows.progress import shown
from stillknows.types import Example, Interval
from stillknows.variants.compress import compressed, parse_variant

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")

Z = 1.6448536269514722  # 95 % of the normal distribution lie below
QUESTIONS = [f"{a} {b} is" for a in ("what", "where", "who", "the") for b in ("river", "capital", "colour")]
CHOICES = ["red", "blue dog", "green and a cat"]
ASK = {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": CHOICES}
RIGHT = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
BRIER = {"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False}
SAME = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
CONTINUE = {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
SAMPLE = {"max_gen_toks": 1, "do_sample": True, "temperature": 1.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where `write` puts tasks."""
    return tmp_path / "tasks"


@pytest.fixture
def write(tmp_path: Path, folder: Path) -> Callable[..., None]:
    """Return write(name, documents, **settings): a task with these documents, by default of multiple choice."""

    def write(name: str, documents: Sequence[dict[str, Any]], **settings: Any) -> None:
        folder.mkdir(exist_ok=True)
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
        source = {"data_files": {"test": str(data), "train": str(data)}, "cache_dir": str(tmp_path / "cache")}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": source, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps(task | settings), encoding="utf-8")  # JSON is YAML

    return write


@pytest.fixture
def says_red(make_model: Callable[..., Any], tokenizer: Any) -> Any:
    """A model for which "red" always comes next, with a probability of practically 1."""
    model = make_model("phi")
    model.lm_head.bias.data[tokenizer.convert_tokens_to_ids("red")] = 100.0
    return model


def questions(labels: Sequence[int]) -> list[dict[str, Any]]:
    return [{"question": question, "label": label} for question, label in zip(QUESTIONS, labels, strict=False)]


def answers(texts: Sequence[str]) -> list[dict[str, Any]]:
    return [{"question": question, "answer": text} for question, text in zip(QUESTIONS, texts, strict=False)]


def log_likelihood(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """ln p of an answer by the project's own code, without the end of sequence."""
    items = encode([Example("one", prompt, answer, "one")], tokenizer, "{prompt}", 64)
    [(_, scores)] = score_items(model, output_layer(model), items)
    return float(scores.log_probs[:-1].sum())


def test_accuracy_is_that_of_the_projects_own_log_likelihoods(
    write: Callable[..., None], folder: Path, model: Any, tokenizer: Any
) -> None:
    labels = [i % 3 for i in range(len(QUESTIONS))]
    write("colours", questions(labels), **ASK, doc_to_target="label", metric_list=[RIGHT])
    found = harness.measure(model, tokenizer, harness.load(["colours"], include=folder))
    picked = [
        int(np.argmax([log_likelihood(model, tokenizer, question, choice) for choice in CHOICES]))
        for question in QUESTIONS
    ]
    share, n = float(np.mean(np.equal(picked, labels))), len(labels)
    assert 0 < share < 1
    margin = Z * math.sqrt(share * (1 - share) / (n - 1))
    assert found == {("colours", "acc"): pytest.approx(Interval(share, share - margin, share + margin, n))}


@torch.no_grad()
def test_rotations_that_change_with_length_are_those_of_each_text_alone(
    write: Callable[..., None], folder: Path, tokenizer: Any
) -> None:
    """Texts of 3, 4 and 6 tokens before the last, and a switch at 5, by which a batch would turn all of them."""
    long: Any = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 5}
    long |= {"short_factor": [1.0] * 8, "long_factor": [9.0] * 8}
    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Phi3Config(
            vocab_size=32, **sizes, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
            original_max_position_embeddings=5, rope_parameters=long, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        model = Phi3ForCausalLM(config).eval().requires_grad_(False)
    labels = [i % 3 for i in range(len(QUESTIONS))]
    write("colours", questions(labels), **ASK, doc_to_target="label", metric_list=[BRIER])
    found = harness.measure(model, tokenizer, harness.load(["colours"], include=folder))

    def log_p(question: str, choice: str) -> Tensor:
        ids = tokenizer(f"{question} {choice}")["input_ids"]
        logits_LV = model(input_ids=torch.tensor([ids[:-1]])).logits[0]
        return sum(logits_LV.log_softmax(-1)[i - 1, ids[i]] for i in range(3, len(ids)))

    logs = torch.stack([torch.stack([log_p(question, choice) for choice in CHOICES]) for question in QUESTIONS])
    gaps = logs.softmax(-1) - torch.nn.functional.one_hot(torch.tensor(labels), 3)
    assert found["colours", "brier_score"].value == pytest.approx(gaps.square().sum(-1).mean().item(), rel=1e-4)


def test_a_model_that_always_says_red(write: Callable[..., None], folder: Path, says_red: Any, tokenizer: Any) -> None:
    write("choices", questions([0, 0, 0, 1]), **ASK, doc_to_target="label", metric_list=[RIGHT])
    write("words", answers(["red", "red", "red", "blue"]), **CONTINUE, generation_kwargs={"max_gen_toks": 1})
    found = harness.measure(says_red, tokenizer, harness.load(["choices", "words"], include=folder), batch_size=3)
    expected = pytest.approx(Interval(0.75, 0.75 - Z * 0.25, 0.75 + Z * 0.25, 4))  # SE: √(¾·¼/3) = ¼
    assert found == {("choices", "acc"): expected, ("words", "exact_match"): expected}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perplexity_is_resampled_and_nothing_is_printed(
    dtype: torch.dtype,
    write: Callable[..., None],
    folder: Path,
    model: Any,
    tokenizer: Any,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("multiprocessing.Pool", None)  # a copy of a process with torch's threads can hang
    model.to(dtype)
    texts = ["red", "blue", "green", "dog", "cat"]
    perplexity = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    rate = {"output_type": "loglikelihood", "doc_to_target": " {{answer}}", "metric_list": [perplexity]}
    write("texts", answers(texts), **CONTINUE | rate)
    found = harness.measure(model, tokenizer, harness.load(["texts"], include=folder))
    scores = [log_likelihood(model, tokenizer, q, text) for q, text in zip(QUESTIONS, texts, strict=False)]
    result = found["texts", "perplexity"]
    assert isinstance(result, Interval)
    assert result.value == pytest.approx(math.exp(-np.mean(scores)), rel=1e-4)
    assert 0 < result.high - result.value < math.inf
    assert tuple(capfd.readouterr()) == ("", "")


def test_a_group_stands_for_its_tasks(write: Callable[..., None], folder: Path, says_red: Any, tokenizer: Any) -> None:
    write("small", questions([0, 1]), **ASK, doc_to_target="label", metric_list=[RIGHT])
    write("large", questions([0, 0, 0, 0, 0, 1]), **ASK, doc_to_target="label", metric_list=[RIGHT])
    group = {"group": "both", "task": ["small", "large"]}
    averaged = group | {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (folder / "both.yaml").write_text(json.dumps(averaged))
    result = harness.measure(says_red, tokenizer, harness.load(["both"], include=folder))
    assert list(result) == [("both", "acc")]
    value, _, _, n = result["both", "acc"]
    assert (value, n) == (0.75, 8)
    (folder / "both.yaml").write_text(json.dumps(group))
    parts = harness.measure(says_red, tokenizer, harness.load(["both"], include=folder))
    assert [(place, result.value) for place, result in parts.items() if isinstance(result, Interval)] == [
        (("small", "acc"), 0.5),
        (("large", "acc"), pytest.approx(5 / 6)),
    ]


def test_without_a_standard_error_the_bounds_are_infinite(
    write: Callable[..., None], folder: Path, model: Any, tokenizer: Any
) -> None:
    write("colours", questions([0, 1, 2]), **ASK, doc_to_target="label", metric_list=[BRIER])
    result = harness.measure(model, tokenizer, harness.load(["colours"], include=folder))["colours", "brier_score"]
    assert isinstance(result, Interval)
    assert (result.low, result.high, result.n) == (-math.inf, math.inf, 3)


def test_the_models_own_generation_settings_do_not_count(
    write: Callable[..., None], folder: Path, says_red: Any, tokenizer: Any
) -> None:
    write("words", answers(["red red red", "red red red"]), **CONTINUE, generation_kwargs={"max_gen_toks": 3})
    suite = harness.load(["words"], include=folder)
    own = says_red.generation_config
    own.do_sample, own.temperature, own.max_new_tokens = True, 1e4, 1
    own.suppress_tokens = [tokenizer.convert_tokens_to_ids("red")]
    found = harness.measure(says_red, tokenizer, suite)
    assert found["words", "exact_match"] == Interval(1.0, 1.0, 1.0, 2)
    assert says_red.generation_config is own
    assert (own.do_sample, own.temperature, own.max_new_tokens) == (True, 1e4, 1)


def test_everything_is_left_as_it_was(
    write: Callable[..., None], folder: Path, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    import evaluate

    write("colours", questions([0, 1, 2]), **ASK, doc_to_target="label", metric_list=[RIGHT])
    write("words", answers(["red", "blue"]), **CONTINUE, generation_kwargs=SAMPLE)
    suite = harness.load(["colours", "words"], include=folder)
    model = make_model("llama_tied")
    model.model.layers[0].train()
    before = copy.deepcopy(model.state_dict())
    states, loader = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()), evaluate.load  # type: ignore[index]
    harness.measure(model, tokenizer, suite, seed=7)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert [module.training for module in (model, model.model.layers[0], model.lm_head)] == [False, True, False]
    assert tokenizer.pad_token is None
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert evaluate.load is loader


def test_the_seed_decides_and_results_are_those_of_simple_evaluate(
    write: Callable[..., None], folder: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shots = {"num_fewshot": 2, "fewshot_split": "train", "metric_list": [BRIER]}
    labels = [0, 1, 2, 0, 1, 2]
    write("colours", questions(labels), **ASK, doc_to_target="label", **shots)
    write("words", answers([*["red", "blue"] * 6]), **CONTINUE, generation_kwargs=SAMPLE, metric_list=[SAME])
    suite = harness.load(["colours", "words"], include=folder)
    found = harness.measure(model, tokenizer, suite, seed=5)
    assert harness.measure(model, tokenizer, suite, seed=5) == found
    assert harness.measure(model, tokenizer, suite, seed=6) != found
    theirs = simple_evaluate(model, copy.deepcopy(tokenizer), suite, 5, monkeypatch)
    for (task, metric), result in found.items():
        assert isinstance(result, Interval)
        assert result.value == pytest.approx(theirs[task][f"{metric},none"], rel=1e-6)


def simple_evaluate(
    model: Any, tokenizer: Any, suite: harness.Suite, seed: int, monkeypatch: pytest.MonkeyPatch
) -> dict[str, dict[str, float]]:
    """lm-eval's results by its own entry point, without the description of the machine, which takes long."""
    import warnings

    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    for slow in ("add_env_info", "get_git_commit_hash"):
        monkeypatch.setattr(evaluator, slow, lambda *_: None)
    wrapper: Any = HFLM
    seeds = {f"{name}_seed": seed for name in ("random", "numpy_random", "torch_random", "fewshot_random")}
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        wrapped = wrapper(pretrained=model, tokenizer=tokenizer, batch_size=8)
        tasks, manager = [*suite.tasks.values()], TaskManager(include_defaults=False)
        return evaluator.simple_evaluate(wrapped, tasks=tasks, task_manager=manager, **seeds)["results"]  # type: ignore


def test_a_limit_keeps_the_first_documents(
    write: Callable[..., None], folder: Path, says_red: Any, tokenizer: Any
) -> None:
    write("colours", questions([0, 0, 1, 1]), **ASK, doc_to_target="label", metric_list=[RIGHT])
    suite = harness.load(["colours"], include=folder)
    assert harness.measure(says_red, tokenizer, suite, limit=2)["colours", "acc"] == Interval(1.0, 1.0, 1.0, 2)
    value, low, high, n = harness.measure(says_red, tokenizer, suite, limit=1)["colours", "acc"]
    assert (value, low, high, n) == (1.0, -math.inf, math.inf, 1)
    with pytest.raises(UserError, match="a limit of 0 documents"):
        harness.measure(says_red, tokenizer, suite, limit=0)


def test_a_quantized_variant_is_measured_as_such(
    write: Callable[..., None], folder: Path, model: Any, tokenizer: Any
) -> None:
    write("colours", questions([0, 1, 2]), **ASK, doc_to_target="label", metric_list=[BRIER])
    suite = harness.load(["colours"], include=folder)
    full = harness.measure(model, tokenizer, suite)
    with compressed(model, parse_variant("rtn:bits=2:group=0")):
        written = copy.deepcopy(model)
        low = harness.measure(model, tokenizer, suite)
    assert low != full
    assert low == harness.measure(written, tokenizer, suite)
    assert harness.measure(model, tokenizer, suite) == full


def test_the_chat_template_frames_prompts(write: Callable[..., None], folder: Path, model: Any, tokenizer: Any) -> None:
    ask = ASK | {"doc_to_target": "label", "metric_list": [BRIER]}
    write("colours", questions([0, 1, 2]), **ask)
    write("framed", questions([0, 1, 2]), **ask | {"doc_to_text": "who {{question}} ?"})
    plain = harness.load(["colours", "framed"], include=folder)
    with pytest.raises(UserError, match="no chat template"):
        harness.measure(model, tokenizer, plain, chat=True)
    found = harness.measure(model, tokenizer, plain)
    tokenizer.chat_template = "{% for message in messages %}who {{ message['content'] }} ?{% endfor %}"
    chat = harness.measure(model, tokenizer, harness.load(["colours"], include=folder), chat=True)
    assert chat["colours", "brier_score"] == pytest.approx(found["framed", "brier_score"])
    assert chat["colours", "brier_score"] != pytest.approx(found["colours", "brier_score"])


def test_what_was_cut_is_said_once(
    write: Callable[..., None], folder: Path, model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    long = [{"question": f"{who} is " * 40, "label": 0} for who in ("dog", "cat")]
    write("long", long, **ASK, doc_to_target="label", metric_list=[RIGHT])
    with shown():
        harness.measure(model, tokenizer, harness.load(["long"], include=folder))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "lm-eval, 6 times: " in err  # 2 questions with 3 choices
    assert "exceeds model's maximum length (64)" in err


def test_equal_identities_mean_equal_tasks(write: Callable[..., None], folder: Path) -> None:
    def identity(labels: Sequence[int], **settings: Any) -> str:
        write("colours", questions(labels), **ASK | {"doc_to_target": "label"} | settings)
        return harness.load(["colours"], include=folder).identity

    first = identity([0, 1])
    assert identity([0, 1]) == first
    assert len({first, identity([0, 2]), identity([0, 1], num_fewshot=1), identity([0, 1], doc_to_text="")}) == 4


def test_own_tasks_do_not_hide_those_of_lm_eval(
    write: Callable[..., None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    index, built_in = lm_eval.tasks.TaskManager, Path(lm_eval.tasks.__file__).parent / "gsm8k"

    def small(include_path: Path, include_defaults: bool = True) -> lm_eval.tasks.TaskManager:
        """One folder of lm-eval's own stands for all, which take long to read."""
        return index(
            include_path=[built_in, include_path] if include_defaults else include_path, include_defaults=False
        )

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", small)
    write("colours", questions([0, 1]), **ASK, doc_to_target="label")
    with pytest.raises(UserError, match="no task 'colour'; did you mean 'colours'"):
        harness.load(["colour"], include=folder)
    with pytest.raises(UserError, match=r"data of task gsm8k is neither on this disk .*openai/gsm8k"):
        harness.load(["colours", "gsm8k"], include=folder)
    write("gsm8k", questions([0, 1]), **ASK, doc_to_target="label")
    assert list(harness.load(["gsm8k"], include=folder).tasks) == ["gsm8k"]


BAD_TASKS = {
    "its data is not there": ({"dataset_kwargs": {"data_files": "nowhere.jsonl"}}, "data of task bad .*nowhere.jsonl"),
    "a split that is not there": ({"test_split": "exam"}, "task bad cannot be loaded: KeyError: 'exam'"),
    "code from the hub": ({"metric_list": [{"metric": "bertscore"}]}, "task bad measures with code from the hub"),
    "code of the model": ({"unsafe_code": True}, "task bad runs code that the model writes"),
    "images": ({"doc_to_image": "label"}, "task bad reads images"),
}


@pytest.mark.parametrize("change", BAD_TASKS)
def test_a_bad_task_is_refused(change: str, write: Callable[..., None], folder: Path) -> None:
    settings, message = BAD_TASKS[change]
    write("bad", questions([0, 1]), **ASK | {"doc_to_target": "label"} | settings)
    with pytest.raises(UserError, match=message):
        harness.load(["bad"], include=folder)


def test_a_bad_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        harness.load(["colours"], include=tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no task"):
        harness.load(["colours"], include=tmp_path)
    (tmp_path / "bad.yaml").write_text("task: colours\nmetric_list: [acc\n")
    with pytest.raises(UserError, match=r"bad\.yaml:3 is not YAML"):
        harness.load(["colours"], include=tmp_path)
    (tmp_path / "bad.yaml").write_bytes(b"task: \xff\n")
    with pytest.raises(UserError, match=r"bad\.yaml is not YAML"):
        harness.load(["colours"], include=tmp_path)


def test_no_task_and_a_task_twice(write: Callable[..., None], folder: Path) -> None:
    with pytest.raises(UserError, match="no task is named"):
        harness.load([], include=folder)
    write("colours", questions([0, 1]), **ASK, doc_to_target="label")
    (folder / "all.yaml").write_text(json.dumps({"group": "all", "task": ["colours"]}))
    assert list(harness.load(["colours", "colours"], include=folder).tasks) == ["colours"]
    with pytest.raises(UserError, match="Duplicate task 'colours'"):
        harness.load(["all", "colours"], include=folder)


@pytest.mark.parametrize("package", ["lm_eval", "accelerate"])
def test_a_missing_extra_is_named(
    package: str, write: Callable[..., None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("colours", questions([0, 1]), **ASK, doc_to_target="label")
    for name in [name for name in sys.modules if name.startswith("lm_eval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"pip install 'stillknows\[harness\]'"):
        harness.load(["colours"], include=folder)


def test_a_collapsed_model_has_no_perplexity_and_loses_nothing_else(
    write: Callable[..., None], folder: Path, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    """The exponential of a loss of thousands of nats per word is beyond floats; metrics without one are kept."""
    model = make_model("phi")
    model.lm_head.bias.data[tokenizer.convert_tokens_to_ids("red")] = 1e5
    metrics = [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]
    ask = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    write("texts", [{"text": "the river flows"}], **ask, metric_list=metrics)
    found = harness.measure(model, tokenizer, harness.load(["texts"], include=folder))
    assert found["texts", "word_perplexity"] == "lm-eval returned infinity (n=1)"
    bits = found["texts", "bits_per_byte"]
    assert isinstance(bits, Interval)
    assert bits.value > 1e4


def test_a_model_that_cannot_be_asked(write: Callable[..., None], folder: Path, model: Any, tokenizer: Any) -> None:
    write("words", answers(["red", "blue"]), **CONTINUE, generation_kwargs={"max_gen_toks": 64})
    suite = harness.load(["words"], include=folder)
    with pytest.raises(UserError, match=r"max tokens to generate .64. must be less than model's maximum"):
        harness.measure(model, tokenizer, suite)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        harness.measure(model, tokenizer, suite)
