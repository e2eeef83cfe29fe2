"""A small HTTP server of OpenAI's wire format that answers with a tiny model, and fails as real ones do."""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = "served/tiny"


@dataclass
class Served:
    """What the server does.

    scoring: "echo" (completions that repeat the prompt with log-probabilities), "prompt_logprobs" (vLLM's), or "".
    single: one answer to each prompt, whatever `n` says. chat_only: no completions.
    failures: what each next request meets, 429 or "cut", until none is left. stop_after: requests until the server
    refuses all.
    """

    folder: str
    scoring: str = "echo"
    single: bool = False
    chat_only: bool = False
    failures: list[Any] = field(default_factory=list)
    stop_after: float = math.inf
    url: str = ""
    key: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    authorisations: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.lock = threading.Lock()

    @torch.no_grad()
    def next_log_probs(self, rows: list[list[int]]) -> list[Any]:
        """Return ln p of every next token after every place of each row; padded on the right."""
        length = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
        logits = self.model(ids).logits.double().log_softmax(-1)
        return [logits[i, : len(row)] for i, row in enumerate(rows)]

    def complete(self, rows: list[list[int]], body: dict[str, Any]) -> list[list[int]]:
        """Continue prompts: the likeliest tokens, or sampled above temperature 0."""
        generator = torch.Generator().manual_seed(int(body.get("seed") or 0))
        rows, said = [list(row) for row in rows], [[] for _ in rows]
        for _ in range(body["max_tokens"]):
            live = [i for i, tokens in enumerate(said) if not tokens or tokens[-1] != self.tokenizer.eos_token_id]
            if not live:
                break
            for i, log_probs in zip(live, self.next_log_probs([rows[i] for i in live]), strict=True):
                last = log_probs[-1]
                if body.get("temperature"):
                    token = int(torch.multinomial((last / body["temperature"]).softmax(-1), 1, generator=generator))
                else:
                    token = int(last.argmax())
                rows[i].append(token)
                said[i].append(token)
        return said

    def logprobs(self, ids: list[int]) -> dict[str, Any]:
        """What completions say of a prompt that they repeat."""
        [rows] = self.next_log_probs([ids])
        names = self.tokenizer.convert_ids_to_tokens(ids)
        best = [self.tokenizer.convert_ids_to_tokens([int(row.argmax())])[0] for row in rows]
        tops = [{best[t]: float(rows[t].max())} for t in range(len(ids) - 1)]
        values = [float(rows[t][ids[t + 1]]) for t in range(len(ids) - 1)]
        return {"tokens": names, "token_logprobs": [None, *values], "top_logprobs": [None, *tops], "text_offset": []}

    def prompt_logprobs(self, ids: list[int]) -> list[Any]:
        """vLLM's form of the same."""
        [rows] = self.next_log_probs([ids])
        found: list[Any] = [None]
        for t, token in enumerate(ids[1:]):
            rank = int((rows[t] > rows[t][token]).sum()) + 1
            name = self.tokenizer.convert_ids_to_tokens([token])[0]
            found.append({str(token): {"logprob": float(rows[t][token]), "rank": rank, "decoded_token": name}})
        return found

    def completions(self, body: dict[str, Any]) -> dict[str, Any]:
        prompts, n = body["prompt"], 1 if self.single else body.get("n") or 1
        rows = [row for row in prompts for _ in range(n)]
        choices = []
        for i, said in enumerate(self.complete(rows, body)):
            text = self.tokenizer.decode(said, skip_special_tokens=True)
            choice: dict[str, Any] = {"index": i, "text": f" {text}", "finish_reason": "stop", "logprobs": None}
            if body.get("echo") and body.get("logprobs") and self.scoring == "echo":
                choice["logprobs"] = self.logprobs(rows[i])
            if body.get("prompt_logprobs") and self.scoring == "prompt_logprobs":
                choice["prompt_logprobs"] = self.prompt_logprobs(rows[i])
            choices.append(choice)
        return self.answer("text_completion", choices, sum(map(len, prompts)), len(rows) * body["max_tokens"])

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        question = body["messages"][-1]["content"]
        ids = self.tokenizer(question, add_special_tokens=False)["input_ids"]
        said = self.complete([ids] * (body.get("n") or 1), body)
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in said]
        choices = [
            {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", "logprobs": None}
            for i, text in enumerate(texts)
        ]
        return self.answer("chat.completion", choices, len(ids), sum(map(len, said)))

    def answer(self, kind: str, choices: list[Any], read: int, written: int) -> dict[str, Any]:
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return {"id": "1", "object": kind, "created": 1, "model": MODEL, "choices": choices, "usage": usage}


def _handler(served: Served) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def reply(self, status: int, content: Any, **headers: str) -> None:
            payload = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def do_GET(self) -> None:
            served.authorisations.append(self.headers.get("Authorization", ""))
            self.reply(200, {"id": MODEL, "object": "model", "created": 7, "owned_by": "tests"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with served.lock:
                served.authorisations.append(self.headers.get("Authorization", ""))
                failure = served.failures.pop(0) if served.failures else None
                if failure == "cut":
                    self.close_connection = True
                    return None
                if failure is not None:
                    return self.reply(failure, {"error": {"message": "slow down"}}, Retry_After="0")
                if served.key and not self.headers.get("Authorization", "").endswith(served.key):
                    return self.reply(401, {"error": {"message": "no key"}})
                if len(served.requests) >= served.stop_after:
                    return self.reply(403, {"error": {"message": "enough"}})
                served.requests.append({"path": self.path, **body})
                if self.path.endswith("/chat/completions"):
                    return self.reply(200, served.chat(body))
                if self.path.endswith("/completions") and not served.chat_only:
                    return self.reply(200, served.completions(body))
                return self.reply(404, {"error": {"message": "no such place"}})

    return Handler


@contextlib.contextmanager
def serving(folder: Any, **how: Any) -> Iterator[Served]:
    """Serve a model from a folder on a port of this machine while the block runs."""
    served = Served(str(folder), **how)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(served))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
