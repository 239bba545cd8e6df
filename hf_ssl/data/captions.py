"""Captions of images: what a row holds, and which of several a step takes."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from hf_ssl.data.readers import ImageSource

CAPTION_DRAW = 2  # part of the counter: another than those of the views and of a clip's place


def captions_of(value: Any) -> list[str]:
    """All captions of a row, one text or a list of them; missing and blank ones are left out."""
    texts = [value] if isinstance(value, str) else list(value or ())
    return [text for text in texts if isinstance(text, str) and text.strip()]


def choose_caption(value: Any, seed: tuple[int, int, int]) -> str:
    """The caption of a row that its sample's seed draws.

    Args:
        value: of the row's text column, with at least one caption.
        seed: the run's seed, epoch and sample id; nothing else counts, so that a resumed run draws the same.
    """
    captions = captions_of(value)
    if len(captions) == 1:
        return captions[0]
    run_seed, epoch, sample_id = seed
    key, counter = (
        np.array(words, dtype=np.uint64) for words in ((run_seed, epoch), (0, 0, sample_id, CAPTION_DRAW))
    )
    generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
    return captions[generator.integers(len(captions))]


def read_captions(sources: list[ImageSource], limit: int) -> Iterator[str]:
    """Captions in stored order, as many rows of each source; images are not read.

    Args:
        sources: with text columns.
        limit: at most so many rows of each.
    """
    for source in sources:
        for row in source.undecoded_rows(limit):
            yield from captions_of(row.get("text"))
