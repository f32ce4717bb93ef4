"""A project folder as an application author has it, and the real Celery processes that run in it."""

import contextlib
import importlib
import os
import shutil
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import celery._state
import kombu.pools
from celery import Celery
from kombu.transport import memory

from tests.children import ChildProcess
from tests.servers import Valkey, free_port

REPOSITORY = Path(__file__).parents[1]
START_TIMEOUT = 90
#: LLMTASKS_POOL of workers for which nobody chooses one; ``pytest --pool`` sets it.
DEFAULT_POOL = "asyncio"


class CeleryProcess(ChildProcess):
    """A ``celery worker``, ``celery beat`` or ``celery flower``.

    Attributes:
        ready: What it logs when it is ready for work.
        url: Where it listens, if it does.
    """

    ready: str
    url: str = ""

    def wait_until_ready(self) -> None:
        """Return when the latest start is ready for work."""
        self.wait_for_log(self.ready, START_TIMEOUT)

    def restart(self) -> None:
        """Start it again with the same arguments; end it in order before that if it still runs."""
        self.terminate()
        self.start()
        self.wait_until_ready()


class Project:
    """A folder with a Celery configuration and task modules; the processes started here end with it.

    Attributes:
        folder: The working directory of its processes; its data is in ``.llmtasks/`` there.
        environ: Their environment. Change it before starting what should see the change.
        broker: The Valkey server that is its broker.
        database_url: The SQLAlchemy URL of its schedules and ledger.
    """

    def __init__(
        self,
        folder: Path,
        *,
        broker: Valkey,
        database_url: str,
        celeryconfig: str | None = None,
        python: str = sys.executable,
    ) -> None:
        """Lay out the folder.

        Args:
            folder: Made if it does not exist.
            broker: A server of its own, so that a test may kill it.
            database_url: SQLAlchemy URL.
            celeryconfig: Text of ``celeryconfig.py``; None copies the one at the top of the repository.
            python: Runs its processes; another environment's for comparisons.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.broker = broker
        self.database_url = database_url
        self._python = python
        self.environ = {
            **os.environ,
            "HOME": str(folder),
            "PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}",
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONFAULTHANDLER": "1",
            "LLMTASKS_HOME": str(folder / ".llmtasks"),
            "LLMTASKS_BROKER_URL": broker.url,
            "LLMTASKS_RESULT_URL": broker.url,
            "LLMTASKS_DATABASE_URL": database_url,
            "LLMTASKS_IMPORTS": "",
            "LLMTASKS_POOL": DEFAULT_POOL,
        }
        self._processes: list[CeleryProcess] = []
        self._exit = contextlib.ExitStack()
        self._app: Celery | None = None
        if celeryconfig is None:
            shutil.copy(REPOSITORY / "celeryconfig.py", folder)
        else:
            self.write("celeryconfig.py", celeryconfig)

    def write(self, name: str, text: str) -> Path:
        """Write a file of the project; ``text`` may be indented as a whole."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), "utf-8")
        return path

    def tasks(self, text: str, module: str = "tasks") -> None:
        """Write a module of task functions which every process of the project imports."""
        self.write(f"{module.replace('.', '/')}.py", text)
        imports = [name for name in self.environ["LLMTASKS_IMPORTS"].split(",") if name and name != module]
        self.environ["LLMTASKS_IMPORTS"] = ",".join([*imports, module])

    def celery(self, *arguments: str, ready: str, name: str, wait: bool = True) -> CeleryProcess:
        """Start ``celery`` with ``arguments`` and wait until it logs ``ready``, or leave that to the caller."""
        argv = [self._python, "-m", "celery", *arguments]
        log = self.folder / f"{name}.log"
        process = CeleryProcess(argv, name=name, log=log, cwd=self.folder, environ=self.environ)
        process.ready = ready
        self._processes.append(process)
        if wait:
            process.wait_until_ready()
        return process

    def worker(
        self, *arguments: str, concurrency: int = 2, pool: str | None = None, wait: bool = True
    ) -> CeleryProcess:
        """Start ``celery worker``, named ``worker-1@test`` and so on, and wait until it consumes."""
        name = self._next_name("worker")
        # Gossip and mingle let workers hear of each other, which costs a second at start.
        quick = ["--without-gossip", "--without-mingle"]
        options = ["-l", "INFO", "-n", f"{name}@test", "-c", str(concurrency), *quick]
        with self._with_environ({} if pool is None else {"LLMTASKS_POOL": pool}):
            return self.celery("worker", *options, *arguments, ready=f"{name}@test ready.", name=name, wait=wait)

    @contextlib.contextmanager
    def _with_environ(self, changes: dict[str, str]) -> Iterator[None]:
        before, self.environ = self.environ, {**self.environ, **changes}
        try:
            yield
        finally:
            self.environ = before

    def beat(self, *arguments: str, wait: bool = True) -> CeleryProcess:
        """Start ``celery beat``."""
        name = self._next_name("beat")
        return self.celery("beat", "-l", "INFO", *arguments, ready="beat: Starting...", name=name, wait=wait)

    def flower(self, *arguments: str, port: int | None = None) -> CeleryProcess:
        """Start ``celery flower`` on a loopback port; its ``url`` says where."""
        port = port or free_port()
        options = ["--address=127.0.0.1", f"--port={port}", *arguments]
        process = self.celery("flower", *options, ready="Visit me at", name=self._next_name("flower"))
        process.url = f"http://127.0.0.1:{port}"
        return process

    def _next_name(self, kind: str) -> str:
        return f"{kind}-{sum(process.name.startswith(kind) for process in self._processes) + 1}"

    def python(self, code: str, *, timeout: float = 60) -> str:
        """Run ``code`` in a Python process of the project, configured like its workers.

        Returns:
            What it printed.

        Raises:
            AssertionError: It ended with an error; shows what it wrote.
        """
        done = self.run([self._python, "-c", textwrap.dedent(code)], timeout=timeout)
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def run(self, argv: list[str], *, timeout: float = 60) -> "subprocess.CompletedProcess[str]":
        """Run a command in the project's folder and environment, to its end."""
        return subprocess.run(argv, cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=timeout)

    @property
    def app(self) -> Celery:
        """The project's Celery app in this process: current from the first use to the end of the test."""
        if self._app is None:
            self._app = self._exit.enter_context(app_in_this_process(self.folder, self.environ))
        return self._app

    def close(self) -> None:
        """End all processes and leave this process as it was."""
        for process in self._processes:
            process.close()
        self._exit.close()


@contextlib.contextmanager
def app_in_this_process(folder: Path, environ: Mapping[str, str], *modules: str) -> Iterator[Celery]:
    """Be a process of a project for a while: its directory, its environment, its default Celery app, its task modules.

    All of it is taken back at the end, and so is what the project's modules registered with Celery and llmtasks, so
    that the next test may register functions of the same names. What test modules registered when they were imported
    is hidden meanwhile, but for that of ``modules``.
    """
    state: Any = celery._state
    saved = state.default_app, state._tls.current_app, state._apps, Path.cwd(), list(sys.path), dict(os.environ)
    os.environ.update({name: value for name, value in environ.items() if name.startswith("LLMTASKS_")})
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.modules.pop("celeryconfig", None)
    importlib.invalidate_caches()
    state.default_app = state._tls.current_app = None
    state._apps = weakref.WeakSet()  # a shared task goes to all apps alive, and other tests' apps may know its name
    show = _hide_registrations(modules)
    app: Celery = state.get_current_app()
    try:
        app.loader.import_default_modules()
        yield app
    finally:
        disconnect(app)
        _close_databases()
        _empty_memory()
        state.default_app, state._tls.current_app, state._apps, directory, sys.path[:], environment = saved
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)
        _forget_modules(folder)
        show()


def _hide_registrations(shown: tuple[str, ...]) -> Callable[[], None]:
    """Hide what other modules, of tests or of an outer project, have registered; returns what shows it again."""
    finalizers: set[Any] = cast("Any", celery._state)._on_app_finalizers
    hidden = {callback for callback in finalizers if not _is_from(callback, shown)}
    finalizers -= hidden
    functions: dict[str, Any] = {}
    options: dict[str, Any] = {}
    modules: dict[str, Any] = {}
    # Not imported here: tests of what llmtasks imports at all begin without it.
    registered = sys.modules.get("llmtasks.registry")
    registry = registered.task_registry if registered else None
    for name in registry.names() if registry else ():
        module = registry.function(name).__module__
        if module in shown or module.startswith("llmtasks."):
            continue
        functions[name], options[name] = registry._functions.pop(name), registry._options.pop(name)
        if "." not in module and module in sys.modules:  # another project's may have the same name
            modules[module] = sys.modules.pop(module)

    def show() -> None:
        finalizers.update(hidden)
        sys.modules.update(modules)
        if registry is not None:
            registry._functions.update(functions)
            registry._options.update(options)

    return show


def _is_from(finalizer: Callable[..., Any], shown: tuple[str, ...]) -> bool:
    """Whether what a shared task does to each new app comes from Celery, llmtasks or one of these modules."""
    enclosed = [cell.cell_contents for cell in finalizer.__closure__ or ()]
    modules = {getattr(value, "__module__", None) or "celery" for value in enclosed if callable(value)}
    return all(module in shown or module.split(".")[0] in {"celery", "llmtasks"} for module in modules)


def disconnect(app: Any) -> None:
    """Close what the app opened: sockets left to the garbage collector would warn in some later test."""
    with contextlib.suppress(AttributeError):  # a backend without a server has none of these
        app.backend.result_consumer.stop()
        app.backend.client.connection_pool.disconnect()
    app.close()
    kombu.pools.reset()


def _empty_memory() -> None:
    """Forget the messages of kombu's memory transport, which all apps of a process share."""
    memory.Channel.queues.clear()
    memory.Transport.global_state.clear()


def _forget_modules(folder: Path) -> None:
    names = {name for name, module in sys.modules.items() if _is_below(getattr(module, "__file__", None), folder)}
    for name in names:
        del sys.modules[name]
    finalizers = cast("Any", celery._state)._on_app_finalizers
    for callback in list(finalizers):
        enclosed = [cell.cell_contents for cell in callback.__closure__ or ()]
        if any(getattr(value, "__module__", None) in names for value in enclosed):
            finalizers.discard(callback)
    # Not imported here: tests of what llmtasks imports at all begin without it.
    if registered := sys.modules.get("llmtasks.registry"):
        registry = registered.task_registry
        for name in registry.names():
            if registry.function(name).__module__ in names:
                del registry._functions[name], registry._options[name]


def _close_databases() -> None:
    if databases := sys.modules.get("llmtasks.store.database"):
        for database in databases._databases.values():
            database.close()


def _is_below(file: str | None, folder: Path) -> bool:
    return file is not None and Path(file).is_relative_to(folder)
