"""``python -m examples.ragapp services`` and ``python -m examples.ragapp demo``."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys

from examples.ragapp import services, settings


def main() -> int:
    """Run what the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.ragapp", description="The example's own processes.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("services", help="run the stub language model and the mail server until Ctrl-C")
    demo = commands.add_parser("demo", help="use the running system as a user would, and print what happens")
    demo.add_argument("--once", action="store_true", help="end after one round, with 1 if something went wrong")
    arguments = parser.parse_args()

    logging.basicConfig(level=logging.WARNING)
    if arguments.command == "services":
        asyncio.run(services.serve(settings.read()))
        return 0
    return run_demo(once=arguments.once)


def run_demo(*, once: bool) -> int:
    """Run the demo; return 1 if something did not happen that should have."""
    # Here, because the services need none of the tasks.
    from examples.ragapp.demo import DemoError, run

    # A supervisor stops its processes by SIGTERM; both signals end the demo quietly.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        asyncio.run(run(once=once))
    except KeyboardInterrupt:
        return 0
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
