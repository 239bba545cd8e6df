"""Which labelled images a recipe's probe uses."""

from typing import Any

from hf_ssl.data.remote import UnreachableError
from hf_ssl.data.sources import DataError, ImageSource, open_images
from hf_ssl.evaluation.images import read_rows
from hf_ssl.training.recipes import DataArguments, RecipeError

HELD_OUT_EVERY = 5  # without a test split, every fifth labelled image is scored against the others


def probe_sources(data: DataArguments) -> tuple[Any, Any] | None:
    """Labelled bank and queries of a recipe's probe; None where the data have no labels.

    Raises:
        DataError: named data, splits or columns do not exist.
        RecipeError: not two splits, or not two configurations.
    """
    for key in ("probe_splits", "probe_config_names"):
        names = getattr(data, key)
        if names is not None and len(names) != 2:
            raise RecipeError(f"{key} must name two, for bank and queries, got {names}")
    dataset = data.probe_dataset or (data.dataset if isinstance(data.dataset, str) else data.dataset[0])
    splits = data.probe_splits or _train_and_test(dataset, data)
    if splits is None:
        return _held_out(dataset, data)
    configs = data.probe_config_names or (data.config_name, data.config_name)
    bank, query = (_open(dataset, data, split, config) for split, config in zip(splits, configs, strict=True))
    if bank.label_column is None or query.label_column is None:
        _require_labels_of_named_data(bank, data)
        return None
    return bank, query


def _open(dataset: str, data: DataArguments, split: str | None, config_name: str | None) -> ImageSource:
    return open_images(
        dataset,
        split=split,
        config_name=config_name,
        image_column=_image_column(data),
        label_column=data.probe_label_column,
    )


def _image_column(data: DataArguments) -> str | None:
    """The training images' column, where those are the probe's: other data have columns of their own."""
    return data.image_column if data.probe_dataset in (None, data.dataset) else None


def _require_labels_of_named_data(source: ImageSource, data: DataArguments) -> None:
    """Training images may have no labels; images that were named for the probe must have some."""
    if data.probe_dataset is not None:
        raise DataError(
            f"the probe needs labels: {source.name} has no label column; name it with --probe_label_column"
        )


def _train_and_test(dataset: str, data: DataArguments) -> list[str] | None:
    """Train and test split where both exist, else None."""
    for test in ("test", "validation"):
        try:
            for split in ("train", test):
                open_images(
                    dataset, split=split, config_name=data.config_name, image_column=_image_column(data)
                )
            return ["train", test]
        except UnreachableError:  # a split that cannot be read is not one that does not exist
            raise
        except DataError:
            continue
    return None


def _held_out(dataset: str, data: DataArguments) -> tuple[Any, Any] | None:
    """Bank and queries cut from one labelled split, spread over it, since folders are sorted by class."""
    source = _open(dataset, data, data.split if data.probe_dataset is None else None, data.config_name)
    if source.label_column is None:
        _require_labels_of_named_data(source, data)
        return None
    limit = data.probe_limit * HELD_OUT_EVERY // (HELD_OUT_EVERY - 1)
    rows = [row for _, row in read_rows(source, limit)]
    query = rows[::HELD_OUT_EVERY]
    bank = [row for index, row in enumerate(rows) if index % HELD_OUT_EVERY]
    return bank, query
