"""A CNN (any timm backbone) in timm's own Hub format, read by timm and transformers' `TimmWrapperModel`."""

import json
import math
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers.image_utils import PILImageResampling

from hf_ssl.hub.native import Landing, processor_geometry
from hf_ssl.hub.small_stem import ENLARGEMENT, rewrite_small_stem
from hf_ssl.modeling.shared.backbone import SSLTimmBackbone
from hf_ssl.modeling.shared.image_processing import SSLImageProcessor


def land_timm(backbone: SSLTimmBackbone, processor: SSLImageProcessor) -> Landing:
    """The timm form of a timm backbone.

    Raises:
        ValueError: the processor or the stem cannot be expressed in stock timm.
    """
    stride = int(backbone.config.small_stem_stride or 0)
    architecture, model_args = backbone.config.architecture, _model_args(backbone)
    network = _build_stock(architecture, backbone.config.num_channels, model_args)
    own_state = backbone.network.state_dict()
    if stride:
        own_state = {**own_state, **rewrite_small_stem(backbone.network, network, stride)}
    state = {name: own_state[name].clone().contiguous() for name in network.state_dict()}
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": int(network.num_features),
        "model_args": model_args,
        "pretrained_cfg": _pretrained_cfg(backbone, processor, ENLARGEMENT[stride]),
    }

    def write(folder: Path) -> None:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    return Landing(
        native_class="TimmWrapperModel",
        write=write,
        state_names=[info["module"] for info in getattr(network, "feature_info", [])],
        enlargement=ENLARGEMENT[stride],
        notes=_notes(backbone, processor, ENLARGEMENT[stride]),
    )


def _model_args(backbone: SSLTimmBackbone) -> dict[str, Any]:
    # num_classes stays out of model_args: TimmWrapper passes its own and Python refuses the pair.
    arguments = {
        key: value for key, value in (backbone.config.model_args or {}).items() if key != "num_classes"
    }
    if backbone.config.num_channels != 3:
        arguments["in_chans"] = backbone.config.num_channels
    if backbone.config.small_stem_stride:
        arguments["replace_stem_pool"] = True
    return arguments


def _build_stock(architecture: str, num_channels: int, model_args: dict[str, Any]) -> Any:
    import timm

    return timm.create_model(
        architecture, pretrained=False, num_classes=0, **{"in_chans": num_channels, **model_args}
    )


def _pretrained_cfg(
    backbone: SSLTimmBackbone, processor: SSLImageProcessor, enlargement: int
) -> dict[str, Any]:
    height, width, edge = processor_geometry(processor)
    if not processor.do_rescale or not math.isclose(processor.rescale_factor, 1 / 255):
        raise ValueError("timm's transforms divide by 255; use do_rescale=True and rescale_factor=1/255")
    if edge is not None and (height != width or enlargement > 1):
        raise ValueError(
            f"timm cannot express a resize to {edge} and a crop to {height}x{width} with this stem; resize "
            'the whole image: size={"height": ..., "width": ...}, do_center_crop=False'
        )
    normalize = processor.do_normalize
    channels = backbone.config.num_channels
    stock: dict[str, Any] = backbone.network.pretrained_cfg  # type: ignore[assignment]
    resample = PILImageResampling.NEAREST if enlargement > 1 else processor.resample
    return {
        "input_size": [channels, height * enlargement, width * enlargement],
        "mean": list(processor.image_mean) if normalize else [0.0] * channels,
        "std": list(processor.image_std) if normalize else [1.0] * channels,
        "interpolation": PILImageResampling(resample).name.lower(),
        # timm resizes the shorter edge to floor(side / crop_pct); the half outlives rounding.
        "crop_pct": 1.0 if edge is None else height / (edge + 0.5),
        "crop_mode": "squash" if edge is None else "center",
        "num_classes": 0,
        "pool_size": None,
        "fixed_input_size": bool(stock.get("fixed_input_size", False)),
        "first_conv": stock.get("first_conv"),
        "classifier": stock.get("classifier"),
    }


def _notes(backbone: SSLTimmBackbone, processor: SSLImageProcessor, enlargement: int) -> list[str]:
    height, width, _ = processor_geometry(processor)
    if enlargement == 1:
        return [
            "timm resizes images with Pillow: pixels may differ by one grey level from training's processor"
        ]
    return [
        f"bring images to {height}x{width} pixels first: the processor enlarges them {enlargement} times by "
        "repeating pixels, and an image of another size would be sampled without smoothing",
        "the norm maxpool.1 was added by the export: an identity in eval mode, nearly one while fine-tuning",
    ]
