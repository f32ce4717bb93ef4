"""The index: documents and their searchable chunks in one SQLite file, safe for several processes at once."""

from __future__ import annotations

import fcntl
import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Final

from examples.ragapp import words

SCHEMA: Final = """
CREATE TABLE documents (
    id TEXT PRIMARY KEY,
    path TEXT NOT NULL UNIQUE,
    title TEXT NOT NULL,
    fingerprint TEXT NOT NULL,  -- of the source: a new one means that it changed
    sha256 TEXT,                -- of the text that the chunks were made from
    status TEXT NOT NULL,
    updated TEXT NOT NULL
);
CREATE INDEX documents_by_status ON documents (status, updated);
CREATE VIRTUAL TABLE chunks USING fts5(document_id UNINDEXED, text, tokenize = 'porter unicode61');
CREATE TABLE mails (
    account TEXT NOT NULL,
    message_id TEXT NOT NULL,
    subject TEXT NOT NULL,
    read TEXT NOT NULL,
    PRIMARY KEY (account, message_id)
);
"""
#: A document queued longer than this is queued again: somebody may have cancelled its run.
QUEUED_TOO_LONG: Final = timedelta(minutes=10)


class DocumentStatus(StrEnum):
    """Where one document stands."""

    #: Found or changed, and not yet queued.
    NEW = "new"
    #: A run of ``process_document`` is on its way.
    QUEUED = "queued"
    #: Its chunks can be searched.
    PROCESSED = "processed"
    #: The last attempt to process it failed.
    FAILED = "failed"
    #: Its source is gone.
    MISSING = "missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Something that can become a document; a new fingerprint means that it changed."""

    path: str
    title: str
    fingerprint: str

    @property
    def document_id(self) -> str:
        """The id of the document: the same for the same path, always."""
        return hashlib.sha256(self.path.encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One row of the index."""

    id: str
    path: str
    title: str
    status: DocumentStatus
    updated: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A chunk that answers a search, best first; ``snippet`` is its best part, ``text`` all of it."""

    document_id: str
    title: str
    path: str
    text: str
    snippet: str
    score: float


@dataclass(frozen=True, slots=True)
class Index:
    """The index in the file ``path``, which is made when it is first used.

    Each call opens its own connection, so an ``Index`` may be shared by threads and survives a fork.
    """

    path: Path

    def note(self, sources: Iterable[Source]) -> int:
        """Remember sources that are new or have changed as documents to be processed; say how many."""
        with self._transaction() as database:
            return len(_note(database, sources))

    def drop_missing(self, found: Iterable[Source], as_of: datetime) -> int:
        """Drop the text of all documents that are not among ``found``; say how many there were.

        Args:
            found: Everything there was to find.
            as_of: When the search for it began; a document that came later is kept.
        """
        with self._transaction() as database:
            query = "SELECT id FROM documents WHERE status != 'missing' AND updated < ?"
            known = {document_id for (document_id,) in database.execute(query, (as_of.isoformat(),))}
            gone = [(document_id,) for document_id in known - {source.document_id for source in found}]
            database.executemany("DELETE FROM chunks WHERE document_id = ?", gone)
            database.executemany("UPDATE documents SET status = 'missing', sha256 = NULL WHERE id = ?", gone)
        return len(gone)

    def note_mail(self, account: str, message_id: str, subject: str, sources: Iterable[Source]) -> list[str] | None:
        """Remember a mail and the documents it brought, in one step.

        Returns:
            The ids of its new documents, or None if this mail was remembered before.
        """
        with self._transaction() as database:
            added = database.execute(
                "INSERT INTO mails VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING", (account, message_id, subject, _now())
            )
            return _note(database, sources) if added.rowcount else None

    def knows_mail(self, account: str, message_id: str) -> bool:
        """Whether this mail was remembered before."""
        with self._connection() as database:
            query = "SELECT 1 FROM mails WHERE account = ? AND message_id = ?"
            return database.execute(query, (account, message_id)).fetchone() is not None

    def unprocessed(self, step: int) -> list[str]:
        """Ids of documents to queue next: as many as there is room for, if ``step`` may be queued at a time."""
        overdue = (datetime.now(UTC) - QUEUED_TOO_LONG).isoformat()
        with self._connection() as database:
            (queued,) = database.execute(
                "SELECT count(*) FROM documents WHERE status = 'queued' AND updated >= ?", (overdue,)
            ).fetchone()
            rows = database.execute(
                "SELECT id FROM documents WHERE status = 'new' OR (status = 'queued' AND updated < ?) "
                "ORDER BY updated, path LIMIT ?",
                (overdue, max(0, step - queued)),
            )
            return [document_id for (document_id,) in rows]

    def mark_queued(self, document_ids: Sequence[str]) -> None:
        """Say that these documents are queued, except those that a worker has finished in the meantime."""
        with self._transaction() as database:
            database.executemany(
                "UPDATE documents SET status = 'queued', updated = ? WHERE id = ? AND status IN ('new', 'queued')",
                [(_now(), document_id) for document_id in document_ids],
            )

    def set_status(self, document_id: str, status: DocumentStatus) -> None:
        """Set the status of a document; one that is not in the index is left out."""
        with self._transaction() as database:
            database.execute("UPDATE documents SET status = ?, updated = ? WHERE id = ?", (status, _now(), document_id))

    def get(self, document_id: str) -> Document | None:
        """The document with this id."""
        with self._connection() as database:
            query = "SELECT id, path, title, status, updated FROM documents WHERE id = ?"
            row = database.execute(query, (document_id,)).fetchone()
        return _document(row) if row else None

    def recent(self, limit: int = 10) -> list[Document]:
        """The documents that changed last, latest first."""
        with self._connection() as database:
            query = "SELECT id, path, title, status, updated FROM documents ORDER BY updated DESC, path LIMIT ?"
            return [_document(row) for row in database.execute(query, (limit,))]

    def replace(self, document_id: str, title: str, chunks: Sequence[str]) -> bool:
        """Make ``chunks`` the text of a document, all at once.

        Returns:
            Whether the text was new; the same text again leaves the chunks as they are.
        """
        digest = hashlib.sha256("\0".join(chunks).encode()).hexdigest()
        with self._transaction() as database:
            row = database.execute("SELECT sha256 FROM documents WHERE id = ?", (document_id,)).fetchone()
            changed = row is not None and row[0] != digest
            if changed:
                database.execute("DELETE FROM chunks WHERE document_id = ?", (document_id,))
                database.executemany(
                    "INSERT INTO chunks (document_id, text) VALUES (?, ?)",
                    [(document_id, words.spaced(chunk)) for chunk in chunks],
                )
            database.execute(
                "UPDATE documents SET title = ?, sha256 = ?, status = 'processed', updated = ? WHERE id = ?",
                (title, digest, _now(), document_id),
            )
        return changed

    def search(self, question: str, limit: int = 5) -> list[Hit]:
        """The chunks that fit the words of ``question`` best, by BM25."""
        query = " OR ".join(f'"{word}"' for word in words.WORD.findall(question))
        if not query:
            return []
        with self._connection() as database:
            rows = database.execute(
                "SELECT documents.id, title, path, text, snippet(chunks, 1, '', '', '...', 40), bm25(chunks) "
                "FROM chunks JOIN documents ON documents.id = document_id "
                "WHERE chunks MATCH ? ORDER BY rank LIMIT ?",
                (query, limit),
            )
            return [
                Hit(
                    document_id=row[0],
                    title=row[1],
                    path=row[2],
                    text=words.unspaced(row[3]),
                    snippet=words.unspaced(row[4]),
                    score=-row[5],
                )
                for row in rows
            ]

    def counts(self) -> dict[str, int]:
        """How many documents there are of each status."""
        with self._connection() as database:
            return dict(database.execute("SELECT status, count(*) FROM documents GROUP BY status ORDER BY status"))

    def totals(self) -> tuple[int, int]:
        """How many chunks and how many mails the index holds."""
        with self._connection() as database:
            row = database.execute("SELECT (SELECT count(*) FROM chunks), (SELECT count(*) FROM mails)").fetchone()
        return row[0], row[1]

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        if not self.path.exists():
            _create(self.path)
        # No isolation level: transactions begin and end where this module says so.
        database = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        try:
            database.execute("PRAGMA synchronous = NORMAL")
            yield database
        finally:
            database.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._connection() as database:
            # IMMEDIATE waits for other writers now; a read that later turns into a write cannot wait.
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
            except BaseException:
                database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")


def _create(path: Path) -> None:
    """Make an empty index appear at ``path`` in one step, however many processes try."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        draft = path.with_suffix(".draft")
        draft.unlink(missing_ok=True)
        database = sqlite3.connect(draft)
        database.execute("PRAGMA journal_mode = WAL")
        database.executescript(SCHEMA)
        database.close()
        draft.replace(path)


def _note(database: sqlite3.Connection, sources: Iterable[Source]) -> list[str]:
    rows = (
        database.execute(
            "INSERT INTO documents (id, path, title, fingerprint, status, updated) VALUES (?, ?, ?, ?, 'new', ?) "
            "ON CONFLICT (id) DO UPDATE SET fingerprint = excluded.fingerprint, status = 'new', "
            "updated = excluded.updated WHERE fingerprint != excluded.fingerprint OR status = 'missing' "
            "RETURNING id",
            (source.document_id, source.path, source.title, source.fingerprint, _now()),
        ).fetchall()
        for source in sources
    )
    return [document_id for changed in rows for (document_id,) in changed]


def _document(row: tuple[str, str, str, str, str]) -> Document:
    return Document(
        id=row[0], path=row[1], title=row[2], status=DocumentStatus(row[3]), updated=datetime.fromisoformat(row[4])
    )


def _now() -> str:
    return datetime.now(UTC).isoformat()
