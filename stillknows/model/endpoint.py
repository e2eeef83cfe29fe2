"""Where a model is served, and the client that asks it in OpenAI's wire format.

The key comes from OPENAI_API_KEY and is written nowhere. The client waits and asks again where a server says that it is
asked too often, fails or breaks off; what was asked is counted, and a budget that would be exceeded ends the run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from stillknows.errors import UserError, first_line

KEY = "OPENAI_API_KEY"
RETRIES = 8  # with growing waits, or as long as the server says
SECONDS = 120.0  # until a request counts as broken off
MILLION = 1e6
AGAIN = "see that the server runs, then repeat the command: what was measured is kept"


@dataclass(frozen=True)
class Endpoint:
    """Where a model is served, and what asking it may cost.

    url: up to and with the version, as in "http://localhost:8000/v1". model: its name there.
    prices: of a million tokens read, and of a million written; None where they are not known.
    budget: the most that may be spent: in the money of `prices`, in tokens where there are none; None for no limit.
    samples: answers by which a probability is estimated where the server gives no log-probabilities.
    """

    url: str
    model: str
    prices: tuple[float, float] | None = None
    budget: float | None = None
    samples: int = 20

    def __post_init__(self) -> None:
        """Raise UserError for what is no address, for one that holds a key, and for numbers out of range."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"the endpoint {self.url!r} is no address", "give one such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query:
            raise UserError("the endpoint's address holds a key", f"put it into {KEY}, and nowhere else")
        if not self.model:
            raise UserError("an endpoint serves many models", "name one with `model`")
        if any(price < 0 for price in self.prices or ()) or (self.budget or 0) < 0:
            raise UserError("a price or the budget of the endpoint is below 0", "give 0 or more")
        if self.samples < 2:
            raise UserError(f"`samples` {self.samples} is out of range", "it must be at least 2")

    @property
    def name(self) -> str:
        """Its name for messages and reports."""
        return f"{self.model} at {self.url}"

    def money(self, read: int, written: int) -> float | None:
        """Return what so many tokens cost, None where prices are not known."""
        return None if self.prices is None else (read * self.prices[0] + written * self.prices[1]) / MILLION


@dataclass
class Usage:
    """What was asked: requests, tokens read and tokens written."""

    requests: int = 0
    read: int = 0
    written: int = 0

    def add(self, read: int, written: int) -> None:
        """Take note of a request."""
        self.requests += 1
        self.read += read
        self.written += written

    def words(self, endpoint: Endpoint) -> str:
        """Say it, with what it costs where prices are known."""
        money = endpoint.money(self.read, self.written)
        cost = "" if money is None else f", {money:.2f} at the prices given"
        return f"{self.requests:,} requests: {self.read:,} tokens read, {self.written:,} written{cost}"

    def exceeds(self, endpoint: Endpoint) -> bool:
        """Tell whether it is more than the budget."""
        money = endpoint.money(self.read, self.written)
        spent = self.read + self.written if money is None else money
        return endpoint.budget is not None and spent > endpoint.budget


@dataclass
class Client:
    """Asks an endpoint, counts what that takes, and says in words what went wrong."""

    endpoint: Endpoint
    usage: Usage = field(default_factory=Usage)

    @cached_property
    def openai(self) -> Any:
        """OpenAI's client. Raises UserError where the package is not installed."""
        try:
            import openai
        except ImportError:
            raise UserError("endpoints need the package openai", "pip install 'stillknows[endpoint]'") from None
        key = os.environ.get(KEY) or "none"  # servers of one's own ask for none
        return openai.OpenAI(base_url=self.endpoint.url, api_key=key, max_retries=RETRIES, timeout=SECONDS)

    def completions(self, prompts: Sequence[Sequence[int]], *, n: int = 1, **how: Any) -> list[Any]:
        """Return n choices for each prompt, given as tokens, in the prompts' order. Raises UserError where there are
        fewer, `Refused` where the server takes no such request."""
        asked = [list(prompt) for prompt in prompts]
        ask = self.openai.completions.create
        return self._choices(lambda: ask(model=self.endpoint.model, prompt=asked, n=n, **how))

    def chat(self, question: str, *, n: int = 1, **how: Any) -> list[Any]:
        """Return n answers to a question; raises as `completions` does."""
        messages = [{"role": "user", "content": question}]
        ask = self.openai.chat.completions.create
        return self._choices(lambda: ask(model=self.endpoint.model, messages=messages, n=n, **how))

    def identity(self) -> Any:
        """Return what the server says of the model, None where it says nothing."""
        import openai

        try:
            return self.openai.models.retrieve(self.endpoint.model).model_dump(mode="json", include={"id", "created"})
        except openai.APIStatusError:
            return None
        except openai.APIConnectionError as error:
            raise self._silent(error) from None

    def _silent(self, error: Exception) -> UserError:
        return UserError(f"{self.endpoint.url} does not answer: {first_line(error.__cause__ or error)}", AGAIN)

    def _choices(self, ask: Callable[[], Any]) -> list[Any]:
        import openai

        if self.usage.exceeds(self.endpoint):
            raise UserError(
                f"the budget for {self.endpoint.name} is spent after {self.usage.words(self.endpoint)}",
                "what was measured is kept: repeat the command with a larger `budget`",
            )
        try:
            answer = ask()
        except (openai.BadRequestError, openai.NotFoundError, openai.UnprocessableEntityError) as error:
            raise Refused(first_line(error)) from None
        except openai.APIStatusError as error:
            fix = f"set {KEY} to your key" if error.status_code in (401, 403) else AGAIN
            raise UserError(f"{self.endpoint.name} refuses: {first_line(error)}", fix) from None
        except openai.APIConnectionError as error:
            raise self._silent(error) from None
        usage = answer.usage
        self.usage.add(usage.prompt_tokens if usage else 0, (usage.completion_tokens or 0) if usage else 0)
        return sorted(answer.choices, key=lambda choice: choice.index)


class Refused(Exception):
    """The server takes no request of this kind."""
