"""A stand-in for a language model: real HTTP and real troubles, and answers that are quoted from the excerpts.

It answers late, sometimes with 429 and Retry-After, sometimes with 500; which request meets what follows from the seed
alone, so that it can be tested.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from examples.ragapp.words import WORD

SENTENCE: Final = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n{2,}")
#: Fenced and indented code, rows of tables, headings.
NO_PROSE: Final = re.compile(r"^```.*?(^```|\Z)|^(    |\t|[|#]).*?$", re.MULTILINE | re.DOTALL)
EXCERPT: Final = re.compile(r"^\[(\d+)\] ", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Troubles:
    """How bad things are.

    Attributes:
        seed: Which sequence of troubles happens.
        latency: The shortest and the longest time to an answer, in seconds.
        busy: The share of requests that are answered with 429.
        broken: The share of requests that are answered with 500.
        retry_after: The seconds that a 429 asks to wait.
    """

    seed: int = 1
    latency: tuple[float, float] = (0.2, 1.5)
    busy: float = 0.1
    broken: float = 0.05
    retry_after: int = 1

    def of_request(self, number: int) -> tuple[int, float]:
        """The HTTP status of the answer to request ``number``, and the seconds until it comes."""
        dice = random.Random(f"{self.seed}-{number}")
        delay, luck = dice.uniform(*self.latency), dice.random()
        if luck < self.busy:
            return 429, 0
        return (500 if luck < self.busy + self.broken else 200), delay


class StubModel(ThreadingHTTPServer):
    """The server; it listens as soon as it is made."""

    daemon_threads = True

    def __init__(self, troubles: Troubles, host: str = "127.0.0.1", port: int = 0, key: str | None = None) -> None:
        super().__init__((host, port), Handler)
        self.troubles = troubles
        self.key = key
        self.numbers = itertools.count(1)

    @property
    def url(self) -> str:
        """The base URL to give to a client."""
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}/v1"

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serve in a thread until the block ends; gives the URL."""
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, name="stub-model")
        thread.start()
        try:
            yield self.url
        finally:
            self.shutdown()
            thread.join()
            self.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers one client."""

    server: StubModel

    def do_POST(self) -> None:
        """Answer a chat completion, or fail as the troubles say."""
        question = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            return self._send(401, {"error": {"message": "Incorrect API key provided"}})
        if self.path != "/v1/chat/completions":
            return self._send(404, {"error": {"message": f"Unknown path {self.path}"}})
        number = next(self.server.numbers)
        status, delay = self.server.troubles.of_request(number)
        time.sleep(delay)
        if status == 429:
            wait = {"Retry-After": str(self.server.troubles.retry_after)}
            return self._send(429, {"error": {"message": "Rate limit reached"}}, wait)
        if status == 500:
            return self._send(500, {"error": {"message": "The server had an error while processing your request"}})
        try:
            request = json.loads(question)
            prompt = str(request["messages"][-1]["content"])
        except (ValueError, LookupError, TypeError):
            return self._send(400, {"error": {"message": "The body is no chat completion request"}})
        return self._send(200, completion(number, str(request.get("model", "stub")), prompt, answer(prompt)))

    def _send(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the callers tell what they met."""


def answer(prompt: str) -> str:
    """The two sentences of the excerpts that fit the question best, quoted with the numbers of their excerpts."""
    question, _, excerpts = prompt.partition("\n\nExcerpts:\n\n")
    asked = _words(question.removeprefix("Question: "))
    _, *numbered = EXCERPT.split(excerpts)
    sentences = [
        (int(number), " ".join(sentence.split()))
        for number, text in zip(numbered[::2], numbered[1::2], strict=True)
        for sentence in SENTENCE.split(NO_PROSE.sub("", text.partition("\n")[2]))
        if 20 <= len(sentence) <= 400
    ]
    # A word that few sentences have says more than one that many have.
    found = Counter(word for _, sentence in sentences for word in asked & _words(sentence))
    scored = [(sum(1 / found[word] for word in asked & _words(text)), number, text) for number, text in sentences]
    best = [f"{text} [{number}]" for score, number, text in sorted(scored, key=lambda item: -item[0])[:2] if score]
    return " ".join(best) or "The excerpts do not answer this question."


def completion(number: int, model: str, prompt: str, text: str) -> dict[str, Any]:
    """A chat completion as the OpenAI API gives it."""
    used, made = len(prompt) // 4, len(text) // 4
    return {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": used, "completion_tokens": made, "total_tokens": used + made},
    }


def _words(text: str) -> set[str]:
    return {word for word in WORD.findall(text.lower()) if len(word) > 2 or not word.isascii()}
