"""The screen belongs to our own lines: other libraries speak only when something is wrong."""

import logging
import time

REPEATED_AFTER = 10.0  # seconds


class Seldom(logging.Filter):
    """Lets one message of a kind through in ten seconds; a kind is what a message begins with.

    The Hub's client warns at every try of every thread: hundreds of lines for one outage of half a minute.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind, now = record.getMessage()[:8], time.monotonic()
        if now - self._last.get(kind, -REPEATED_AFTER) < REPEATED_AFTER:
            return False
        self._last[kind] = now
        return True


_seldom = Seldom()  # one: a filter is added to a logger once


def quiet_libraries() -> None:
    """Switch off progress bars and reports of transformers and datasets, whenever they were imported."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub.utils._http").addFilter(_seldom)
