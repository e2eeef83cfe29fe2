"""The options that say which model is asked over HTTP, and what that may cost."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from typer import Option

from stillknows.cli.options import COUNT
from stillknows.errors import UserError
from stillknows.model.endpoint import Endpoint

EndpointUrl: TypeAlias = Annotated[
    str | None, Option(help="Address of a server of OpenAI's format, up to /v1; the key comes from OPENAI_API_KEY.")
]
ServedModel: TypeAlias = Annotated[str | None, Option("--model", help="What the endpoint calls the model.")]
Price: TypeAlias = Annotated[
    str | None, Option(metavar="<in/out>", help="Of a million tokens read and written, such as 0.5/1.5.")
]
Budget: TypeAlias = Annotated[
    float | None, Option(help="Most that the endpoint may cost: in the money of --price, without it in tokens.")
]
Samples: TypeAlias = Annotated[
    int, Option(min=2, metavar=COUNT, help="Answers to each prompt, where an endpoint serves no log-probabilities.")
]


def endpoint_of(
    url: str | None, model: str | None, price: str | None, budget: float | None, samples: int
) -> Endpoint | None:
    """Return the endpoint that options name, None without one. Raises UserError for options that fit none."""
    if url is None:
        if model is not None or price is not None or budget is not None:
            raise UserError("`model`, `price` and `budget` are of an endpoint", "add `endpoint`, or leave them out")
        return None
    try:
        read, written = map(float, price.split("/")) if price else (0.0, 0.0)
    except ValueError:
        raise UserError(f"`price` {price!r} names no two prices", "give those of a million tokens: 0.5/1.5") from None
    return Endpoint(url, model or "", (read, written) if price else None, budget, samples)
