"""Where the soak happens: real servers and processes, the acts that hit them, and a note of who died when."""

import contextlib
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.ledger import QUICK
from tests.processes import CeleryProcess, Project, app_in_this_process
from tests.servers import PostgreSQL, Valkey, postgresql
from tests.soak.plan import Step

TASKS = "tests.soak.tasks"


class Stage:
    """The processes of a soak.

    Attributes:
        app: The project's app, in this process.
        deaths: When each process that was killed, or told to end, was; by its id. The instant is just before.
        put_backs_at: When somebody was told to put back what ran: a worker that ends, or one whose broker goes away.
        done: How often each act was done.
    """

    def __init__(self, project: Project, app: Any, server: PostgreSQL | None, say: Callable[[str], None]) -> None:
        self.project = project
        self.app = app
        self.deaths: dict[int, float] = {}
        self.put_backs_at: list[float] = []
        self.done: Counter[str] = Counter()
        self._server = server
        self._say = say
        self.workers = [
            project.worker(pool="prefork", wait=False),
            project.worker(pool="asyncio", concurrency=50, wait=False),
            project.worker(pool="threads", concurrency=4, wait=False),
        ]
        self.beats = [project.beat(wait=False), project.beat(wait=False)]
        for process in self.processes:
            process.wait_until_ready()
        self._away: list[tuple[float, Callable[[], None], str]] = []
        self._ending: list[CeleryProcess] = []

    @property
    def processes(self) -> list[CeleryProcess]:
        """Workers and beats."""
        return [*self.workers, *self.beats]

    def act(self, step: Step) -> None:
        """Do one act; who is hit is started again later by ``tend``."""
        signal_name, _, kind = step.what.partition(" ")
        if kind in {"valkey", "postgresql"}:
            self._kill_server(step, self.project.broker if kind == "valkey" else self._server)
            return
        with_children = [process for process in self.workers if process.family()]
        among = {"beat": self.beats, "child": with_children}.get(kind, self.workers) or self.workers
        process = among[step.number % len(among)]
        if not process.running or process in self._ending:
            self._said(step, f"{process.name} is down already")
        elif kind == "child":
            self._kill_child(step, process)
        elif signal_name == "SIGTERM":
            self._note_deaths(process)
            self.put_backs_at.append(time.time())
            process.process.terminate()
            self._ending.append(process)
            self._said(step, process.name, done=True)
        else:
            self._note_deaths(process)
            process.kill()
            self._said(step, process.name, done=True)

    def tend(self, *, all_now: bool = False) -> None:
        """Start again what is down and should not be."""
        for at, start, name in list(self._away):
            if all_now or time.monotonic() >= at:
                self._away.remove((at, start, name))
                start()
                self._say(f"{name} is back")
        self._ending = [process for process in self._ending if process.running]
        for process in self.processes:
            if not process.running:
                process.start()

    def _kill_server(self, step: Step, server: Valkey | PostgreSQL | None) -> None:
        assert server is not None
        if not server.process.running:
            self._said(step, "it is down already")
            return
        if isinstance(server, Valkey):
            self.put_backs_at.append(time.time())
        server.kill()
        self._away.append((time.monotonic() + step.seconds, server.start, server.process.name))
        self._said(step, f"for {step.seconds:.1f} s", done=True)

    def _kill_child(self, step: Step, process: CeleryProcess) -> None:
        children = sorted(process.family(), key=lambda child: child.pid)
        if not children:  # the threads pool has none
            self._said(step, f"{process.name} has none")
            return
        victim = children[step.number % len(children)]
        self.deaths[victim.pid] = time.time()
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
        self._said(step, f"{victim.pid} of {process.name}", done=True)

    def _note_deaths(self, process: CeleryProcess) -> None:
        now = time.time()
        self.deaths |= dict.fromkeys((process.pid, *(child.pid for child in process.family())), now)

    def _said(self, step: Step, whom: str, *, done: bool = False) -> None:
        self.done[step.what] += done
        self._say(f"{step.what}: {whom}")


@contextlib.contextmanager
def stage(folder: Path, *, on_postgresql: bool, say: Callable[[str], None]) -> Iterator[Stage]:
    """Start servers and processes; all of it is gone afterwards."""
    with contextlib.ExitStack() as stack:
        broker = Valkey(folder / "broker", unix=True)
        stack.callback(broker.close)
        server = stack.enter_context(postgresql(folder)) if on_postgresql else None
        url = server.create_database() if server else f"sqlite:///{folder / 'ledger.db'}"
        project = Project(folder / "project", broker=broker, database_url=url)
        stack.callback(project.close)
        # A worker that ends lets runs go on for a moment only, so that some are put back.
        project.environ |= {**QUICK, "LLMTASKS_SHUTDOWN_GRACE": "1", "LLMTASKS_IMPORTS": TASKS}
        project.python("from llmtasks.dispatch import station; station().database.migrate()")
        app = stack.enter_context(app_in_this_process(project.folder, project.environ, TASKS))
        yield Stage(project, app, server, say)
