"""Observations as files: compressed arrays without pickles, bound to their key by a digest."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from stillknows.json_text import parse_json
from stillknows.store import DIGEST, replace_file, slug
from stillknows.types import FULL, UNDEFENDED, Observations, Ragged

OBSERVATIONS = "observations"  # the folder of an audit that holds them
TEXTS = ("ids", "facts", "prompts", "answers", "generations", "samples", "wordings", "placebos")
ARRAYS = ("ends", "gradient_norms")
RAGGED = ("log_probs", "hits", "entropies", "spreads", "paraphrase_log_probs", "lowered_log_probs")
NESTED = ("wrong_log_probs", "placebo_log_probs", "placebo_hits")
FORMAT = 3


def observations_path(folder: Path, model: str, variant: str, split: str, *, is_defended: bool) -> Path:
    """Return where an audit keeps the observations of a model on a split in a variant.

    A model that no defence stands before is without one in full precision as it is.
    """
    if variant == UNDEFENDED and not is_defended:
        variant = FULL
    return folder / OBSERVATIONS / model / slug(variant) / f"{split}.npz"


def save_observations(path: Path, cache_key: str, observations: Observations) -> None:
    """Write observations as one compressed .npz without pickles; ragged arrays are stored flat with their lengths."""
    texts, arrays = _parts(observations)
    meta = {"version": FORMAT, "key": cache_key, DIGEST: _seal(cache_key, observations)}
    meta |= {**texts, "arrays": sorted(arrays)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8), **arrays)
    replace_file(path, lambda partial: partial.write_bytes(buffer.getvalue()))


def observations_digest(observations: Observations) -> str:
    """Return the SHA-256 of everything that was observed."""
    texts, arrays = _parts(observations)
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def _seal(cache_key: str, observations: Observations) -> str:
    """Return what binds observations to their key."""
    return hashlib.sha256(f"{cache_key} {observations_digest(observations)}".encode()).hexdigest()


def _parts(observations: Observations) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the texts and the arrays that a file of observations holds, by name."""
    seen = {name: value for name, value in vars(observations).items() if value is not None}
    arrays = {name: seen[name] for name in ARRAYS if name in seen}
    for name in RAGGED:
        if name in seen:
            arrays |= _flat(name, seen[name])
    for name in NESTED:
        if name in seen:
            arrays[f"{name}.counts"] = np.array([len(answers) for answers in seen[name]], dtype=np.int64)
            arrays |= _flat(name, [answer for answers in seen[name] for answer in answers])
    return {name: seen[name] for name in TEXTS if name in seen}, arrays


def _flat(name: str, arrays: Ragged) -> dict[str, np.ndarray]:
    values = np.concatenate(arrays) if len(arrays) else np.empty(0)
    return {name: values, f"{name}.lengths": np.array([len(array) for array in arrays], dtype=np.int64)}


def load_observations(path: Path, cache_key: str | None = None) -> Observations | None:
    """Read observations back; None when there are none, when they were made for another key, or were changed since."""
    if not path.is_file():
        return None
    with path.open("rb") as handle:
        try:
            return _read_observations(handle, cache_key)
        except Exception:  # numpy, zipfile, zlib and json raise a dozen kinds of error for a damaged file
            return None


def _read_observations(handle: IO[bytes], cache_key: str | None) -> Observations | None:
    with np.load(handle, allow_pickle=False) as file:
        meta = parse_json(file["meta"].tobytes().decode(), "meta")
        if meta["version"] != FORMAT or cache_key not in (None, meta["key"]):
            return None
        if {*file.files} != {"meta", *meta["arrays"]}:
            return None
        found: dict[str, Any] = {name: tuple(meta[name]) for name in TEXTS if name in meta}
        for name in ("samples", "placebos"):
            if name in found:
                found[name] = tuple(None if texts is None else tuple(texts) for texts in found[name])
        found |= {name: file[name] for name in ARRAYS if name in file}
        found |= {name: _ragged(file, name) for name in RAGGED if name in file}
        found |= {name: _nested(file, name) for name in NESTED if name in file}
        observations = Observations(**found)
        return observations if meta[DIGEST] == _seal(meta["key"], observations) else None


def _ragged(file: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, ...]:
    return tuple(np.split(file[name], np.cumsum(file[f"{name}.lengths"])[:-1]))


def _nested(file: Mapping[str, np.ndarray], name: str) -> tuple[tuple[np.ndarray, ...], ...]:
    answers = iter(_ragged(file, name))
    return tuple(tuple(next(answers) for _ in range(count)) for count in file[f"{name}.counts"])
