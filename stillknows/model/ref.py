"""A model as it is named: its files are found and checked at once, what they say is read when it is first asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stillknows.errors import UserError, blamed_on
from stillknows.lazy import nn
from stillknows.model import adapters, configuration, finding, loading, parameters
from stillknows.model.limits import CONFIG
from stillknows.model.modelfiles import ModelFiles
from stillknows.model.packed import folders, gguf
from stillknows.model.target import LocalTarget

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": "float32", "stored": "auto"}  # as transformers names them


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded, and what the user allows.

    dtype: "float32", or "stored": as the files keep the weights. Packed weights are float32 either way.
    """

    device: str = "cpu"
    dtype: Literal["float32", "stored"] = "float32"
    allow_pickle: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True, eq=False)
class ModelRef:
    """A model on disk or on the hub; `open` finds it. Everything that its files say is read once.

    name: as the user gave it: a folder, a .gguf file or a hub name.
    packing: in words, how its weights are quantized on disk; "" where they are not.
    gguf: the one file that is the model, if it is one.
    adapter, base: of an adapter of peft, which is merged when it is loaded, and the model that it belongs to.
    """

    name: str
    files: ModelFiles
    options: LoadOptions = LoadOptions()
    packing: str = ""
    gguf: gguf.GgufFile | None = None
    adapter: adapters.Adapter | None = None
    base: ModelRef | None = None
    states: list[Any] = field(init=False, repr=False)  # of the files, as they were when it was opened

    def __post_init__(self) -> None:
        object.__setattr__(self, "states", self.files.states())

    @classmethod
    def open(cls, name: str, options: LoadOptions | None = None, *, packed: bool = False) -> ModelRef:
        """Find a local model or download one, and check its files; neither torch nor transformers is imported.

        Args:
            packed: weights that are quantized on disk, and .gguf files, are allowed.

        Raises UserError: no such folder or hub model, no config.json, code of its own (needs `trust_remote_code`), no
        safetensors weights (pickled weights need `allow_pickle`), missing, truncated or unreadable weight files,
        quantized ones that are not allowed or that nothing here can read.
        """
        options, path = options or LoadOptions(), Path(name).expanduser()
        if path.suffix == gguf.SUFFIX and path.is_file():
            _require_plain(name, packed)
            file = gguf.GgufFile(path)
            return cls(name, ModelFiles(path), options, file.describe(), file)
        folder = finding.folder_of(name, options.allow_pickle)
        if adapters.is_alone(folder):
            return cls._adapted(name, adapters.Adapter(folder, options.trust_remote_code), options, packed)
        files = finding.readable_files(folder, options.trust_remote_code)
        quantization = files.said(CONFIG).get("quantization_config")
        packing = ""
        if quantization:
            _require_plain(name, packed)
            packing = folders.describe(quantization, f"{folder}/{CONFIG}")
        finding.require_weights(files, options.allow_pickle and not packing)
        return cls(name, files, options, packing)

    @classmethod
    def _adapted(cls, name: str, adapter: adapters.Adapter, options: LoadOptions, packed: bool) -> ModelRef:
        """Return an adapter on its base. Raises UserError, which names both, for a base that cannot be opened."""
        if adapters.is_alone(Path(adapter.base_name)):
            raise UserError(f"{name} is an adapter of another adapter, {adapter.base_name}", "merge that one first")
        try:
            base = cls.open(adapter.base_name, options, packed=packed)
        except UserError as error:
            raise UserError(
                f"{name} is an adapter of {adapter.base_name}, which cannot be opened: {error}\n"
                f"  or write where that model lies into base_model_name_or_path of {adapter.place}"
            ) from error
        files = base.files.and_beside(adapter.files)
        return cls(name, files, options, base.packing, base.gguf, adapter, base)

    @property
    def path(self) -> Path:
        """What the model is: a folder, or a .gguf file."""
        return self.adapter.folder if self.adapter else self.files.path

    @property
    def folder(self) -> Path:
        """Where its weights lie; of an adapter, those of its base."""
        return self.files.path.parent if self.gguf else self.files.path

    @property
    def folders(self) -> list[Path]:
        """Every folder that its files lie in."""
        return [self.folder, *([self.adapter.folder] if self.adapter else [])]

    @cached_property
    def fingerprint(self) -> str:
        """What identifies the files, as they were when this was first asked for: `load` refuses any others."""
        return self.files.fingerprint()

    @cached_property
    def configuration(self) -> Any:
        """The plain model's configuration, as transformers has it; not to be changed.

        Raises UserError for one that cannot be read, or that is not a causal language model's.
        """
        if self.gguf:
            loading.quiet()
            return self.gguf.config()
        config = configuration.read(self.folder, self.options.trust_remote_code)
        if self.packing:
            delattr(config, "quantization_config")
        return config

    def check(self) -> ModelRef:
        """Return this once its configuration is read and its device tried. Raises UserError as they do."""
        loading.require_device(self.options.device)
        assert self.configuration
        return self

    @property
    def context_length(self) -> int:
        """The most tokens that the model can read at once."""
        return configuration.context_length(self.configuration)

    @property
    def vocabulary_size(self) -> int:
        """The number of tokens that the model embeds."""
        return int(self.configuration.get_text_config().vocab_size)

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """The tokens at which the model's own settings end what it generates."""
        has_settings = not self.packing and (self.folder / configuration.SETTINGS).is_file()
        return configuration.end_tokens(self.configuration, self.folder, has_settings=has_settings)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, as tokenizer.json or the .gguf file has it. Raises UserError when there is none."""
        beside_adapter = self.adapter is not None and self.adapter.has_tokenizer
        if self.gguf and not beside_adapter:
            return self.gguf.tokenizer()
        folder = self.path if beside_adapter else self.folder
        return loading.tokenizer(folder, self.configuration, self.options.trust_remote_code)

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model with shapes but without weights, on the meta device; not to be changed."""
        return configuration.skeleton(self.configuration, self.files, self.options.trust_remote_code)

    def load(self, label: str | None = None) -> LocalTarget:
        """Load the model in evaluation mode, and check every weight.

        Args:
            label: its name in reports; the folder's when None.

        Raises UserError for weights that do not fit the configuration, for NaN or infinite weights (naming the tensor),
        for a tokenizer that cannot be loaded and for files that have changed since they were found.
        """
        expected, tokenizer = self.fingerprint, self.tokenizer
        with blamed_on(f"{self.name} cannot be loaded", "copy or download it again"):
            model, info = self._loaded()
        if self.files.states() != self.states or self.files.fingerprint() != expected:
            raise UserError(
                f"{self.name} changed while it was read", "leave its files alone meanwhile, and run it again"
            )
        loading.require_fit(model, info, self.name)
        self._merge(model)
        loading.require_finite(model, self.name)
        head: Any = model.get_output_embeddings()
        if head is not None and head.weight is not model.get_input_embeddings().weight:
            configuration.untie(model.config)  # so that it is saved as it is
        model.eval().requires_grad_(False).to(self.options.device)  # type: ignore[reportArgumentType]
        return LocalTarget(label or Path(self.name).name, model, tokenizer, self.path, expected)

    def _merge(self, model: nn.Module) -> None:
        if self.adapter is not None:
            known = dict(model.named_parameters(remove_duplicate=False))
            for name, new in self.adapter.merged(model):
                parameters.write({name: known[name]}, {name: new})

    def _loaded(self) -> loading.Loaded:
        if not self.packing:
            dtype = DTYPES[self.options.dtype]
            return loading.plain_model(self.files, self.configuration, dtype, self.options.trust_remote_code)
        if self.gguf:
            return loading.model_of(self.skeleton, self.gguf.weights(self.skeleton))
        stored = self.files.said(CONFIG)["quantization_config"]
        weights = folders.weights(self.files.weights, stored, self.skeleton, str(self.folder))
        return loading.model_of(self.skeleton, weights)


def _require_plain(name: str, packed: bool) -> None:
    if not packed:
        raise UserError(
            f"{name} holds weights that are quantized already",
            "give the model in full precision; formats are applied by an audit's `variants`",
        )


def require_same_shapes(original: ModelRef, other: ModelRef) -> None:
    """Raise UserError when two models differ in the names or shapes of weights; which layers share them may differ."""
    first, second = _shapes(original.skeleton), _shapes(other.skeleton)
    for key in [*first, *second]:
        if first.get(key) != second.get(key):
            raise UserError(
                f"{other.name} is not a version of {original.name}: "
                f"{key} is {second.get(key, 'missing')}, not {first.get(key, 'missing')}",
                "give models of one architecture and size; the original is the one that the others were unlearned from",
            )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
