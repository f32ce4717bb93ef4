"""What task functions noted in their file while they ran."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from benchmarks.systems.marks import END, PUBLISHED, RECORD, START


class Marked:
    """Starts and ends of tasks, each read once; tasks with negative numbers, for warming up, are only counted.

    Attributes:
        published: When each task was sent, in nanoseconds since 1970, by its number.
        starts: When each task started first.
        ends: When each task ended last.
        ended: How often each task ended.
        warm: How often tasks with negative numbers ended.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self.published: dict[int, int] = {}
        self.starts: dict[int, int] = {}
        self.ends: dict[int, int] = {}
        self.ended: Counter[int] = Counter()
        self.warm = 0

    def look(self) -> None:
        """Read what is new."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = len(new) - len(new) % RECORD.size
        self._read += whole
        for kind, number, at in RECORD.iter_unpack(new[:whole]):
            if number < 0:
                self.warm += kind == END
            elif kind == PUBLISHED:
                self.published[number] = at
            elif kind == START:
                self.starts.setdefault(number, at)
            else:
                self.ends[number] = at
                self.ended[number] += 1

    @property
    def first_start(self) -> int:
        """The first start of all."""
        return min(self.starts.values())

    @property
    def last_end(self) -> int:
        """The last end of all."""
        return max(self.ends.values())

    @property
    def seconds(self) -> float:
        """From the first start to the last end."""
        return (self.last_end - self.first_start) / 1e9

    @property
    def twice(self) -> int:
        """How many tasks ended more than once."""
        return sum(times > 1 for times in self.ended.values())
