"""Models from the Hub: a failure of the connection or the server is tried again, and said as what it is.

transformers wraps such failures in advice about local folders, and takes weights whose address does not
answer for weights that do not exist. The client itself sees to it that no half file appears in its cache.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from hf_ssl.data.remote import (
    NO_DISK,
    Persistence,
    is_temporary,
    said_while_slow,
    short_name,
    split_revision,
    status_of,
)

Model = TypeVar("Model")


def pulled(name: str, load: Callable[[], Model]) -> Model:
    """What `load` loads.

    Args:
        name: of what it loads: a folder, or owner/name or owner/name@revision on the Hub.
        load: may be called several times.

    Raises:
        UnreachableError: the Hub did not give it for minutes.
        ValueError: its weights are damaged.
        OSError: the disk is full.
    """
    is_on_hub = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
    persistence = Persistence(f"load {short_name(name)}")
    while True:
        try:
            with said_while_slow(lambda: f"loading {short_name(name)}"):
                return load()
        except Exception as error:
            _refuse_what_stays(name, error)
            failure = _failure_behind(name, error) if is_on_hub else None
            if failure is None:
                raise
            persistence.wait(failure)


def _refuse_what_stays(name: str, error: Exception) -> None:
    for link in _chain(error):
        if isinstance(link, SafetensorError):
            raise ValueError(
                f"the weights of '{short_name(name)}' are damaged or cut short: {link}"
            ) from error
        if getattr(link, "errno", None) in NO_DISK:
            from huggingface_hub.constants import HF_HUB_CACHE

            raise OSError(
                f"cannot load '{name}': no space left in {HF_HUB_CACHE}; free some, or set HF_HOME to a "
                "folder on another disk"
            ) from error


def _failure_behind(name: str, error: Exception) -> Exception | None:
    """The passing failure for which transformers raised an error; None if it had another reason."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]
    from transformers.utils import SAFE_WEIGHTS_NAME

    for link in _chain(error):
        is_answer = status_of(link) is not None
        if is_answer or isinstance(link, (httpx.TransportError, ConnectionError, LocalEntryNotFoundError)):
            return link if is_temporary(link) else None
    if not isinstance(error, OSError) and not isinstance(error.__cause__, OSError):
        return None
    # transformers says that there is no such file: is that so?
    repository, revision = split_revision(name)
    try:
        exists = HfApi().file_exists(repository, SAFE_WEIGHTS_NAME, revision=revision)
    except Exception as failure:
        return failure if is_temporary(failure) else None
    told = error if isinstance(error, OSError) else error.__cause__
    return told if exists and isinstance(told, OSError) else None


def _chain(error: BaseException | None) -> Iterator[Exception]:
    """An error and those it was raised from, the first of them last."""
    while isinstance(error, Exception):
        yield error
        error = error.__cause__ or error.__context__
