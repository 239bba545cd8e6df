"""Images with an annotation of their pixels, for evaluation: rows are read when they are used."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ssl.data.sources import DataError

if TYPE_CHECKING:
    from datasets import Dataset


def open_annotated(
    dataset: str,
    split: str,
    *,
    config_name: str | None = None,
    image_column: str = "image",
    annotation_column: str = "annotation",
) -> "Dataset":
    """Rows {"image", "annotation"}, both encoded, of a dataset of the Hub or of a local folder of parquet.

    Args:
        dataset: what `datasets.load_dataset` takes.
        split: of the dataset.
        config_name: of a dataset that has several.
        image_column: column of pictures.
        annotation_column: column of pictures of one channel, which hold the class of every pixel.

    Raises:
        DataError: dataset, split or column cannot be found, or a column holds no pictures.
    """
    import datasets

    try:
        rows = datasets.load_dataset(dataset, config_name, split=split)
    except Exception as error:  # of many types, by what is wrong
        raise DataError(f"cannot open split '{split}' of '{dataset}': {error}") from error
    columns = {"image": image_column, "annotation": annotation_column}
    for column in columns.values():
        if not isinstance(rows.features.get(column), datasets.Image):
            raise DataError(
                f"'{dataset}' has no column '{column}' of pictures; its columns are "
                f"{', '.join(rows.column_names)}"
            )
    rows = rows.select_columns(list(columns.values()))
    for column in columns.values():
        rows = rows.cast_column(column, datasets.Image(decode=False))

    def encoded(batch: dict[str, list[Any]]) -> dict[str, list[bytes | None]]:
        return {name: [_bytes_of(value) for value in batch[column]] for name, column in columns.items()}

    return rows.with_transform(encoded)


def _bytes_of(picture: dict[str, Any] | None) -> bytes | None:
    if picture is None:
        return None
    content: bytes | None = picture["bytes"]
    return Path(picture["path"]).read_bytes() if content is None else content
