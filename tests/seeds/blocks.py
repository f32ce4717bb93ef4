"""The code blocks of the text that the project was asked for, and a process that runs one of them.

``python -m tests.seeds.blocks <preamble> <block>`` runs a block as the text has it, after a preamble with the names
that it leaves out, and prints as JSON what the preamble's ``look()`` returned after each statement.
"""

import ast
import asyncio
import inspect
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = Path(__file__).with_name("seed.txt")
#: Where the text's imports are here.
IMPORTS = {
    "app.core.tasks.retry": "llmtasks.retry",
    "app.core.tasks.monitor": "llmtasks.monitor",
    "app.core.tasks.metrics": "llmtasks.metrics",
    "app.core.tasks": "llmtasks",
    "app.models.task": "llmtasks.task",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One ``python`` block of the text.

    Attributes:
        heading: The heading above it, without its number.
        written: The block as the text has it.
    """

    heading: str
    written: str

    @property
    def source(self) -> str:
        """The block with the imports of this project; nothing else is changed."""
        return re.sub(
            r"^from (app\.[\w.]+) import ", lambda found: f"from {IMPORTS[found[1]]} import ", self.written, flags=re.M
        )


def blocks() -> list[Block]:
    """All blocks in the text's order."""
    found: list[Block] = []
    heading = ""
    code: list[str] | None = None
    for line in SEED.read_text("utf-8", "replace").splitlines():
        if code is None and line.startswith("#"):
            heading = line.lstrip("#").strip().split(". ", 1)[-1]
        elif code is None and line.startswith("```python"):
            code = []
        elif code is not None and line.startswith("```"):
            found.append(Block(heading=heading, written="\n".join(code) + "\n"))
            code = None
        elif code is not None:
            code.append(line)
    return found


async def run(preamble: str, block: str) -> list[Any]:
    """Run a block's statements one after the other, with ``await`` at their top, and look after each."""
    names: dict[str, Any] = {"__name__": "block"}
    await _execute(compile(preamble, "preamble", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
    seen: list[Any] = []
    look: Callable[[], Any] = names["look"]
    for statement in ast.parse(block).body:
        module = ast.Module(body=[statement], type_ignores=[])
        await _execute(compile(module, "block", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
        seen.append(look())
    return seen


async def _execute(code: Any, names: dict[str, Any]) -> None:
    awaitable = eval(code, names)
    if inspect.isawaitable(awaitable):
        await awaitable


if __name__ == "__main__":
    texts = [Path(name).read_text("utf-8") for name in sys.argv[1:3]]
    print(json.dumps(asyncio.run(run(*texts)), default=str))
