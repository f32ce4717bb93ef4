"""The task functions of the soak. Each call writes a line when it begins and one when it ends, whoever kills what."""

import asyncio
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llmtasks import task_registry

#: Below the project's folder.
TRACE = "calls.jsonl"
#: How many calls of a function may run at once; of a unique one with the same arguments.
LIMITS = {"pair": 2, "single": 1, "unique": 1}
#: Kills count as attempts, and many may hit one run.
PATIENT: dict[str, Any] = {"bind": True, "max_retries": 50, "retry_delay": 0.2}


@contextmanager
def call(task: Any) -> Iterator[None]:
    """Write down that a call begins, under which claim, and that it ends, however it does."""
    claim = task.request.llm_hold.claim
    said = {"run": claim.id, "claim": claim.claim_no, "attempt": claim.attempts + 1, "func": task.name}
    _write(said | {"event": "begin"})
    try:
        yield
    finally:
        _write(said | {"event": "end"})


def _write(said: dict[str, Any]) -> None:
    handle = os.open(TRACE, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        line = json.dumps(said | {"at": time.time(), "pid": os.getpid()})
        os.write(handle, f"{line}\n".encode())  # one call: lines of several processes do not mix
    finally:
        os.close(handle)


@task_registry.register(name="quick", **PATIENT)
async def quick(self: Any, value: int) -> int:
    with call(self):
        return value


@task_registry.register(name="slow", **PATIENT)
async def slow(self: Any, seconds: float) -> None:
    with call(self):
        await asyncio.sleep(seconds)


@task_registry.register(name="shaky", **PATIENT)
def shaky(self: Any, failures: int) -> None:
    with call(self):
        if self.request.retries < failures:
            raise ConnectionError(f"attempt {self.request.retries + 1} of {failures + 1}")


@task_registry.register(name="pair", max_instances=LIMITS["pair"], **PATIENT)
def pair(self: Any, seconds: float) -> None:
    with call(self):
        time.sleep(seconds)


@task_registry.register(name="single", max_instances=LIMITS["single"], **PATIENT)
async def single(self: Any, seconds: float) -> None:
    with call(self):
        await asyncio.sleep(seconds)


@task_registry.register(name="unique", unique="subject", **PATIENT)
async def unique(self: Any, subject: str, seconds: float) -> None:
    with call(self):
        await asyncio.sleep(seconds)


@task_registry.register(name="total", **PATIENT)
def total(self: Any, numbers: list[int]) -> int:
    with call(self):
        return sum(numbers)


@task_registry.register(name="plus", **PATIENT)
async def plus(self: Any, value: int, more: int) -> int:
    with call(self):
        return value + more


@task_registry.register(name="every_second", interval_minutes=1 / 60, overlap="allow", **PATIENT)
async def every_second(self: Any) -> None:
    with call(self):
        await asyncio.sleep(0.2)


@task_registry.register(name="every_half_second", interval_minutes=1 / 120, overlap="allow", **PATIENT)
def every_half_second(self: Any) -> None:
    with call(self):
        time.sleep(0.02)


@task_registry.register(name="every_minute", schedule="* * * * *", timezone="UTC", overlap="allow", **PATIENT)
def every_minute(self: Any) -> None:
    with call(self):
        pass
