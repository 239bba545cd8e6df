"""What single patches know: segmentation by a linear layer and by nearest patches, both on frozen features.

Protocol: training patches are a seeded sample over all training images, each with the class of most of its
pixels; the linear layer is the one of the linear probe, its L2 strength chosen on held-out patches. Scores of
the test patches are brought to the size of the annotation (bilinear, as DINOv2's linear segmentation, arXiv
2304.07193, section 7.4) and compared pixel by pixel.
Shape suffixes in this file: B = images in a batch, D = width, h, w = grid of patches, H, W = image,
N = training patches, C = classes.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ssl.data.decoding import decode_image
from hf_ssl.evaluation.baselines import random_encoder
from hf_ssl.evaluation.features import (
    as_map,
    evaluating,
    find_patch_size,
    forward_inputs,
    place_inputs,
    token_layout,
)
from hf_ssl.evaluation.images import decode_picture
from hf_ssl.evaluation.knn import knn_scores
from hf_ssl.evaluation.linear_probe import fit_linear_probe
from hf_ssl.evaluation.protocol import ENCODER, PIXELS, RANDOM

CNN_STRIDE = 32  # images for CNNs are multiples of it
NEVER = -1e4  # logit of a class without training patches; finite, as it is interpolated

Rows = Sequence[Mapping[str, Any]]
Batch = tuple[Tensor, list[Tensor]]  # pixel values (B, C, H, W) and annotations (H, W)
PatchMap = Callable[[Tensor], Tensor]  # pixel values (B, C, H, W) to features (B, D, h, w)


@dataclass(frozen=True)
class DenseScore:
    """Mean intersection over union of one kind of patch features, between 0 and 1."""

    features: str
    linear_miou: float
    knn_miou: float


class ConfusionMatrix:
    """Counts pixels by true and predicted class."""

    def __init__(self, num_classes: int, ignore_index: int | None = None) -> None:
        self.counts_CC = torch.zeros(num_classes, num_classes, dtype=torch.long)
        self.ignore_index = ignore_index

    def add(self, prediction: Tensor, target: Tensor) -> None:
        """Both of any equal shape, classes 0 to C - 1; pixels of the ignored class do not count."""
        known = torch.ones_like(target, dtype=torch.bool)
        if self.ignore_index is not None:
            known = target != self.ignore_index
        num_classes = len(self.counts_CC)
        cells = target[known].long() * num_classes + prediction[known].long()
        self.counts_CC += torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)

    def iou(self) -> Tensor:
        """Intersection over union of each class (C,); nan for a class neither true nor predicted anywhere."""
        both_C = self.counts_CC.diagonal().double()
        return both_C / (self.counts_CC.sum(0) + self.counts_CC.sum(1) - both_C)

    def mean_iou(self) -> float:
        """Mean over the classes that occur."""
        return float(self.iou().nanmean())


def patch_map(encoder: nn.Module, pixel_values: Tensor) -> Tensor:
    """Patch features (B, D, h, w) of a frozen encoder of images, float32 on the CPU."""
    inputs = place_inputs(pixel_values, encoder)
    with torch.inference_mode(), evaluating(encoder):
        outputs = forward_inputs(encoder, inputs)
    hidden = as_map(outputs.last_hidden_state, *token_layout(encoder, outputs, inputs))
    return hidden.float().cpu()


def patch_tokens(encoder: nn.Module, pixel_values: Tensor) -> Tensor:
    """Patch features (B, N, D) of a frozen encoder of images or clips, float32 on the CPU."""
    if pixel_values.ndim == 4:
        return patch_map(encoder, pixel_values).flatten(2).transpose(1, 2)
    with torch.inference_mode(), evaluating(encoder):
        outputs = forward_inputs(encoder, place_inputs(pixel_values, encoder))
    tokens: Tensor = outputs.last_hidden_state.float().cpu()
    return tokens


def evaluate_segmentation(
    encoder: nn.Module,
    processor: Any,
    train: Rows,
    test: Rows,
    num_classes: int,
    *,
    ignore_index: int | None = None,
    floors: bool = True,
    size: tuple[int, int] | None = None,
    num_patches: int = 20_000,
    num_neighbors: int = 20,
    batch_size: int = 8,
    seed: int = 0,
) -> list[DenseScore]:
    """Scores patch features of an encoder, of the same encoder with random weights, and of pixels.

    Args:
        encoder: the frozen network; takes any size that is a multiple of its patch.
        processor: its image processor; only its normalisation is used.
        train: rows {"image", "annotation"}, each encoded or a picture, such as a `datasets.Dataset`;
            annotations have one class number a pixel.
        test: rows that are scored, likewise.
        num_classes: C; without the ignored class, if that is the last one.
        ignore_index: class of pixels that do not count.
        floors: whether random weights and pixels are scored too.
        size: height and width that images are resized to, rounded down to whole patches; by default those
            of the first image.
        num_patches: training patches, drawn from all.
        num_neighbors: of the patch kNN.
        batch_size: images a forward.
        seed: of the drawn patches.

    Returns:
        The floors, then the encoder.

    Raises:
        ValueError: no rows, a row without annotation, an annotation with classes that do not exist, or
            images smaller than a patch.
    """
    if not len(train) or not len(test):
        raise ValueError(f"got {len(train)} training and {len(test)} test rows; need at least one of each")
    patch = find_patch_size(encoder) or (CNN_STRIDE, CNN_STRIDE)
    size = _whole_patches(size or decode_image(train[0]["image"]).shape[:2], patch)
    classes = _Classes(num_classes, ignore_index)

    def read(rows: Rows) -> Iterator[Batch]:
        for inputs, annotations in _batches(rows, processor, size, batch_size):
            yield inputs, [classes.check(annotation) for annotation in annotations]

    maps: dict[str, PatchMap] = {}
    if floors:
        fresh = random_encoder(encoder, (inputs for inputs, _ in read(train)))
        maps = {PIXELS: partial(_pixel_map, patch=patch), RANDOM: partial(patch_map, fresh)}
    maps[ENCODER] = partial(patch_map, encoder)
    scores = []
    for name, features_of in maps.items():
        bank = _draw_patches(features_of, read(train), classes, num_patches, seed)
        linear, knn = _compare(features_of, read(test), bank, classes, num_neighbors)
        scores.append(DenseScore(name, linear.mean_iou(), knn.mean_iou()))
    return scores


@dataclass(frozen=True)
class _Classes:
    """Of the annotations."""

    number: int
    ignored: int | None

    def check(self, annotation_HW: Tensor) -> Tensor:
        """The same annotation, if its classes exist."""
        if annotation_HW.ndim != 2:
            raise ValueError(
                f"an annotation has the shape {tuple(annotation_HW.shape)}; give pictures of one channel "
                "that holds the class"
            )
        found = set(annotation_HW.unique().tolist()) - {self.ignored}
        unknown = [label for label in found if not 0 <= label < self.number]
        if unknown:
            raise ValueError(
                f"annotations have the class {max(unknown)}, but num_classes is {self.number} and "
                f"ignore_index {self.ignored}; raise num_classes, or name the class to ignore"
            )
        return annotation_HW

    def majority(self, annotation_HW: Tensor, grid: tuple[int, int]) -> Tensor:
        """Most frequent class in each cell of the grid (h, w); -1 where it is the ignored one."""
        class_HW = annotation_HW.long()
        if self.ignored is not None:
            class_HW = class_HW.masked_fill(class_HW == self.ignored, self.number)
        one_hot_CHW = F.one_hot(class_HW, self.number + 1).permute(2, 0, 1).float()
        label_hw = F.adaptive_avg_pool2d(one_hot_CHW, grid).argmax(0)
        return label_hw.masked_fill(label_hw == self.number, -1)


def _draw_patches(
    features_of: PatchMap, batches: Iterator[Batch], classes: _Classes, count: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Features (N, D) and classes (N,) of patches whose most frequent class counts."""
    features, labels = [], []
    for inputs, annotations in batches:
        for map_Dhw, annotation_HW in zip(features_of(inputs), annotations, strict=True):
            label_hw = classes.majority(annotation_HW, (map_Dhw.shape[1], map_Dhw.shape[2]))
            known = label_hw >= 0
            features.append(map_Dhw.permute(1, 2, 0)[known])
            labels.append(label_hw[known])
    features_ND, labels_N = torch.cat(features), torch.cat(labels)
    chosen = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(seed))[:count]
    return features_ND[chosen], labels_N[chosen]


def _compare(
    features_of: PatchMap,
    batches: Iterator[Batch],
    bank: tuple[Tensor, Tensor],
    classes: _Classes,
    num_neighbors: int,
) -> tuple[ConfusionMatrix, ConfusionMatrix]:
    """What the linear layer and the nearest patches say of test images."""
    probe = fit_linear_probe(*bank)
    unseen = classes.number - len(probe.weight)  # classes after the last one that was trained
    linear, knn = (ConfusionMatrix(classes.number, classes.ignored) for _ in range(2))
    for inputs, annotations in batches:
        map_BDhw = features_of(inputs)
        patches = map_BDhw.permute(0, 2, 3, 1).flatten(0, 2)
        logits = F.pad(probe.scores(patches), (0, unseen), value=NEVER)
        votes = knn_scores(patches, *bank, classes.number, num_neighbors)
        for counts, scores in ((linear, logits), (knn, votes)):
            score_BhwC = scores.unflatten(0, (len(map_BDhw), *map_BDhw.shape[2:]))
            for score_hwC, annotation_HW in zip(score_BhwC, annotations, strict=True):
                counts.add(_predict(score_hwC, annotation_HW.shape), annotation_HW)
    return linear, knn


def _whole_patches(size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """The largest size of whole patches within a height and width."""
    whole = size[0] // patch[0] * patch[0], size[1] // patch[1] * patch[1]
    if min(whole) == 0:
        raise ValueError(
            f"images of {size[0]} x {size[1]} hold no patch of {patch[0]} x {patch[1]}; give a larger size"
        )
    return whole


def _batches(rows: Rows, processor: Any, size: tuple[int, int], batch_size: int) -> Iterator[Batch]:
    """Normalised images of one size (B, C, H, W), and their annotations at the size they have.

    Broken images are left out and named in the log.
    """
    for start in range(0, len(rows), batch_size):
        pictures, annotations = [], []
        for number in range(start, min(start + batch_size, len(rows))):
            row = rows[number]
            if row.get("annotation") is None:
                raise ValueError(f"row {number} has no annotation; every row needs one class a pixel")
            picture = decode_picture(row["image"], number)
            if picture is not None:
                pictures.append(picture.resize(size[::-1], Image.Resampling.BICUBIC))
                annotations.append(_classes_of(row["annotation"]))
        if not pictures:
            continue
        inputs = processor(images=pictures, do_resize=False, do_center_crop=False, return_tensors="pt")
        yield inputs["pixel_values"], annotations


def _classes_of(annotation: bytes | Image.Image) -> Tensor:
    """Numbers of a picture as they are stored, of a palette too: (H, W)."""
    picture = Image.open(io.BytesIO(annotation)) if isinstance(annotation, bytes) else annotation
    return torch.from_numpy(np.array(picture))


def _pixel_map(pixels_BCHW: Tensor, patch: tuple[int, int]) -> Tensor:
    """All pixels of a patch as its features."""
    grid = pixels_BCHW.shape[2] // patch[0], pixels_BCHW.shape[3] // patch[1]
    return F.unfold(pixels_BCHW, patch, stride=patch).unflatten(2, grid)


def _predict(score_hwC: Tensor, shape: Sequence[int]) -> Tensor:
    """Best class of every pixel (H, W)."""
    score_1Chw = score_hwC.permute(2, 0, 1)[None]
    resized = F.interpolate(score_1Chw, size=tuple(shape), mode="bilinear", align_corners=False)
    return resized[0].argmax(0)
