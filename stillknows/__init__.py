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
    from stillknows.api.certifying import certify, verify
    from stillknows.api.comparing import compare, history
    from stillknows.api.estimating import estimate_unlearn
    from stillknows.api.experimenting import demo, tune, validate_metrics
    from stillknows.api.judging import audit, diagnose, explain, load_report, model_card, score
    from stillknows.api.making import (
        control,
        defend,
        fetch,
        finetune,
        import_model,
        quantize,
        unlearn,
    )
    from stillknows.auditing.policy import Policy
    from stillknows.errors import Misfit, UserError
    from stillknows.model.endpoint import Endpoint
    from stillknows.registry import register
    from stillknows.results import Certified, Report, Scores, Unlearned, Verification
    from stillknows.types import Benchmark, Example, Split

_PLACES = {
    "api.certifying": ("certify", "verify"),
    "api.comparing": ("compare", "history"),
    "api.estimating": ("estimate_unlearn",),
    "api.experimenting": ("demo", "tune", "validate_metrics"),
    "api.judging": ("audit", "diagnose", "explain", "load_report", "model_card", "score"),
    "api.making": ("control", "defend", "fetch", "finetune", "import_model", "quantize", "unlearn"),
    "auditing.verdict": ("Policy",),
    "errors": ("Misfit", "UserError"),
    "model.endpoint": ("Endpoint",),
    "registry": ("register",),
    "results": ("Certified", "Report", "Scores", "Unlearned", "Verification"),
    "types": ("Benchmark", "Example", "Split"),
}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}
__all__ = [
    "Benchmark", "Certified", "Endpoint", "Example", "Misfit", "Policy", "Report", "Scores", "Split", "Unlearned",
    "UserError", "Verification", "audit", "certify", "compare", "control", "defend", "demo", "diagnose",
    "estimate_unlearn", "explain", "fetch", "finetune", "history", "import_model", "load_report", "model_card",
    "quantize", "register", "score", "tune", "unlearn", "validate_metrics", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import stillknows` takes no time."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
