"""A local mail server: what it is sent over SMTP, it delivers into a Maildir."""

from __future__ import annotations

import asyncio
from pathlib import Path

from aiosmtpd.handlers import Mailbox
from aiosmtpd.smtp import SMTP


async def start(maildir: Path, host: str = "127.0.0.1", port: int = 0) -> asyncio.Server:
    """Listen on ``host`` and ``port`` (0 means any free one) and deliver every message into ``maildir``."""
    maildir.parent.mkdir(parents=True, exist_ok=True)
    mailbox = Mailbox(maildir)
    loop = asyncio.get_running_loop()
    return await loop.create_server(lambda: SMTP(mailbox, hostname="localhost", loop=loop), host, port)
