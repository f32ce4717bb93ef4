"""``llmtasks dev``: the embedded broker and the Procfile's processes, in one terminal."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import click
from kombu.utils.url import sanitize_url

from llmtasks.broker import EmbeddedBroker
from llmtasks.cli import procfile
from llmtasks.cli.broker import home_of, read_settings
from llmtasks.cli.procfile import Entry, Kind
from llmtasks.cli.supervisor import Backoff, Child, Launch, free_port
from llmtasks.errors import LLMTasksError, UnavailableError
from llmtasks.settings import Settings, embedded_broker_url

#: Seconds beyond the worker's own grace in which a process must have stopped.
STOP_MARGIN: Final = 10.0
_COLOURS: Final = ("cyan", "yellow", "green", "magenta", "blue")


@click.command("dev")
@click.option("-A", "--app", "app_name", help="The Celery app; by default celeryconfig.py of the current folder.")
@click.option(
    "--procfile", "path", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Default: Procfile."
)
@click.option("--no-flower", is_flag=True, help="Leave the dashboard out.")
@click.option("--port", type=click.IntRange(1, 65535), help="Flower's port; the next free one if it is taken.")
@click.option("--json", "as_json", is_flag=True, help="Print each event and each line of output as a line of JSON.")
@click.pass_context
def dev(
    context: click.Context, app_name: str | None, path: Path | None, no_flower: bool, port: int | None, as_json: bool
) -> None:
    """Run broker, worker, beat and dashboard together until Ctrl-C.

    A process that dies is started again. Ctrl-C stops all of them, the broker last; a second Ctrl-C kills them.
    """
    began = time.monotonic()
    # `celery -A app llmtasks dev`
    app_name = app_name or context.find_root().params.get("app")
    try:
        settings = read_settings(context, app_name)
        entries = procfile.read(path)
        console = Console([entry.name for entry in entries], as_json=as_json)
        entries = [entry for entry in entries if _wanted(entry, console, no_flower=no_flower)]
        with contextlib.ExitStack() as stack:
            broker = None
            if settings.home and settings.broker_url == embedded_broker_url(settings.home):
                broker = stack.enter_context(EmbeddedBroker(home_of(settings)))
                console.up("broker", broker.pid or 0, broker.url)
                if broker.restored:
                    console.note("broker", f"requeued {broker.restored} messages that dead workers held")
            else:
                console.note("broker", f"not started: broker_url is {sanitize_url(settings.broker_url)}")
            asyncio.run(Session(settings, console, broker, began).run(entries, app_name, port))
    except LLMTasksError as error:
        raise click.ClickException(str(error)) from error


class Console:
    """What the user sees: one line per event, and the processes' own lines behind their names."""

    def __init__(self, names: Sequence[str], *, as_json: bool) -> None:
        self.on_closed: Callable[[], None] = lambda: None
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A character that the terminal cannot show must not end everything.
            sys.stdout.reconfigure(errors="backslashreplace")
        self._json = as_json
        self._width = max(map(len, [*names, "broker"]))
        self._colours = {name: _COLOURS[at % len(_COLOURS)] for at, name in enumerate(["broker", *names])}
        self._coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def up(self, name: str, pid: int, url: str | None) -> None:
        """The process does its work."""
        self._event("up", name, f"up  pid {pid}{f'  {url}' if url else ''}", pid=pid, url=url)

    def died(self, name: str, exit_code: int, delay: float) -> None:
        """The process ended by itself and starts again."""
        how = f"exit {exit_code}" if exit_code >= 0 else f"killed by {signal.Signals(-exit_code).name}"
        text = f"died ({how}); starts again in {delay:g} s"
        self._event("died", name, text, exit_code=exit_code, restart_in=delay)

    def stopped(self, name: str) -> None:
        """The process ended because it was told to."""
        self._event("stopped", name, "stopped")

    def note(self, name: str, text: str) -> None:
        """Anything else that the user should know."""
        self._event("note", name, text, text=text)

    def output(self, name: str, line: str) -> None:
        """The process wrote a line."""
        if self._json:
            self._write(json.dumps({"event": "output", "process": name, "line": line}))
        else:
            self._write(f"{self._prefix(name)} | {line}")

    def ready(self, seconds: float) -> None:
        """Everything is up."""
        if self._json:
            self._write(json.dumps({"event": "ready", "seconds": round(seconds, 2)}))
        else:
            self._write(f"ready in {seconds:.1f} s; Ctrl-C stops everything")

    def _event(self, event: str, name: str, sentence: str, /, **facts: Any) -> None:
        if self._json:
            known = {key: value for key, value in facts.items() if value is not None}
            self._write(json.dumps({"event": event, "process": name, **known}))
        else:
            self._write(f"{self._prefix(name)}  {sentence}")

    def _prefix(self, name: str) -> str:
        text = name.ljust(self._width)
        return click.style(text, fg=self._colours.get(name), bold=True) if self._coloured else text

    def _write(self, line: str) -> None:
        try:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
        except OSError:
            # Nobody reads any more (`llmtasks dev | head`, a closed window): stop, and do not fail again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.on_closed()


class Session:
    """One ``llmtasks dev`` from its start to its end."""

    def __init__(self, settings: Settings, console: Console, broker: EmbeddedBroker | None, began: float) -> None:
        self._settings = settings
        self._console = console
        self._broker = broker
        self._began = began
        self._stop = asyncio.Event()
        self._children: list[Child] = []
        self._keeping: asyncio.Task[None] | None = None

    async def run(self, entries: Sequence[Entry], app: str | None, port: int | None) -> None:
        """Run everything until a signal, then stop it in order."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(signum, self._on_signal)
        self._console.on_closed = self._stop.set
        self._children = [Child(entry.name, self._launcher(entry, app, port), self._console) for entry in entries]
        running = [asyncio.create_task(child.run()) for child in self._children]
        self._keeping = asyncio.create_task(self._keep_broker())
        aside = [asyncio.create_task(self._say_ready()), self._keeping]
        stopping = asyncio.create_task(self._stop.wait())
        try:
            # A task of ours ends early only by an error, which must not leave the others running unseen.
            await asyncio.wait([stopping, *running], return_when=asyncio.FIRST_COMPLETED)
            # Last in the Procfile, first to stop: nobody talks to a process that is gone.
            for child, task in reversed([*zip(self._children, running, strict=True)]):
                child.stop()
                await asyncio.wait({task}, timeout=self._settings.shutdown_grace + STOP_MARGIN)
                if not task.done():
                    self._console.note(child.name, "killed: it did not stop in time")
                    child.kill()
                await task
        finally:
            for child in self._children:
                child.kill()
            stopping.cancel()
            for task in (*aside, *running):
                task.cancel()
            await asyncio.gather(*aside, *running, return_exceptions=True)
            if self._broker is not None:
                await asyncio.to_thread(self._broker.stop)
                self._console.stopped("broker")

    def _on_signal(self) -> None:
        if not self._stop.is_set():
            self._stop.set()
            self._console.note("", "stopping; again kills")
            return
        for child in self._children:
            child.kill()
        if self._broker is not None and self._keeping is not None:
            self._keeping.cancel()
            self._broker.kill()

    async def _say_ready(self) -> None:
        await asyncio.gather(*(child.up.wait() for child in self._children))
        self._console.ready(time.monotonic() - self._began)

    async def _keep_broker(self) -> None:
        """Start the broker again whenever it died."""
        broker, backoff, began = self._broker, Backoff(), time.monotonic()
        while broker is not None:
            await asyncio.sleep(0.5)
            if broker.exit_code is None:
                continue
            delay = backoff.after(time.monotonic() - began)
            self._console.died("broker", broker.exit_code, delay)
            await asyncio.sleep(delay)
            began = time.monotonic()
            # In this thread: the kernel ends the server with the thread that started it.
            broker.spawn()
            try:
                await asyncio.to_thread(broker.wait_until_ready)
            except UnavailableError as error:
                self._console.note("broker", str(error))
            else:
                self._console.up("broker", broker.pid or 0, broker.url)

    def _launcher(self, entry: Entry, app: str | None, port: int | None) -> Callable[[], Launch]:
        """How ``entry`` is started, asked anew before each start, because a port may have been taken meanwhile."""
        environ = procfile.environment(entry, self._settings.home)

        def launch() -> Launch:
            if entry.kind is not Kind.FLOWER:
                return Launch(command=entry.command(environ, app=app), environ=environ, kind=entry.kind)
            host = entry.option("address", environ) or "127.0.0.1"
            wished = port or _port(entry.option("port", environ)) or 5555
            free = free_port(host, wished)
            if free != wished:
                self._console.note(entry.name, f"port {wished} is taken, so it uses {free}")
            command = entry.command(environ, app=app, extra=[f"--address={host}", f"--port={free}"])
            return Launch(command=command, environ=environ, kind=entry.kind, address=(host, free))

        return launch


def _wanted(entry: Entry, console: Console, *, no_flower: bool) -> bool:
    if entry.kind is not Kind.FLOWER:
        return True
    if no_flower:
        return False
    if importlib.util.find_spec("flower") is None:
        console.note(entry.name, "not installed, so there is no dashboard: pip install 'llmtasks[flower]'")
        return False
    return True


def _port(text: str) -> int:
    return int(text) if text.isdecimal() and int(text) <= 65535 else 0
