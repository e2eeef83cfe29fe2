"""GGUF files in the making: metadata, tokenizer and tensors, in the order and under the names of llama.cpp."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stillknows.errors import UserError
from stillknows.lazy import Tensor, torch
from stillknows.model.layers import Linear, decoder
from stillknows.model.packed import Kept, gguf, library
from stillknows.model.packed.ggml import pack
from stillknows.model.packed.gguf_tokenizer import GPT_2, LLAMA_3, NUMBER, QWEN_2

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# llama.cpp's names for how byte-level BPE cuts text, by the patterns, one after the other
CUTS = {(GPT_2,): "gpt-2", (NUMBER, GPT_2): "smollm", (QWEN_2,): "qwen2", (LLAMA_3,): "llama-bpe"}
# Parts of a configuration that no answer depends on, or that the rest of the file says. A test changes each.
UNSAID = {
    *("_name_or_path", "architectures", "dtype", "transformers_version", "model_type", "id2label", "label2id"),
    *("problem_type", "return_dict", "output_hidden_states", "output_attentions", "is_encoder_decoder", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout", "pretraining_tp"),
    *("tie_word_embeddings", "rope_parameters", "chunk_size_feed_forward", "use_sliding_window", "max_window_layers"),
}
# What architectures read though their configurations do not declare it, with what it is where nothing is said.
UNDECLARED = {"head_dim": None, "is_causal": True}
ROTATIONS = ("default", "llama3")


def check_architecture(model_type: str, name: str) -> None:
    """Raise UserError for a model of a type that no GGUF file is written for here."""
    if model_type not in gguf.ARCHITECTURES:
        known = ", ".join(gguf.ARCHITECTURES)
        raise UserError(f"{name}: GGUF files are not written for {model_type} models", f"written are {known}")


class GgufWriter:
    """One .gguf file. See export.Writer."""

    package = "gguf"

    def __init__(self, file: str, stem: str) -> None:
        self.file, self.name = file, f"{stem}-{file}{gguf.SUFFIX}"
        self.tensors: dict[str, tuple[np.ndarray, str]] = {}

    def check(self, model: PreTrainedModel, tokenizer: Any, name: str) -> None:
        """Raise UserError for an architecture, a tokenizer or a configuration that cannot be written."""
        config: Any = model.config
        check_architecture(config.model_type, name)
        gguf.names(model, gguf.ARCHITECTURES[config.model_type])
        _cut(tokenizer, name)
        rotation = config.rope_parameters["rope_type"]
        if rotation not in ROTATIONS:
            raise UserError(f"{name}: GGUF files are not written for rotations of the type {rotation}")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / self.name
            _finish(self._begin(model, tokenizer, path))
            differing = _differing(config, gguf.GgufFile(path).config().to_dict())
        if differing:
            raise UserError(f"{name}: a GGUF file cannot say that {', '.join(differing)}", "ship another format")

    def add(self, layer: Linear, kept: Kept) -> None:
        """Take one matrix."""
        if kept.type == "F16":
            rows = kept.codes_OI.to(torch.int16).view(torch.float16).cpu().numpy()
        else:
            rows = pack(kept.type, kept.parts).reshape(len(kept.codes_OI), -1)
        self.tensors[f"{layer.name}.weight"] = rows, kept.type

    def write(self, model: PreTrainedModel, tokenizer: Any, folder: Path) -> Path:
        """Write the file; what is not quantized in float32."""
        path, types = folder / self.name, library("gguf").GGMLQuantizationType
        writer = self._begin(model, tokenizer, path)
        architecture = gguf.ARCHITECTURES[model.config.model_type]
        named = {id(parameter): name for name, parameter in model.named_parameters()}
        shared = {name: named[id(value)] for name, value in model.named_parameters(remove_duplicate=False)}
        tensors = {shared[name]: value for name, value in self.tensors.items()}
        for name, place in gguf.names(model, architecture).items():
            rows, kind = tensors.get(name) or (model.get_parameter(name).detach().float().cpu().numpy(), "F32")
            if heads := gguf.rotated_heads(name, model, architecture):
                rows = gguf.in_pairs(torch.from_numpy(rows), heads).numpy()
            writer.add_tensor(place, np.ascontiguousarray(rows), raw_dtype=types[kind])
        factors = _rotation_factors(model)
        if factors is not None:
            writer.add_tensor(gguf.ROTATIONS, factors.cpu().numpy())
        _finish(writer)
        return path

    def _begin(self, model: PreTrainedModel, tokenizer: Any, path: Path) -> Any:
        """Return a file with its metadata and its tokenizer."""
        library_ = library("gguf")
        config: Any = model.config
        writer = library_.GGUFWriter(path, gguf.ARCHITECTURES[config.model_type])
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        writer.add_file_type(library_.LlamaFileType[f"MOSTLY_{self.file}"])
        writer.add_quantization_version(library_.GGML_QUANT_VERSION)
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(width)
        writer.add_value_length(width)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(width)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        _add_tokenizer(writer, tokenizer, config.vocab_size)
        return writer


def _finish(writer: Any) -> None:
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    """Write tokens, their kinds and merges for llama.cpp, and the tokenizer itself for readers of Hugging Face's."""
    kinds, keys = library("gguf").TokenType, library("gguf").Keys.Tokenizer
    by_number = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(size):
        tokens.append(by_number.get(number, f"[PAD{number}]"))
        if number not in by_number:
            types.append(kinds.UNUSED)
        elif number in added:
            types.append(kinds.CONTROL if added[number].special else kinds.USER_DEFINED)
        else:
            types.append(kinds.NORMAL)
    stored = tokenizer.backend_tokenizer.to_str()
    merges = json.loads(stored)["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_cut(tokenizer, ""))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    begin = tokenizer("a")["input_ids"][0]
    writer.add_add_bos_token(begin == tokenizer.bos_token_id)
    if template := tokenizer.chat_template:
        named = (
            [{"name": name, "template": text} for name, text in template.items()]
            if isinstance(template, dict)
            else template
        )
        writer.add_chat_template(named)
    writer.add_string(keys.HF_JSON, stored)


def _cut(tokenizer: Any, name: str) -> str:
    """Return llama.cpp's name for how a tokenizer cuts text before it merges. UserError where it has none here."""
    if not tokenizer.is_fast:
        raise UserError(
            f"{name}: GGUF files are not written with its tokenizer ({type(tokenizer).__name__})",
            "save the model with a tokenizer that has a tokenizer.json",
        )
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    first = stored["pre_tokenizer"] or {}
    steps = first.get("pretokenizers", [first])
    patterns = tuple(pattern for step in steps for pattern in _patterns(step))
    if stored["model"]["type"] == "BPE" and steps[-1].get("type") == "ByteLevel" and patterns in CUTS:
        return CUTS[patterns]
    raise UserError(
        f"{name}: GGUF files are not written with its tokenizer ({stored['model']['type']})",
        "written are byte-level BPE tokenizers that cut text as GPT-2, Llama 3, Qwen 2 or SmolLM does",
    )


def _patterns(step: dict[str, Any]) -> list[str]:
    """Return by what patterns a step of a pre-tokenizer cuts text; its kind where that is not by patterns."""
    if step.get("type") == "ByteLevel" and not step["add_prefix_space"]:
        return [GPT_2] if step["use_regex"] else []
    if step.get("type") == "Digits" and step["individual_digits"]:
        return [NUMBER]
    if step.get("type") == "Split" and (step["behavior"], step["invert"]) == ("Isolated", False):
        return [step["pattern"].get("Regex", "")]
    return [str(step.get("type"))]


def _rotation_factors(model: PreTrainedModel) -> Tensor | None:
    """Return what llama.cpp divides rotation frequencies by, None where they are plain."""
    parameters: Any = model.config.rope_parameters
    if parameters["rope_type"] == "default":
        return None
    used: Any = decoder(model).get_buffer("rotary_emb.inv_freq")
    plain = parameters["rope_theta"] ** (torch.arange(len(used), dtype=torch.float64) / -len(used))
    return (plain / used.cpu().double()).float()


def _differing(config: Any, read: dict[str, Any]) -> list[str]:
    """Return "key is value" for every part of a configuration that answers depend on and a file does not give back.

    Keys that the configuration's class does not know are strangers' notes: no architecture reads them.
    """
    source = UNDECLARED | config.to_dict()
    known = {*type(config)().to_dict(), *UNDECLARED} - UNSAID
    return [f"{key} is {value}" for key, value in source.items() if key in known and not _said(key, value, read)]


def _said(key: str, value: Any, read: dict[str, Any]) -> bool:
    """Tell whether a file gives a value back; None, and "no" where the file has no word for it, say nothing."""
    if value is None or (key not in UNDECLARED | read and not value):
        return True
    found: Any = (UNDECLARED | read).get(key)
    numbers = isinstance(value, float) and isinstance(found, float)
    return math.isclose(value, found, rel_tol=1e-6) if numbers else value == found
