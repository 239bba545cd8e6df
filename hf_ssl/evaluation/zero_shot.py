"""Zero-shot classification: a class is the mean of texts that name it.

Protocol of CLIP's notebook: embeddings of a class's prompts are normalised, averaged, and normalised again.
Shape suffixes: N = images, C = classes, P = prompts of a class, E = embedding width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hf_ssl.data.sources import DataError
from hf_ssl.evaluation.image_text import ImageTextEncoder
from hf_ssl.evaluation.images import decode_picture, read_rows, source_name
from hf_ssl.evaluation.metrics import top_k_accuracy
from hf_ssl.modeling.shared.losses import normalize

_PHOTOS = (
    "bad", "low resolution", "cropped", "bright", "dark", "close-up", "black and white", "pixelated",
    "jpeg corrupted", "blurry", "good",
)  # fmt: skip
_STATES = ("hard to see", "clean", "dirty", "cool", "nice", "weird", "small", "large")
_KINDS = (
    "sculpture", "rendering", "rendition", "drawing", "painting", "sketch", "doodle", "tattoo", "photo",
)  # fmt: skip
_MATERIALS = ("embroidered", "plastic", "origami", "cartoon", "toy", "plushie")
_OTHERS = ("graffiti of {} {{}}.", "itap of {} {{}}.", "art of {} {{}}.", "{} {{}} in a video game.")
_ARTICLES = ("a", "the")
# Prompts by name: one, CLIP's seven best of ImageNet, and its eighty.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "simple": ("a photo of a {}.",),
    "best7": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
    "imagenet80": (
        *(f"a {kind} photo of {article} {{}}." for kind in _PHOTOS for article in _ARTICLES),
        *(f"a photo of {article} {state} {{}}." for state in _STATES for article in _ARTICLES),
        *(f"a {kind} of {article} {{}}." for kind in _KINDS for article in _ARTICLES),
        *(f"{article} {material} {{}}." for material in _MATERIALS for article in _ARTICLES),
        *(text.format(article) for text in _OTHERS for article in _ARTICLES),
        *(f"a photo of {count} {{}}." for count in ("many", "my", "one")),
        "itap of my {}.",
    ),
}


@dataclass(frozen=True)
class ZeroShotScores:
    """What came of it, and of what; class names and prompts are part of a result.

    Attributes:
        top1: share of images whose class is named first.
        top5: share of images whose class is among the first five.
        chance: of top1, for a guess.
        num_images: that were classified.
        class_names: as they were put into the prompts.
        templates: the prompts.
        dataset: where the images are from.
    """

    top1: float
    top5: float
    chance: float
    num_images: int
    class_names: list[str]
    templates: list[str]
    dataset: str

    def to_dict(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)

    def table(self) -> str:
        """For people."""
        return (
            f"{self.dataset}: {self.num_images} images, {len(self.class_names)} classes, "
            f"{len(self.templates)} prompts each\nzero-shot      top-1 {100 * self.top1:.1f} %  top-5 "
            f"{100 * self.top5:.1f} %  (by chance {100 * self.chance:.1f} %)"
        )


def class_weights(prompt_CPE: Tensor) -> Tensor:
    """One unit vector (C, E) a class from the embeddings of its prompts, any norm."""
    return normalize(normalize(prompt_CPE).mean(dim=1))


def check_templates(templates: Sequence[str]) -> None:
    """Raise ValueError unless every prompt has one place for the class."""
    wrong = [text for text in templates if text.count("{}") != 1]
    if wrong or not templates:
        raise ValueError(
            f"a prompt needs one {{}} for the class, such as 'a photo of a {{}}.'; got {wrong or 'none'}"
        )


def plain_class_names(names: Sequence[str]) -> list[str]:
    """Class names as a text has them: spaces for underscores."""
    return [name.replace("_", " ").strip() for name in names]


def evaluate_zero_shot(
    encoder: ImageTextEncoder,
    source: Any,
    templates: Sequence[str] = TEMPLATES["simple"],
    class_names: Sequence[str] | None = None,
    limit: int | None = None,
    batch_size: int = 128,
) -> ZeroShotScores:
    """Classify images by the names of their classes.

    Args:
        encoder: of images and texts.
        source: labelled images.
        templates: prompts with `{}` for the class.
        class_names: in the order of labels; None: those of the source.
        limit: at most so many images.
        batch_size: images, or prompts, at a time.

    Raises:
        DataError: no labels, or no names of the classes.
        ValueError: a prompt has no place for the class.
    """
    check_templates(templates)
    given = class_names or getattr(source, "label_names", None)
    if not given:
        raise DataError(
            f"{source_name(source)} has no names of classes; name a column of class labels, or give "
            "class_names"
        )
    names = plain_class_names(given)
    prompts = [template.format(name) for name in names for template in templates]
    prompt_CPE = encoder.embed_texts(prompts, batch_size).unflatten(0, (len(names), len(templates)))
    image_NE, labels_N = _embed_labelled(encoder, source, limit, batch_size)
    if int(labels_N.max()) >= len(names):
        raise DataError(f"label {int(labels_N.max())} has no name; {len(names)} names were given")
    scores_NC = normalize(image_NE) @ class_weights(prompt_CPE).T
    return ZeroShotScores(
        top1=top_k_accuracy(scores_NC, labels_N),
        top5=top_k_accuracy(scores_NC, labels_N, 5),
        chance=1 / len(names),
        num_images=len(labels_N),
        class_names=names,
        templates=list(templates),
        dataset=source_name(source),
    )


def _embed_labelled(
    encoder: ImageTextEncoder, source: Any, limit: int | None, batch_size: int
) -> tuple[Tensor, Tensor]:
    labels: list[int] = []

    def pictures() -> Iterator[Any]:
        for row_id, row in read_rows(source, limit):
            picture = decode_picture(row["image"], row_id)
            if picture is None:
                continue
            if row.get("label") is None:
                raise DataError(
                    f"row {row_id} of {source_name(source)} has no label; zero-shot scores need them"
                )
            labels.append(row["label"])
            yield picture

    image_NE = encoder.embed_in_turn(pictures(), batch_size)
    if not labels:
        raise DataError(f"{source_name(source)} has no image that can be read")
    return image_NE, torch.tensor(labels)
