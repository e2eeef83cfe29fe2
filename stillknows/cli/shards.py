"""The command line of exact deletion: `stillknows shards …`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillknows.cli.options import COUNT, Device, Json, Overwrite
from stillknows.cli.terminal import examples, show
from stillknows.errors import UserError

if TYPE_CHECKING:
    from stillknows.types import Example

shards = typer.Typer(
    help="Exact deletion: items are learned by adapters that can be taken away, and a log shows every change.",
    rich_markup_mode="markdown",
    no_args_is_help=True,
)

Folder = Annotated[Path, typer.Argument(help="Folder that `stillknows shards train` wrote.")]
FRAME = "Question: {prompt}\nAnswer:"


@shards.command(
    epilog=examples(
        "stillknows shards train org/model --shard ada.jsonl --shard bela.jsonl --out runs/shards",
        "stillknows shards train ./model --shard notes.jsonl --slices 4 --rank 16 --epochs 20 --out runs/shards --json",
    )
)
def train(
    base: Annotated[str, typer.Argument(help="The model to start from, which does not know the items. It stays.")],
    shard: Annotated[list[Path], typer.Option(help="Items of one shard, as for `--benchmark jsonl`: repeat it.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the adapters and their log.")],
    slices: Annotated[
        int, typer.Option(min=1, metavar=COUNT, help="Cut each shard into so many slices, in the order of its file.")
    ] = 1,
    rank: Annotated[int, typer.Option(min=1, metavar=COUNT, help="Of the adapters.")] = 8,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 1e-3,
    epochs: Annotated[float, typer.Option(help="Passes over each slice.")] = 10.0,
    max_steps: Annotated[int | None, typer.Option("--steps", help="Most steps to take on each slice.")] = None,
    batch_size: Annotated[int, typer.Option(help="Items per step.")] = 16,
    seed: Annotated[int, typer.Option(help="Order of the items.")] = 0,
    template: Annotated[
        str, typer.Option(help='Frame of a question, with "{prompt}"; or "chat" for the tokenizer\'s own.')
    ] = FRAME,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Learn items with one adapter for each slice of each shard, and log which adapter saw what.

    Put items that are likely to be deleted at the end of a shard, or into a shard of their own: a deletion drops the
    slice that saw the item and the later ones of its shard.
    """
    from stillknows.benchmarks.jsonl import read_examples
    from stillknows.training.settings import Settings
    from stillknows.unlearning import sisa

    parts = [_sliced(path, read_examples(path), slices) for path in shard]
    settings = Settings(lr=lr, epochs=epochs, max_steps=max_steps, batch_size=batch_size, seed=seed)
    head = sisa.train(base, parts, out, settings, template=template, rank=rank, device=device)
    count = len(parts) * slices
    _show_head(head, as_json, f"wrote {count} adapters to {out}", folder=str(out), adapters=count)


@shards.command(
    epilog=examples(
        "stillknows shards delete runs/shards --items ada.jsonl",
        "stillknows shards delete runs/shards --items request-7.jsonl --head 3f0c… --json",
    )
)
def delete(
    folder: Folder,
    items: Annotated[Path, typer.Option(help="Items to delete, with the questions and answers that were learned.")],
    head: Annotated[str | None, typer.Option(help="The last digest as you kept it; see `verify`.")] = None,
    as_json: Json = False,
) -> None:
    """Drop every adapter that saw one of the items. What is left was computed without them."""
    from stillknows.benchmarks.jsonl import read_examples
    from stillknows.unlearning import ledger, sisa

    examples_ = read_examples(items)
    ledger.verify(folder, head)
    last, dropped = sisa.delete(folder, examples_)
    names = [place.file for place in dropped]
    text = f"deleted {len(examples_)} items with {', '.join(names)}\nnext: stillknows shards retrain {folder} --shard …"
    _show_head(last, as_json, text, dropped=names)


@shards.command(
    epilog=examples(
        "stillknows shards retrain runs/shards --shard ada.jsonl --shard bela.jsonl",
        "stillknows shards retrain runs/shards --shard ada.jsonl --json",
    )
)
def retrain(
    folder: Folder,
    shard: Annotated[
        list[Path], typer.Option(help="The shards' files as they were trained; deleted items are skipped.")
    ],
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Train what deletions dropped again, without the deleted items, each slice from the one before it.

    What is then there equals, bit by bit, a training that never held the deleted items.
    """
    from stillknows.benchmarks.jsonl import read_examples
    from stillknows.unlearning import sisa

    items = [item for path in shard for item in read_examples(path)]
    last, trained = sisa.retrain(folder, items, device=device)
    names = [place.file for place in trained]
    _show_head(last, as_json, f"trained {', '.join(names) or 'nothing: nothing was dropped'}", trained=names)


@shards.command(
    epilog=examples("stillknows shards verify runs/shards", "stillknows shards verify runs/shards --head 3f0c… --json")
)
def verify(
    folder: Folder,
    head: Annotated[
        str | None,
        typer.Option(help="The last digest as you kept it elsewhere: finds a log that was cut or rewritten."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check the log, and the adapters against it; exit code 2 names the first that is not as it was written."""
    from stillknows.unlearning import ledger

    _show_head(ledger.verify(folder, head), as_json, f"{folder} is as its log says")


@shards.command(
    epilog=examples(
        "stillknows shards merge runs/shards --out runs/served",
        "stillknows shards merge runs/shards --shard 0 --out runs/shard-0",
    )
)
def merge(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", help="Folder for the checkpoint.")],
    shard: Annotated[
        int | None,
        typer.Option(metavar=COUNT, help="Number of one shard, from 0, as SISA serves them; else their sum."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write the base with the adapters that are left, as an ordinary checkpoint, for `stillknows audit` to take."""
    from stillknows.unlearning import sisa

    record = sisa.merge(folder, out, shard=shard, overwrite=overwrite)
    show(record, as_json, f"wrote {out}", f"next: stillknows audit {out} --original … --control … --benchmark …")


def _sliced(path: Path, items: Sequence[Example], slices: int) -> list[Sequence[Example]]:
    """Cut a shard into slices of like size, in order."""
    if len(items) < slices:
        raise UserError(f"{path} holds {len(items)} items, too few for {slices} slices", "give a smaller --slices")
    bounds = [len(items) * k // slices for k in range(slices + 1)]
    return [items[start:end] for start, end in itertools.pairwise(bounds)]


def _show_head(head: str, as_json: bool, text: str, **more: object) -> None:
    show({"head": head, **more}, as_json, f"{text}\nlast digest {head}", "keep the digest elsewhere: verify --head")
