"""A model that a server holds, as a target: answers scored where log-probabilities are served, prompts continued."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from stillknows.errors import NotMeasured, UserError
from stillknows.lazy import torch
from stillknows.model.encoding import EncodedAnswer
from stillknows.model.endpoint import Client, Endpoint, Refused, Usage
from stillknows.model.forward import ItemScores
from stillknows.model.target import Capability
from stillknows.store import digest
from stillknows.types import Floats

PROMPTS = 32  # of one request
CHOICES = 64  # answers of one request: to one prompt, or to several
SHOWN = 50  # letters that a message shows
Scoring = Literal["echo", "prompt_logprobs", ""]  # how log-probabilities of a prompt are asked for; "": they are not


@dataclass
class EndpointTarget:
    """A model that a server holds. Prompts are tokens, those of the model that it is compared with.

    scoring: how log-probabilities of a prompt are asked for. chats: whether it is asked through the chat only, and then
    with the bare question.
    """

    name: str
    client: Client
    fingerprint: str
    scoring: Scoring
    chats: bool = False
    single: bool = False  # the server gives one answer to each prompt, whatever it is asked for

    @classmethod
    def find(cls, endpoint: Endpoint, label: str, probe: EncodedAnswer, expected: str) -> EndpointTarget:
        """Ask a server what it can do, by one item.

        Args:
            expected: the item's text, as its tokens say it.

        Raises UserError for a server that does not answer, that serves no such model, and for one that reads other
        tokens.
        """
        client = Client(endpoint)
        fingerprint = digest(endpoint.url, endpoint.model, client.identity())
        found = cls(label, client, fingerprint, "")
        for scoring in ("echo", "prompt_logprobs"):
            try:
                candidate = cls(label, client, fingerprint, scoring)
                candidate.require_same_tokens(probe, expected)
                candidate.score([probe])
                return candidate
            except (Refused, NotMeasured):
                continue
        try:
            found.generate([probe], [1])
        except Refused as no_completions:
            found.chats = True
            try:
                found.generate([probe], [1])
            except Refused:
                what = f"{endpoint.name} answers neither completions nor chats: {no_completions}"
                raise UserError(what, "correct `endpoint` or `model`") from None
        return found

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Generating, and scoring where log-probabilities of prompts are served."""
        return frozenset({"generate", "score"}) if self.scoring else frozenset({"generate"})

    def require_same_tokens(self, item: EncodedAnswer, expected: str) -> None:
        """Raise UserError where the server says another text for the tokens of an item, NotMeasured where it says
        none."""
        [choice] = self.client.completions([item.ids], **self._asked())
        said = _letters(_tokens_said(choice, item.ids) if self.scoring == "echo" else _numbered(choice, item.ids))
        if not said:
            raise NotMeasured("the server does not say which tokens it reads")
        if not _letters(expected).endswith(said):  # the first token has no probability, and not always a name
            raise UserError(
                f"{self.client.endpoint.name} reads other tokens than the original: {said[-SHOWN:]!r}, not "
                f"{_letters(expected)[-SHOWN:]!r}",
                "serve a model of the original's tokenizer",
            )

    def score(
        self, items: Sequence[EncodedAnswer], with_distribution: Container[int] | None = None
    ) -> Mapping[int, ItemScores]:
        """See `Target.score`; of the distributions an endpoint says no more than whether a token was the likeliest."""
        found: dict[int, ItemScores] = {}
        for first in range(0, len(items), PROMPTS):
            part = items[first : first + PROMPTS]
            choices = self.client.completions([item.ids for item in part], **self._asked())
            if len(choices) != len(part):
                raise self._answers_too_few(len(choices), len(part))
            for i, (item, choice) in enumerate(zip(part, choices, strict=True), first):
                found[i] = self._scores(item, choice)
        return found

    def _asked(self) -> dict[str, Any]:
        """Return what a request says to be given log-probabilities of its prompt."""
        if self.scoring == "echo":
            return {"max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        return {"max_tokens": 1, "temperature": 0, "extra_body": {"prompt_logprobs": 1}}

    def _scores(self, item: EncodedAnswer, choice: Any) -> ItemScores:
        places = range(item.start, len(item.ids))
        told = _echoed(choice, places) if self.scoring == "echo" else _prompt_scores(choice, item.ids, places)
        log_probs = torch.tensor([value for value, _ in told], dtype=torch.float64)
        hits = torch.tensor([hit for _, hit in told], dtype=torch.bool)
        return ItemScores(log_probs, hits, torch.empty(0), torch.empty(0))

    def generate(
        self, items: Sequence[EncodedAnswer], limits: Sequence[int], temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """See `Target.generate`. Samples of one prompt are asked for together; the server draws them as it does."""
        texts: dict[int, str] = {}
        for number, (places, limit) in enumerate(grouped(items, limits)):
            prompts = [items[same[0]] for same in places]
            wanted = len(places[0]) if temperature else 1
            how = {"max_tokens": limit, "temperature": temperature, "seed": (seed * 10007 + number) % 2**31}
            for same, said in zip(places, self._answers(prompts, wanted, how), strict=True):
                texts |= zip(same, said if temperature else said * len(same), strict=True)
        return [texts[i] for i in range(len(items))]

    def _answers(self, prompts: Sequence[EncodedAnswer], n: int, how: dict[str, Any]) -> list[list[str]]:
        """Return n answers to each prompt; of servers that give one, whatever they are asked for, by n requests."""
        if n > 1 and not self.single:
            found = self._once(prompts, n, how)
            self.single = len(found[0]) < n
            if not self.single:
                return found
        rounds = [self._once(prompts, 1, how | {"seed": (how["seed"] + k) % 2**31}) for k in range(n)]
        return [[text for said in texts for text in said] for texts in zip(*rounds, strict=True)]

    def _once(self, prompts: Sequence[EncodedAnswer], n: int, how: dict[str, Any]) -> list[list[str]]:
        """Return what one request for each chat, or one for all completions, gives: by prompt."""
        if self.chats:
            asked = (self.client.chat(prompt.example.prompt, n=n, **how) for prompt in prompts)
            return [[str(choice.message.content or "") for choice in choices] for choices in asked]
        choices = self.client.completions([item.ids[: item.start] for item in prompts], n=n, **how)
        each, rest = divmod(len(choices), len(prompts))
        if rest or not each:
            raise self._answers_too_few(len(choices), n * len(prompts))
        texts = [str(choice.text) for choice in choices]
        return [texts[i * each : (i + 1) * each] for i in range(len(prompts))]

    def _answers_too_few(self, given: int, asked: int) -> UserError:
        return UserError(f"{self.client.endpoint.name} gives {given} answers of {asked}", "use another server")

    def gradient_norms(self, items: Sequence[EncodedAnswer]) -> Floats:
        """Raise UserError: an endpoint gives no gradients."""
        what = f"{self.client.endpoint.name} gives no gradients"
        raise UserError(what, "leave out the metrics that read gradient_norms")


@dataclass
class CountingTarget:
    """Stands for an endpoint that is not asked: counts what asking it would take, at most."""

    name: str = "counted"
    fingerprint: str = ""
    capabilities: frozenset[Capability] = frozenset({"score", "generate"})
    usage: Usage = field(default_factory=Usage)

    def score(
        self, items: Sequence[EncodedAnswer], with_distribution: Container[int] | None = None
    ) -> Mapping[int, ItemScores]:
        """Count the requests; the scores say nothing."""
        for first in range(0, len(items), PROMPTS):
            part = items[first : first + PROMPTS]
            self.usage.add(sum(len(item.ids) for item in part), len(part))
        nothing = (torch.full((len(item.ids) - item.start,), math.nan) for item in items)
        return {i: ItemScores(nan, nan > 0, nan, nan) for i, nan in enumerate(nothing)}

    def generate(
        self, items: Sequence[EncodedAnswer], limits: Sequence[int], temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """Count the requests; the texts are empty."""
        for places, limit in grouped(items, limits):
            answers = sum(map(len, places)) if temperature else len(places)
            self.usage.add(sum(items[same[0]].start for same in places), answers * limit)
        return [""] * len(items)

    def gradient_norms(self, items: Sequence[EncodedAnswer]) -> Floats:
        """Return nothing: an endpoint gives none."""
        return np.full(len(items), np.nan)


def grouped(items: Sequence[EncodedAnswer], limits: Sequence[int]) -> list[tuple[list[list[int]], int]]:
    """Return what goes into each request: places of items with the same prompt, and how many tokens each may write.

    The prompts of a request are asked equally often: at most PROMPTS of them, and CHOICES answers in all.
    """
    same: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for i, (item, limit) in enumerate(zip(items, limits, strict=True)):
        same.setdefault((item.ids[: item.start], limit), []).append(i)
    alike: dict[tuple[int, int], list[list[int]]] = {}
    for (_, limit), places in same.items():
        for first in range(0, len(places), CHOICES):
            part = places[first : first + CHOICES]
            alike.setdefault((limit, len(part)), []).append(part)
    found = []
    for (limit, n), groups in alike.items():
        size = max(1, min(PROMPTS, CHOICES // n))
        found += [(groups[first : first + size], limit) for first in range(0, len(groups), size)]
    return found


def _echoed(choice: Any, places: range) -> list[tuple[float, bool]]:
    """Return log-probability and hit of tokens of an echoed prompt. Raises NotMeasured where there are none."""
    told = choice.logprobs
    if told is None or len(told.token_logprobs or ()) < places.stop or len(told.top_logprobs or ()) < places.stop:
        raise NotMeasured("the server gives no log-probabilities of prompts")
    values = [told.token_logprobs[t] for t in places]
    best = [max((told.top_logprobs[t] or {}).values(), default=math.inf) for t in places]
    return [_told(value, value is not None and value >= top) for value, top in zip(values, best, strict=True)]


def _tokens_said(choice: Any, ids: Sequence[int]) -> str:
    told = choice.logprobs
    return "".join(map(str, (told.tokens or ())[: len(ids)])) if told else ""


def _numbered(choice: Any, ids: Sequence[int]) -> str:
    """Return what vLLM says that the tokens of a prompt are; "" where it says nothing of them."""
    told = (choice.model_extra or {}).get("prompt_logprobs") or ()
    rows = [row.get(str(token), {}) for row, token in zip(told, ids, strict=False) if row]
    return "".join(str(row.get("decoded_token", "")) for row in rows)


def _prompt_scores(choice: Any, ids: Sequence[int], places: range) -> list[tuple[float, bool]]:
    """Return the same of vLLM's `prompt_logprobs`, which name tokens by number."""
    told = (choice.model_extra or {}).get("prompt_logprobs") or ()
    if len(told) < places.stop or any(str(ids[t]) not in (told[t] or {}) for t in places):
        raise NotMeasured("the server gives no log-probabilities of prompts")
    rows = [told[t][str(ids[t])] for t in places]
    return [_told(row.get("logprob"), row.get("rank") == 1) for row in rows]


def _told(value: Any, hit: bool) -> tuple[float, bool]:
    return (math.nan if value is None else float(value)), hit


def _letters(text: str) -> str:
    """Return text without what servers write differently: spaces, and marks that stand for them."""
    return "".join(character for character in text if character.isalnum() and character.isascii())
