"""A command on a leash: it gets a signal when the process that started it ends, however that ends.

Run as a script, this file replaces itself by the command, so that the pid stays and nothing of it remains in memory. A
script, because the same in ``preexec_fn`` would run Python between fork and exec, where a lock that another thread held
at the fork is held for ever.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence

#: ``PR_SET_PDEATHSIG`` of <linux/prctl.h>: kept across exec, cleared by a further fork.
_SET_PARENT_DEATH_SIGNAL = 1
#: Seconds between two looks where the kernel does not tell (macOS).
_WATCH_EVERY = 0.25


def leashed(
    command: Sequence[str], signum: signal.Signals, *, watch: bool = not sys.platform.startswith("linux")
) -> list[str]:
    """``command`` as one that gets ``signum`` when this process ends.

    Start it from a thread that lives as long as it should: to Linux, the thread that starts it is its parent.

    Args:
        command: Program and arguments; the program is looked up in PATH.
        signum: What the command gets.
        watch: Have a second process watch this one, instead of the kernel.
    """
    script = [sys.executable, "-I", "-S", os.path.abspath(__file__)]  # noqa: PTH100 - the script must not import pathlib
    return [*script, str(os.getpid()), str(int(signum)), "watch" if watch else "kernel", *command]


def _tell_kernel(signum: int) -> None:
    """Have the kernel send ``signum`` to this process when its parent ends."""
    import ctypes  # only on Linux, and only in the script

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_SET_PARENT_DEATH_SIGNAL, signum, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def _fork_watcher(parent: int, signum: int) -> None:
    """Leave a child behind that sends ``signum`` to this process when ``parent`` is gone, and ends with either."""
    target = os.getpid()
    if os.fork() != 0:
        return
    # It must hold no pipe, socket or lock of the command open; its own session keeps the terminal's Ctrl-C away.
    os.setsid()
    os.closerange(0, 256)
    while os.getppid() == target:
        try:
            os.kill(parent, 0)
        except PermissionError:
            pass
        except ProcessLookupError:
            os.kill(target, signum)
            break
        time.sleep(_WATCH_EVERY)
    os._exit(0)


def _main(parent: str, signum: str, how: str, *command: str) -> None:
    if how == "watch":
        _fork_watcher(int(parent), int(signum))
    else:
        _tell_kernel(int(signum))
    if os.getppid() != int(parent):
        # The parent ended before the leash was on.
        os._exit(1)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"cannot start {command[0]}: {error.strerror}\n")
        os._exit(127)


if __name__ == "__main__":
    _main(*sys.argv[1:])
