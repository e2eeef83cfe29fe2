"""The files that a model is read from: one answer for loading, for fingerprints and for reading weights on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stillknows.errors import UserError
from stillknows.lazy import Tensor, torch
from stillknows.model.limits import AGAIN, CONFIG
from stillknows.store import file_digest, read_json

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


def weight_files(folder: Path) -> list[Path]:
    """Return the files that a folder's weights are loaded from, in a fixed order; some that are named may be missing.

    The same choice as transformers makes: what config.json names, else safetensors before pickles, one file before
    shards; other files are ignored.
    """
    entry = _entry(folder)
    if entry is None or entry.suffix != ".json":
        return [entry] if entry else []
    shards = read_object(entry).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{entry} names no weight files", AGAIN)
    return sorted({_inside(folder, name, entry) for name in shards.values()})


def _entry(folder: Path) -> Path | None:
    """Return the file by which the weights are found: the weights themselves, or an index of them."""
    config = folder / CONFIG
    named = read_object(config).get(NAMED) if config.is_file() else None
    if named is None:
        return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if not str(named).endswith((".safetensors", ".safetensors.index.json")):
        raise UserError(f"{config}: {NAMED} is {named!r}, which is no safetensors file", f"correct or remove {NAMED}")
    return _inside(folder, named, config)


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
            f"{folder} holds an adapter ({ADAPTER}), and what is loaded would depend on whether peft is installed",
            "merge it: PeftModel.from_pretrained(model, FOLDER).merge_and_unload().save_pretrained(OTHER); "
            f"or move {ADAPTER} away to use the weights without it",
        )


def files(path: Path) -> list[Path]:
    """Return every file that a model, a folder or a .gguf file, is read from, in a fixed order.

    Python code counts where the model asks for it. Raises UserError where an adapter lies beside the weights.
    """
    if path.is_file():
        return [path]
    require_no_adapter(path)
    companions = {*_found(path, COMPANIONS), *(_found(path, ("**/*.py",)) if has_code(path) else ())}
    entry = _entry(path)
    index = [entry] if entry is not None and entry.suffix == ".json" else []
    return [*sorted(companions), *index, *weight_files(path)]


def has_code(folder: Path) -> bool:
    """Tell whether a model asks for Python code that comes with it."""
    return code_asked_by(folder) is not None


def code_asked_by(folder: Path) -> Path | None:
    """Return the file in which a model asks for Python code of its own, None where it does not."""
    candidates = (folder / name for name in (CONFIG, "tokenizer_config.json"))
    return next((path for path in candidates if path.is_file() and read_object(path).get("auto_map")), None)


def _found(folder: Path, patterns: tuple[str, ...]) -> set[Path]:
    return {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}


def fingerprint(path: Path) -> str:
    """Return a hash of everything that a model's answers depend on: weights, configuration, tokenizer and code.

    path: a folder, or a .gguf file, which holds all of that.
    """
    return file_digest(*files(path))


@contextlib.contextmanager
def unchanged(*folders: Path) -> Iterator[None]:
    """Raise UserError at the end of the block when a model's files were written meanwhile, as their dates tell."""

    def dates() -> list[tuple[Path, int, int, int]]:
        states = [(file, file.stat()) for folder in folders for file in files(folder)]
        return [(file, state.st_size, state.st_mtime_ns, state.st_ino) for file, state in states]

    before = dates()
    yield
    changed = {file for file, *_ in {*before} ^ {*dates()}}
    if changed:
        raise UserError(
            f"{min(changed)} changed while it was read", "leave the files alone meanwhile, and run it again"
        )


def present(folder: Path) -> list[Path]:
    """Return the files in a folder that would be taken for parts of a model that is written there."""
    patterns = ("model*.safetensors*", "pytorch_model*.bin*", "adapter_*", *COMPANIONS)
    return sorted(_found(folder, patterns))


def differ(folder: Path, first: Iterable[str], second: Iterable[str]) -> bool:
    """Tell whether safetensors files hold two matrices, each under one of its names, with different weights."""
    from safetensors import safe_open

    places: dict[str, Path] = {}
    for file in weight_files(folder):
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
