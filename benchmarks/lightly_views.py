"""lightly's transforms, told the sizes, strengths and probabilities of our views."""

from collections.abc import Callable
from typing import Any

from lightly.transforms import MAETransform, MoCoV2Transform, SimCLRTransform
from lightly.transforms.dino_transform import DINOViewTransform
from lightly.transforms.multi_view_transform import MultiViewTransform
from PIL import Image
from torch import Tensor

TWO_VIEWS = {"simclr": SimCLRTransform, "moco": MoCoV2Transform}
STEPS = {  # of a view, that lightly's transform has a setting for
    "mae": {"horizontal_flip"},
    "simclr": {"horizontal_flip", "color_jitter", "grayscale", "gaussian_blur"},
    "moco": {"horizontal_flip", "color_jitter", "grayscale", "gaussian_blur"},
    "dino": {"horizontal_flip", "color_jitter", "grayscale", "gaussian_blur", "solarize"},
    "ibot": {"horizontal_flip", "color_jitter", "grayscale", "gaussian_blur", "solarize"},
}

Views = list[dict[str, Any]]


def lightly_transform(method: str, views: Views) -> Callable[[Image.Image], list[Tensor]]:
    """lightly's own transform of a method.

    Args:
        method: one of `STEPS`.
        views: of our image processor; every entry has a size.

    Raises:
        ValueError: a view has something that lightly's transform cannot be told.
    """
    for view in views:
        _check(method, view)
    if method in ("dino", "ibot"):
        return MultiViewTransform([_multi_crop_view(view) for view in views for _ in range(view["count"])])
    view = views[0]
    sizes = {"input_size": view["size"], "min_scale": view["crop"]["scale"][0]}
    return MAETransform(**sizes) if method == "mae" else TWO_VIEWS[method](**sizes, **_colors(view))


def strengths(view: dict[str, Any]) -> list[float]:
    """Of brightness, contrast, saturation, hue."""
    jitter = next(step for step in view["transforms"] if step["type"] == "color_jitter")
    return [jitter[name] for name in ("brightness", "contrast", "saturation", "hue")]


def probability(view: dict[str, Any], name: str) -> float:
    """How often a transform happens; 0 where the view has none."""
    return float(next((step["probability"] for step in view["transforms"] if step["type"] == name), 0.0))


def _multi_crop_view(view: dict[str, Any]) -> DINOViewTransform:
    sizes = {"crop_size": view["size"], "crop_scale": tuple(view["crop"]["scale"])}
    return DINOViewTransform(**sizes, **_colors(view), solarization_prob=probability(view, "solarize"))


def _colors(view: dict[str, Any]) -> dict[str, Any]:
    brightness, contrast, saturation, hue = strengths(view)
    return {
        "hf_prob": probability(view, "horizontal_flip"),
        "cj_prob": probability(view, "color_jitter"),
        "cj_strength": 1.0,  # the strengths below are final
        "cj_bright": brightness,
        "cj_contrast": contrast,
        "cj_sat": saturation,
        "cj_hue": hue,
        "random_gray_scale": probability(view, "grayscale"),
        "gaussian_blur": probability(view, "gaussian_blur"),
        "sigmas": (0.1, 2.0),
    }


def _check(method: str, view: dict[str, Any]) -> None:
    crop, steps = view["crop"], {step["type"] for step in view["transforms"]}
    if tuple(crop["ratio"]) != (0.75, 4 / 3):
        raise ValueError(f"lightly's crops have the ratios 3/4 to 4/3, not {crop['ratio']}")
    one_bound = method not in ("dino", "ibot")  # only the smallest share of the image can be set
    if steps - STEPS[method] or (one_bound and crop["scale"][1] != 1):
        raise ValueError(f"lightly's transform of {method} has no setting for {view}")
