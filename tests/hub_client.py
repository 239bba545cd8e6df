"""Clients of the Hub that try as often as ever, but do not wait between tries."""

import time
from typing import Any

import huggingface_hub.file_download
import huggingface_hub.utils._http
import pytest

from hf_ssl.data import remote


class Clock:
    """The module `time`, in which no time is slept away."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        pass


def without_waits(patch: pytest.MonkeyPatch, tries: int = len(remote.RETRY_SECONDS) + 1) -> None:
    """Retries at once: ours, so many, and those of huggingface_hub."""
    patch.setattr(remote, "RETRY_SECONDS", (0,) * (tries - 1))
    for module in (huggingface_hub.utils._http, huggingface_hub.file_download):
        patch.setattr(module, "time", Clock())
