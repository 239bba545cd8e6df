"""Captions of images: what a row holds, and which of several a step takes."""

from collections.abc import Iterator
from typing import Any

from hf_ssl.data.readers import ImageSource
from hf_ssl.data.view_draws import CAPTION_DRAW, generator_of_sample


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
    return captions[generator_of_sample(seed, CAPTION_DRAW).integers(len(captions))]


def read_captions(sources: list[ImageSource], limit: int) -> Iterator[str]:
    """Captions in stored order, as many rows of each source; images are not read.

    Args:
        sources: with text columns.
        limit: at most so many rows of each.
    """
    for source in sources:
        for row in source.undecoded_rows(limit):
            yield from captions_of(row.get("text"))
