"""Batches of processed images from any source, in order, without augmentation."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from hf_ssl.data.clips import decode_clip, frames_of
from hf_ssl.data.decoding import BrokenImageError, decode_image
from hf_ssl.data.view_recipe import FramesSpec

logger = logging.getLogger(__name__)

# An `ImageSource` of hf_ssl.data, or simply a list of {"image": bytes or picture, "label": int} rows.
Source = Any


class ImageBatch(NamedTuple):
    """Images (B, C, H, W) or clips (B, T, C, H, W), float; (B,) labels or None; row numbers in the source."""

    pixel_values: Tensor
    labels: Tensor | None
    row_ids: list[int]


def read_batches(
    source: Source,
    processor: Any,
    batch_size: int = 256,
    limit: int | None = None,
    start: int = 0,
    spread: bool = True,
) -> Iterator[ImageBatch]:
    """Processed images of a source in its order; `list(...)` of it keeps them for several uses.

    Broken images are left out and named in the log.

    Args:
        source: an `ImageSource`, or a sequence of rows.
        processor: an image processor of transformers; clips are cut from the middle of a video if its views
            have `frames`.
        batch_size: images a batch; the last one may be smaller.
        limit: at most so many rows.
        start: first row.
        spread: how a limit chooses, see `read_rows`.

    Raises:
        ValueError: some rows have a label and some have none.
    """
    rows, frames = read_rows(source, limit, start, spread), frames_of(processor)
    while chunk := list(islice(rows, batch_size)):
        pictures, labels, row_ids = [], [], []
        for row_id, row in chunk:
            picture = decode_picture(row["image"], row_id, frames)
            if picture is not None:
                pictures.append(picture)
                labels.append(row.get("label"))
                row_ids.append(row_id)
        if pictures:
            yield ImageBatch(_processed(pictures, processor), label_tensor(labels, row_ids), row_ids)


def source_name(source: Source) -> str:
    """Name of a source for reports; a plain list has none of its own."""
    return str(getattr(source, "name", None) or f"list of {len(source)} rows")


def count_classes(source: Source, labels: Tensor) -> int:
    """Number of classes: of the source's names where it has them, else one more than the highest label."""
    names = getattr(source, "label_names", None)
    return max(len(names) if names else 0, int(labels.max()) + 1)


def read_rows(
    source: Source, limit: int | None = None, start: int = 0, spread: bool = True
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Row numbers and undecoded rows {"image", "label"} of a source or of a list of rows, in order.

    Args:
        source: an `ImageSource`, or a sequence of rows.
        limit: at most so many rows.
        start: first row.
        spread: with a limit, take rows at even distances instead of the first ones, which in a folder sorted
            by class would be of one class. Streams that cannot be read at any row give the first ones.
    """
    if isinstance(source, Sequence):
        num_rows: int | None = len(source)
    elif hasattr(source, "rows"):
        num_rows = getattr(source, "num_rows", None)
    else:
        raise TypeError(
            f"{type(source).__name__} is no image source; use open_images of hf_ssl.data or a list of rows"
        )
    if not spread or limit is None or num_rows is None or num_rows - start <= limit:
        return enumerate(_rows_from(source, limit, start), start=start)
    indices = (start + number * (num_rows - start) // limit for number in range(limit))
    return ((index, row) for index in indices for row in _rows_from(source, 1, index))


def _rows_from(source: Source, limit: int | None, start: int) -> Iterator[Mapping[str, Any]]:
    if isinstance(source, Sequence):
        return islice(source, start, None if limit is None else start + limit)
    return iter(source.rows(limit=limit, start=start))


def _processed(pictures: list[Any], processor: Any) -> Tensor:
    if not isinstance(pictures[0], list):
        return processor(images=pictures, return_tensors="pt")["pixel_values"]
    frames = [frame for clip in pictures for frame in clip]
    pixel_values: Tensor = processor(images=frames, return_tensors="pt")["pixel_values"]
    return pixel_values.unflatten(0, (len(pictures), -1))


def decode_picture(image: Any, row_id: int, frames: FramesSpec | None = None) -> Any:
    """RGB picture, or the list of a clip's, or None (with a line in the log) if it cannot be read."""
    try:
        if frames is not None:
            return [Image.fromarray(frame) for frame in decode_clip(image, frames)]
        return Image.fromarray(decode_image(image))
    except BrokenImageError as error:
        logger.warning("row %d left out: %s", row_id, error)
        return None


def label_tensor(labels: list[Any], row_ids: list[int]) -> Tensor | None:
    """Labels as a tensor, or None if no row has one."""
    missing = [row_id for row_id, label in zip(row_ids, labels, strict=True) if label is None]
    if len(missing) == len(labels):
        return None
    if missing:
        raise ValueError(f"row {missing[0]} has no label but others have; label all rows or none")
    return torch.tensor(labels, dtype=torch.long)
