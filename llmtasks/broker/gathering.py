"""What a batch publishes to Redis: one command for all messages of a queue, where kombu sends one for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, TypeAlias

from kombu.transport import redis as stock

from llmtasks.broker import scripts

#: Messages of one command at most: the server's Lua takes some thousand arguments.
MOST: Final = 1_000
#: Characters of one command, more or less: the server keeps a command whole before it begins with it.
LONGEST: Final = 4_000_000

#: The name of a method of the client, and its arguments.
Command: TypeAlias = tuple[Any, ...]

# Its stub is older.
_stock: Any = stock
_StockBatch: Any = _stock.PublishBatch


class Commands(list[Command]):
    """What kombu takes for a batch: the commands that publish messages."""

    def add(self, *command: Any) -> None:
        """Take one more."""
        self.append(command)


class PublishBatch(_StockBatch):  # type: ignore[misc]  # Any as a base, see above
    """A batch of kombu's whose messages are gathered by queue and priority."""

    def __init__(self, channel: Any, max_size: int) -> None:
        super().__init__(channel, max_size)
        self.pipeline: Any = Gathering(self.pipeline)


class Gathering:
    """A pipeline that gathers what ``scripts.PUT`` puts, and sends all else after it."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._texts: dict[tuple[str, str], list[str]] = {}
        self._others: list[Command] = []

    def __getattr__(self, name: str) -> Any:
        def add(*arguments: Any) -> None:
            self._others.append((name, *arguments))

        return add

    def eval(self, _script: str, _keys: int, key: str, wake_key: str, text: str) -> None:
        """Gather a message."""
        self._texts.setdefault((key, wake_key), []).append(text)

    def execute(self) -> Any:
        """Send all of it."""
        for (key, wake_key), texts in self._texts.items():
            for piece in _pieces(texts):
                self._pipeline.eval(scripts.PUT, 2, key, wake_key, *piece)
        for name, *arguments in self._others:
            getattr(self._pipeline, name)(*arguments)
        self._texts.clear()
        self._others.clear()
        return self._pipeline.execute()

    def reset(self) -> None:
        """Forget it."""
        self._texts.clear()
        self._others.clear()
        self._pipeline.reset()


def _pieces(texts: list[str]) -> Iterator[list[str]]:
    """Texts in their order, cut where a command would become too long."""
    piece: list[str] = []
    length = 0
    for text in texts:
        if piece and (len(piece) >= MOST or length + len(text) > LONGEST):
            yield piece
            piece, length = [], 0
        piece.append(text)
        length += len(text)
    if piece:
        yield piece
