"""``python -m benchmarks.peers``: the environments of other systems, each with its own pinned packages."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

#: Git ignores it; delete a folder below it to have it made again.
FOLDER = Path(__file__).parent / ".peers"
_CELERY = ("celery[redis]==5.7.0", "kombu==5.7.0", "redis==8.1.0")
#: All versions that are compared with. The environments have this process's Python.
PEERS: dict[str, tuple[str, ...]] = {
    "celery": _CELERY,
    "sqlalchemy-celery-beat": (
        *_CELERY, "sqlalchemy-celery-beat==0.9.1", "SQLAlchemy==2.1.9", "psycopg[binary]==3.3.9",
    ),
    "celery-redbeat": (*_CELERY, "celery-redbeat==2.4.2"),
    "celery-gevent": (*_CELERY, "gevent==26.9.0", "hiredis==3.5.0"),
    "taskiq": ("taskiq==0.13.0", "taskiq-redis==1.2.4", "redis==8.1.0", "hiredis==3.5.0", "uvloop==0.23.0"),
    "arq": ("arq==0.28.0", "redis==5.3.1", "hiredis==3.5.0"),
    # saq imports typing_extensions, which it does not name.
    "saq": ("saq[hiredis,redis]==0.26.4", "redis==7.4.1", "hiredis==3.5.0", "typing_extensions==4.16.0"),
    "streaq": ("streaq==7.2.0", "coredis==6.9.0"),
    "dramatiq": ("dramatiq[redis]==2.2.1", "redis==8.1.0", "hiredis==3.5.0"),
    "huey": ("huey==3.5.4", "redis==8.1.0", "hiredis==3.5.0"),
    "procrastinate": ("procrastinate==3.10.0", "psycopg[binary,pool]==3.3.9", "psycopg-pool==3.3.3"),
}  # fmt: skip
INSTALL_TIMEOUT = 300
#: What this process found or made, and what it could not: a second try would take as long to fail.
_made: dict[str, str | PeerUnavailableError] = {}
_making = threading.Lock()


class PeerUnavailableError(Exception):
    """The environment could not be made; the message says why."""


def python_of(peer: str) -> str:
    """The Python of a peer's environment, which is made where it is missing or has other versions.

    Raises:
        PeerUnavailableError: Its packages cannot be installed, most likely because no package registry answers.
    """
    with _making:
        if peer not in _made:
            _made[peer] = _make(peer)
        made = _made[peer]
    if isinstance(made, PeerUnavailableError):
        raise made
    return made


def _make(peer: str) -> str | PeerUnavailableError:
    folder = FOLDER / peer
    python, made_of = folder / "bin" / "python", folder / "made-of.txt"
    wanted = "\n".join((sys.version, *PEERS[peer]))
    if made_of.exists() and made_of.read_text("utf-8") == wanted:
        return str(python)
    shutil.rmtree(folder, ignore_errors=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1"]
    try:
        for command in ([sys.executable, "-m", "venv", str(folder)], [*install, *PEERS[peer]]):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_TIMEOUT)
    except (subprocess.SubprocessError, OSError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        return PeerUnavailableError(f"left out: the packages of {peer} cannot be installed: {' '.join(said)}")
    made_of.write_text(wanted, "utf-8")
    return str(python)


def main() -> None:
    """Make all environments."""
    for peer in PEERS:
        try:
            print(python_of(peer))
        except PeerUnavailableError as absent:
            print(absent, file=sys.stderr)


if __name__ == "__main__":
    main()
