"""Fixtures of the example's tests: a home of its own, real local servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from examples.ragapp import mailserver, settings
from examples.ragapp.index import Index
from examples.ragapp.settings import Settings
from examples.ragapp.stub_llm import StubModel, Troubles


@pytest.fixture
def config(tmp_path: Path) -> Settings:
    """Settings of an application that has only the folder ``docs`` to read."""
    return settings.read({"RAGAPP_HOME": str(tmp_path / "home"), "RAGAPP_DOCUMENTS": str(tmp_path / "docs")})


@pytest.fixture
def index(config: Settings) -> Index:
    return Index(config.index_path)


@pytest.fixture
def model() -> Iterator[StubModel]:
    """A language model without troubles."""
    server = StubModel(Troubles(latency=(0, 0), busy=0, broken=0))
    with server.running():
        yield server


@pytest.fixture
async def mail_server(config: Settings) -> AsyncIterator[tuple[str, int]]:
    """A mail server that delivers into the default mailbox; its host and port."""
    server = await mailserver.start(config.maildir)
    yield server.sockets[0].getsockname()[:2]
    server.close()
    await asyncio.sleep(0)
