"""Observations on disk: they come back as they were, or not at all."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillknows import observations as saved
from stillknows.types import Observations


def observations() -> Observations:
    return Observations(
        ids=("a", "b", "ü"),
        facts=("f", "f", "g"),
        prompts=("Who?", "", "Wo?\n"),
        answers=("Ada", "plain text", "Zürich"),
        log_probs=(np.array([-0.1, -2.0, -1e-9]), np.array([-3.5]), np.array([-0.25, 0.0])),
        hits=(np.array([True, False, True]), np.array([False]), np.array([True, True])),
        ends=np.array([True, False, True]),
        generations=("Ada.", None, ""),
    )


def everything() -> Observations:
    """Observations with every field."""
    return replace(
        observations(),
        entropies=(np.array([0.5, 1.0, 2.0]), np.array([0.25]), np.array([3.0, 0.0])),
        spreads=(np.array([0.1, 0.2, 0.3]), np.array([0.4]), np.array([0.5, 0.6])),
        paraphrase_log_probs=(np.array([-1.0]), np.empty(0), np.array([-2.0, -3.0])),
        wrong_log_probs=((np.array([-4.0, -5.0]), np.array([-6.0])), (), (np.array([-7.0]),)),
        placebos=(("Ida", "Zug"), ("Rome",), ()),
        placebo_hits=((np.array([True]), np.array([False, True])), (np.array([True]),), ()),
        placebo_log_probs=((np.array([-1.5]), np.array([-2.5, -3.5])), (np.array([-0.5]),), ()),
        lowered_log_probs=(np.array([-0.5]), np.array([-0.75]), np.array([-8.0])),
        gradient_norms=np.array([1.5, 2.5, 3.5]),
        samples=(("Ada", "Ida"), None, ("", "Zug")),
        wordings=("plain", "no question mark", "plain"),
    )


def assert_same(a: Observations, b: Observations) -> None:
    assert plain(vars(a)) == plain(vars(b))


def plain(value: Any) -> Any:
    """Turn arrays into their type and numbers, so that == compares everything."""
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    return tuple(plain(part) for part in value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("make", [observations, everything])
def test_observations_come_back_as_they_were(tmp_path: Path, make: Callable[[], Observations]) -> None:
    path = tmp_path / "deep" / "seen.npz"
    saved.save_observations(path, "key", make())
    for key in ("key", None):
        found = saved.load_observations(path, key)
        assert found is not None
        assert_same(found, make())


def test_every_field_of_observations_is_stored() -> None:
    assert {f.name for f in fields(Observations)} == {*saved.TEXTS, *saved.ARRAYS, *saved.RAGGED, *saved.NESTED}


def test_observations_of_an_older_format_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "FORMAT", saved.FORMAT - 1)
    saved.save_observations(tmp_path / "seen.npz", "key", observations())
    monkeypatch.undo()
    assert saved.load_observations(tmp_path / "seen.npz", "key") is None


def test_observations_of_another_key_or_nowhere_are_none(tmp_path: Path) -> None:
    path = tmp_path / "seen.npz"
    assert saved.load_observations(path) is None
    saved.save_observations(path, "key", observations())
    assert saved.load_observations(path, "another") is None


def test_the_file_holds_no_pickle(tmp_path: Path) -> None:
    path = tmp_path / "seen.npz"
    saved.save_observations(path, "key", observations())
    with np.load(path, allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)


def test_a_pickle_in_the_file_is_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return pytest.fail, ("a pickle was run",)

    path = tmp_path / "seen.npz"
    np.savez(path, meta=np.array([Bomb()], dtype=object))
    assert saved.load_observations(path) is None
    path.write_bytes(pickle.dumps(Bomb()))
    assert saved.load_observations(path) is None


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_counts_as_not_there(tmp_path: Path, share: float) -> None:
    """It is then observed again."""
    path = tmp_path / "seen.npz"
    saved.save_observations(path, "key", observations())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert saved.load_observations(path, "key") is None


def test_a_file_with_a_flipped_byte_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "seen.npz"
    saved.save_observations(path, "key", observations())
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        found = saved.load_observations(path, "key")
        if found is not None:  # a byte that carries no data
            assert_same(found, observations())


def test_arrays_of_another_file_are_not_believed(tmp_path: Path) -> None:
    """Neither under this file's header nor under their own with this file's key."""
    mine, others = tmp_path / "mine.npz", tmp_path / "others.npz"
    saved.save_observations(mine, "mine", observations())
    saved.save_observations(others, "others", replace(observations(), ends=np.array([True, True, True])))
    with np.load(mine) as a, np.load(others) as b:
        header, theirs = (json.loads(file["meta"].tobytes()) for file in (a, b))
        arrays = {name: b[name] for name in b.files if name != "meta"}
    for meta in (header, theirs | {"key": "mine"}):
        np.savez_compressed(mine, meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8), **arrays)
        assert saved.load_observations(mine, "mine") is None
        assert saved.load_observations(mine) is None


def test_the_digest_is_of_what_was_observed(tmp_path: Path) -> None:
    digest = saved.observations_digest(everything())
    saved.save_observations(tmp_path / "a.npz", "a", everything())
    found = saved.load_observations(tmp_path / "a.npz")
    assert found is not None
    assert saved.observations_digest(found) == digest
    for field in fields(Observations):
        assert saved.observations_digest(replace(everything(), **{field.name: other(field.name)})) != digest


def other(name: str) -> Any:
    """Return another value of a field of observations."""
    value = getattr(everything(), name)
    if isinstance(value, np.ndarray):
        return value[::-1][:2]
    return (*value[1:], value[0])
