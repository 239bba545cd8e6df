"""The image processor that all methods share.

At inference it is an ordinary transformers processor. It also carries `views`, the method's training
augmentations as plain data, so that a checkpoint says how it was trained; `hf_ssl.data.views` builds the
pipeline from them.
"""

from typing import Any

from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

# At 64 px and below, images are resized whole: a crop would lose what little there is.
SMALLEST_CROPPED_SIDE = 65


class SSLImageProcessorKwargs(ImagesKwargs, total=False):
    """Adds the training views to transformers' own arguments."""

    views: list[dict[str, Any]]


class SSLImageProcessor(TorchvisionBackend):
    """Resize, centre crop, rescale, normalise; and `views`, the training recipe as data."""

    valid_kwargs = SSLImageProcessorKwargs
    model_input_names = ["pixel_values"]
    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 224, "width": 224}
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    views: list[dict[str, Any]] = []

    @classmethod
    def default_views(cls, image_size: int) -> list[dict[str, Any]]:
        """The method's published augmentations for images of this side."""
        return []

    @classmethod
    def for_image_size(cls, image_size: int, **overrides: Any) -> "SSLImageProcessor":
        """The processor for training and testing at one image side.

        Args:
            image_size: side in pixels. Above 64 the test image is resized to 256/224 of it and cropped.
            **overrides: any processor argument, e.g. `image_mean` or `views`; views that name no size get
                `image_size`.
        """
        geometry: dict[str, Any] = {"size": {"height": image_size, "width": image_size}}
        if image_size >= SMALLEST_CROPPED_SIDE:
            geometry = {
                "size": {"shortest_edge": round(image_size * 256 / 224)},
                "do_center_crop": True,
                "crop_size": {"height": image_size, "width": image_size},
            }
        views = overrides.pop("views", None) or cls.default_views(image_size)
        sized = [{"size": image_size, **spec} for spec in views]
        return cls(**{"views": sized, **geometry, **overrides})


def crop(scale: tuple[float, float], interpolation: str) -> dict[str, Any]:
    """Random resized crop with torchvision's aspect ratios."""
    return {"scale": list(scale), "ratio": [3 / 4, 4 / 3], "interpolation": interpolation}


def flip(probability: float = 0.5) -> dict[str, Any]:
    """Horizontal flip."""
    return {"type": "horizontal_flip", "probability": probability}


def color_jitter(
    brightness: float, contrast: float, saturation: float, hue: float, probability: float
) -> dict[str, Any]:
    """Brightness, contrast, saturation and hue in random order."""
    return {
        "type": "color_jitter",
        "probability": probability,
        "brightness": brightness,
        "contrast": contrast,
        "saturation": saturation,
        "hue": hue,
    }


def grayscale(probability: float = 0.2) -> dict[str, Any]:
    """Grey image with three equal channels."""
    return {"type": "grayscale", "probability": probability}


def blur(probability: float) -> dict[str, Any]:
    """Gaussian blur with sigma in (0.1, 2.0) pixels."""
    return {"type": "gaussian_blur", "probability": probability, "sigma": [0.1, 2.0]}


def solarize(probability: float) -> dict[str, Any]:
    """Invert values of 128 and above."""
    return {"type": "solarize", "probability": probability, "threshold": 128}


def view(
    size: int,
    crop_spec: dict[str, Any],
    transforms: list[dict[str, Any]],
    count: int = 1,
    kind: str = "global",
) -> dict[str, Any]:
    """One entry of `views`: `count` views drawn alike."""
    return {"count": count, "kind": kind, "size": size, "crop": crop_spec, "transforms": transforms}


def clip(image_size: int, crop_spec: dict[str, Any], count: int, step: int) -> dict[str, Any]:
    """The view of a clip: `count` frames, every `step`-th of the video; one crop and flip for all of them."""
    return view(image_size, crop_spec, [flip()]) | {"frames": {"count": count, "step": step}}


def multi_crop_views(
    image_size: int,
    *,
    global_scale: tuple[float, float],
    local_scale: tuple[float, float],
    num_local_views: int,
    blur_probabilities: tuple[float, float, float] = (1.0, 0.1, 0.5),
    local_size: int | None = None,
) -> list[dict[str, Any]]:
    """Two global crops drawn differently and small local ones (Caron et al. 2021, arXiv 2104.14294).

    Args:
        image_size: side of the global crops.
        global_scale: their share of the image's area.
        local_scale: that of the local crops.
        num_local_views: 0 leaves them out.
        blur_probabilities: of the first and second global view, and of local ones; not at 32 px and below.
        local_size: side of the local crops; None: 3/7 of the global ones (96 of 224) in steps of 16.
    """
    color = [flip(), color_jitter(0.4, 0.4, 0.2, 0.1, probability=0.8), grayscale()]
    blurs = [[blur(chance)] if image_size > 32 else [] for chance in blur_probabilities]
    views = [
        view(image_size, crop(global_scale, "bicubic"), [*color, *blurs[0]]),
        view(image_size, crop(global_scale, "bicubic"), [*color, *blurs[1], solarize(0.2)]),
    ]
    if num_local_views:
        side = local_size or max(round(image_size * 3 / 7 / 16), 1) * 16
        transforms = [*color, *blurs[2]]
        views.append(view(side, crop(local_scale, "bicubic"), transforms, num_local_views, kind="local"))
    return views
