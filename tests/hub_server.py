"""The Hub's protocol on this machine, for tests: the real client libraries run against it unchanged.

Repositories live in memory (`hub_repositories.py`). Every request is logged, and a test can make the server
fail, be slow, cut a connection or be gone. Clients find it by the environment (`HubServer.environment`),
which `tests/conftest.py` sets before any of them is imported: no test ever speaks to the real Hub. The
fixture `hub` gives a test the server, empty; `clean_process.py` runs code in a process of its own that finds
it as well.
"""

import contextlib
import re
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any

from tests.hub_protocol import TOKEN, HubRequestHandler
from tests.hub_repositories import KINDS, Repository, stored
from tests.hub_transport import Fault, Request


@dataclass
class HubServer:
    """A Hub on a free port of this machine.

    Attributes:
        repositories: by (kind, "owner/name"), kind being models, datasets or spaces.
        uploads: contents sent by LFS, by their SHA-256.
        requests: all that came in, in order.
        faults: what goes wrong; the first that matches counts.
        page_size: entries of a tree listing sent at once.
    """

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    page_size: int = 1000
    lock: Any = field(default_factory=threading.RLock)
    connections: set[socket.socket] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        self.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def environment(self, home: str) -> dict[str, str]:
        """What clients need in their environment before they are imported.

        Args:
            home: folder for their caches.
        """
        return {
            "HF_ENDPOINT": self.address,
            "HF_TOKEN": TOKEN,
            "HF_HOME": home,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # the server has plain LFS only
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def start(self) -> None:
        """Serves, after `stop` at the same address again."""
        handler = type("Handler", (HubRequestHandler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._port = self._server.server_port
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def stop(self) -> None:
        """Is gone: open connections are closed, new ones refused."""
        if self._server is None:
            return
        self._server.shutdown()
        self._server.server_close()
        self._server = None
        with self.lock:
            for connection in list(self.connections):
                with contextlib.suppress(OSError):  # it is closed already
                    connection.shutdown(socket.SHUT_RDWR)

    def clear(self) -> None:
        """As new: no repository, no fault, no log, and serving."""
        with self.lock:
            for store in (self.repositories, self.uploads, self.requests, self.faults):
                store.clear()
            self.page_size = 1000
        if self._server is None:
            self.start()

    def commit(
        self,
        kind: str,
        name: str,
        files: Mapping[str, bytes | str | None],
        *,
        branch: str = "main",
        message: str = "change",
        private: bool = False,
    ) -> str:
        """Changes a repository without a client, and creates it if there is none.

        Args:
            kind: models, datasets or spaces.
            name: owner/name.
            files: new contents by path; None deletes.
            branch: where to; a new one starts from main.
            message: title of the commit.
            private: of a new repository.

        Returns:
            Id of the commit.
        """
        assert kind in KINDS
        with self.lock:
            repository = self.repositories.setdefault((kind, name), Repository(kind, name, private))
            changed = dict((repository.commit_at(branch) or repository.branches["main"]).files)
            for path, content in files.items():
                if content is None:
                    del changed[path]
                else:
                    changed[path] = stored(content.encode() if isinstance(content, str) else content)
            return repository.add_commit(branch, changed, message).oid

    def files(self, kind: str, name: str, revision: str = "main") -> dict[str, bytes]:
        """Contents by path, without `.gitattributes`."""
        commit = self.repositories[kind, name].commit_at(revision)
        assert commit is not None, f"{name} has no revision {revision}"
        return {path: file.content for path, file in commit.files.items() if path != ".gitattributes"}

    def fail(self, pattern: str, **what: Any) -> Fault:
        """Adds a fault (see `Fault`)."""
        fault = Fault(pattern, **what)
        with self.lock:
            self.faults.append(fault)
        return fault

    def asked(self, pattern: str) -> list[Request]:
        """Requests so far whose "METHOD /path" matches a regular expression."""
        with self.lock:
            return [request for request in self.requests if re.search(pattern, str(request))]

    def take_fault(self, request: Request) -> Fault | None:
        """The fault that hits a request, which is counted."""
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, str(request)):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None
