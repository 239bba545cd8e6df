"""Views beside the peers' on one core: from an encoded image to normalised tensors, decoding included.

python benchmarks/speed_views.py [--data ../shared/data] [--rounds 5]

"""

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it asks the network otherwise

import albumentations as A
import cv2
import kornia.augmentation as K
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from interleaved import Part, interleave, option_parser, speedup_gate, timing_rows
from lightly_views import Views, lightly_transform, probability, strengths
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from hf_ssl.data import decoding
from hf_ssl.data.sources import open_images
from hf_ssl.data.views import ViewMaker
from hf_ssl.modeling import METHODS
from hf_ssl.training.micro_batches import normalize_bytes

SETTING = (
    "One core; from encoded images (24 photographs of 500 x 375, quality 95; 256 arrays of CIFAR-10) to "
    "batches of normalised float32. All sides get the same images and the same recipe: crops, flips, "
    "strengths and probabilities. Not the same: albumentations resizes without an antialiasing filter, "
    "lightly blurs with Pillow's box filters, torchvision and kornia with a kernel of a tenth of the side."
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SETTINGS = {  # name: method, size, images from
    "SimCLR 2x224": ("simclr", 224, "jpeg"),
    "MoCo v2 2x224": ("moco", 224, "jpeg"),
    "DINO 2x224 + 8x96": ("dino", 224, "jpeg"),
    "SimCLR 2x96": ("simclr", 96, "jpeg"),
    "SimCLR 2x32, arrays": ("simclr", 32, "array"),
}
AIMS = {  # of ratios to these peers
    "SimCLR 2x224": {"lightly": 3.5, "torchvision": 7, "albumentations": 1.0},
    "MoCo v2 2x224": {"lightly": 3.5, "torchvision": 7, "albumentations": 1.0},
    "DINO 2x224 + 8x96": {"lightly": 4, "albumentations": 0.85},
    "SimCLR 2x96": {"lightly": 2.6},
    "SimCLR 2x32, arrays": {"lightly": 7, "kornia": 1.8},
}
PLAIN_AIMS = {"SimCLR 2x224": 1.4}  # of ours without the extra `fast`, to lightly
NUM_CHECKED = 384  # views of a side
PEERS = ("lightly", "torchvision", "albumentations", "kornia")

Run = Callable[[], Any]


def blur_kernel(size: int) -> int:
    """A tenth of the side, odd, as the authors of SimCLR have it."""
    return max(int(0.1 * size) // 2 * 2 + 1, 3)


def torchvision_view(view: dict[str, Any]) -> Callable[[Image.Image], Tensor]:
    """torchvision's v2 transforms on PIL images."""
    size, crop = view["size"], view["crop"]
    transforms = [
        v2.RandomResizedCrop(size, crop["scale"], crop["ratio"], v2.InterpolationMode(crop["interpolation"])),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(*strengths(view))], p=probability(view, "color_jitter")),
        v2.RandomGrayscale(probability(view, "grayscale")),
    ]
    if probability(view, "gaussian_blur"):
        blur = v2.GaussianBlur(blur_kernel(size), (0.1, 2.0))
        transforms.append(v2.RandomApply([blur], p=probability(view, "gaussian_blur")))
    if probability(view, "solarize"):
        transforms.append(v2.RandomSolarize(128, probability(view, "solarize")))
    ends = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    return v2.Compose([*transforms, *ends])


def albumentations_view(view: dict[str, Any]) -> Callable[[Any], Tensor]:
    """albumentations on arrays."""
    size, crop = view["size"], view["crop"]
    brightness, contrast, saturation, hue = strengths(view)
    interpolation = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}[crop["interpolation"]]
    jitter = A.ColorJitter(
        (1 - brightness, 1 + brightness),
        (1 - contrast, 1 + contrast),
        (1 - saturation, 1 + saturation),
        (-hue, hue),
        p=probability(view, "color_jitter"),
    )
    transform = A.Compose(
        [
            A.RandomResizedCrop((size, size), crop["scale"], crop["ratio"], interpolation),
            A.HorizontalFlip(p=0.5),
            jitter,
            A.ToGray(p=probability(view, "grayscale")),
            A.GaussianBlur(0, (0.1, 2.0), p=probability(view, "gaussian_blur")),
            A.Solarize((0.5, 0.5), p=probability(view, "solarize")),
            A.Normalize(MEAN, STD),
            ToTensorV2(),
        ]
    )
    return lambda image: transform(image=image)["image"]


def kornia_view(view: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """kornia on a batch of float tensors."""
    size, crop = view["size"], view["crop"]
    kernel = blur_kernel(size)
    return torch.nn.Sequential(
        K.RandomResizedCrop(
            (size, size), crop["scale"], crop["ratio"], resample=crop["interpolation"].upper()
        ),
        K.RandomHorizontalFlip(),
        K.ColorJitter(*strengths(view), p=probability(view, "color_jitter")),
        K.RandomGrayscale(p=probability(view, "grayscale")),
        K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=probability(view, "gaussian_blur")),
        K.RandomSolarize(0.0, 0.0, p=probability(view, "solarize")),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )


def candidates(method: str, size: int, images: Sequence[Any]) -> dict[str, Run]:
    """One call makes all views of all images, as batches of normalised float32."""
    views = METHODS[method].processor_class.for_image_size(size).views
    each = [view for view in views for _ in range(view["count"])]
    decoded = isinstance(images[0], np.ndarray)

    def pil(image: Any) -> Image.Image:
        return Image.fromarray(image) if decoded else Image.open(io.BytesIO(image)).convert("RGB")

    def array(image: Any) -> Any:
        return image if decoded else cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR_RGB)

    def one_by_one(transform: Callable[[Any], list[Tensor]], read: Callable[[Any], Any]) -> Run:
        return lambda: [
            torch.stack(view) for view in zip(*[transform(read(image)) for image in images], strict=True)
        ]

    def listed(transforms: list[Callable[[Any], Tensor]]) -> Callable[[Any], list[Tensor]]:
        return lambda image: [transform(image) for transform in transforms]

    def batched(transforms: list[Callable[[Tensor], Tensor]]) -> Run:
        def run() -> list[Tensor]:
            batch = np.stack([array(image) for image in images])
            pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).float().div_(255)
            return [transform(pixels) for transform in transforms]

        return run

    return {
        "lightly": one_by_one(lightly_transform(method, views), pil),
        "torchvision": one_by_one(listed([torchvision_view(view) for view in each]), pil),
        "albumentations": one_by_one(listed([albumentations_view(view) for view in each]), array),
        "kornia": batched([kornia_view(view) for view in each]),
        "ours": our_run(views, images, compiled=True),
        "ours without the extra": our_run(views, images, compiled=False),
    }


def our_run(views: Views, images: Sequence[Any], compiled: bool) -> Run:
    """Ours, with the extra `fast` or without: uint8 views, normalised as a batch, as the trainer does it."""
    maker, epoch = ViewMaker(views, compiled=compiled), iter(range(10**9))

    def run() -> list[Tensor]:
        number = next(epoch)
        with mock.patch.object(decoding, "simplejpeg", decoding.simplejpeg if compiled else None):
            batch = maker.make_batch(images, [(0, number, row) for row in range(len(images))])
        return [normalize_bytes(view, MEAN, STD) for view in batch]

    return run


def check(runs: dict[str, Run]) -> None:
    """All sides make views of the same sizes and of about the same brightness and contrast."""
    torch.manual_seed(0)
    statistics = {}
    for name, run in runs.items():
        batches = [run()[0]]
        while sum(map(len, batches)) < NUM_CHECKED:  # means of fewer differ by chance
            batches.append(run()[0])
        first = torch.cat(batches)
        statistics[name] = tuple(first.shape[1:]), float(first.mean()), float(first.std())
    shape, mean, deviation = statistics["ours"]
    for name, (other, its_mean, its_deviation) in statistics.items():
        alike = abs(its_mean - mean) < 0.25 and abs(its_deviation - deviation) < 0.25
        assert other == shape and alike, f"{name} does something else: {statistics}"


def photographs(folder: Path) -> list[bytes]:
    """24 JPEG files of 500 x 375, quality 95: twelve photographs and their mirror images."""
    encoded = []
    for path in sorted(folder.glob("photos/*.jpg")):
        image = Image.open(path).convert("RGB").resize((500, 375), Image.Resampling.LANCZOS)
        for picture in (image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=95)
            encoded.append(buffer.getvalue())
    return encoded


def small_arrays(folder: Path, count: int = 256) -> list[Any]:
    """Images of CIFAR-10, decoded."""
    rows = open_images(str(folder / "cifar10"), split="train").rows()
    return [np.array(Image.open(io.BytesIO(next(rows)["image"])).convert("RGB")) for _ in range(count)]


def main() -> None:
    """Time all settings and write the report."""
    options = option_parser(__doc__, rounds=5).parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    images = {"jpeg": photographs(options.data), "array": small_arrays(options.data)}
    body, gates, data = [SETTING], [], {}
    for name, (method, size, kind) in SETTINGS.items():
        runs = candidates(method, size, images[kind])
        check(runs)
        timings = interleave(runs, reference="lightly", rounds=options.rounds)
        body += ["", f"## {name}", "", *timing_rows(timings, len(images[kind]), "images")]
        data[name] = {candidate: timing.seconds for candidate, timing in timings.items()}
        gates += [speedup_gate(name, timings, peer, AIMS[name].get(peer)) for peer in PEERS]
        plain, aim = "ours without the extra", PLAIN_AIMS.get(name)
        gates.append(speedup_gate(f"{name}, without the extra", timings, "lightly", aim, own=plain))
    Part("speed_views", "Views", "speed_views.py", body, gates, {"seconds": data}).write()


if __name__ == "__main__":
    main()
