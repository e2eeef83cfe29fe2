"""stillknows: unlearn knowledge from a language model, then find out whether the model still knows it.

import stillknows as sk
unlearned = sk.unlearn("org/model", benchmark)
sk.audit(unlearned, original="org/model", controls=["never-taught"], benchmark=benchmark)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from stillknows.api.comparing import compare, history
    from stillknows.api.experimenting import demo, tune, validate_metrics
    from stillknows.api.judging import audit, diagnose, explain, load_report, score
    from stillknows.api.making import control, defend, fetch, finetune, import_model, quantize, unlearn
    from stillknows.auditing.verdict import Policy
    from stillknows.errors import UserError
    from stillknows.registry import register
    from stillknows.results import Report, Scores, Unlearned
    from stillknows.types import Benchmark, Example, Split

_PLACES = {
    "api.comparing": ("compare", "history"),
    "api.experimenting": ("demo", "tune", "validate_metrics"),
    "api.judging": ("audit", "diagnose", "explain", "load_report", "score"),
    "api.making": ("control", "defend", "fetch", "finetune", "import_model", "quantize", "unlearn"),
    "auditing.verdict": ("Policy",),
    "errors": ("UserError",),
    "registry": ("register",),
    "results": ("Report", "Scores", "Unlearned"),
    "types": ("Benchmark", "Example", "Split"),
}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}
__all__ = [
    "Benchmark", "Example", "Policy", "Report", "Scores", "Split", "Unlearned", "UserError", "audit", "compare",
    "control", "defend", "demo", "diagnose", "explain", "fetch", "finetune", "history", "import_model", "load_report",
    "quantize", "register", "score", "tune", "unlearn", "validate_metrics",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import stillknows` takes no time."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
