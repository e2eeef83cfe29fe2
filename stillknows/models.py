"""Loading, checking and taking apart causal language models: the only place that knows transformers' classes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stillknows.errors import UserError
from stillknows.store import file_digest
from stillknows.types import Subject


class Source(NamedTuple):
    """A model on disk or on the hub, checked as far as possible without loading it.

    `name` may carry a hub name; `folder` is where its files lie.
    """

    name: str
    folder: Path


def locate(name: str, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> Source:
    """Find a local folder or download a hub model, and check that it is a causal language model that can be loaded.

    Raises UserError: no such folder or hub model, no config.json, not a causal language model, no safetensors weights
    (pickled weights need `allow_pickle`), truncated or unreadable weight files.
    """
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
    return Source(name, folder)


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
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}/config.json cannot be used: {str(error).splitlines()[0]}") from error
    wrong = [a for a in config.architectures or [] if not a.endswith(("ForCausalLM", "LMHeadModel"))]
    if wrong or (config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not trust_remote_code):
        kind = wrong[0] if wrong else config.model_type
        raise UserError(f"{folder} holds a {kind}, not a causal language model", "give a model that generates text")


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder in a fixed order."""
    return sorted(folder.glob("*.safetensors"))


def _check_weights(folder: Path, allow_pickle: bool) -> None:
    from safetensors import SafetensorError, safe_open

    files = weight_files(folder)
    if not files and not allow_pickle:
        pickled = [*folder.glob("*.bin"), *folder.glob("*.pt")]
        if pickled:
            raise UserError(
                f"{folder} has only pickled weights ({pickled[0].name}), and a pickle can run code",
                "convert it to safetensors, or add --allow-pickle if you trust where it comes from",
            )
        raise UserError(f"{folder} has no weights (*.safetensors)", "give the folder of a saved model")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is truncated or damaged: {error}", "copy or download it again") from error


def require_same_shapes(original: Source, other: Source) -> None:
    """Raise UserError when two checkpoints store a tensor of one name in different shapes. Reads headers only."""
    first, second = _stored_shapes(original.folder), _stored_shapes(other.folder)
    for key in sorted(first.keys() & second.keys()):
        if first[key] != second[key]:
            raise UserError(
                f"{other.name} is not a version of {original.name}: {key} is {second[key]}, not {first[key]}",
                "give as --original the model that it was unlearned from",
            )


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return shapes


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
    infinite weights (naming the tensor) and for a tokenizer that cannot be loaded or has more tokens than the model.
    """
    from transformers import AutoModelForCausalLM

    source = locate(name, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source.folder, trust_remote_code=trust_remote_code)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source.folder,
            dtype=dtype or "auto",
            use_safetensors=not allow_pickle or bool(weight_files(source.folder)),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{name} cannot be loaded: {str(error).splitlines()[0]}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"{name} lacks {len(missing)} weights, the first: {missing[0]}", "the checkpoint is incomplete")
    check_finite(model, name)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # type: ignore[union-attr]
        raise UserError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the model embeds fewer",
            "put the tokenizer that belongs to the model into its folder",
        )
    model.eval().requires_grad_(False).to(device)
    return Subject(label or Path(name).name, model, tokenizer, source.folder, fingerprint(source.folder))


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False):
    """Load the tokenizer of a model folder; UserError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} has no tokenizer that can be loaded: {str(error).splitlines()[0]}",
            "put tokenizer.json and tokenizer_config.json beside the weights",
        ) from error


def fingerprint(folder: Path) -> str:
    """Return a hash of configuration, tokenizer and weights as they lie on disk."""
    names = ["config.json", "tokenizer.json", "tokenizer_config.json"]
    files = [folder / name for name in names if (folder / name).is_file()]
    return file_digest(*files, *weight_files(folder))


def save(model: nn.Module, tokenizer, folder: Path) -> None:
    """Write a normal Hugging Face checkpoint (safetensors) with its tokenizer into an existing folder."""
    check_finite(model, folder.name)
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)


def check_finite(model: nn.Module, name: str) -> None:
    """Raise UserError that names the first tensor with a NaN or infinite weight."""
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{name}: the weights {key} hold NaN or infinity", "the checkpoint is broken; use another")


def context_length(folder: Path, *, trust_remote_code: bool = False) -> int:
    """Return the most tokens that the model of a folder can read at once."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config()
    for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        if getattr(config, key, None):
            return int(getattr(config, key))
    return 2048


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

    Raises UserError for an architecture whose logits are made in a way that this project does not know.
    """
    layer = OutputLayer(model)
    ids = torch.arange(1, 5, device=next(model.parameters()).device)[None] % layer.vocabulary
    with torch.no_grad():
        own = layer(hidden_states(model, ids)).float()
        theirs = model(input_ids=ids, use_cache=False).logits.float()
    if own.shape != theirs.shape or not torch.allclose(own, theirs, rtol=1e-3, atol=1e-3):
        raise UserError(f"{type(model).__name__} computes its logits in a way that stillknows does not know")
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
