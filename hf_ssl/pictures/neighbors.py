"""Queries and the images their features are nearest to."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from hf_ssl.pictures.canvas import BAD, GOOD, INK, Tile, draw_grid, fit


def draw_neighbors(
    query_images: Sequence[Any],
    neighbor_images: Sequence[Sequence[Any]],
    similarities: Sequence[Sequence[float]],
    *,
    query_labels: Sequence[str] | None = None,
    neighbor_labels: Sequence[Sequence[str]] | None = None,
    title: str = "Nearest neighbours",
) -> Image.Image:
    """Draws one row per query: the query, then its neighbours with their similarity.

    Args:
        query_images: whatever `decode_image` takes.
        neighbor_images: neighbours of each query, nearest first.
        similarities: cosine of each neighbour.
        query_labels: names of the queries' classes.
        neighbor_labels: names of the neighbours' classes; with both, a frame says right (green) or wrong.
        title: above the sheet.

    Returns:
        The sheet.

    Raises:
        ValueError: the lists differ in length, or only one of the two kinds of labels is given.
    """
    if (query_labels is None) != (neighbor_labels is None):
        raise ValueError("give query_labels and neighbor_labels, or neither")
    rows = []
    for number, image in enumerate(query_images):
        own = query_labels[number] if query_labels is not None else ""
        others = (
            neighbor_labels[number] if neighbor_labels is not None else [""] * len(neighbor_images[number])
        )
        row = [Tile(fit(image), own, INK)]
        for neighbor, cosine, label in zip(
            neighbor_images[number], similarities[number], others, strict=True
        ):
            color = None if query_labels is None else GOOD if label == own else BAD
            row.append(Tile(fit(neighbor), f"{cosine:.2f} {label}", color))
        rows.append(row)
    num_columns = max((len(row) for row in rows), default=1)
    return draw_grid(rows, title=title, headings=["query", "nearest", *[""] * (num_columns - 2)])
