"""Mail: read mailboxes, each message once, and send."""

from __future__ import annotations

import hashlib
import imaplib
import os
import re
import smtplib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from email import message_from_bytes, policy
from email.message import EmailMessage
from email.utils import make_msgid, parseaddr
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit

from examples.ragapp.documents import file_source
from examples.ragapp.index import Index

#: Attachments of these kinds become documents.
KINDS: Final = {".md", ".txt"}
TIMEOUT: Final = 30.0


class MailboxError(Exception):
    """A mailbox cannot be read now."""


@dataclass(frozen=True, slots=True)
class Account:
    """A mailbox: ``maildir:/path`` or ``imaps://user:password@host/FOLDER`` (``imap://`` without TLS)."""

    url: str

    @property
    def name(self) -> str:
        """What it is called in logs and in the index: its URL without the password."""
        parts = urlsplit(self.url)
        return self.url.replace(f":{parts.password}@", "@") if parts.password else self.url

    def unread(self) -> Iterator[tuple[EmailMessage, Callable[[], None]]]:
        """The messages nobody has read, oldest first, each with the call that marks it as read.

        Raises:
            MailboxError: The mailbox does not exist, does not answer, or refuses us.
        """
        parts = urlsplit(self.url)
        if parts.scheme == "maildir":
            return _unread_in_maildir(Path(parts.path))
        if parts.scheme in {"imap", "imaps"}:
            return _unread_on_server(parts)
        raise MailboxError(f"{self.name}: expected a URL that begins with maildir:, imap:// or imaps://")


@dataclass(frozen=True, slots=True, kw_only=True)
class Synced:
    """What reading a mailbox brought: the number of new messages, and the ids of the documents in them."""

    messages: int
    document_ids: list[str]


def sync(account: Account, index: Index, attachments: Path) -> Synced:
    """Read the unread messages of ``account``; keep their documents in ``attachments`` and note them in ``index``.

    A message is marked as read only after the index has noted it, and the index notes each message once: stopped
    anywhere and started again, this reads every message exactly once.
    """
    messages = 0
    document_ids: list[str] = []
    for message, mark_as_read in account.unread():
        message_id = identify(message)
        if not index.knows_mail(account.name, message_id):
            files = [_save(attachments, message, part) for part in _documents(message)]
            sources = [source for file in files if (source := file_source(file))]
            noted = index.note_mail(account.name, message_id, str(message["Subject"] or ""), sources)
            messages += noted is not None
            document_ids += noted or []
        mark_as_read()
    return Synced(messages=messages, document_ids=document_ids)


def identify(message: EmailMessage) -> str:
    """The message's own id, or one made from its content if it has none."""
    return str(message["Message-ID"] or hashlib.sha256(message.as_bytes()).hexdigest()).strip()


def compose(sender: str, to: str, subject: str, text: str, html: str | None = None) -> EmailMessage:
    """A message, ready to get attachments and to be sent."""
    message = EmailMessage()
    message["From"] = sender
    message["To"] = to
    # A subject is one line; what failed may have more to say.
    message["Subject"] = " ".join(subject.split())
    message["Message-ID"] = make_msgid(domain="ragapp.localhost")
    message.set_content(text)
    if html is not None:
        message.add_alternative(html, subtype="html")
    return message


def send(message: EmailMessage, host: str, port: int) -> None:
    """Hand ``message`` to the mail server; it has taken it when this returns."""
    with smtplib.SMTP(host, port, timeout=TIMEOUT) as server:
        server.send_message(message)


def _unread_in_maildir(path: Path) -> Iterator[tuple[EmailMessage, Callable[[], None]]]:
    # https://cr.yp.to/proto/maildir.html: unread messages are in new/; a read one moves to cur/ and gets its flags.
    def mark_as_read() -> None:
        with suppress(FileNotFoundError):  # another reader was quicker
            file.rename(path / "cur" / f"{file.name}:2,S")

    try:
        files = sorted((path / "new").iterdir(), key=lambda file: (file.stat().st_mtime_ns, file.name))
    except OSError as error:
        raise MailboxError(f"maildir:{path} cannot be read: {error}") from error
    for file in files:
        try:
            content = file.read_bytes()
        except FileNotFoundError:  # another reader was quicker
            continue
        yield _parse(content), mark_as_read


def _unread_on_server(parts: SplitResult) -> Iterator[tuple[EmailMessage, Callable[[], None]]]:
    def mark_as_read() -> None:
        server.uid("STORE", uid, "+FLAGS", r"(\Seen)")

    connect, usual_port = (imaplib.IMAP4_SSL, 993) if parts.scheme == "imaps" else (imaplib.IMAP4, 143)
    port = parts.port or usual_port
    folder = unquote(parts.path.lstrip("/")) or "INBOX"
    try:
        with connect(parts.hostname or "localhost", port, timeout=TIMEOUT) as server:
            server.login(unquote(parts.username or ""), unquote(parts.password or ""))
            answer, detail = server.select(f'"{folder}"')
            if answer != "OK":
                raise MailboxError(f"{parts.hostname} has no folder {folder}: {detail}")
            _, found = server.uid("SEARCH", "UNSEEN")
            for uid in found[0].decode().split():
                # PEEK does not mark the message as read: it is read when the index has it.
                _, content = server.uid("FETCH", uid, "(BODY.PEEK[])")
                if isinstance(content[0], tuple):  # else it was deleted in the meantime
                    yield _parse(content[0][1]), mark_as_read
    except (OSError, imaplib.IMAP4.error) as error:
        raise MailboxError(f"{parts.hostname}:{port} cannot be read: {error}") from error


def _parse(content: bytes) -> EmailMessage:
    return message_from_bytes(content, policy=policy.default)


def _documents(message: EmailMessage) -> Iterator[EmailMessage]:
    for part in message.iter_attachments():
        if Path(part.get_filename() or "").suffix.lower() in KINDS:
            yield part


def _save(folder: Path, message: EmailMessage, part: EmailMessage) -> Path:
    """Write an attachment; the same name from the same sender replaces what was sent before."""
    content = part.get_payload(decode=True)
    sender = parseaddr(str(message["From"] or ""))[1] or "unknown"
    file = folder / _plain(sender) / _plain(part.get_filename() or "")
    file.parent.mkdir(parents=True, exist_ok=True)
    # A reader sees the old file or the new one, never half of one; the draft's suffix is none that is ingested.
    draft = file.with_name(f"{file.name}.{os.getpid()}.draft")
    draft.write_bytes(content if isinstance(content, bytes) else b"")
    draft.replace(file)
    return file.resolve()


def _plain(name: str) -> str:
    """``name`` as a safe file name: whoever sent the mail chose it."""
    return re.sub(r"[^\w.@-]+", "_", Path(name).name).lstrip(".") or "_"
