"""Where the application keeps its data and whom it talks to, read from the environment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROJECT: Final = Path(__file__).resolve().parents[2]


class ServicesNotRunningError(Exception):
    """The local language model and mail server have not been started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that can be set, by environment variables that begin with ``RAGAPP_``.

    Attributes:
        home: The folder of everything that the application writes.
        documents: Files and folders to ingest, besides ``inbox`` and ``attachments``.
        packages: Whether the descriptions of the installed Python packages are documents too.
        mailboxes: Where mail is read: ``maildir:/path`` or ``imaps://user:password@host/INBOX``.
        admin: Who gets reports and is told about failures.
        sender: The address that mail is sent from.
        llm_url: Base URL of an OpenAI-compatible endpoint; None means the local stub.
        llm_key: Its key.
        llm_model: Its model.
        smtp: ``host:port`` of the mail server to send through; None means the local one.
        interval_minutes: How often documents and mail are looked for.
        report_schedule: When the report is written, as a cron expression.
        retry_delay: Seconds between attempts.
        step: How many documents may be queued at a time.
    """

    home: Path
    documents: tuple[Path, ...]
    packages: bool
    mailboxes: tuple[str, ...]
    admin: str = "admin@localhost"
    sender: str = "ragapp@localhost"
    llm_url: str | None = None
    llm_key: str = "local"
    llm_model: str = "stub"
    smtp: str | None = None
    interval_minutes: float = 0.25
    report_schedule: str = "0 0 * * *"
    retry_delay: float = 3
    step: int = 25

    @property
    def index_path(self) -> Path:
        """The SQLite file of the index."""
        return self.home / "index.db"

    @property
    def inbox(self) -> Path:
        """A folder in which anybody may put documents."""
        return self.home / "inbox"

    @property
    def attachments(self) -> Path:
        """Documents that came by mail."""
        return self.home / "attachments"

    @property
    def reports(self) -> Path:
        """Where reports are kept."""
        return self.home / "reports"

    @property
    def maildir(self) -> Path:
        """The mailbox into which the local mail server delivers."""
        return self.home / "mail"

    @property
    def services_file(self) -> Path:
        """Where the local services write down their addresses."""
        return self.home / "services.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where the language model and the mail server listen."""

    llm_url: str
    smtp_host: str
    smtp_port: int


def read(environ: Mapping[str, str] | None = None) -> Settings:
    """The settings that ``environ`` (default: this process's environment) asks for."""
    env = os.environ if environ is None else environ
    data = Path(env.get("LLMTASKS_HOME") or PROJECT / ".llmtasks").expanduser().absolute()
    home = Path(env.get("RAGAPP_HOME") or data / "ragapp").expanduser().absolute()
    folders = env.get("RAGAPP_DOCUMENTS")
    documents = tuple(Path(item) for item in folders.split(os.pathsep) if item) if folders else own_documents()
    return Settings(
        home=home,
        documents=documents,
        packages=env.get("RAGAPP_PACKAGES", "0" if folders else "1") == "1",
        mailboxes=tuple(env.get("RAGAPP_MAILBOXES", "").split()) or (f"maildir:{home / 'mail'}",),
        admin=env.get("RAGAPP_ADMIN", "admin@localhost"),
        sender=env.get("RAGAPP_SENDER", "ragapp@localhost"),
        llm_url=env.get("RAGAPP_LLM_URL") or None,
        llm_key=env.get("RAGAPP_LLM_KEY", "local"),
        llm_model=env.get("RAGAPP_LLM_MODEL", "stub"),
        smtp=env.get("RAGAPP_SMTP") or None,
        interval_minutes=float(env.get("RAGAPP_INTERVAL_MINUTES", "0.25")),
        report_schedule=env.get("RAGAPP_REPORT_SCHEDULE", "0 0 * * *"),
        retry_delay=float(env.get("RAGAPP_RETRY_DELAY", "3")),
        step=int(env.get("RAGAPP_STEP", "25")),
    )


def own_documents() -> tuple[Path, ...]:
    """The documents of the project that this example belongs to."""
    return (PROJECT / "docs", PROJECT / "examples" / "README.md", *sorted(PROJECT.glob("*.md")))


def addresses(settings: Settings) -> Addresses:
    """Where to reach the language model and the mail server.

    The local services may be restarted on other ports, so ask again for each use.

    Raises:
        ServicesNotRunningError: The environment names no servers, and the local ones have not been started.
    """
    local: dict[str, str] = {}
    if settings.llm_url is None or settings.smtp is None:
        try:
            local = json.loads(settings.services_file.read_text())
        except FileNotFoundError:
            raise ServicesNotRunningError(
                f"{settings.services_file} does not exist: start `python -m examples.ragapp services`, "
                "or set RAGAPP_LLM_URL and RAGAPP_SMTP to servers of your own"
            ) from None
    host, _, port = (settings.smtp or local["smtp"]).rpartition(":")
    return Addresses(llm_url=settings.llm_url or local["llm_url"], smtp_host=host, smtp_port=int(port))
