"""TOFU (arXiv 2401.06121): 200 fictitious authors, 20 questions each; 1, 5 or 10 % of the authors are forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from stillknows.benchmarks.jsonl import read_examples
from stillknows.errors import UserError
from stillknows.registry import register
from stillknows.types import Benchmark, Split

REPOSITORY = "locuslab/TOFU"


@register("benchmark", source="arXiv 2401.06121")
def tofu(
    *,
    split: Literal["forget01", "forget05", "forget10"] = "forget10",
    data: str | None = None,
    retain: int | None = None,
) -> Benchmark:
    """TOFU from a folder with its JSON files, or from the hub.

    Args:
        split: which share of the authors is forgotten; the retain split is its complement.
        data: folder that holds forget10.json, retain90.json and so on; None downloads them.
        retain: how many items of the retain split to use, spread evenly; None for all.
    """
    complement = f"retain{100 - int(split.removeprefix('forget')):02d}"
    return Benchmark(
        f"tofu:{split}",
        (
            Split("forget", "forget", read_examples(_file(data, split))),
            Split("retain", "retain", read_examples(_file(data, complement), limit=retain)),
        ),
    )


def _file(data: str | None, name: str) -> Path:
    if data is not None:
        path = Path(data) / f"{name}.json"
        if not path.is_file():
            raise UserError(f"TOFU needs {path}, which is missing", "give the folder with TOFU's JSON files as --data")
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(REPOSITORY, f"{name}.json", repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{REPOSITORY} cannot be downloaded: {reason}", "give a folder with its JSON files as --data"
        ) from error
