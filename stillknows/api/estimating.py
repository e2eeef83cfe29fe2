"""What a run will take, told beforehand; what the arguments of `unlearn` mean."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillknows.api.inputs import (
    Folder,
    Items,
    LongItems,
    Model,
    Save,
    benchmark_of,
    model_folder,
    path_of,
    settings_of,
)
from stillknows.arguments import typed
from stillknows.unlearning.estimate import Estimate
from stillknows.unlearning.request import UnlearnConfig


@typed
def estimate_unlearn(
    model: Model,
    benchmark: Items,
    *,
    out: Folder | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> Estimate:
    """Return what `unlearn` with the same arguments will take of memory and time, and what it will write.

    Nothing is trained or written, and no weights are loaded. The speed of this machine is measured for a second.

    Raises UserError as `unlearn` does, and for a run that takes more memory than is free, with the option under which
    it would fit.
    """
    from stillknows.unlearning import unlearn as unlearning

    folder = Path(tempfile.gettempdir()) / "stillknows-dry-run" if out is None else Path(out)
    return unlearning.estimated(request_of(model, benchmark, **options), folder, overwrite=overwrite, resume=resume)


@typed
def request_of(
    model: Model,
    benchmark: Items,
    *,
    method: str | None = None,
    data: Folder | None = None,
    template: str | None = None,
    refusals: Folder | Sequence[str] | None = None,
    long_items: LongItems = "error",
    device: str = "cpu",
    after: Folder | None = None,
    controls: Sequence[Model] = (),
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    save: Save = "model",
    **settings: Any,
) -> UnlearnConfig:
    """Return what the arguments of `unlearn` mean."""
    from stillknows.unlearning import choices

    given = {name: value for name, value in settings.items() if value is not None}
    settings_of(given)
    asked = benchmark_of(benchmark, data=data, template=template, refusals=refusals)
    how = (long_items, device, allow_pickle, trust_remote_code, path_of(after), save)
    return UnlearnConfig(
        model_folder(model), asked, *choices.choose(asked, method, given), *how, [model_folder(c) for c in controls]
    )
