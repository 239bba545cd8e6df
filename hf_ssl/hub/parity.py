"""The comparison of an exported encoder with ours, made at every export.

Shape suffixes: B = images, C = channels, H, W = pixels.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_ssl.hub.native import VIDEO_CLASS, Landing, processor_geometry
from hf_ssl.modeling.shared.backbone import SSLTimmBackbone
from hf_ssl.modeling.shared.image_processing import SSLImageProcessor
from hf_ssl.modeling.shared.vit import SSLViTBackbone

TOLERANCE = 1e-5  # largest difference, relative to the largest feature where that is above 1
NUM_IMAGES = 4


def random_images(num_channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth coloured patterns with a little noise, uint8 (B, C, H, W); spectra like photographs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(NUM_IMAGES, num_channels, 5, 5, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    noise = 0.05 * torch.randn(smooth.shape, generator=generator)
    return ((smooth + noise).clamp(0, 1) * 255).round().to(torch.uint8)


def enlarge(images_BCHW: Tensor, times: int) -> Tensor:
    """Repeat every pixel `times` times in both directions."""
    return images_BCHW.repeat_interleave(times, dim=-2).repeat_interleave(times, dim=-1)


@torch.no_grad()
def check_parity(
    backbone: SSLViTBackbone | SSLTimmBackbone, processor: SSLImageProcessor, landing: Landing, folder: Path
) -> float:
    """Compare the folder, loaded as a user loads it, with our encoder.

    Args:
        backbone: our encoder, float32, in eval mode.
        processor: our image processor.
        landing: what was written.
        folder: where.

    Returns:
        The largest absolute difference of `last_hidden_state` and `pooler_output`.

    Raises:
        ValueError: a tensor is missing, features are not finite or differ by more than the tolerance (names
            the first layer), or the processors disagree.
    """
    from transformers import AutoModel

    native, info = AutoModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    native.eval()
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            raise ValueError(
                f"{landing.native_class} reads the export with {problem}: {sorted(info[problem])[0]}"
            )
    images = random_images(backbone.config.num_channels, *processor_geometry(processor)[:2])
    _check_processors(processor, landing, folder, images)
    own_input = _normalized(images, processor)
    if landing.native_class == VIDEO_CLASS:  # clips whose frames are shifted
        frames = range(backbone.config.num_frames)
        own_input = torch.stack([own_input.roll(frame, dims=-1) for frame in frames], dim=1)
    native_input = enlarge(own_input, landing.enlargement)
    own_outputs = _outputs(backbone(own_input), landing)
    if not all(bool(output.isfinite().all()) for output in own_outputs):
        raise ValueError("the encoder's features hold NaN or infinity; export an earlier checkpoint")
    native_outputs = _outputs(native(native_input, **landing.forward_options), landing)
    difference, is_close = _difference(own_outputs, native_outputs)
    if not is_close:
        layer = _first_difference(backbone, native, landing, own_input, native_input)
        raise ValueError(
            f"{landing.native_class} differs from our encoder by {difference:.1e} (limit {TOLERANCE:.0e}), "
            f"first in '{layer}'; nothing was exported"
        )
    return difference


def _normalized(images_BCHW: Tensor, processor: SSLImageProcessor) -> Tensor:
    pixels = images_BCHW / 255
    if not processor.do_normalize:
        return pixels
    mean, std = (
        torch.tensor(values).view(-1, 1, 1) for values in (processor.image_mean, processor.image_std)
    )
    return (pixels - mean) / std


def _outputs(outputs: Any, landing: Landing) -> list[Tensor]:
    pooled = [outputs.pooler_output] if landing.has_pooled_output else []
    return [outputs.last_hidden_state, *pooled]


def _difference(own: list[Tensor], native: list[Tensor]) -> tuple[float, bool]:
    """Largest absolute difference, and whether every tensor is within the tolerance."""
    largest, is_close = 0.0, True
    for ours, theirs in zip(own, native, strict=True):
        if ours.shape != theirs.shape:
            return float("inf"), False
        difference = float((ours - theirs).abs().max())
        # Written so that a NaN on either side is no agreement.
        is_close = is_close and difference <= TOLERANCE * max(1.0, float(ours.abs().max()))
        largest = max(largest, difference) if difference == difference else float("nan")
    return largest, is_close


def _first_difference(
    backbone: nn.Module, native: nn.Module, landing: Landing, own_input: Tensor, native_input: Tensor
) -> str:
    """Name of the first state that differs; a state whose shape the rewrite changes is passed over."""
    try:
        own_states = backbone(own_input, output_hidden_states=True).hidden_states
        options = {"output_hidden_states": True, **landing.forward_options}
        native_states = native(native_input, **options).hidden_states
    except (AttributeError, ValueError):  # timm models without forward_intermediates
        return "last_hidden_state"
    for name, ours, theirs in zip(landing.state_names, own_states, native_states, strict=False):
        if ours.shape == theirs.shape and not _difference([ours], [theirs])[1]:
            return name
    return "last_hidden_state"


def _check_processors(
    processor: SSLImageProcessor, landing: Landing, folder: Path, images_BCHW: Tensor
) -> None:
    """Compare the processors on one image; resizing may move a pixel by one grey level."""
    from PIL import Image
    from transformers import AutoImageProcessor, AutoVideoProcessor

    if images_BCHW.shape[1] != 3:
        return
    image = Image.fromarray(images_BCHW[0].permute(1, 2, 0).numpy())
    own = processor(image, return_tensors="pt")["pixel_values"]
    if landing.native_class == VIDEO_CLASS:
        native_processor = AutoVideoProcessor.from_pretrained(folder)
        native = native_processor(images_BCHW[:1], return_tensors="pt")["pixel_values_videos"][0]
    else:
        native = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    own = enlarge(own, landing.enlargement)
    grey_level = 1 / 255 / (min(processor.image_std) if processor.do_normalize else 1.0)
    if own.shape != native.shape or not float((own - native).abs().max()) <= 1.01 * grey_level:
        raise ValueError(
            f"the exported processor gives {tuple(native.shape)} pixels, ours {tuple(own.shape)}; they "
            "differ by more than one grey level; nothing was exported"
        )
