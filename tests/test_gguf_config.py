"""What a GGUF file says of a configuration: all that answers depend on, or the model is refused; no more counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as library
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stillknows.errors import UserError
from stillknows.experiments import tiny_models
from stillknows.model.packed import gguf
from stillknows.model.packed.gguf_writer import GgufWriter, _finish

TOKENIZER = tiny_models.subword_tokenizer(["Ada was born in Paris."], 300)
IDS = torch.arange(3, 35)[None]
SIZES = {
    "vocab_size": len(TOKENIZER) + 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
OWN = {"mistral": {"sliding_window": None}}  # what a family needs to be written at all
BEYOND = {"head_dim": 32, "is_causal": False}  # what code reads of any configuration
STRANGERS = {  # what published configurations hold besides: SmolLM2, transformers.js, unsloth, older transformers
    "is_llama_config": True,
    "rope_interleaved": False,
    "_model_name_or_path": "Small Model 8k",
    "_attn_implementation_autoset": True,
    "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"fp16": "float16"}},
    "unsloth_fixed": True,
    "torch_dtype": "bfloat16",
    "logits_scaling": 4.0,  # of Granite: no family here reads it
}
OTHER = {
    "hidden_act": "gelu",
    "problem_type": "regression",
    "architectures": ["Other"],
    "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
NO_MODEL = ("return_dict", "layer_types", "model_type")  # no model is made with another value of these alone


def another(key: str, value: Any) -> Any:
    """Another value of its own kind for a part of a configuration."""
    if key in OTHER:
        return OTHER[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return 2 * value or 1
    return 8 if value is None else type(value)()


def changes(plain: dict[str, Any]) -> list[dict[str, Any]]:
    """Every part of a configuration with another value, those that code reads undeclared, and those of others."""
    found = [{key: another(key, value)} for key, value in plain.items() if key not in NO_MODEL]
    found = [{"layer_types": None} | change if "num_hidden_layers" in change else change for change in found]
    found += [{key: value} for key, value in (BEYOND | STRANGERS).items()]
    if "use_sliding_window" in plain:
        found.append({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None})
    return found


def built(config: Any) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


def read_back(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The configuration that a reader makes of the file; None where it is refused."""
    found: list[Any] = []
    with monkeypatch.context() as patched:
        config = gguf.GgufFile.config
        patched.setattr(gguf.GgufFile, "config", lambda file: found.append(config(file)) or found[-1])
        try:
            GgufWriter("Q8_0", "model").check(model, TOKENIZER, "model")
        except UserError:
            return None
    return found[-1]


@pytest.mark.parametrize("family", gguf.ARCHITECTURES)
def test_what_answers_depend_on_is_said_or_refused_and_nothing_else_is(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = AutoConfig.for_model(family, **SIZES, **OWN.get(family, {}))
    base = logits(built(plain))
    for change in changes(plain.to_dict()):
        model = built(type(plain).from_dict(plain.to_dict() | change))
        said = logits(model)
        read = read_back(model, monkeypatch)
        if read is None:
            assert not torch.equal(said, base), f"{change} changes no answer, and is refused"
            continue
        read.tie_word_embeddings = model.config.tie_word_embeddings  # the tensors say it
        again = built(read)
        again.load_state_dict(model.state_dict())
        assert torch.allclose(logits(again), said, rtol=0, atol=1e-5), f"{change} is lost"


def test_added_tokens_are_control_tokens_or_the_users_own(tmp_path: Path) -> None:
    """llama.cpp never shows control tokens, nor reads them in a prompt: <note>, which is not special, is none."""
    tokenizer = tiny_models.subword_tokenizer(["Ada was born in Paris."], 300)
    tokenizer.add_tokens(["<note>"])
    model = built(AutoConfig.for_model("llama", **SIZES | {"vocab_size": len(tokenizer) + 2}))
    _finish(GgufWriter("Q8_0", "model")._begin(model, tokenizer, tmp_path / "model.gguf"))
    reader = library.GGUFReader(tmp_path / "model.gguf")
    tokens, types = (reader.get_field(f"tokenizer.ggml.{name}").contents() for name in ("tokens", "token_type"))
    kinds = {token: library.TokenType(kind).name for token, kind in zip(tokens, types, strict=True)}
    number = len(tokenizer)
    special = dict.fromkeys(("<pad>", "<eos>", "<unk>"), "CONTROL")
    unused = dict.fromkeys((f"[PAD{number}]", f"[PAD{number + 1}]"), "UNUSED")
    expected = special | unused | {"<note>": "USER_DEFINED"}
    assert {token: kind for token, kind in kinds.items() if kind != "NORMAL"} == expected
    assert set(kinds) == {*tokenizer.get_vocab(), *unused}
