"""Data that are not here: datasets on the Hub, and files at any address that fsspec opens.

huggingface_hub repeats a failed download five times within half a minute, with a warning each time; requests
for revisions and small files it gives up at once, and `datasets` takes a card that it could not fetch for
one that does not exist. So whatever is read here is tried again for some minutes, and says so; a dataset is
pinned to a commit and its card is fetched first.
"""

import contextlib
import errno
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from hf_ssl.data.columns import DataError

logger = logging.getLogger(__name__)

RETRY_SECONDS = (1, 5, 20, 60)  # waits between tries, besides those of huggingface_hub
SLOW_SECONDS = 15  # what takes longer says so, every so often
NO_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
CARD_FILES = ("README.md", ".huggingface.yaml", "dataset_infos.json")  # what tells splits, files and features

Result = TypeVar("Result")


class UnreachableError(DataError):
    """Data that are, or were, somewhere else and could not be read from there."""


def is_remote(path: str) -> bool:
    """Whether a file is at an address, not in a file system of this machine."""
    return "://" in path


class Persistence:
    """Decides after each failure of a remote read whether to try again.

    Args:
        what: is done, for messages: "read hf://...".
    """

    def __init__(self, what: str):
        self._what = what
        self._start = time.monotonic()
        self.restart()

    def restart(self) -> None:
        """Something was read: later failures start anew."""
        self._waits = list(RETRY_SECONDS)

    def wait(self, error: Exception) -> None:
        """Waits until the next try.

        Raises:
            UnreachableError: the error lasts, or the file is gone.
            Exception: `error`, if it is no matter of connections and servers.
        """
        if not is_temporary(error):
            if is_missing(error):
                raise UnreachableError(f"cannot {self._what}: {reason(error)}") from error
            raise error
        if not self._waits:
            passed = f"{time.monotonic() - self._start:.0f} s and {len(RETRY_SECONDS) + 1} tries"
            raise UnreachableError(f"cannot {self._what}: {reason(error)}, still after {passed}") from error
        seconds = self._waits.pop(0)
        logger.warning("cannot %s: %s; trying again in %d s", self._what, reason(error), seconds)
        time.sleep(seconds)


def repeated(what: str, action: Callable[[], Result]) -> Result:
    """What `action` returns, called again after failures of the connection or the server.

    Args:
        what: it does, for messages: "read hf://...".
        action: may be called several times.

    Raises:
        UnreachableError: see `Persistence.wait`.
    """
    persistence = Persistence(what)
    while True:
        try:
            return action()
        except Exception as error:
            persistence.wait(error)


class DataFile:
    """A file, here or at an address, that any thread may read.

    fsspec keeps a file system for each thread that asks for one, and each fetches the listing of the
    repository again; this one belongs to the thread that calls the constructor.
    """

    def __init__(self, path: str):
        self.path = path
        self._open: Callable[[], Any] = partial(open, path, "rb")
        if is_remote(path):
            from fsspec.core import url_to_fs  # type: ignore[import-untyped]

            filesystem, location = url_to_fs(path)
            # By default 5 MiB are read ahead: all of a shard, where single row groups are wanted.
            self._open = partial(filesystem.open, location, "rb", cache_type="none")

    def read(self, action: Callable[[Any], Result]) -> Result:
        """What `action` makes of the open file; of one at an address it may be called several times.

        Raises:
            UnreachableError: a file at an address is gone, or cannot be read for minutes.
        """

        def attempt() -> Result:
            with self._open() as handle:
                return action(handle)

        return repeated(f"read {self.path}", attempt) if is_remote(self.path) else attempt()


def is_temporary(error: BaseException) -> bool:
    """Whether the same request may succeed later: failed connections, timeouts, overloaded servers."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # `datasets` takes it there too

    if isinstance(error, DataError):
        return False
    status = status_of(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    if isinstance(error, LocalEntryNotFoundError):  # neither on the Hub, nor in the cache: why?
        return not isinstance(error.__cause__, OfflineModeIsEnabled)
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, OfflineModeIsEnabled)):
        return False
    if getattr(error, "errno", None) in NO_DISK:
        return False
    is_client = type(error).__module__.split(".")[0] in ("aiohttp", "botocore", "requests")
    return is_client or isinstance(error, (OSError, EOFError, httpx.TransportError))


def is_missing(error: BaseException) -> bool:
    """Whether a file is not there, or must not be read."""
    return status_of(error) is not None or isinstance(error, (FileNotFoundError, PermissionError))


def reason(error: BaseException) -> str:
    """Why a remote read failed, in a few words: the answer of the server, or the first error of a chain."""
    while (status := status_of(error)) is None and error.__cause__ is not None:
        error = error.__cause__
    if status is not None:
        phrase = getattr(getattr(error, "response", None), "reason_phrase", "") or type(error).__name__
        return f"the server answers {status} {phrase}"
    text = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def end_broken_streams() -> None:
    """Makes a stream of `datasets` end with an error when its connection breaks and cannot be opened again.

    By default it asks the same file for more, which huggingface_hub then takes for read to its end: the shard
    would be cut short there, without a word if that is between two images.
    """
    from datasets import config

    config.STREAMING_READ_MAX_RETRIES = 1
    for wait in ("", "_SERVER_UNAVAILABLE", "_RATE_LIMIT"):  # it waits before the error as well
        setattr(config, f"STREAMING_READ{wait}_RETRY_INTERVAL", 0)


@contextlib.contextmanager
def said_while_slow(progress: Callable[[], str]) -> Iterator[None]:
    """Logs, as long as the body takes long, what it is doing.

    Args:
        progress: says it, and how far it is.
    """
    done = threading.Event()
    start = time.monotonic()

    def speak() -> None:
        while not done.wait(SLOW_SECONDS):
            logger.info("%s, %.0f s so far", progress(), time.monotonic() - start)

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def split_revision(name: str) -> tuple[str, str | None]:
    """Name of a dataset on the Hub, and the revision it was given with: owner/name@revision."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def short_name(name: str) -> str:
    """The name of a repository for messages: of a commit, the first digits are enough."""
    repository, revision = split_revision(name)
    is_commit = re.fullmatch("[0-9a-f]{40}", revision or "")
    return f"{repository}@{revision[:7]}" if revision and is_commit else name


def pin_commit(repository: str, revision: str | None) -> str | None:
    """The commit of a dataset on the Hub that a revision names now; its card is in the cache then.

    Args:
        repository: owner/name.
        revision: a branch, a tag or a commit; None is the main branch.

    Returns:
        Its 40 digits; without network (HF_HUB_OFFLINE) `revision`.

    Raises:
        DataError: there is no such dataset or revision, or it must not be read.
        UnreachableError: the Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if is_offline_mode():
        return revision
    api = HfApi()
    try:
        found = repeated(f"open {repository}", lambda: api.dataset_info(repository, revision=revision))
        present = {file.rfilename for file in found.siblings or []}
        for name in CARD_FILES:
            if name in present:
                fetch = partial(
                    api.hf_hub_download, repository, name, repo_type="dataset", revision=found.sha
                )
                repeated(f"read {name} of {repository}", fetch)
    except UnreachableError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            raise DataError(
                f"the Hub has no dataset {repository}, or it is private or gated; check the name, or log in "
                "with `hf auth login`"
            ) from error
        if isinstance(error.__cause__, RevisionNotFoundError):
            raise DataError(
                f"{repository} has no revision {revision}; give a branch, tag or commit"
            ) from error
        raise
    return str(found.sha)


def status_of(error: BaseException) -> int | None:
    """Status of the answer that an error stands for."""
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    return status if isinstance(status, int) else None
