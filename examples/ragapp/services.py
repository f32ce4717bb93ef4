"""The servers that the example brings along: a stub language model and a mail server, in one process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Iterator

from examples.ragapp import mailserver
from examples.ragapp.settings import Settings
from examples.ragapp.stub_llm import StubModel, Troubles


async def serve(settings: Settings) -> None:
    """Run both servers until SIGINT or SIGTERM, and keep their addresses in ``settings.services_file``.

    ``RAGAPP_STUB_PORT`` and ``RAGAPP_SMTP_PORT`` fix their ports; without them, any free ones are taken.
    """
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    model = StubModel(
        Troubles(seed=int(os.environ.get("RAGAPP_STUB_SEED", "1"))), port=int(os.environ.get("RAGAPP_STUB_PORT", "0"))
    )
    with model.running() as llm_url:
        mail = await mailserver.start(settings.maildir, port=int(os.environ.get("RAGAPP_SMTP_PORT", "0")))
        host, port = mail.sockets[0].getsockname()[:2]
        try:
            with written_down(settings, {"llm_url": llm_url, "smtp": f"{host}:{port}"}):
                print(f"stub language model on {llm_url}, mail server on {host}:{port}", flush=True)
                await stop.wait()
        finally:
            mail.close()


@contextlib.contextmanager
def written_down(settings: Settings, services: dict[str, str]) -> Iterator[None]:
    """Keep the addresses in a file that the tasks read, until the block ends."""
    file = settings.services_file
    draft = file.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(services))
    draft.replace(file)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
