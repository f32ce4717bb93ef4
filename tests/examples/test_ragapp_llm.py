"""The endpoint is called over real HTTP, and its troubles are met: busy, broken, gone, refusing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest

from examples.ragapp import llm, stub_llm
from examples.ragapp.index import Hit
from examples.ragapp.llm import LLMError, LLMUnavailableError
from examples.ragapp.stub_llm import StubModel, Troubles

HITS = [
    Hit(
        document_id="1",
        title="Fruit",
        path="/fruit.md",
        text="Apples are red in autumn. Pears are green.",
        snippet="",
        score=2,
    ),
    Hit(
        document_id="2", title="Tasks", path="/tasks.md", text="A paused schedule has no next run.", snippet="", score=1
    ),
]


@dataclass(frozen=True)
class Script(Troubles):
    """Troubles that are written down: the status of each answer in turn, then 200."""

    statuses: tuple[int, ...] = ()
    latency: tuple[float, float] = field(default=(0, 0))

    def of_request(self, number: int) -> tuple[int, float]:
        return (self.statuses[number - 1] if number <= len(self.statuses) else 200), 0


async def ask(url: str, question: str = "When are apples red?", key: str = "local") -> str:
    return await llm.ask(question, HITS, url=url, key=key, model="stub")


async def test_the_answer_is_quoted_from_the_excerpts(model: StubModel) -> None:
    """The stub answers with the sentences that fit the question, and cites their excerpt."""
    assert (await ask(model.url)).startswith("Apples are red in autumn. [1]")
    assert (await ask(model.url, "What is the next run of a paused schedule?")).startswith("A paused schedule")


async def test_a_worker_asks_with_the_client_that_it_opened(model: StubModel) -> None:
    """Between its start and its end; elsewhere each question has a client of its own."""
    await llm.open_client()
    shared = llm._shared
    assert shared is not None
    for _ in range(2):
        assert (await ask(model.url)).startswith("Apples are red in autumn. [1]")
    assert not shared.is_closed

    await llm.close_client()

    assert shared.is_closed
    assert (await ask(model.url)).startswith("Apples are red in autumn. [1]")


def test_the_answer_is_prose() -> None:
    """Code, tables and headings are not quoted, whatever words they have."""
    words = "when are apples red in autumn"
    text = f"# {words}\n\n    {words}\n\n| {words} |\n\n```\n{words}\n```\n\nThose apples are never blue."
    hit = Hit(document_id="1", title="Fruit", path="/fruit.md", text=text, snippet="", score=1)

    said = stub_llm.answer(llm.prompt("When are apples red?", [hit])[-1]["content"])

    assert said == "Those apples are never blue. [1]"


async def test_an_answer_that_is_not_in_the_excerpts_is_not_invented(model: StubModel) -> None:
    """Where nothing fits, the stub says so."""
    assert "do not answer" in await ask(model.url, "Quantum chromodynamics?")


async def test_a_busy_endpoint_is_asked_again_when_it_said() -> None:
    """429 with Retry-After is waited for, then the question is asked again."""
    with StubModel(Script(statuses=(429,), retry_after=1)).running() as url:
        started = time.monotonic()

        answer = await ask(url)

        assert time.monotonic() - started >= 1
    assert "[1]" in answer


async def test_a_broken_endpoint_is_asked_again() -> None:
    """Two answers of 500 do not keep the third from arriving."""
    with StubModel(Script(statuses=(500, 500))).running() as url:
        assert "[1]" in await ask(url)


async def test_a_wrong_key_is_not_tried_again() -> None:
    """What will not get better by asking again is an error at once."""
    model = StubModel(Troubles(latency=(0, 0), busy=0, broken=0), key="right")
    with model.running() as url, pytest.raises(LLMError, match="401") as caught:
        await ask(url, key="wrong")

    assert not isinstance(caught.value, LLMUnavailableError)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (408, LLMUnavailableError),
        (429, LLMUnavailableError),
        (503, LLMUnavailableError),
        (400, LLMError),
        (200, LLMError),
    ],
)
def test_each_status_says_whether_to_ask_again(status: int, error: type[LLMError]) -> None:
    """Busy and broken may pass; refusals and answers that are no completions do not."""
    response = httpx.Response(status, text="<html>", request=httpx.Request("POST", "http://model/v1"))

    with pytest.raises(LLMError) as caught:
        llm.read_answer(response)

    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (lambda: {"Retry-After": "7"}, 7),
        (lambda: {"Retry-After": format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)}, 60),
        (lambda: {"Retry-After": format_datetime(datetime.now(UTC) - timedelta(hours=1), usegmt=True)}, 0),
        (lambda: {"Retry-After": "soon"}, 0),
        (dict, 0),
    ],
)
def test_retry_after_is_seconds_or_a_date(header: Callable[[], dict[str, str]], seconds: float) -> None:
    """Both forms that HTTP allows are understood; anything else means no wait."""
    assert llm.retry_after(httpx.Response(429, headers=header())) == pytest.approx(seconds, abs=10)


def test_troubles_follow_from_the_seed() -> None:
    """The same seed gives the same troubles, and about as many as it should."""
    fates = [Troubles(seed=5, busy=0.2, broken=0.1).of_request(number) for number in range(1000)]

    assert fates == [Troubles(seed=5, busy=0.2, broken=0.1).of_request(number) for number in range(1000)]
    statuses = [status for status, _ in fates]
    assert 150 < statuses.count(429) < 250
    assert 60 < statuses.count(500) < 140


async def test_the_stub_refuses_what_is_no_completion(model: StubModel) -> None:
    """A bad body or path is answered as the real API answers it: 400 and 404 with an error message."""
    async with httpx.AsyncClient() as client:
        bad = await client.post(f"{model.url}/chat/completions", content=b"not json")
        lost = await client.post(f"{model.url}/nowhere", json={})

    assert (bad.status_code, lost.status_code) == (400, 404)
    assert bad.json()["error"]["message"]
