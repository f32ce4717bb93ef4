"""What to tell people whose broker does not answer."""

from __future__ import annotations

import socket
from urllib.parse import unquote, urlsplit

from llmtasks.redis_options import EXPLICIT


def missing_socket_advice(url: str) -> str | None:
    """What to tell the user if broker ``url`` is a unix socket on which nobody listens; None where all is well.

    Says nothing about brokers on the network.
    """
    scheme, _, rest = url.removeprefix(f"{EXPLICIT}+").partition("://")
    if scheme not in {"redis+socket", "valkey+socket"}:
        return None
    path = unquote(urlsplit(f"//{rest}").path)
    start = "start it with `llmtasks broker`, or everything with `llmtasks dev`"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(2)
            probe.connect(path)
    except FileNotFoundError:
        return f"the broker does not run: there is no socket {path}; {start}"
    except ConnectionRefusedError:
        return f"the broker does not run: nobody listens on the socket {path}; {start}"
    except OSError as error:
        return f"the broker cannot be reached on the socket {path}: {error.strerror or error}"
    return None
