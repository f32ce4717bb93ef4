"""The language model: one call to an OpenAI-compatible endpoint, and what may go wrong with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

import httpx

from examples.ragapp.index import Hit
from llmtasks import on_worker_loop_start, on_worker_loop_stop, retry_with_backoff

TIMEOUT: Final = httpx.Timeout(30, connect=5)
#: Waiting longer than this is not the business of one attempt.
LONGEST_WAIT: Final = 20.0

INSTRUCTIONS: Final = (
    "Answer the question from the numbered excerpts alone and cite them as [1], [2]. "
    "If they do not answer it, say so. Use the language of the question."
)


class LLMError(Exception):
    """The endpoint did not answer, and would not if asked again: a bad key, a bad request, a bad answer."""


class LLMUnavailableError(LLMError):
    """The endpoint did not answer now: it is busy, down or slow. Ask again."""


#: The client of this worker's runs; None in other processes.
_shared: httpx.AsyncClient | None = None


@on_worker_loop_start
async def open_client() -> None:
    """Make the client that all runs share: making one loads certificates, which takes some time."""
    global _shared
    _shared = httpx.AsyncClient(timeout=TIMEOUT)


@on_worker_loop_stop
async def close_client() -> None:
    """Close its connections."""
    global _shared
    if _shared is not None:
        await _shared.aclose()
    _shared = None


@asynccontextmanager
async def _client() -> AsyncIterator[httpx.AsyncClient]:
    if _shared is not None:
        yield _shared
        return
    async with httpx.AsyncClient(timeout=TIMEOUT) as client:
        yield client


@retry_with_backoff(max_retries=5, base_delay=0.5, max_delay=8, retry_on=(LLMUnavailableError,))
async def ask(question: str, hits: Sequence[Hit], *, url: str, key: str, model: str) -> str:
    """The model's answer to ``question`` from ``hits``.

    Args:
        question: What somebody asked.
        hits: What the index found about it.
        url: Base URL of the endpoint, which ends in ``/v1`` for most.
        key: Its API key.
        model: Its model.

    Raises:
        LLMUnavailableError: It was asked several times, with growing pauses, and did not answer.
        LLMError: It refuses.
    """
    body = {"model": model, "temperature": 0, "messages": prompt(question, hits)}
    try:
        async with _client() as client:
            headers = {"Authorization": f"Bearer {key}"}
            response = await client.post(f"{url.rstrip('/')}/chat/completions", json=body, headers=headers)
    except httpx.TransportError as error:
        raise LLMUnavailableError(f"{url} does not answer: {error!r}") from error
    if response.status_code == httpx.codes.TOO_MANY_REQUESTS:
        # It says when it will have time. The backoff comes on top of that, so that not all callers return at once.
        await asyncio.sleep(min(LONGEST_WAIT, retry_after(response)))
    return read_answer(response)


def prompt(question: str, hits: Sequence[Hit]) -> list[dict[str, str]]:
    """The messages that ask ``question`` about the numbered ``hits``."""
    excerpts = "\n\n".join(f"[{number}] {hit.title}\n{hit.text}" for number, hit in enumerate(hits, start=1))
    return [
        {"role": "system", "content": INSTRUCTIONS},
        {"role": "user", "content": f"Question: {question}\n\nExcerpts:\n\n{excerpts}"},
    ]


def read_answer(response: httpx.Response) -> str:
    """The text of the model's answer, or the error that says whether to ask again."""
    status = response.status_code
    if status in {408, 409, 429} or status >= 500:
        raise LLMUnavailableError(f"{response.url} answered {status}: {response.text[:200]}")
    if status != httpx.codes.OK:
        raise LLMError(f"{response.url} answered {status}: {response.text[:200]}")
    try:
        answer: Any = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise LLMError(f"{response.url} answered no chat completion: {response.text[:200]}") from error
    return str(answer)


def retry_after(response: httpx.Response) -> float:
    """The seconds that the response asks to wait, which it may give as a number or as a date."""
    value = response.headers.get("Retry-After", "0")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except ValueError:
            return 0
    return max(0, seconds)
