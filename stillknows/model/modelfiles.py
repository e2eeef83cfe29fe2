"""The files that a model is read from: one answer for loading, for fingerprints and for reading weights on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from stillknows.checksums import file_digest
from stillknows.errors import UserError
from stillknows.lazy import Tensor, torch
from stillknows.model.limits import AGAIN, CONFIG
from stillknows.store import read_json

ADAPTER = "adapter_config.json"
NAMED = "transformers_weights"  # in config.json: the file that holds the weights, or the index of those that do
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Everything else that transformers reads of a folder. What a tokenizer class reads of it depends on which files there
# are, so all kinds of vocabularies count.
COMPANIONS = (
    *(CONFIG, "generation_config.json", "*.jinja", "additional_chat_templates/*.jinja"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "bpe.codes"),
)


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; UserError where there is none."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object", AGAIN)
    return value


class ModelFiles:
    """The files that a model is read from: a folder, or one .gguf file, which holds everything.

    What its small JSON files say is read once, when it is first needed.
    """

    def __init__(
        self,
        path: Path,
        said: Mapping[str, dict[str, Any]] | None = None,
        beside: Callable[[], list[Path]] = list,
    ) -> None:
        """said: what JSON files in the folder hold, by name, of those that were read already. beside: lists files that
        lie elsewhere and that answers depend on too."""
        self.path, self.beside = path, beside
        self._said = dict(said or {})

    def and_beside(self, beside: Callable[[], list[Path]]) -> ModelFiles:
        """Return the same files with others that lie elsewhere."""
        return ModelFiles(self.path, self._said, beside)

    def said(self, name: str) -> dict[str, Any]:
        """Return the JSON object in a file of the folder; {} where there is no such file."""
        return self._read(name) if (self.path / name).is_file() else {}

    def _read(self, name: str) -> dict[str, Any]:
        if name not in self._said:
            self._said[name] = read_object(self.path / name)
        return self._said[name]

    @cached_property
    def weights(self) -> list[Path]:
        """The files that the weights are loaded from, in a fixed order; some that are named may be missing.

        The same choice as transformers makes: what config.json names, else safetensors before pickles, one file before
        shards; other files are ignored.
        """
        if self.path.is_file():
            return [self.path]
        entry = self._entry
        if entry is None or entry.suffix != ".json":
            return [entry] if entry else []
        shards = self._read(entry.relative_to(self.path).as_posix()).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise UserError(f"{entry} names no weight files", AGAIN)
        return sorted({_inside(self.path, name, entry) for name in shards.values()})

    @cached_property
    def _entry(self) -> Path | None:
        """The file by which the weights are found: the weights themselves, or an index of them."""
        named = self.said(CONFIG).get(NAMED)
        if named is None:
            return next((self.path / name for name in WEIGHTS if (self.path / name).is_file()), None)
        place = self.path / CONFIG
        if not str(named).endswith((".safetensors", ".safetensors.index.json")):
            raise UserError(
                f"{place}: {NAMED} is {named!r}, which is no safetensors file", f"correct or remove {NAMED}"
            )
        return _inside(self.path, named, place)

    @property
    def pickled(self) -> list[Path]:
        """The weight files that are pickles, which can run code when they are loaded."""
        return [file for file in self.weights if file.suffix not in (".safetensors", ".gguf")]

    @cached_property
    def code_asked_by(self) -> Path | None:
        """The file in which the model asks for Python code of its own, None where it does not."""
        names = (CONFIG, "tokenizer_config.json")
        return next((self.path / name for name in names if self.said(name).get("auto_map")), None)

    def all(self) -> list[Path]:
        """Return every file that the model is read from, in a fixed order, as they lie there now.

        Python code counts where the model asks for it. Raises UserError where an adapter lies beside the weights.
        """
        if self.path.is_file():
            return [self.path, *self.beside()]
        require_no_adapter(self.path)
        code = _found(self.path, ("**/*.py",)) if self.code_asked_by else set()
        entry = self._entry
        index = [entry] if entry is not None and entry.suffix == ".json" else []
        return [*sorted({*_found(self.path, COMPANIONS), *code}), *index, *self.weights, *self.beside()]

    def fingerprint(self) -> str:
        """Return a hash of everything that the model's answers depend on: weights, configuration, tokenizer, code."""
        return file_digest(*self.all())

    def states(self) -> list[tuple[Path, int, int, int]]:
        """Return size, date and number of every file: they change when one is written or replaced."""
        found = [(file, file.stat()) for file in self.all()]
        return [(file, state.st_size, state.st_mtime_ns, state.st_ino) for file, state in found]


def _inside(folder: Path, name: Any, named_by: Path) -> Path:
    """Return a file's path in the folder. UserError for one that lies outside of it."""
    inside = Path(str(name))
    if inside.is_absolute() or ".." in inside.parts:
        raise UserError(f"{named_by} names weights outside of its folder: {name}", AGAIN)
    return folder / inside


def require_no_adapter(folder: Path) -> None:
    """Raise UserError where an adapter lies in a folder: transformers adds it to the weights where peft is installed,
    and leaves it out elsewhere."""
    if (folder / ADAPTER).is_file():
        raise UserError(
            f"{folder} holds an adapter ({ADAPTER}) beside a model, and what is loaded would depend on whether peft is "
            "installed",
            "give the adapter a folder of its own; "
            "or merge it: PeftModel.from_pretrained(model, FOLDER).merge_and_unload().save_pretrained(OTHER)",
        )


def _found(folder: Path, patterns: tuple[str, ...]) -> set[Path]:
    return {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}


def fingerprint(path: Path) -> str:
    """Return the fingerprint of the model in a folder or a .gguf file; see `ModelFiles.fingerprint`."""
    return ModelFiles(path).fingerprint()


@contextlib.contextmanager
def unchanged(*folders: Path) -> Iterator[None]:
    """Raise UserError at the end of the block when a model's files were written meanwhile, as their dates tell."""
    before = _states(folders)
    yield
    changed = {file for file, *_ in before ^ _states(folders)}
    if changed:
        raise UserError(
            f"{min(changed)} changed while it was read", "leave the files alone meanwhile, and run it again"
        )


def _states(folders: Iterable[Path]) -> set[tuple[Path, int, int, int]]:
    return {state for folder in folders for state in ModelFiles(folder).states()}


def present(folder: Path) -> list[Path]:
    """Return the files in a folder that would be taken for parts of a model that is written there."""
    patterns = ("model*.safetensors*", "pytorch_model*.bin*", "adapter_*", *COMPANIONS)
    return sorted(_found(folder, patterns))


def differ(files: Sequence[Path], first: Iterable[str], second: Iterable[str]) -> bool:
    """Tell whether weight files hold two matrices, each under one of its names, with different weights."""
    from safetensors import safe_open

    places: dict[str, Path] = {}
    for file in files:
        if file.suffix != ".safetensors":
            return False
        with safe_open(file, framework="np") as tensors:
            places |= dict.fromkeys(tensors.keys(), file)
    keys = [next((name for name in names if name in places), None) for names in (first, second)]
    if None in keys:
        return False
    return not torch.equal(*(_tensor(places[key], key) for key in keys if key))


def _tensor(file: Path, key: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(key).float()
