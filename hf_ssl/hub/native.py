"""What a landing hands to the export: how to write the native folder and how to compare with it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VIDEO_CLASS = "VJEPA2Model"


@dataclass
class Landing:
    """A native form of one encoder.

    Attributes:
        native_class: class that `AutoModel` builds from the folder.
        write: writes weights, config and processor into an empty folder.
        state_names: names of the states that both encoders return for `output_hidden_states`, in order.
        enlargement: how many times the native input is larger than ours, by repeating pixels.
        has_pooled_output: whether the native class returns `pooler_output`.
        forward_options: what the native class is called with beside its input.
        notes: what a user of the native folder should know.
    """

    native_class: str
    write: Callable[[Path], None]
    state_names: list[str]
    enlargement: int = 1
    has_pooled_output: bool = True
    forward_options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def processor_geometry(processor: Any) -> tuple[int, int, int | None]:
    """Height and width of the processed image, and the length of its shorter edge before a crop.

    The last is None where the whole image is resized to height and width.

    Raises:
        ValueError: the processor's output has no fixed size.
    """
    size = processor.size
    if processor.do_center_crop:
        crop = processor.crop_size
        edge = size["shortest_edge"] if "shortest_edge" in size else None
        if edge:
            return crop["height"], crop["width"], edge
    elif processor.do_resize and size.get("height") and size.get("width"):
        return size["height"], size["width"], None
    raise ValueError(
        f"cannot export a processor with size {dict(size)} and do_center_crop {processor.do_center_crop}; "
        "use for_image_size of the method's image processor"
    )


def loading_lines(native_class: str, name: str, from_hub: bool = False) -> list[str]:
    """Python lines that load a native encoder without this package.

    Args:
        native_class: class that `AutoModel` builds.
        name: folder, or `owner/name`.
        from_hub: whether `name` is a repository.
    """
    processor = "AutoVideoProcessor" if native_class == VIDEO_CLASS else "AutoImageProcessor"
    lines = [
        f"from transformers import {processor}, AutoModel",
        f'model = AutoModel.from_pretrained("{name}")',
        f'processor = {processor}.from_pretrained("{name}")',
    ]
    if native_class == "TimmWrapperModel":
        lines += [
            "import timm",
            f'model = timm.create_model("{"hf-hub" if from_hub else "local-dir"}:{name}", pretrained=True)',
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        ]
    return lines
