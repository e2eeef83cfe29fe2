"""torch and transformers, imported when first used: what a command line can know is refused before that takes seconds.

`from stillknows.lazy import Tensor, nn, torch` stands for `import torch` and `from torch import Tensor, nn`. Nothing
here may be used while a module is imported: `@no_grad` is there for that, and classes that inherit from torch's have
modules of their own, which functions import. Annotations are texts and are not evaluated.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    import torch as torch
    import transformers as transformers
    from torch import Tensor as Tensor
    from torch import nn as nn
    from torch.nn import functional as functional
    from torch.nn.utils import parametrize as parametrize
    from torch.utils.checkpoint import checkpoint as checkpoint

P = ParamSpec("P")
R = TypeVar("R")


class Lazy:
    """Stands for a module, or for a class in it, and imports it when an attribute is read, a call or a check made."""

    def __init__(self, module: str, name: str = "") -> None:
        self._place = module, name

    @functools.cached_property
    def _found(self) -> Any:
        module, name = self._place
        found = importlib.import_module(module)
        return getattr(found, name) if name else found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":  # inspection, as by typing or copy, is no use
            raise AttributeError(name)
        return getattr(self._found, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._found(*args, **options)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self._found)


if not TYPE_CHECKING:
    torch, nn, functional = Lazy("torch"), Lazy("torch.nn"), Lazy("torch.nn.functional")
    parametrize, transformers = Lazy("torch.nn.utils.parametrize"), Lazy("transformers")
    Tensor, checkpoint = Lazy("torch", "Tensor"), Lazy("torch.utils.checkpoint", "checkpoint")


def _deferred(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return torch's decorator of that name, applied when the function is first called."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.cache
        def decorated() -> Callable[P, R]:
            return getattr(torch, name)()(function)

        @functools.wraps(function)
        def call(*args: P.args, **options: P.kwargs) -> R:
            return decorated()(*args, **options)

        return call

    return decorate


no_grad, enable_grad, inference_mode = map(_deferred, ("no_grad", "enable_grad", "inference_mode"))
