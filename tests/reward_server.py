"""A real HTTP server for the tests of rewards over HTTP, on a free port of this machine."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Request:
    """A request as it arrived; ``index`` counts from 0 over the life of the server."""

    index: int
    path: str
    headers: dict[str, str]
    body: Any


@dataclass(frozen=True)
class Reply:
    """An answer: what is not bytes is sent as JSON. ``drop`` closes the connection instead."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False
    # Sends the body in pieces of one byte, with this pause in seconds before each.
    pause: float | None = None

    @property
    def content(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


class RewardServer(ThreadingHTTPServer):
    """Answers POST requests as ``behave`` says, and keeps count."""

    daemon_threads = True

    def __init__(self, behave: Callable[[Request], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave = behave
        self.requests: list[Request] = []
        self.connections = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/rewards"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet for an answer
    server: RewardServer

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.connections += 1

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            request = Request(len(server.requests), self.path, dict(self.headers), body)
            server.requests.append(request)
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            reply = server.behave(request)
        finally:
            with server.lock:
                server.in_flight -= 1
        if reply.drop or server.closing.is_set():
            self.close_connection = True
            return
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.content)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if reply.pause is None:
            self.wfile.write(reply.content)
            return
        for byte in reply.content:
            self.wfile.flush()
            if server.closing.wait(reply.pause):
                break
            self.wfile.write(bytes([byte]))

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serve(behave: Callable[[Request], Reply]) -> Iterator[RewardServer]:
    """Runs a server; what still waits for ``server.closing`` is released at the end."""
    server = RewardServer(behave)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
