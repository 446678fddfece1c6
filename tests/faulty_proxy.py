"""A proxy before a real S3 server that breaks what a test tells it to: the one thing here that only pretends.

Requests go through as they came, Host header too, so signatures hold. A fault is chosen for each request by a function.
"""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["500", "503 SlowDown", "403 AccessDenied", "400 ExpiredToken", "no answer", "cut", "altered"]
"""`no answer` does the request and drops the connection; `cut` ends the answer in the middle of its body; `altered`
changes one byte of it; the others answer with an error and do nothing."""

ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>as the test asked for</Message></Error>"


@dataclass(frozen=True)
class Request:
    """What a fault is chosen by: the method, the path with its query, and how many requests came before."""

    method: str
    path: str
    number: int


@contextmanager
def faulty_proxy(server: str, choose: Callable[[Request], Fault | None]) -> Iterator[str]:
    """The endpoint of a proxy before the server, for the time of the block."""
    upstream = urlsplit(server)
    lock, count = threading.Lock(), 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            nonlocal count
            with lock:
                request = Request(self.command, self.path, count)
                count += 1
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            fault = choose(request)
            if fault is not None and fault[0].isdigit():
                status, _, code = fault.partition(" ")
                self.answer(int(status), {}, ERROR.format(code=code or "InternalError").encode())
                return
            connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port, timeout=30)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            try:
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                content = answer.read()
            except OSError:  # the server is away, so the proxy's client gets no answer either
                self.close_connection = True
                return
            kept = {name: value for name, value in answer.getheaders() if name.lower() != "transfer-encoding"}
            connection.close()
            if fault == "no answer":
                self.close_connection = True
                return
            if fault == "altered" and content:
                content = bytes([content[0] ^ 1]) + content[1:]
            self.answer(answer.status, kept, content, sent=len(content) // 2 if fault == "cut" else None)

        def answer(self, status: int, headers: dict[str, str], content: bytes, sent: int | None = None) -> None:
            self.send_response_only(status)
            length = str(len(content))
            for name, value in headers.items():
                if name.lower() == "content-length":
                    length = value if self.command == "HEAD" else length
                else:
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[:sent])
            if sent is not None:
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 the base class's name
            pass

    for method in ("GET", "PUT", "POST", "HEAD", "DELETE"):
        setattr(Handler, f"do_{method}", Handler.handle_any)
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    proxy.daemon_threads = True
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{proxy.server_address[1]}"
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()
