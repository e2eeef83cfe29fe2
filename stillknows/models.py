"""Loading, checking and taking apart causal language models: the only place that knows transformers' classes."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stillknows.errors import UserError, is_out_of_memory
from stillknows.store import file_digest, read_json
from stillknows.types import Subject


class Source(NamedTuple):
    """A model on disk or on the hub, checked as far as possible without loading it.

    `name` may carry a hub name; `folder` is where its files lie.
    """

    name: str
    folder: Path
    trust_remote_code: bool = False


def locate(name: str, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> Source:
    """Find a local folder or download a hub model, and check that it is a causal language model that can be loaded.

    Raises UserError: no such folder or hub model, no config.json, not a causal language model, code of its own (needs
    `trust_remote_code`), no safetensors weights (pickled weights need `allow_pickle`), missing, truncated or unreadable
    weight files.
    """
    quiet()
    folder = Path(name).expanduser()
    if not folder.is_dir():
        looks_local = folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1
        if looks_local:
            raise UserError(
                f"no folder {name}", "give a folder with a Hugging Face model, or a hub name like org/model"
            )
        folder = _download(name, allow_pickle)
    _check_config(folder, trust_remote_code)
    _check_weights(folder, allow_pickle)
    return Source(name, folder, trust_remote_code)


def _download(name: str, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    unwanted = ["*.gguf", "*.h5", "*.msgpack", "*.onnx"] + ([] if allow_pickle else ["*.bin", "*.pt", "*.pth"])
    try:
        return Path(snapshot_download(name, ignore_patterns=unwanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name} is neither a folder here nor a model that the hub gives: {str(error).splitlines()[0]}",
            "check the spelling, the network, and `hf auth login` for a gated model",
        ) from error


def _check_config(folder: Path, trust_remote_code: bool) -> None:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model: it has no config.json", "give the folder that holds config.json")
    stored = _read_object(folder / "config.json")
    _check_code(folder, trust_remote_code)
    if stored.get("quantization_config"):
        raise UserError(
            f"{folder} holds weights that are quantized already",
            "give the model in full precision; formats are applied by `stillknows audit --variants`",
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # configurations check themselves and raise all kinds of error
        raise UserError(
            f"{folder}/config.json cannot be used: {_first_line(error)}", "copy or download the model again"
        ) from error
    wrong = [a for a in config.architectures or [] if not a.endswith(("ForCausalLM", "LMHeadModel"))]
    if wrong or (config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not trust_remote_code):
        kind = wrong[0] if wrong else config.model_type
        raise UserError(f"{folder} holds a {kind}, not a causal language model", "give a model that generates text")


def _check_code(folder: Path, trust_remote_code: bool) -> None:
    """Refuse a model that brings its own Python code: running another class instead could give other numbers."""
    for name in ("config.json", "tokenizer_config.json"):
        if not trust_remote_code and (folder / name).is_file() and _read_object(folder / name).get("auto_map"):
            raise UserError(
                f"{folder / name} asks for Python code that comes with the model (auto_map)",
                "read that code; then add --trust-remote-code to run it",
            )


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object", "copy or download the model again")
    return value


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def weight_files(folder: Path) -> list[Path]:
    """Return the files that a folder's weights are loaded from, in a fixed order; those of an index may be missing.

    The same choice as transformers makes: safetensors before pickles, one file before shards, other files ignored.
    """
    for path in (folder / name for name in WEIGHTS):
        if path.is_file() and path.suffix != ".json":
            return [path]
        if path.is_file():
            shards = _read_object(path).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise UserError(f"{path} names no weight files", "copy or download the model again")
            return sorted({folder / str(name) for name in shards.values()})
    return []


def _is_pickled(files: list[Path]) -> bool:
    return bool(files) and files[0].suffix != ".safetensors"


def _check_weights(folder: Path, allow_pickle: bool) -> None:
    from safetensors import SafetensorError, safe_open

    files = weight_files(folder)
    if not files:
        raise UserError(f"{folder} has no weights ({WEIGHTS[0]})", "give the folder of a saved model")
    if _is_pickled(files) and not allow_pickle:
        raise UserError(
            f"{folder} has only pickled weights ({files[0].name}), and a pickle can run code",
            "convert it to safetensors, or add --allow-pickle if you trust where it comes from",
        )
    for file in files:
        if not file.is_file():
            raise UserError(f"{folder} lacks {file.name}, which its index names", "copy or download it again")
        if _is_pickled(files):
            continue
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is truncated or damaged: {error}", "copy or download it again") from error


def require_same_shapes(original: Source, other: Source) -> None:
    """Raise UserError when two models differ in the names or shapes of their weights. Reads configurations only."""
    first, second = (_shapes(skeleton(source)) for source in (original, other))
    for key in [*first, *second]:
        if first.get(key) != second.get(key):
            raise UserError(
                f"{other.name} is not a version of {original.name}: "
                f"{key} is {second.get(key, 'missing')}, not {first.get(key, 'missing')}",
                "audit models of one architecture and size; --original is the one they were unlearned from",
            )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def skeleton(source: Source) -> nn.Module:
    """Return the model that the configuration describes, with shapes but without weights (on the meta device)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = source.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    except Exception as error:  # each family fails in its own way on numbers that do not go together
        raise UserError(
            f"{source.folder}/config.json describes no model that can be built: {_first_line(error)}",
            "copy or download the model again",
        ) from error


def check_device(name: str) -> None:
    """Raise UserError for a device that this machine or this build of torch does not have."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the device {name!r} cannot be used: {_first_line(error)}", "use --device cpu") from error


def load(
    name: str,
    *,
    label: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: str = "cpu",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Subject:
    """Load a causal language model with its tokenizer, in evaluation mode, and check every weight.

    Args:
        name: local folder or hub name.
        label: name in reports; the folder's name when None.
        dtype: of the weights in memory; None keeps the file's own.

    Raises UserError for everything that `locate` finds, for weights that do not fit the configuration, for NaN or
    infinite weights (naming the tensor) and for a tokenizer that cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    source = locate(name, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source.folder, trust_remote_code=trust_remote_code)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[reportGeneralTypeIssues]
            source.folder,
            dtype=dtype or "auto",
            use_safetensors=not _is_pickled(weight_files(source.folder)),
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # so that they are listed: _check_fit refuses them
            output_loading_info=True,
        )
    except (OSError, ValueError, EOFError, ImportError, RuntimeError, pickle.UnpicklingError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{name} cannot be loaded: {_first_line(error)}", "copy or download it again") from error
    _check_fit(model, info, name)
    check_finite(model, name)
    model.eval().requires_grad_(False).to(device)
    return Subject(label or Path(name).name, model, tokenizer, source.folder, fingerprint(source.folder))


def _check_fit(model: nn.Module, info: dict[str, Any], name: str) -> None:
    """Raise UserError for weights that are missing, of other shapes, or of layers that the configuration lacks."""
    layers = {re.sub(r"\d+", "#", key) for key in model.state_dict()}
    surplus = sorted(key for key in info["unexpected_keys"] if re.sub(r"\d+", "#", key) in layers)
    problems = {
        "are missing": sorted(info["missing_keys"]),
        "have another shape": sorted(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]),
        "have no place in it": surplus,
    }
    for problem, keys in problems.items():
        if keys:
            raise UserError(
                f"the weights of {name} do not fit its config.json: {len(keys)} {problem}, the first: {keys[0]}",
                "use the config.json and all the weight files of one model",
            )


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False):
    """Load the tokenizer of a model folder; UserError when there is none."""
    from transformers import AutoTokenizer

    fix = "put tokenizer.json and tokenizer_config.json beside the weights"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise UserError(f"{folder} has no tokenizer that can be loaded: {_first_line(error)}", fix) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # some classes make an empty one where the files are missing
        raise UserError(f"{folder} has no tokenizer: nothing but special tokens came of it", fix)
    return tokenizer


COMPANIONS = ("config.json", "generation_config.json", "tokenizer*", "vocab.*", "merges.txt", "*.jinja", "*.py")


def fingerprint(folder: Path) -> str:
    """Return a hash of everything that a model's answers depend on: its weights, configuration, tokenizer and code."""
    files = sorted({file for pattern in COMPANIONS for file in folder.glob(pattern) if file.is_file()})
    return file_digest(*files, *weight_files(folder))


def save(model: nn.Module, tokenizer, folder: Path) -> None:
    """Write a normal Hugging Face checkpoint (safetensors) with its tokenizer into an existing folder."""
    check_finite(model, "the result", "training left the range of numbers: lower --lr, or add a retain term")
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)


def check_finite(model: nn.Module, name: str, fix: str = "the checkpoint is broken; use another") -> None:
    """Raise UserError that names the first tensor with a NaN or infinite weight."""
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{name}: the weights {key} hold NaN or infinity", fix)


def context_length(folder: Path, *, trust_remote_code: bool = False) -> int:
    """Return the most tokens that the model of a folder can read at once."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config()
    for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        if getattr(config, key, None):
            return int(getattr(config, key))
    return 2048


def vocabulary_size(folder: Path, *, trust_remote_code: bool = False) -> int:
    """Return the number of tokens that the model of a folder embeds."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config().vocab_size)


class OutputLayer:
    """hidden [*, D] -> logits [*, V], as the model itself computes them after its last layer.

    Covers what families add to the linear map: soft-capping (Gemma 2), scaling (Cohere, Granite).
    """

    def __init__(self, model: nn.Module) -> None:
        config = model.config.get_text_config()  # type: ignore[union-attr]
        self.linear: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        self.cap = getattr(config, "final_logit_softcapping", None)
        self.scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        self.vocabulary = int(self.linear.weight.shape[0])  # type: ignore[union-attr]

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.linear(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if not self.cap else self.cap * torch.tanh(logits / self.cap)

    def frozen(self) -> OutputLayer:
        """Return a copy with its own weights, which stay as they are while the model is trained."""
        copy = object.__new__(OutputLayer)
        copy.__dict__.update(self.__dict__)
        linear = nn.Linear(*reversed(self.linear.weight.shape), bias=self.linear.bias is not None, device="meta")  # type: ignore
        state = {key: value.detach().clone() for key, value in self.linear.state_dict().items()}
        linear.load_state_dict(state, assign=True)
        copy.linear = linear.requires_grad_(False)
        return copy


def hidden_states(model: nn.Module, ids_BL: Tensor) -> Tensor:
    """Return what the output layer reads, [B, L, D]. No mask: causality hides the fillers at the right."""
    return model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state  # type: ignore[operator]


def output_layer(model: nn.Module) -> OutputLayer:
    """Return the model's output layer after checking it against the model's own logits on a few tokens.

    Raises UserError for an architecture whose logits are made in a way that this project does not know, or that looks
    at tokens to the right.
    """
    layer = OutputLayer(model)
    ids = torch.arange(1, 5, device=next(model.parameters()).device)[None] % layer.vocabulary
    with torch.no_grad():
        own = layer(hidden_states(model, ids)).float()
        theirs = model(input_ids=ids, use_cache=False).logits.float()
        shorter = layer(hidden_states(model, ids[:, :-1])).float()
    if own.shape != theirs.shape or not torch.allclose(own, theirs, rtol=1e-3, atol=1e-3):
        raise UserError(f"{type(model).__name__} computes its logits in a way that stillknows does not know")
    if not torch.allclose(own[:, :-1], shorter, rtol=1e-3, atol=1e-3):
        raise UserError(f"{type(model).__name__} is not causal: what it says of a token depends on later ones")
    return layer


class Linear(NamedTuple):
    """A linear map inside the decoder. `transposed` marks GPT-2's Conv1D, which stores [I, O]."""

    name: str
    module: nn.Module
    transposed: bool

    def read(self) -> Tensor:
        """Return the weights [O, I]; a view of the module's own storage."""
        weight: Tensor = self.module.weight.data  # type: ignore[union-attr]
        return weight.T if self.transposed else weight

    def write(self, weight_OI: Tensor) -> None:
        """Put weights [O, I] into the module, in place."""
        self.read().copy_(weight_OI)


def linears(model: nn.Module) -> Iterator[Linear]:
    """Yield the decoder's linear maps in order: what 4- and 8-bit back ends quantize.

    Embeddings and the output layer are left out, as bitsandbytes, GPTQ and AWQ leave them.
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield Linear(name, module, transposed=False)
        elif isinstance(module, Conv1D):
            yield Linear(name, module, transposed=True)


def quiet() -> None:
    """Keep transformers' own progress bars and advice out of the output; warnings that matter are ours to give."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*torch_dtype.*")
