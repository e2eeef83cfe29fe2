"""Adapters of peft: low-rank updates of a base model, in a folder of their own. Read without peft; no pickle is opened.

What is read is merged: W + (α/r)·B·A, with α/√r for rank-stabilized adapters (arXiv 2312.03732), and its rows scaled to
the magnitudes of DoRA (arXiv 2402.09353) where there are some. Settings of an adapter that change what it computes and
that are not read here are refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stillknows.errors import UserError, blamed_on
from stillknows.lazy import Tensor, nn, no_grad, torch
from stillknows.model import limits
from stillknows.model.modelfiles import ADAPTER, COMPANIONS, ModelFiles

if TYPE_CHECKING:
    from stillknows.model.ref import ModelRef

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # before the names of a base model's tensors
MERGE = "or merge it with peft: PeftModel.from_pretrained(model, FOLDER).merge_and_unload().save_pretrained(OTHER)"
# Settings that are read here, and those that no merged weight depends on: they say how an adapter was trained.
READ = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "alpha_pattern"),
    *("rank_pattern", "use_rslora", "use_dora", "lora_bias", "init_lora_weights"),
}
TRAINED = {
    *("auto_mapping", "inference_mode", "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "bias"),
    *("modules_to_save", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "loftq_config"),
    *("eva_config", "corda_config", "lora_ga_config", "runtime_config", "peft_version", "ensure_weight_tying"),
    "qalora_group_size",  # of use_qalora
}
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the base's weights when they begin
PATTERN = re.compile(r"[\w.^]+")  # of names in alpha_pattern and rank_pattern; anything more may never end
FACTORS = {  # the end of a tensor's name: what it is of its module
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_B.bias": "bias",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
}


class LowRankUpdate(NamedTuple):
    """B·A of a linear map, its scale within B: b [O, R], a [R, I]."""

    b_OR: Tensor
    a_RI: Tensor


def is_alone(folder: Path) -> bool:
    """Tell whether a folder holds an adapter and no model beside it."""
    return (folder / ADAPTER).is_file() and not (folder / limits.CONFIG).is_file()


class Adapter:
    """A folder with an adapter, its settings checked.

    Raises UserError for one that is pickled, damaged, or of a kind that is not read here.
    """

    def __init__(self, folder: Path, trust_remote_code: bool) -> None:
        self.folder, self.place = folder, folder / ADAPTER
        self.said = limits.require_readable(folder, ADAPTER)[ADAPTER]
        if (asked_by := ModelFiles(folder).code_asked_by) and not trust_remote_code:
            raise UserError(
                f"{asked_by} asks for Python code that comes with the adapter (auto_map)",
                "read that code; then add `trust_remote_code` to run it",
            )
        if not (folder / WEIGHTS).is_file():
            pickled = (folder / PICKLED).is_file()
            raise UserError(
                f"{folder} has only pickled weights ({PICKLED}), and a pickle can run code"
                if pickled
                else f"{folder} has no weights of an adapter ({WEIGHTS})",
                "save it as safetensors: save_pretrained of peft writes them" if pickled else limits.AGAIN,
            )
        limits.count_tensors(folder / WEIGHTS)
        _check(self.said, str(self.place))

    @property
    def base_name(self) -> str:
        """The folder or hub name of the model that the adapter belongs to; a relative one may lie in its own folder."""
        name = self.said.get("base_model_name_or_path")
        if not isinstance(name, str) or not name:
            raise UserError(f"{self.place} names no base model", "write its folder into base_model_name_or_path")
        inside = self.folder / name
        return str(inside) if not Path(name).is_dir() and inside.is_dir() else name

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies beside the adapter; it counts then, and not the base's."""
        return any((self.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))

    def files(self) -> list[Path]:
        """Return every file that is read, in a fixed order."""
        found = {file for pattern in COMPANIONS for file in self.folder.glob(pattern) if file.is_file()}
        return [self.place, self.folder / WEIGHTS, *sorted(found)]

    def tensors(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """Return the factors of each layer, by its name, and the parameters that are saved whole, in float32."""
        from safetensors.torch import load_file

        factors: dict[str, dict[str, Tensor]] = {}
        whole: dict[str, Tensor] = {}
        with blamed_on(f"{self.folder / WEIGHTS} is truncated or damaged", limits.AGAIN):
            tensors = load_file(self.folder / WEIGHTS)
        self._require(bool(tensors), "it holds no tensors")
        for key, tensor in tensors.items():
            name = key.removeprefix(PREFIX)
            end = next((end for end in FACTORS if name.endswith(end)), None)
            if end is None:
                whole[name.replace(".base_layer.", ".")] = tensor.float()
            else:
                factors.setdefault(name.removesuffix(end), {})[FACTORS[end]] = tensor.float()
        return factors, whole

    def updates(self) -> dict[str, LowRankUpdate]:
        """Return what is added to each linear map, by its name. Raises UserError where there is more than that."""
        factors, whole = self.tensors()
        beyond = [*whole, *(name for name, parts in factors.items() if parts.keys() != {"a", "b"})]
        if beyond:
            raise UserError(
                f"{self.folder} changes {beyond[0]} by more than a product of two factors, which cannot be added to",
                "merge it first with `stillknows import`",
            )
        scales = {name: self._scale(name, parts["a"].shape[0]) for name, parts in factors.items()}
        return {name: LowRankUpdate(scales[name] * parts["b"], parts["a"]) for name, parts in factors.items()}

    @no_grad
    def merged(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter of the base that the adapter changes, by its name, with its new values in float32.

        Raises UserError for an adapter of another model: a layer that the base lacks, or that has other shapes.
        """
        modules, known = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
        factors, whole = self.tensors()
        self._require_unshared(known, {*whole, *(f"{name}.weight" for name in factors)})
        for name, tensor in whole.items():
            self._require(name in known, f"it has no place for {name}")
            self._require(tensor.shape == known[name].shape, f"{name} is {list(tensor.shape)}")
        for name, parts in factors.items():
            key, bias = f"{name}.weight", f"{name}.bias"
            self._require(key in known, f"it has no layer {name}")
            pair = {"embedding_a", "embedding_b"} if isinstance(modules[name], nn.Embedding) else {"a", "b"}
            self._require(pair <= parts.keys(), f"{name} has one factor of two")
            yield key, self._updated(name, modules[name], parts, whole.pop(key, known[key]))
            if "bias" in parts:
                self._require(bias in known and known[bias].shape == parts["bias"].shape, f"{name} has no such bias")
                added = self._scale(name, parts["a"].shape[0]) * parts["bias"]
                yield bias, whole.pop(bias, known[bias]).float() + added.to(known[bias].device)
        yield from whole.items()

    def _require_unshared(self, known: Mapping[str, Tensor], changed: set[str]) -> None:
        for name in sorted(changed & known.keys()):
            other = next((key for key, p in known.items() if p is known[name] and key != name), None)
            if other is not None:
                raise UserError(
                    f"{self.folder} changes {name}, which the base shares with {other}: whether that changes too "
                    "depends on who merges it",
                    f"save the base with tie_word_embeddings false; {MERGE}",
                )

    def _updated(self, name: str, module: nn.Module, parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        """Return what the adapter makes of a layer's weights, laid out as they are."""
        from transformers.pytorch_utils import Conv1D

        is_embedding = isinstance(module, nn.Embedding)
        is_turned = is_embedding or isinstance(module, Conv1D)  # kept as [I, O], and as [V, D] for an update [D, V]
        weight_OI = weight.float().T if is_turned else weight.float()
        prefix = "embedding_" * is_embedding
        a_RI, b_OR = (parts[f"{prefix}{side}"].to(weight.device) for side in "ab")
        self._require(
            (b_OR.shape[0], a_RI.shape[-1]) == tuple(weight_OI.shape) and b_OR.shape[-1] == a_RI.shape[0],
            f"the update of {name} is {list(b_OR.shape)} times {list(a_RI.shape)}",
        )
        merged_OI = weight_OI + self._scale(name, a_RI.shape[0]) * (b_OR @ a_RI)
        if self.said.get("use_dora"):
            self._require("magnitude" in parts and not is_embedding, f"{name} has no magnitudes")
            size_O = parts["magnitude"].to(weight.device).flatten()
            merged_OI = (size_O / torch.linalg.norm(merged_OI, dim=1))[:, None] * merged_OI
        return merged_OI.T if is_turned else merged_OI

    def _scale(self, name: str, rank: int) -> float:
        alpha = _by_name(self.said.get("alpha_pattern"), name, self.said["lora_alpha"])
        expected = _by_name(self.said.get("rank_pattern"), name, self.said["r"])
        self._require(rank == expected, f"{name} has the rank {rank} and should have {expected}")
        return alpha / math.sqrt(rank) if self.said.get("use_rslora") else alpha / rank

    def _require(self, fits: bool, problem: str) -> None:
        if not fits:
            raise UserError(
                f"{self.folder} is no adapter of {self.base_name}: {problem}",
                f"put the base that it was trained on there, or name it in {ADAPTER}",
            )


def _check(said: Mapping[str, Any], place: str) -> None:
    """Raise UserError for settings that are not read here, or of the wrong kind."""
    if said.get("peft_type") != "LORA":
        raise UserError(f"{place}: adapters of the type {said.get('peft_type')} are not read", f"give LORA, {MERGE}")
    if said.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(f"{place}: its task is {said['task_type']}, not CAUSAL_LM", "give one of a language model")
    strange = [
        name for name, value in said.items() if name not in READ | TRAINED and value not in (None, False, {}, [])
    ]
    if strange:
        raise UserError(f"{place}: {strange[0]} = {said[strange[0]]!r} is not read here", f"leave it out, {MERGE}")
    if said.get("init_lora_weights") not in STARTS:
        raise UserError(
            f"{place}: init_lora_weights = {said['init_lora_weights']!r} begins by changing the base's weights",
            f"convert it to a plain adapter with peft, {MERGE}",
        )
    if said.get("revision") not in (None, "main"):
        raise UserError(
            f"{place}: it belongs to the revision {said['revision']!r} of its base",
            "download that one, and write its folder into base_model_name_or_path",
        )
    numbers = {name: said.get(name) for name in ("r", "lora_alpha")}
    for name in ("alpha_pattern", "rank_pattern"):
        pattern = said.get(name) or {}
        if not isinstance(pattern, dict) or not all(PATTERN.fullmatch(key) for key in pattern):
            raise UserError(f"{place}: {name} holds more than names of layers", f"name them in full, {MERGE}")
        numbers |= {f"{name} of {key}": value for key, value in pattern.items()}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{place}: {name} is {value!r}, which is no number above 0", limits.AGAIN)


def _by_name(pattern: Mapping[str, float] | None, layer: str, usual: float) -> float:
    """Return the value of the first name that a layer's ends with, as peft finds it."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", layer)), usual)


class Parts(NamedTuple):
    """The parameters that an adapter changes, by name: of the base, and what the adapter adds to them, in float32."""

    base: dict[str, Tensor]
    update: dict[str, Tensor]


def parts(ref: ModelRef) -> Parts:
    """Return base weights and update of a model that is an adapter on its base, so that the update can be taken away
    or scaled: base + scale·update, where scale 1 is the model but for rounding and 0 is the base, bit by bit.

    Raises UserError for a model that is no adapter, and as loading does.
    """
    if ref.adapter is None or ref.base is None:
        raise UserError(f"{ref.name} is no adapter", f"give a folder with {ADAPTER} and {WEIGHTS}")
    model = ref.base.load().model
    known = dict(model.named_parameters(remove_duplicate=False))
    merged = dict(ref.adapter.merged(model))
    base = {name: known[name].detach().float() for name in merged}
    return Parts(base, {name: merged[name] - base[name] for name in merged})
