"""Mail is sent over SMTP, delivered, and read exactly once from a Maildir or an IMAP server."""

from __future__ import annotations

import asyncio
from email.message import EmailMessage
from pathlib import Path

import pytest

from examples.ragapp import mail
from examples.ragapp.index import Index
from examples.ragapp.mail import Account, MailboxError
from examples.ragapp.settings import Settings
from tests.examples.imap_server import ImapServer


def letter(subject: str, **attachments: str) -> EmailMessage:
    message = mail.compose("Bob <bob@example.org>", "ann@example.org", subject, f"About {subject}")
    for name, text in attachments.items():
        message.add_attachment(text, filename=name.replace("_", "."))
    return message


def put(maildir: Path, message: EmailMessage, name: str = "1.a.b") -> None:
    for folder in ("new", "cur", "tmp"):
        (maildir / folder).mkdir(parents=True, exist_ok=True)
    (maildir / "new" / name).write_bytes(message.as_bytes())


@pytest.fixture
def account(config: Settings) -> Account:
    return Account(config.mailboxes[0])


async def test_mail_that_is_sent_arrives_in_the_mailbox(
    config: Settings, index: Index, account: Account, mail_server: tuple[str, int]
) -> None:
    """A message handed to the local server is read from its mailbox, with its attachment, and stays there as read."""
    await asyncio.to_thread(mail.send, letter("plans", plan_md="# Plan\n\nStep one."), *mail_server)

    synced = await asyncio.to_thread(mail.sync, account, index, config.attachments)

    (document,) = index.recent()
    assert synced.messages == 1
    assert synced.document_ids == [document.id]
    assert Path(document.path).read_text() == "# Plan\n\nStep one.\n"
    (kept,) = (config.maildir / "cur").iterdir()
    assert kept.name.endswith(":2,S")


def test_a_message_is_read_once(config: Settings, index: Index, account: Account) -> None:
    """Reading again brings nothing, and neither does the same message delivered twice."""
    message = letter("plans", plan_md="text")
    put(config.maildir, message)
    assert mail.sync(account, index, config.attachments).messages == 1

    put(config.maildir, message, name="2.a.b")

    assert mail.sync(account, index, config.attachments) == mail.Synced(messages=0, document_ids=[])
    assert list((config.maildir / "new").iterdir()) == []


def test_reading_that_was_cut_short_goes_on_where_it_stopped(config: Settings, index: Index, account: Account) -> None:
    """A message that was noted but not marked as read is marked, and its documents are not taken again."""
    message = letter("plans", plan_md="older")
    put(config.maildir, message)
    index.note_mail(account.name, mail.identify(message), "plans", [])

    synced = mail.sync(account, index, config.attachments)

    assert synced.messages == 0
    assert not config.attachments.exists()
    assert len(list((config.maildir / "cur").iterdir())) == 1


def test_an_attachment_sent_again_is_a_new_version(config: Settings, index: Index, account: Account) -> None:
    """The same file name from the same sender is the same document, changed."""
    put(config.maildir, letter("first", plan_md="old"))
    (first,) = mail.sync(account, index, config.attachments).document_ids

    put(config.maildir, letter("second", plan_md="somewhat newer"), name="2.a.b")

    assert mail.sync(account, index, config.attachments).document_ids == [first]
    document = index.get(first)
    assert document is not None
    assert Path(document.path).read_text() == "somewhat newer\n"


def test_only_text_attachments_become_documents(config: Settings, index: Index, account: Account) -> None:
    """Other attachments are left, and a name cannot lead out of the folder."""
    message = letter("files", notes_txt="notes", image_png="no text")
    message.add_attachment("evil", filename="../../../.evil.md")
    put(config.maildir, message)

    mail.sync(account, index, config.attachments)

    saved = sorted(file.relative_to(config.attachments) for file in config.attachments.rglob("*") if file.is_file())
    assert [str(file) for file in saved] == ["bob@example.org/evil.md", "bob@example.org/notes.txt"]


def test_a_missing_mailbox_says_which(config: Settings, index: Index, account: Account) -> None:
    """A Maildir that does not exist is a MailboxError with its path."""
    with pytest.raises(MailboxError, match=str(config.maildir)):
        mail.sync(account, index, config.attachments)


def test_imap_mailbox_is_read_once(config: Settings, index: Index) -> None:
    """Unread messages of an IMAP server are fetched, noted, and only then marked as read."""
    messages = [letter("one", a_md="first").as_bytes(), letter("two", b_txt="second").as_bytes()]
    with ImapServer(messages).running() as server:
        account = Account(f"imap://ann:p%40ss@127.0.0.1:{server.port}/INBOX")

        first = mail.sync(account, index, config.attachments)
        second = mail.sync(account, index, config.attachments)

        assert server.seen == {1, 2}
        assert server.fetched == [1, 2]
    assert first.messages == 2
    assert len(first.document_ids) == 2
    assert second.messages == 0


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("imap://ann:wrong@127.0.0.1:{port}/INBOX", "bad password"),
        ("imap://ann:p%40ss@127.0.0.1:{port}/Nowhere", "no folder Nowhere"),
        ("imap://ann:p%40ss@127.0.0.1:1/INBOX", "cannot be read"),
        ("pop3://ann:secret@127.0.0.1", "expected a URL that begins with maildir:"),
    ],
)
def test_a_mailbox_that_cannot_be_read_says_why(config: Settings, index: Index, url: str, reason: str) -> None:
    """A wrong password, folder, port or kind of mailbox is a MailboxError, and never shows the password."""
    with ImapServer([]).running() as server, pytest.raises(MailboxError, match=reason) as caught:
        mail.sync(Account(url.format(port=server.port)), index, config.attachments)

    assert not any(secret in str(caught.value) for secret in ("wrong", "p%40ss", "p@ss", "secret"))


def test_a_subject_of_several_lines_becomes_one() -> None:
    """An error message can be a subject."""
    assert mail.compose("a@x", "b@x", "failed:\nbecause", "text")["Subject"] == "failed: because"
