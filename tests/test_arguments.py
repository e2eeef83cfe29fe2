"""Arguments are of the types that are written beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from stillknows.arguments import fits, require_type, typed
from stillknows.errors import UserError

KINDS: list[tuple[Any, list[Any], list[Any]]] = [  # a type, what is of it, what is not
    (int, [0, -1, np.int64(3)], [1.0, True, "1", None]),
    (float, [0, 1.5, np.float32(2)], [False, "1", None]),
    (bool, [True], [1, "true", None]),
    (str | Path | None, ["", Path(), None], [5, b"x"]),
    (Literal["a", "b"], ["a"], ["c", "", None, 1]),
    (Sequence[str], [[], ["a"], ("a",)], ["a", ["a", 1], None, {"a"}]),
    (tuple[str, ...], [(), ("a", "b")], [["a"], ("a", 1)]),
    (tuple[Any, Any], [(1, "a")], [(1,), (1, 2, 3), [1, 2]]),
    (Mapping[str, Sequence[int]], [{}, {"a": [1]}], [{"a": 1}, [], {"a": ["b"]}]),
    (Any, [None, 1], []),
]


@pytest.mark.parametrize(("kind", "right", "wrong"), KINDS, ids=lambda kind: str(kind)[:20])
def test_values_fit_their_types(kind: Any, right: list[Any], wrong: list[Any]) -> None:
    assert [value for value in right if not fits(value, kind)] == []
    assert [value for value in wrong if fits(value, kind)] == []


def test_a_typed_function_names_the_argument() -> None:
    @typed
    def double(*numbers: int, times: float = 2, **others: Any) -> list[float]:
        return [n * times for n in numbers] + list(others)

    assert double(1, 2, x=1) == [2, 4, "x"]
    with pytest.raises(UserError, match="numbers='a' is of the wrong type\\n  give int"):
        double(1, "a")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="numbers='a'"):
        double("a", x=1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="times=None is of the wrong type\\n  give float"):
        double(1, times=None)  # type: ignore[arg-type]


def test_a_typed_function_refuses_options_that_it_does_not_have() -> None:
    @typed
    def double(number: int, *, times: int = 2) -> int:
        return number * times

    with pytest.raises(UserError, match="there is no option 'tiems'; did you mean 'times'"):
        double(1, tiems=3)  # type: ignore[call-arg]


def test_a_long_value_is_named_by_its_type() -> None:
    with pytest.raises(UserError, match=r"^model, a list, is of the wrong type\n  give str or tuple\[Any, Any\]$"):
        require_type("model", ["a long value"] * 20, str | tuple[Any, Any])
