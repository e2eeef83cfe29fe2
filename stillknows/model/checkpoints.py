"""Checkpoints on disk and on the hub: found, checked before anything is loaded, loaded, saved."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillknows.errors import UserError, blamed_on, first_line
from stillknows.lazy import nn, torch
from stillknows.model import limits, modelfiles, tokens
from stillknows.model.modelfiles import (
    WEIGHTS,
    code_asked_by,
    fingerprint,
    read_object,
    require_no_adapter,
    weight_files,
)
from stillknows.model.packed import folders, gguf
from stillknows.types import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Source:
    """A model on disk or on the hub, checked as far as possible without loading it.

    `name` may carry a hub name; `folder` is where its files lie; then what the user allows. `form` says in words how
    its weights are quantized on disk, "" where they are not; `gguf` is the one file that is the model, if it is one.
    """

    name: str
    folder: Path
    allow_pickle: bool = False
    trust_remote_code: bool = False
    form: str = ""
    gguf: Path | None = None

    @property
    def path(self) -> Path:
        """What the model is: a folder, or a .gguf file."""
        return self.gguf or self.folder

    @cached_property
    def fingerprint(self) -> str:
        """What identifies the files, as they were when this was first asked for: `load` refuses any others."""
        return fingerprint(self.path)


def locate(
    name: str, *, allow_pickle: bool = False, trust_remote_code: bool = False, quantized: bool = False
) -> Source:
    """Find a local model or download one, and check that it is a causal language model that can be loaded.

    Raises UserError as `find` and `understood` do.
    """
    return understood(find(name, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code, quantized=quantized))


def find(name: str, *, allow_pickle: bool = False, trust_remote_code: bool = False, quantized: bool = False) -> Source:
    """Find a local model or download one, and check its files, for which neither torch nor transformers is imported.

    `quantized` allows weights that are quantized on disk, and .gguf files.

    Raises UserError: no such folder or hub model, no config.json, code of its own (needs `trust_remote_code`), no
    safetensors weights (pickled weights need `allow_pickle`), missing, truncated or unreadable weight files, quantized
    ones that are not allowed or that nothing here can read.
    """
    folder = Path(name).expanduser()
    if folder.suffix == gguf.SUFFIX and folder.is_file():
        if not quantized:
            raise _already_quantized(name)
        return Source(name, folder.parent, form=gguf.describe(folder), gguf=folder)
    if not folder.is_dir():
        looks_local = folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1
        if looks_local:
            raise UserError(
                f"no folder {name}", "give a folder with a Hugging Face model, or a hub name like org/model"
            )
        folder = _download(name, allow_pickle)
    stored = _check_files(folder, trust_remote_code)
    if stored and not quantized:
        raise _already_quantized(name)
    form = folders.describe(stored, f"{folder}/config.json") if stored else ""
    _check_weights(folder, allow_pickle and not stored)
    return Source(name, folder, allow_pickle, trust_remote_code, form)


def _already_quantized(name: str) -> UserError:
    return UserError(
        f"{name} holds weights that are quantized already",
        "give the model in full precision; formats are applied by an audit's `variants`",
    )


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


def here(*names: str) -> list[Path]:
    """Return the folders on this machine that models of these names lie in; hub names have none."""
    paths = [Path(name).expanduser() for name in names]
    return [path.parent if path.is_file() else path for path in paths if path.exists()]


def understood(source: Source) -> Source:
    """Return the same source. Raises UserError for a configuration that transformers cannot read, or that is not a
    causal language model's."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    quiet()
    if source.gguf:
        return source
    with blamed_on(f"{source.folder}/config.json cannot be used", limits.AGAIN):
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
        wrong = [name for name in config.architectures or [] if not _writes_text(name, config.model_type)]
        int(config.get_text_config().vocab_size)  # parts of a configuration may be of kinds that no library checks
    if wrong or (config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not source.trust_remote_code):
        kind = wrong[0] if wrong else config.model_type
        raise UserError(
            f"{source.folder} holds a {kind}, not a causal language model", "give a model that generates text"
        )
    return source


def _writes_text(architecture: str, kind: str) -> bool:
    """Tell whether a class is a causal language model, or one that reads pictures too and that transformers loads as
    such (Gemma 3)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    wider = architecture.endswith(("ForConditionalGeneration", "Decoder"))
    loaded = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) == architecture
    return architecture.endswith(("ForCausalLM", "LMHeadModel")) or (wider and loaded)


def _check_files(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """Check what a folder says of its model, and return how its weights are quantized ({} where they are not)."""
    require_no_adapter(folder)
    stored = limits.require_readable(folder)
    _check_code(folder, trust_remote_code)
    limits.require_layers(stored, weight_files(folder), f"{folder}/config.json")
    quantized = stored.get("quantization_config") or {}
    if not isinstance(quantized, dict):
        raise UserError(f"{folder}/config.json: its quantization_config is no JSON object", limits.AGAIN)
    return quantized


def _check_code(folder: Path, trust_remote_code: bool) -> None:
    """Refuse a model that brings its own Python code: running another class instead could give other numbers."""
    asking = None if trust_remote_code else code_asked_by(folder)
    if asking:
        raise UserError(
            f"{asking} asks for Python code that comes with the model (auto_map)",
            "read that code; then add `trust_remote_code` to run it",
        )


def _is_pickled(files: list[Path]) -> bool:
    return bool(files) and files[0].suffix != ".safetensors"


def _check_weights(folder: Path, allow_pickle: bool) -> None:
    files = weight_files(folder)
    if not files:
        raise UserError(f"{folder} has no weights ({WEIGHTS[0]})", "give the folder of a saved model")
    if _is_pickled(files) and not allow_pickle:
        raise UserError(
            f"{folder} has only pickled weights ({files[0].name}), and a pickle can run code",
            "convert it to safetensors, or add `allow_pickle` if you trust where it comes from",
        )
    for file in files:
        if not file.is_file():
            raise UserError(f"{folder} lacks {file.name}, which its index or config names", "copy or download it again")
        limits.count_tensors(file)


def require_same_shapes(original: Source, other: Source) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return both `skeleton`s. Raises UserError when they differ in the names or shapes of weights; which layers share
    them may differ."""
    built, beside = skeleton(original), skeleton(other)
    first, second = _shapes(built), _shapes(beside)
    for key in [*first, *second]:
        if first.get(key) != second.get(key):
            raise UserError(
                f"{other.name} is not a version of {original.name}: "
                f"{key} is {second.get(key, 'missing')}, not {first.get(key, 'missing')}",
                "give models of one architecture and size; the original is the one that the others were unlearned from",
            )
    return built, beside


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def skeleton(source: Source) -> PreTrainedModel:
    """Return the model that the configuration describes, with shapes but without weights (on the meta device).

    Its output layer has weights of its own where the files hold them, as when it is loaded, whatever the configuration
    says of ties.
    """
    config = _config(source)
    model = _built(source, config)
    if _holds_untied(source, model):
        _untie(config)
        model = _built(source, config)
    return model


def _built(source: Source, config: Any) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    place = str(source.gguf or source.folder / "config.json")
    with blamed_on(f"{place} describes no model that can be built", limits.AGAIN), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    limits.require_weights(model, [source.gguf] if source.gguf else weight_files(source.folder), place)
    return model


def _holds_untied(source: Source, model: PreTrainedModel) -> bool:
    """Tell whether safetensors files hold two different matrices where the configuration has one for two layers."""
    pairs: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return not source.gguf and any(
        modelfiles.differ(source.folder, *([name, name.removeprefix(f"{model.base_model_prefix}.")] for name in pair))
        for pair in pairs.items()
    )


def _untie(config: Any) -> None:
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False


def check_device(name: str) -> None:
    """Raise UserError for a device that this machine or this build of torch does not have."""
    if name == "cpu":
        return
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the device {name!r} cannot be used: {first_line(error)}", "use `device` cpu") from error


# ignore_mismatched_sizes: so that they are listed; _check_fit refuses them
LOADING = {"dtype": "float32", "ignore_mismatched_sizes": True, "output_loading_info": True}


def load(source: Source, *, label: str | None = None, device: str = "cpu") -> Subject:
    """Load a causal language model with its tokenizer, in float32 and evaluation mode, and check every weight.

    `label` is its name in reports; the folder's when None.

    Raises UserError for weights that do not fit the configuration, for NaN or infinite weights (naming the tensor), for
    a tokenizer that cannot be loaded and for files that have changed since their fingerprint was taken.
    """
    name, expected = source.name, source.fingerprint
    tokenizer = load_tokenizer(source)
    with blamed_on(f"{name} cannot be loaded", "copy or download it again"):
        model, info = _load_packed(source) if source.form else _load_plain(source)
    if fingerprint(source.path) != expected:
        raise UserError(f"{name} changed while it was read", "leave its files alone meanwhile, and run it again")
    _check_fit(model, info, name)
    check_finite(model, name)
    head: Any = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        _untie(model.config)  # so that it is saved as it is
    model.eval().requires_grad_(False).to(device)  # type: ignore[reportArgumentType]
    return Subject(label or Path(name).name, model, tokenizer, source.path, expected)


def _load_plain(source: Source) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model, and which weights did not fit it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(  # type: ignore[reportReturnType]
        source.folder,
        use_safetensors=not _is_pickled(weight_files(source.folder)),
        trust_remote_code=source.trust_remote_code,
        **LOADING,
    )


def _load_packed(source: Source) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the plain model with the weights that a quantized file stands for, and which of them did not fit it."""
    model = skeleton(source)
    if source.gguf:
        tensors = gguf.weights(source.gguf, model)
    else:
        stored = read_object(source.folder / "config.json")["quantization_config"]
        tensors = folders.weights(weight_files(source.folder), stored, model, str(source.folder))
    return type(model).from_pretrained(None, config=model.config, state_dict=tensors, **LOADING)  # type: ignore[reportReturnType]


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


PROBE = "a b"


def load_tokenizer(source: Source):
    """Load a model's tokenizer, as its tokenizer.json has it; UserError when there is none."""
    from transformers import AutoTokenizer

    if source.gguf:
        return gguf.tokenizer(source.gguf)
    folder = source.folder
    fix = "put tokenizer.json and tokenizer_config.json beside the weights"
    with blamed_on(f"{folder} has no tokenizer that can be loaded", fix):
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
        tokenizer = tokens.as_stored(loaded, folder)
        if not isinstance(tokenizer.model_max_length, int | float):
            raise UserError(
                f"{folder}/tokenizer_config.json: its model_max_length {tokenizer.model_max_length!r} is no number", fix
            )
        tokenizer(PROBE)  # some faults show only then
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # some classes make an empty one where the files are missing
        raise UserError(f"{folder} has no tokenizer: nothing but special tokens came of it", fix)
    return tokenizer


def save(model: nn.Module, tokenizer, folder: Path) -> None:
    """Write a normal Hugging Face checkpoint (safetensors) with its tokenizer into an existing folder."""
    check_result(model)
    save_model(model, folder)
    tokenizer.save_pretrained(folder)


def save_model(model: nn.Module, folder: Path, **options: Any) -> None:
    """Write a model without its tokenizer into an existing folder; `options` are those of transformers.

    Its settings for generation are written as they are. transformers would refuse some that published models have, such
    as a temperature without sampling, and a model that was trained for hours would be lost over them.
    """
    from transformers import GenerationConfig

    settings = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[reportArgumentType]
    try:
        model.save_pretrained(folder, **options)  # type: ignore[operator]
    finally:
        model.generation_config = settings
    if settings is not None:
        settings.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])  # type: ignore[operator]


def check_result(model: nn.Module) -> None:
    """Raise UserError when training has left a NaN or infinite weight."""
    check_finite(model, "the result", "training left the range of numbers: lower `lr`, or add a retain term")


def check_finite(model: nn.Module, name: str, fix: str = "the checkpoint is broken; use another") -> None:
    """Raise UserError that names the first tensor with a NaN or infinite weight."""
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{name}: the weights {key} hold NaN or infinity", fix)


def context_length(source: Source) -> int:
    """Return the most tokens that a model can read at once."""
    config = _config(source).get_text_config()
    for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        if getattr(config, key, None):
            return int(getattr(config, key))
    return 2048


def generation_ends(source: Source) -> frozenset[int]:
    """Return the tokens at which a model's own settings end what it generates."""
    from transformers import GenerationConfig

    path = source.folder / "generation_config.json"
    with blamed_on(f"{path} cannot be used", limits.AGAIN):
        if source.form or not path.is_file():
            settings = GenerationConfig.from_model_config(_config(source))
        else:
            settings = GenerationConfig.from_pretrained(source.folder)
    listed: Any = settings.eos_token_id
    ends = [token for token in (listed if isinstance(listed, list) else [listed]) if token is not None]
    if any(type(token) is not int for token in ends):
        raise UserError(f"{path}: its eos_token_id {listed!r} is no token's number", "correct or remove eos_token_id")
    return frozenset(ends)


def vocabulary_size(source: Source) -> int:
    """Return the number of tokens that a model embeds."""
    return int(_config(source).get_text_config().vocab_size)


def _config(source: Source):
    """Return the configuration of the plain model."""
    from transformers import AutoConfig

    if source.gguf:
        return gguf.config(source.gguf)
    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
    if source.form:
        delattr(config, "quantization_config")
    return config


def quiet() -> None:
    """Keep transformers' own progress bars and advice out of the output; warnings that matter are ours to give."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*torch_dtype.*")
