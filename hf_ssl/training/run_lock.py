"""One run, one folder: a lock that the kernel releases when the run's process ends, however it ends."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from hf_ssl.training.checkpoints import CheckpointError

logger = logging.getLogger(__name__)

LOCK_FILE = "_lock"  # Trainer uploads nothing that begins with "_"

_held: dict[Path, int] = {}  # open lock file of every folder that this process holds


class RunInUse(CheckpointError):  # noqa: N818  (says what is so)
    """Another run writes into the folder."""


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; a process that holds it already may enter again.

    Where the system or the file system knows no locks, a warning says so and the run goes on.

    Args:
        folder: of the run; made if it is not there.

    Raises:
        RunInUse: another process holds it.
    """
    folder = folder.absolute()
    descriptor = None if folder in _held else _acquire(folder)
    if descriptor is None:
        yield
        return
    _held[folder] = descriptor
    try:
        yield
    finally:
        if _held.pop(folder, None) is not None:
            (folder / LOCK_FILE).unlink(missing_ok=True)  # while it is held: `_acquire` knows of it
            os.close(descriptor)


def _acquire(folder: Path) -> int | None:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        logger.warning("this system has no file locks: take care that no second run writes into %s", folder)
        return None
    path = folder / LOCK_FILE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode(errors="replace") or "it has just started"
            os.close(descriptor)
            raise RunInUse(
                f"another run ({holder}) is writing into '{folder}'; stop it or wait for its end, or choose "
                "another output_dir"
            ) from error
        except OSError as error:
            os.close(descriptor)
            logger.warning(
                "cannot lock %s (%s): take care that no second run writes into it", folder, error.strerror
            )
            return None
        if _is_file_at(path, descriptor):
            break
        os.close(descriptor)  # its holder ended and removed it in between
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor


def _is_file_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _let_go() -> None:
    """In a forked child: with the inherited file a loader's worker would hold the lock of a killed run."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
