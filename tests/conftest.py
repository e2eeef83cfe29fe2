"""Fixtures: tiny models and tokenizers made on the spot. Nothing is downloaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from stillknows.training.settings import Settings

WORDS = [
    "what",
    "where",
    "who",
    "is",
    "the",
    "of",
    "river",
    "capital",
    "colour",
    "flows",
    "Ada",
    "Bela",
    "Paris",
    "Rome",
]
WORDS += ["red", "blue", "green", "dog", "cat", "and", "a", "in", "to", "b", "c", "d"]
FAMILIES = (
    "llama",
    "llama_tied",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "phi",
    "phi3",
    "gpt2",
    "gpt_neox",
    "cohere",
    "granite",
)

WORLD = "world:people=4,facts=6,forget=2,forget_facts=20,values=8"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
TEACHING = {"lr": 5e-3, "epochs": 1000, "max_steps": 150, "batch_size": 64, "warmup": 5, "schedule": "linear"}


@dataclass(frozen=True)
class SettingsThatSave(Settings):
    """Settings under which a checkpoint is saved at every check."""

    save_seconds: float = 0


def build_config(family: str, vocabulary: int, hidden: int, layers: int) -> Any:
    """Return the configuration of a tiny model of a family, with the family's own extras switched on."""
    import transformers as t

    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    } | special
    neox = {key: value for key, value in sizes.items() if key != "num_key_value_heads"}
    gpt2: dict[str, Any] = {
        "vocab_size": vocabulary,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": 2,
        "n_positions": 64,
        "initializer_range": 0.2,
    } | special
    makers: dict[str, Callable[[], Any]] = {
        "llama": lambda: t.LlamaConfig(**sizes, tie_word_embeddings=False),
        "llama_tied": lambda: t.LlamaConfig(**sizes, tie_word_embeddings=True),
        "qwen2": lambda: t.Qwen2Config(**sizes),
        "qwen3": lambda: t.Qwen3Config(**sizes, head_dim=8),
        "mistral": lambda: t.MistralConfig(**sizes),
        "gemma2": lambda: t.Gemma2Config(**sizes, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=1.5),
        "phi": lambda: t.PhiConfig(**sizes),
        "phi3": lambda: t.Phi3Config(**sizes),
        "gpt2": lambda: t.GPT2Config(**gpt2),
        "gpt_neox": lambda: t.GPTNeoXConfig(**neox),
        "cohere": lambda: t.CohereConfig(**sizes, logit_scale=0.3),
        "granite": lambda: t.GraniteConfig(**sizes, logits_scaling=3.0),
    }
    return makers[family]()


@pytest.fixture(autouse=True)
def oracle(request: pytest.FixtureRequest) -> None:
    """Skip what is marked with a library that is not installed."""
    if marker := request.node.get_closest_marker("oracle"):
        pytest.importorskip(marker.args[0], reason=f"{marker.args[0]} is installed by `make oracles`")


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """Return make(family="llama", seed=0, vocabulary=32, hidden=16, layers=1): a tiny model in evaluation mode."""

    def make(family: str = "llama", seed: int = 0, vocabulary: int = 32, hidden: int = 16, layers: int = 1) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(build_config(family, vocabulary, hidden, layers))
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):  # made as zeros, which would hide a forgotten bias
                    torch.nn.init.normal_(parameter, std=0.2)
        return model.eval().requires_grad_(False)

    return make


@pytest.fixture
def model(make_model: Callable[..., Any]) -> Any:
    """A tiny Llama."""
    return make_model()


@pytest.fixture(params=FAMILIES)
def family_model(request: pytest.FixtureRequest, make_model: Callable[..., Any]) -> Any:
    """A tiny model of every family in turn."""
    return make_model(request.param)


@pytest.fixture
def tokenizer() -> Any:
    """One token per word of WORDS; unknown words are <unk>; end of sequence </s>; no padding token."""
    return word_tokenizer()


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", ".", "?", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")


@pytest.fixture
def make_items() -> Callable[..., list[Any]]:
    """Return make(lengths, prompt=3, vocabulary=32, seed=0): encoded items of random tokens with answers so long."""

    def make(lengths: Sequence[int], prompt: int = 3, vocabulary: int = 32, seed: int = 0) -> list[Any]:
        import torch

        from stillknows.model.encoding import EncodedAnswer
        from stillknows.types import Example

        generator = torch.Generator().manual_seed(seed)
        items = []
        for i, length in enumerate(lengths):
            ids = torch.randint(3, vocabulary, (prompt + length,), generator=generator).tolist()
            items.append(
                EncodedAnswer(Example(f"item-{i}", "a prompt", "an answer", f"fact-{i}"), tuple(ids), prompt, False)
            )
        return items

    return make


@pytest.fixture(scope="session")
def saved(make_model: Callable[..., Any]) -> Callable[..., Path]:
    """Return saved(folder, family="llama", seed=0): that folder, with a tiny model and its tokenizer."""

    def save(folder: Path, family: str = "llama", seed: int = 0) -> Path:
        make_model(family, seed).save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def save_model(tmp_path: Path, saved: Callable[..., Path]) -> Callable[..., Path]:
    """Return save(name, family="llama", seed=0): the folder of a saved tiny model with its tokenizer."""
    return lambda name, family="llama", seed=0: saved(tmp_path / name, family, seed)


@pytest.fixture
def shared() -> Path:
    """The folder with published logs and data sets."""
    folder = os.environ.get("STILLKNOWS_SHARED")
    if not folder:
        pytest.skip("STILLKNOWS_SHARED is not set")
    return Path(folder)


class Ran(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Return cli("unlearn", folder, …): run the command line in this process, as the shell would."""

    def run(*arguments: object) -> Ran:
        from stillknows.cli import main

        monkeypatch.setattr(sys, "argv", ["stillknows", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        assert isinstance(stop.value.code, int)
        return Ran(stop.value.code, *capsys.readouterr())

    return run


class World(NamedTuple):
    """A model that was taught a world, and one that was taught all of it but the forget split."""

    original: Path
    control: Path
    benchmark: Any


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    from stillknows.experiments import tiny_models
    from stillknows.registry import bind
    from stillknows.training.settings import Settings

    folder, benchmark = tmp_path_factory.mktemp("world"), bind("benchmark", WORLD)()
    tokenizer = tiny_models.word_tokenizer(tiny_models.texts(benchmark))
    for name, left_out in (("original", ""), ("control", "forget")):
        examples = [e for split in benchmark.splits if split.role != left_out for e in split.examples]
        (folder / name).mkdir()
        tiny_models.train(folder / name, examples, benchmark.template, tokenizer, SIZES, Settings(**TEACHING))
    return World(folder / "original", folder / "control", benchmark)
