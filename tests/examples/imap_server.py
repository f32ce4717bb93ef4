"""A real IMAP server, as far as reading one folder goes: enough of RFC 3501 for imaplib."""

from __future__ import annotations

import re
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast


class ImapServer(socketserver.ThreadingTCPServer):
    """Holds the messages of ``INBOX``; message number n has uid n."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, messages: list[bytes]) -> None:
        super().__init__(("127.0.0.1", 0), ImapSession)
        self.messages = messages
        self.seen: set[int] = set()
        self.fetched: list[int] = []

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @contextmanager
    def running(self) -> Iterator[ImapServer]:
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            self.server_close()


class ImapSession(socketserver.StreamRequestHandler):
    """One client: user ``ann``, password ``p@ss``."""

    def handle(self) -> None:
        self.say("* OK ready")
        for line in self.rfile:
            tag, command, rest = [*line.decode().strip().split(" ", 2), ""][:3]
            if command.upper() == "LOGOUT":
                self.say("* BYE", f"{tag} OK done")
                return
            self.answer(tag, command.upper(), rest)

    def answer(self, tag: str, command: str, rest: str) -> None:
        server = cast("ImapServer", self.server)
        match command, rest.split(" "):
            case "CAPABILITY", _:
                self.say("* CAPABILITY IMAP4rev1", f"{tag} OK done")
            case "LOGIN", [user, password]:
                self.say(
                    f"{tag} OK done" if (user.strip('"'), password) == ("ann", '"p@ss"') else f"{tag} NO bad password"
                )
            case "SELECT", ['"INBOX"']:
                self.say(f"* {len(server.messages)} EXISTS", f"{tag} OK [READ-WRITE] done")
            case "UID", ["SEARCH", "UNSEEN"]:
                unseen = [uid for uid in range(1, len(server.messages) + 1) if uid not in server.seen]
                self.say(" ".join(["* SEARCH", *map(str, unseen)]), f"{tag} OK done")
            case "UID", ["FETCH", uid, "(BODY.PEEK[])"]:
                content = server.messages[int(uid) - 1]
                server.fetched.append(int(uid))
                self.say(f"* {uid} FETCH (UID {uid} BODY[] {{{len(content)}}}")
                self.wfile.write(content)
                self.say(")", f"{tag} OK done")
            case "UID", ["STORE", uid, *flags] if re.search(r"\\Seen", " ".join(flags)):
                server.seen.add(int(uid))
                self.say(f"{tag} OK done")
            case _:
                self.say(f"{tag} NO {command} is refused")

    def say(self, *lines: str) -> None:
        self.wfile.write("".join(f"{line}\r\n" for line in lines).encode())
