"""Which columns of a dataset are read: found by their feature types, or named."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import PIL.Image

if TYPE_CHECKING:
    import datasets

NAME_LENGTH = 300
USUAL_TEXT_COLUMNS = ("text", "caption", "captions", "texts", "sentences")
Row = dict[str, Any]  # "image", and "label" and "text" (one or a list of several) if the source has them


class DataError(ValueError):
    """What is wrong with the data; one line that names the value, the rule and the way out."""


def printable(text: str) -> str:
    """Text from data, for a message: control characters escaped, the middle of a long one left out."""
    if len(text) > NAME_LENGTH:
        text = f"{text[: NAME_LENGTH // 2]}...{text[-NAME_LENGTH // 2 :]}"
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class Columns(NamedTuple):
    """The columns that are read; None where the source has none."""

    image: str
    label: str | None = None
    text: str | None = None
    label_names: list[str] | None = None

    def names(self) -> list[str]:
        """The columns there are, image first."""
        return [name for name in (self.image, self.label, self.text) if name is not None]

    def row(self, values: Mapping[str, Any]) -> Row:
        """A row of ours from the values of its columns."""
        row: Row = {"image": _undecoded(values[self.image])}
        if self.label is not None:
            row["label"] = values[self.label]
        if self.text is not None:
            row["text"] = values[self.text]
        return row


def find_columns(features: "datasets.Features", wanted: Columns, name: str) -> Columns:
    """Completes the columns that were named by those that the feature types give away.

    Args:
        features: of the dataset.
        wanted: the columns that were named; an empty name for a column of images or texts to be found.
        name: of the dataset, for messages.

    Raises:
        DataError: a column that does not exist or holds something else; no image column, or several.
    """
    named = [column for column in (wanted.image, wanted.label, wanted.text) if column]
    check_columns(named, list(features), name)
    label = _find_label(features, wanted.label, name)
    names = list(features[label].names) if label and _kind(features[label]) == "ClassLabel" else None
    text = None if wanted.text is None else _find_text(features, wanted.text, name)
    return Columns(_find_image(features, wanted.image, name), label, text, names)


def features_of(row: Mapping[str, Any]) -> "datasets.Features":
    """Feature types of a stream that declares none, by the values of its first row."""
    from datasets import Features, Image, Value

    types = {int: Value("int64"), str: Value("string"), bytes: Value("binary")}
    features = {}
    for column, value in row.items():
        is_picture = isinstance(value, PIL.Image.Image) or getattr(value, "ndim", 0) == 3
        features[column] = Image() if is_picture else types.get(type(value), Value("null"))
    return Features(features)


def check_columns(columns: list[str], existing: list[str], name: str) -> None:
    """Raises DataError if one of the columns does not exist."""
    for column in columns:
        if column not in existing:
            raise DataError(f'{name} has no column "{column}"; it has: {printable(", ".join(existing))}')


def _find_image(features: "datasets.Features", named: str, name: str) -> str:
    kinds = {column: _kind(feature) for column, feature in features.items()}
    listing = printable(", ".join(f"{column} ({kind})" for column, kind in kinds.items()))
    if named:
        if kinds[named] not in (
            "Image",
            "Video",
            "file",
            "binary",
            "large_binary",
            "string",
            "large_string",
        ):
            raise DataError(f'column "{named}" of {name} holds no images; it has: {listing}')
        return named
    # Bytes may be images; strings may be their paths, but are so only if somebody says it.
    for accepted in (["Image"], ["Video"], ["file", "binary", "large_binary"]):
        found = [column for column, kind in kinds.items() if kind in accepted]
        if len(found) > 1:
            several = printable(", ".join(found))
            raise DataError(f"{name} has several image columns, {several}; name one as image_column")
        if found:
            return str(found[0])
    raise DataError(f"{name} has no image column; it has: {listing}")


def _find_label(features: "datasets.Features", named: str | None, name: str) -> str | None:
    classes = [column for column, feature in features.items() if _kind(feature) == "ClassLabel"]
    if named is None:
        usual = [column for column in ("label", "labels") if column in classes]
        return usual[0] if usual else classes[0] if len(classes) == 1 else None
    kind = _kind(features[named])
    if kind != "ClassLabel" and not kind.startswith(("int", "uint")):
        found = ", ".join(classes) or "none"
        raise DataError(
            f'column "{named}" of {name} holds no classes but {kind}; columns of classes: {found}'
        )
    return named


def _find_text(features: "datasets.Features", named: str, name: str) -> str:
    listing = printable(", ".join(f"{column} ({_kind(feature)})" for column, feature in features.items()))
    texts = [column for column, feature in features.items() if _holds_text(feature)]
    if named and named not in texts:
        raise DataError(f'column "{named}" of {name} holds no texts; it has: {listing}')
    usual = [column for column in USUAL_TEXT_COLUMNS if column in texts]
    found = [named] if named else usual[:1] or texts
    if len(found) != 1:
        what = f"several columns of texts, {printable(', '.join(found))}" if found else "no column of texts"
        raise DataError(f"{name} has {what}; name one as text_column; it has: {listing}")
    return found[0]


def _holds_text(feature: Any) -> bool:
    """Whether values are strings or lists of strings."""
    inner = getattr(feature, "feature", feature)
    return _kind(inner) in ("string", "large_string")


def _kind(feature: Any) -> str:
    """Name of a feature type; for plain values that of their type; "file" for a struct with its bytes."""
    if isinstance(feature, dict):
        return "file" if "bytes" in feature else "struct"
    kind = type(feature).__name__
    return str(feature.dtype) if kind == "Value" else kind


def _undecoded(value: Any) -> Any:
    """Bytes or path of the struct that `datasets` stores for an image, or what is stored in its place."""
    if isinstance(value, dict):
        return value["bytes"] if value.get("bytes") is not None else value.get("path")
    return value
