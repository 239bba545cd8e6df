"""Both towers of a model of images and texts as one native model, with its processor and tokenizer.

CLIP lands in `VisionTextDualEncoderModel`, whose image tower is whatever the encoder alone lands in. SigLIP
lands in `SiglipModel` if its image tower is the paper's: a ViT without class token, pooled by attention.
Shape suffixes: B = images, M = texts, L = tokens.
"""

import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.image_utils import PILImageResampling

from hf_ssl.hub.folders import refuse_foreign_folder, write_whole_folder
from hf_ssl.hub.landing import REPORT_FILE, ExportReport, choose_landing, plain_backbone
from hf_ssl.hub.landing_vit import processor_options
from hf_ssl.hub.locations import locate
from hf_ssl.hub.native import processor_geometry
from hf_ssl.hub.parity import TOLERANCE, enlarge, random_images
from hf_ssl.modeling import method_of
from hf_ssl.modeling.shared.configuration import SSLViTConfig
from hf_ssl.modeling.shared.text_processing import forget_origin

_FILES = (
    "config.json", "model.safetensors", "preprocessor_config.json", "processor_config.json",
    "tokenizer.json", "tokenizer_config.json", REPORT_FILE,
)  # fmt: skip
_VIT_NAMES = (  # of our ViT's parts, and of the native image tower's
    ("embeddings.patch_embeddings.projection.", "embeddings.patch_embedding."),
    ("layernorm_before.", "layer_norm1."),
    ("layernorm_after.", "layer_norm2."),
    ("attention.o_proj.", "self_attn.out_proj."),
    ("attention.", "self_attn."),
    ("layernorm.", "post_layernorm."),
)
_ENLARGED = "bring images to the training size first: the processor enlarges them by repeating pixels"


def export_image_text(run: str | Path, folder: str | Path, overwrite: bool = False) -> ExportReport:
    """Write both towers as a native model; the folder works with the zero-shot pipeline by its path.

    Args:
        run: folder of a run of a method that learns from texts, or of its checkpoint.
        folder: target; absent, empty or an earlier export.
        overwrite: replace whatever the target holds.

    Raises:
        FileExistsError: the target holds something else.
        ValueError: no native class computes what the towers compute, or the reloaded model differs.
    """
    from transformers import AutoModelForPreTraining, AutoProcessor

    folder = Path(folder).absolute()
    refuse_foreign_folder(folder, _FILES, REPORT_FILE, overwrite)
    location = locate(run)
    subfolder = location.subfolder()
    model = location.load(AutoModelForPreTraining, subfolder, dtype=torch.float32).eval()
    processor = location.load(AutoProcessor, subfolder)
    forget_origin(processor.tokenizer)
    land = _LANDINGS[method_of(model.config).name]
    size = sum(value.numel() for value in model.parameters())
    reports: list[ExportReport] = []

    def write(partial: Path) -> None:
        native_class, enlargement = land(model, processor, partial)
        notes = (_ENLARGED,) if enlargement > 1 else ()
        difference = _check_logits(model, processor, partial, enlargement)
        how = (
            "from transformers import pipeline",
            f'pipe = pipeline("zero-shot-image-classification", "{folder}")',
        )
        reports.append(ExportReport(native_class, str(folder), difference, notes, how, size))
        content = asdict(reports[0]) | {
            "folder": ".",
            "how_to_load": [how[0], how[1].replace(str(folder), ".")],
        }
        (partial / REPORT_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    write_whole_folder(folder, write)
    return reports[0]


def _land_clip(model: Any, processor: Any, folder: Path) -> tuple[str, int]:
    """`VisionTextDualEncoderModel`: class name, and by how much images are enlarged before it."""
    from transformers import (
        AutoModel,
        CLIPTextModel,
        VisionTextDualEncoderConfig,
        VisionTextDualEncoderModel,
        VisionTextDualEncoderProcessor,
        ViTImageProcessor,
    )

    landing = choose_landing(plain_backbone(model), processor.image_processor)
    if not landing.has_pooled_output:
        raise ValueError(
            f"{landing.native_class} has no pooled output to compare with texts; train with "
            "use_class_token=True"
        )
    with tempfile.TemporaryDirectory() as scratch:
        landing.write(Path(scratch))
        vision = AutoModel.from_pretrained(scratch)
    vision.config.hidden_size = model.student.backbone.hidden_size  # a timm model's config has none
    text = CLIPTextModel(copy.deepcopy(model.text_tower.config))
    text.load_state_dict(model.text_tower.state_dict())
    scale = model.similarity.logit_scale.item()
    width = model.text_projection.out_features
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision.config, text.config, projection_dim=width, logit_scale_init_value=scale
    )
    native = VisionTextDualEncoderModel(config, vision, text)
    head = model.student.head
    with torch.no_grad():
        native.visual_projection.weight.copy_(
            torch.eye(width) if isinstance(head, nn.Identity) else head.weight
        )
        native.text_projection.weight.copy_(model.text_projection.weight)
        native.logit_scale.fill_(scale)
    native.save_pretrained(folder)
    image_processor = ViTImageProcessor(**_image_options(processor.image_processor, landing.enlargement))
    VisionTextDualEncoderProcessor(image_processor, processor.tokenizer).save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return "VisionTextDualEncoderModel", landing.enlargement


def _image_options(processor: Any, enlargement: int) -> dict[str, Any]:
    """Of the native image processor; a small stem hidden in a large one wants pixels repeated."""
    options = processor_options(processor)
    if enlargement > 1:
        height, width, _ = processor_geometry(processor)
        size = {"height": height * enlargement, "width": width * enlargement}
        options |= {"size": size, "resample": PILImageResampling.NEAREST, "do_center_crop": False}
    return options


def _land_siglip(model: Any, processor: Any, folder: Path) -> tuple[str, int]:
    """`SiglipModel`: class name, and by how much images are enlarged before it."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    vit = model.config.backbone_config
    _check_siglip_tower(model.config)
    shared = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
        "patch_size", "num_channels", "hidden_act", "layer_norm_eps",
    )  # fmt: skip
    vision = {name: getattr(vit, name) for name in shared}
    native = SiglipModel(SiglipConfig(vision_config=vision, text_config=model.text_tower.config.to_dict()))
    native.load_state_dict(_siglip_state(model), strict=True)
    native.save_pretrained(folder)
    own = processor.image_processor
    SiglipImageProcessor(
        size=dict(own.size), resample=own.resample, image_mean=own.image_mean, image_std=own.image_std
    ).save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    return "SiglipModel", 1


def _check_siglip_tower(config: Any) -> None:
    vit = config.backbone_config
    is_plain = (
        config.pools_by_attention
        and isinstance(vit, SSLViTConfig)
        and vit.position_embedding_type == "learned"
        and vit.qkv_bias
        and vit.use_key_bias
        and vit.layer_scale_value is None
        and not (vit.num_register_tokens or vit.use_swiglu_ffn or vit.use_shared_relative_position_bias)
    )
    if not is_plain:
        raise ValueError(
            "SiglipModel has a plain ViT of learned positions without class token, registers and LayerScale; "
            "this image tower is another"
        )
    if config.text_max_length != 64:
        raise ValueError(
            f"SiglipModel's pipelines pad texts to 64 tokens, text_max_length is {config.text_max_length}"
        )


def _siglip_state(model: Any) -> dict[str, Tensor]:
    state = {f"text_model.{name}": value for name, value in model.text_tower.state_dict().items()}
    for name, value in model.student.backbone.state_dict().items():
        if name == "embeddings.position_embeddings":
            state["vision_model.embeddings.position_embedding.weight"] = value[0]
            continue
        if name == "embeddings.mask_token":
            continue
        name = f"encoder.{name}" if name.startswith("layers.") else name
        for ours, theirs in _VIT_NAMES:
            if ours in name:
                name = name.replace(ours, theirs)
                break
        state[f"vision_model.{name}"] = value
    state |= {f"vision_model.head.{name}": value for name, value in model.student.head.state_dict().items()}
    return state | {f"logit_{name}": getattr(model.similarity, f"logit_{name}") for name in ("scale", "bias")}


_LANDINGS: dict[str, Callable[[Any, Any, Path], tuple[str, int]]] = {
    "clip": _land_clip,
    "siglip": _land_siglip,
}


@torch.no_grad()
def _check_logits(model: Any, processor: Any, folder: Path, enlargement: int) -> float:
    """Largest difference between our logits and those of the reloaded model.

    Raises:
        ValueError: it is above the tolerance.
    """
    from transformers import AutoModel

    native = AutoModel.from_pretrained(folder).eval()
    own = processor.image_processor
    height, width, _ = processor_geometry(own)
    images_BCHW = random_images(model.config.backbone_config.num_channels, height, width).float() / 255
    tokens = processor.tokenize(["a red dog", "two", "the quick brown fox jumps over it"])
    image_BE = nn.functional.normalize(model.get_image_features(images_BCHW).pooler_output, dim=-1)
    text_ME = nn.functional.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
    logits_BM = model.similarity.logit_scale.exp() * image_BE @ text_ME.T
    if model.similarity.logit_bias is not None:
        logits_BM = logits_BM + model.similarity.logit_bias
    found_BM = native(pixel_values=enlarge(images_BCHW, enlargement), **tokens).logits_per_image
    difference = (found_BM - logits_BM).abs().max().item()
    if difference > TOLERANCE * max(1.0, logits_BM.abs().max().item()):
        raise ValueError(f"{type(native).__name__} gives other logits than the run, by {difference:.1e}")
    return difference
