"""A model hub on loopback that serves a repository, or does to each file what a test asks of it."""

import hashlib
import json
import re
import socketserver
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote

COMMIT = "5eaf" * 10
OTHER_COMMIT = "0dd0" * 10
Fault = Callable[["Handler", bytes], None]  # answers a request for these bytes


def entry(name: str, content: bytes) -> dict:
    """A file as the hub's API lists it: weights by SHA-256, texts by git's blob hash."""
    blob = hashlib.sha1(b"blob %d\x00" % len(content) + content).hexdigest()
    found = {"rfilename": name, "size": len(content), "blobId": blob}
    if name.endswith((".safetensors", ".gguf", ".bin")):
        found["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return found


class Hub(socketserver.ThreadingTCPServer):
    """`files` are the repository; `faults[name]` (or `faults["listing"]`) are used up one a request, then all is well.

    `asked` has (name, request headers) of every request, `sent` the bytes of bodies.
    """

    allow_reuse_address = daemon_threads = True

    def __init__(self, files: dict[str, bytes], commit: str = COMMIT) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.commit = files, commit
        self.faults: dict[str, list[Fault]] = {}
        self.listed: list[dict] | None = None
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.sent = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def requests_for(self, name: str) -> list[dict[str, str]]:
        return [headers for asked, headers in self.asked if asked == name]

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is expected here."""


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = unquote(self.path)
        listing = re.fullmatch(r"/api/models/(whales/minke)/revision/([\w./-]+)\?blobs=true", path)
        file = re.fullmatch(rf"/(?:whales/minke/resolve/{self.server.commit}|elsewhere)/(.+)", path)
        if listing is not None:
            name = "listing"
            listed = self.server.listed
            siblings = [entry(*item) for item in self.server.files.items()] if listed is None else listed
            content = json.dumps({"sha": self.server.commit, "siblings": siblings}).encode()
        elif file is not None and file[1] in self.server.files:
            name = file[1]
            content = self.server.files[name]
        else:
            self.send_error(404)
            return
        with self.server.lock:
            self.server.asked.append((name, {key.lower(): value for key, value in self.headers.items()}))
            faults = self.server.faults.get(name, [])
            fault = faults.pop(0) if faults else serve
        fault(self, content)

    def answer(self, status: int, body: bytes = b"", **headers: object) -> None:
        """Send a whole answer; `content_length` may lie."""
        self.send_response(status)
        for key, value in ({"content_length": len(body)} | headers).items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)
        with self.server.lock:
            self.server.sent += len(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def wanted(handler: Handler) -> int:
    """The first byte that the request asks for."""
    found = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    return int(found[1]) if found else 0


def serve(handler: Handler, content: bytes, keep: int | None = None) -> None:
    """As a server should; `keep` cuts the connection after so many bytes of the body."""
    start = wanted(handler)
    body = content[start:]
    extra = {"content_range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
    handler.answer(206 if start else 200, body[:keep], content_length=len(body), **extra)


def cut(keep: int) -> Fault:
    return lambda handler, content: serve(handler, content, keep)


def status(code: int, **headers: object) -> Fault:
    return lambda handler, content: handler.answer(code, b"no", **headers)


def instead(change: Callable[[bytes], bytes]) -> Fault:
    """Other bytes, as if they were the file's."""
    return lambda handler, content: serve(handler, change(content))


def whole(handler: Handler, content: bytes) -> None:
    """All of it, whatever range is asked for."""
    handler.answer(200, content)


def unframed(content_of: Callable[[bytes], bytes]) -> Fault:
    """A body without a length, ended by hanging up."""

    def fault(handler: Handler, content: bytes) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(content_of(content))

    return fault


def redirect(target: str) -> Fault:
    return lambda handler, content: handler.answer(302, location=target)
