"""Recipes of views: plain data (as in YAML or `preprocessor_config.json`), checked, with defaults filled in.

A recipe is a list of entries like this one; `count` views are drawn with each:
    {"count": 2, "kind": "global", "size": 224,
     "crop": {"scale": [0.2, 1.0], "ratio": [0.75, 1.3333333333333333], "interpolation": "bilinear"},
     "transforms": [{"type": "horizontal_flip", "probability": 0.5}, ...]}
Transforms run in the order written. Everything but `size` and `crop.scale` has a default.
An entry of kind "anchor" has `count` and `size` alone: its views are the global ones once more, same crop and
flip, at another size and without their changes of colour and sharpness.
"""

import difflib
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

KINDS = ("global", "local", "anchor")
INTERPOLATIONS = ("bilinear", "bicubic")
DEFAULT_RATIO = (3 / 4, 4 / 3)

# Options of each transform beside `type` and `probability`, with their defaults.
TRANSFORM_OPTIONS: dict[str, dict[str, Any]] = {
    "horizontal_flip": {},
    "color_jitter": {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0},
    "grayscale": {},
    "gaussian_blur": {"sigma": (0.1, 2.0)},  # SimCLR, Appendix A; in pixels of the view
    "solarize": {"threshold": 128},
}
_LIMITS: dict[str, tuple[float, float]] = {
    "probability": (0.0, 1.0),
    "brightness": (0.0, math.inf),
    "contrast": (0.0, math.inf),
    "saturation": (0.0, math.inf),
    "hue": (0.0, 0.5),  # in turns: half a turn either way reaches every hue
    "threshold": (0, 256),  # of uint8 values: 0 inverts all of them, 256 none
    "scale": (0.0, 1.0),
    "ratio": (0.0, math.inf),
    "sigma": (0.0, math.inf),
}


class CropSpec(NamedTuple):
    """Ranges of the random crop: share of the image's area, and width / height."""

    scale: tuple[float, float]
    ratio: tuple[float, float]
    interpolation: str


class TransformSpec(NamedTuple):
    """One transform: its type, how often it happens, and its options with defaults filled in."""

    type: str
    probability: float
    options: dict[str, Any]


class FramesSpec(NamedTuple):
    """Frames of a clip: how many, and every which frame of the video."""

    num_frames: int
    step: int


class ViewSpec(NamedTuple):
    """How one view is drawn; an anchor, which repeats a global view, has no crop of its own."""

    kind: str
    size: int
    crop: CropSpec | None
    transforms: tuple[TransformSpec, ...]


def parse_recipe(views: list[dict[str, Any]]) -> list[ViewSpec]:
    """Checks a recipe and returns one spec per view.

    Args:
        views: the recipe; entries with `count` n yield n equal specs.

    Returns:
        Specs in the order of the recipe.

    Raises:
        ValueError: an unknown key or type (the message names the nearest known one), a missing or wrong
            value, or two sizes for one kind (the views of one kind are stacked in one tensor).
    """
    if not isinstance(views, (list, tuple)) or not views:
        raise ValueError(f"views must be a list of at least one entry, got {views!r}")
    specs: list[ViewSpec] = []
    for number, entry in enumerate(views):
        where = f"views[{number}]"
        count = _integer(_mapping(entry, where).get("count", 1), f"{where}.count")
        specs += [_parse_view(entry, where)] * count
    for kind in KINDS:
        sizes = sorted({spec.size for spec in specs if spec.kind == kind})
        if len(sizes) > 1:
            raise ValueError(
                f"{kind} views have the sizes {sizes}; give one size per kind (kinds: {', '.join(KINDS)})"
            )
    counts = {kind: sum(spec.kind == kind for spec in specs) for kind in KINDS}
    if counts["anchor"] not in (0, counts["global"]):
        raise ValueError(
            f"{counts['anchor']} anchor views cannot repeat {counts['global']} global ones; give as many"
        )
    return specs


def parse_frames(views: list[dict[str, Any]]) -> FramesSpec:
    """The `frames` of a recipe of clips, which has one view.

    Raises:
        ValueError: there are several views, or a key or a value is wrong.
    """
    if len(views) != 1 or views[0].get("count", 1) != 1 or views[0].get("kind", "global") != "global":
        raise ValueError("a recipe with frames has one global view of a clip, with count 1")
    where = "views[0].frames"
    frames = _mapping(_required(views[0], "frames", "views[0]"), where)
    _check_keys(frames, ("count", "step"), where)
    return FramesSpec(
        _integer(_required(frames, "count", where), f"{where}.count"),
        _integer(frames.get("step", 1), f"{where}.step"),
    )


def _parse_view(entry: Mapping[str, Any], where: str) -> ViewSpec:
    kind = _choice(entry.get("kind", "global"), KINDS, f"{where}.kind")
    own_keys = () if kind == "anchor" else ("crop", "transforms")
    _check_keys(entry, ("count", "kind", "size", *own_keys), where)
    size = _integer(_required(entry, "size", where), f"{where}.size")
    if kind == "anchor":
        return ViewSpec(kind, size, None, ())
    transforms = entry.get("transforms", [])
    if not isinstance(transforms, (list, tuple)):
        raise ValueError(f"{where}.transforms must be a list, got {transforms!r}")
    crop = _parse_crop(_mapping(_required(entry, "crop", where), f"{where}.crop"), f"{where}.crop")
    return ViewSpec(
        kind,
        size,
        crop,
        tuple(_parse_transform(t, f"{where}.transforms[{i}]") for i, t in enumerate(transforms)),
    )


def _parse_crop(crop: Mapping[str, Any], where: str) -> CropSpec:
    _check_keys(crop, ("scale", "ratio", "interpolation"), where)
    return CropSpec(
        _range(_required(crop, "scale", where), "scale", where),
        _range(crop.get("ratio", DEFAULT_RATIO), "ratio", where),
        _choice(crop.get("interpolation", "bilinear"), INTERPOLATIONS, f"{where}.interpolation"),
    )


def _parse_transform(transform: Any, where: str) -> TransformSpec:
    transform = _mapping(transform, where)
    kind = _choice(_required(transform, "type", where), TRANSFORM_OPTIONS, f"{where}.type")
    defaults = TRANSFORM_OPTIONS[kind]
    _check_keys(transform, ("type", "probability", *defaults), f"{where} ({kind})")
    options = {
        name: _range(transform.get(name, default), name, where)
        if isinstance(default, tuple)
        else _number(transform.get(name, default), name, where, whole=isinstance(default, int))
        for name, default in defaults.items()
    }
    return TransformSpec(kind, _number(transform.get("probability", 1.0), "probability", where), options)


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping, got {value!r}")
    return value


def _required(mapping: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in mapping:
        raise ValueError(f"{where} needs the key {key!r}")
    return mapping[key]


def _check_keys(mapping: Mapping[str, Any], known: Collection[str], where: str) -> None:
    for key in mapping:
        if key not in known:
            raise ValueError(f"{where} has the unknown key {key!r}; {_nearest(key, known)}")


def _choice(value: Any, known: Collection[str], where: str) -> str:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{where} is {value!r}, which is unknown; {_nearest(value, known)}")
    return value


def _nearest(name: Any, known: Collection[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.4)
    return (f"did you mean {near[0]!r}? " if near else "") + f"Known: {', '.join(known)}"


def _integer(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{where} must be a whole number >= 1, got {value!r}")
    return value


def _number(value: Any, name: str, where: str, whole: bool = False) -> float:
    low, high = _LIMITS[name]
    types = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, types) or not low <= value <= high:
        noun = "whole number" if whole else "number"
        raise ValueError(f"{where}.{name} must be a {noun} from {low:g} to {high:g}, got {value!r}")
    return value


def _range(value: Any, name: str, where: str) -> tuple[float, float]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"{where}.{name} must be two numbers [lowest, highest], got {value!r}")
    low, high = (_number(bound, name, where) for bound in value)
    if not 0 < low <= high < math.inf:
        raise ValueError(f"{where}.{name} must satisfy 0 < lowest <= highest, got {list(value)}")
    return low, high
