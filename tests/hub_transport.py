"""How requests come in and answers go out at the test server (`hub_server.py`), and what goes wrong there."""

import contextlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

CHUNK = 1 << 14

Answer = tuple[int, bytes, dict[str, str]]  # status, body, headers


def json_answer(content: object, status: int = 200) -> Answer:
    return status, json.dumps(content).encode(), {"Content-Type": "application/json"}


@dataclass
class Request:
    """One request that came in, with what was answered."""

    method: str
    path: str  # unquoted, with the query
    headers: dict[str, str]  # names in lower case
    status: int | None = None  # None: the connection was closed without an answer
    sent: int = 0  # bytes of the answer's body

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class Fault:
    """What goes wrong with requests whose "METHOD /path" matches a pattern; the rest of them pass.

    Attributes:
        pattern: regular expression, searched for.
        times: how many requests are hit.
        skip: how many pass before.
        status: answered in place of the real answer.
        retry_after: seconds, a header of that answer.
        cut_after: bytes of the body after which the connection is closed; 0: without any answer.
        keep: bytes of the body that come as if they were all of it.
        delay: seconds before the answer.
        bytes_per_second: how fast the body comes.
    """

    pattern: str
    times: int = 1
    skip: int = 0
    status: int | None = None
    retry_after: int | None = None
    cut_after: int | None = None
    keep: int | None = None
    delay: float = 0.0
    bytes_per_second: int | None = None


class RefusedError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str = "", **content: object):
        super().__init__(message)
        self.status = status
        self.code = code
        self.content = {"error": message, **content}


class LoggingHandler(BaseHTTPRequestHandler, ABC):
    """Reads and logs the requests of one connection, and answers as far as a fault lets it through."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: ClassVar[Any]  # the HubServer

    def setup(self) -> None:
        super().setup()
        with self.hub.lock:
            self.hub.connections.add(self.connection)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client ended the connection
            super().handle()

    def finish(self) -> None:
        with self.hub.lock:
            self.hub.connections.discard(self.connection)
        with contextlib.suppress(OSError):  # the server was stopped
            super().finish()

    def log_message(self, *args: object) -> None:
        pass

    def handle_any(self) -> None:
        """Every method comes here."""
        self.body = self._read_body()
        address = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(address.query).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.request_log = Request(self.command, unquote(self.path), headers)
        with self.hub.lock:
            self.hub.requests.append(self.request_log)
            self.fault = self.hub.take_fault(self.request_log) or Fault("", times=0)
        time.sleep(self.fault.delay)
        try:
            if self.fault.status is not None:
                raise RefusedError(self.fault.status, "the server is told to fail")
            answer = self.answer(address.path)
        except RefusedError as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)}
            if self.fault.retry_after is not None:
                headers["Retry-After"] = str(self.fault.retry_after)
            status, body, own = json_answer(refusal.content, refusal.status)
            answer = status, body, own | headers
        self.reply(*answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815 - so the library calls them

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    @abstractmethod
    def answer(self, path: str) -> Answer:
        """The answer to the request with this path; RefusedError is one as well."""

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        """Sends an answer, as far as the request's fault lets it through."""
        if self.fault.cut_after == 0:
            self.close_connection = True
            return
        if self.fault.keep is not None:
            body = body[: self.fault.keep]
        self.request_log.status = status
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value.encode("ascii", "replace").decode().replace("\n", " "))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault.cut_after is not None and self.fault.cut_after < len(body):
            body = body[: self.fault.cut_after]
            self.close_connection = True
        try:
            for part in self._paced(body):
                self.wfile.write(part)
                self.request_log.sent += len(part)
        except OSError:  # the client is gone, or the server was stopped
            self.close_connection = True

    def _paced(self, body: bytes) -> Iterator[bytes]:
        speed = self.fault.bytes_per_second
        size = CHUNK if speed is None else max(1, speed // 10)
        for start in range(0, len(body), size):
            yield body[start : start + size]
            if speed is not None:
                time.sleep(size / speed)
