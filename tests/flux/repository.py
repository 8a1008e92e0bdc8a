"""A Git repository, served over HTTP on loopback by Git's own server program."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Object = dict[str, Any]
FILE = "vision/family.yaml"


class Repository:
    """A bare repository, `url`, and a checkout from which commits are pushed to it."""

    def __init__(self, folder: Path) -> None:
        self.checkout, self.served = folder / "checkout", folder / "served"
        (self.checkout / "vision").mkdir(parents=True)
        self.served.mkdir()
        self._git("init", "-q", "--bare", "-b", "main", str(self.served / "families.git"))
        self._git("init", "-q", "-b", "main")
        self._git("remote", "add", "origin", str(self.served / "families.git"))
        self._server = _serve(self.served)
        self.url = f"http://127.0.0.1:{self._server.server_port}/families.git"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, thing: Object | None, text: str = "an edit") -> str:
        """Push one object as the whole of the file, or remove the file; the commit."""
        file = self.checkout / FILE
        if thing is None:
            file.unlink()
        else:
            file.write_text(json.dumps(thing, indent=1))
        self._git("add", "-A")
        self._git("commit", "-qm", text)
        return self._pushed()

    def revert(self, commit: str) -> str:
        """Take back what an earlier commit did; the new commit."""
        self._git("revert", "--no-edit", commit)
        return self._pushed()

    def _pushed(self) -> str:
        self._git("push", "-q", "origin", "main")
        return self._git("rev-parse", "HEAD").strip()

    def _git(self, *words: str) -> str:
        who = ("-c", "user.name=x", "-c", "user.email=x@example.com")
        done = subprocess.run(
            ["git", *who, *words], cwd=self.checkout, check=True, capture_output=True, text=True
        )
        return done.stdout


def _serve(folder: Path) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            length = self.headers.get("Content-Length") or "0"
            asked = {
                "GIT_PROJECT_ROOT": str(folder),
                "GIT_HTTP_EXPORT_ALL": "1",
                "PATH_INFO": path,
                "QUERY_STRING": query,
                "REQUEST_METHOD": self.command,
                "CONTENT_TYPE": self.headers.get("Content-Type", ""),
                "CONTENT_LENGTH": length,
                "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
                "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            }
            body = self.rfile.read(int(length))
            self._answer(_backend(asked, body))

        do_POST = do_GET

        def _answer(self, said: bytes) -> None:
            """As CGI says it: headers, one of which may be the status, and the body."""
            head, _, data = said.partition(b"\r\n\r\n")
            headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
            self.send_response(int(headers.pop("Status", "200").split()[0]))
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def _backend(asked: dict[str, str], body: bytes) -> bytes:
    environment = {"PATH": os.environ["PATH"], **asked}
    command = ["git", "http-backend"]
    return subprocess.run(command, env=environment, input=body, capture_output=True).stdout
