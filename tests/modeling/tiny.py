"""Tiny models of every method: one row of the table `TINY_METHODS` gives a method all shared tests."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_ssl.modeling import METHODS
from hf_ssl.modeling.shared.outputs import SSLOutput
from hf_ssl.modeling.shared.pretraining import SSLForPreTraining, SSLModel

TINY_VIT = {
    "model_type": "hf_ssl_vit",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
QUIET_VIT = {**TINY_VIT, "drop_path_rate": 0.0}  # for methods whose default has that noise
TINY_RESNET = {
    "model_type": "hf_ssl_timm",
    "architecture": "resnet18",
    "model_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
    "image_size": 16,
}
TINY_PROTOTYPES = {
    "num_prototypes": 24,
    "head_hidden_size": 16,
    "head_bottleneck_size": 8,
    "freeze_prototypes": 0,
    "teacher_temperature": 0.04,
    "teacher_temperature_warmup": 0,
}
TINY_MOCO_V3_HEADS = {"projection_size": 8, "projection_hidden_size": 16}
TINY_PREDICTOR = {
    "predictor_hidden_size": 8,
    "predictor_num_hidden_layers": 1,
    "min_context_patches": 2,
    "target_scale": [0.2, 0.4],
}
TINY_CLIPS = {
    "model_type": "hf_ssl_vit",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "num_frames": 4,
    "tubelet_size": 2,
    "weight_initialization": "xavier_uniform",  # at this width the method's own starts with hardly any signal
}
TINY_CLIP_PREDICTOR = {
    "predictor_hidden_size": 12,
    "predictor_num_hidden_layers": 2,
    "predictor_num_attention_heads": 2,
    "mask_num_tubes": [2, 1],
    "mask_scales": [0.2, 0.5],
}
TINY_TEXTS = {
    "text_hidden_size": 16,
    "text_num_hidden_layers": 2,
    "text_num_attention_heads": 2,
    "text_max_length": 8,
    "vocab_size": 40,
}


@dataclass(frozen=True)
class TinyMethod:
    """One row: a method in one of its forms, small enough for milliseconds.

    Attributes:
        name: of the row, in test names.
        method: key of `METHODS`.
        backbone: fields of `backbone_config` beside or instead of the method's default ones.
        options: fields of the method's config.
        num_views: views of an image in a batch; 0 for methods that take one image without a view dimension.
        local_batch_norm: statistics of one process, so that merged batches differ (MoCo with BatchNorm).
    """

    name: str
    method: str
    backbone: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    num_views: int = 2
    local_batch_norm: bool = False

    @property
    def has_vit(self) -> bool:
        """Whether the backbone is our ViT."""
        return self.backbone["model_type"] == "hf_ssl_vit"

    @property
    def has_teacher(self) -> bool:
        """Whether the method keeps a momentum copy of the student."""
        return self.method not in ("simclr", "mae", "beit", "beit_tokenizer", "clip", "siglip")

    @property
    def teacher_has_head(self) -> bool:
        """Whether the copy has the student's head too."""
        return self.has_teacher and self.method not in ("ijepa", "vjepa")

    @property
    def input_name(self) -> str:
        """The batch's name of images or clips."""
        return str(METHODS[self.method].pretraining_class.main_input_name)

    @property
    def published(self) -> str:
        """The branch whose backbone is the encoder."""
        return str(METHODS[self.method].pretraining_class.base_model_prefix)

    @property
    def image_size(self) -> int:
        """Side of the images."""
        return int(self.backbone["image_size"])

    def config(self, **changes: Any) -> Any:
        """The config; `changes` replace options, those of `backbone_config` are merged into the backbone."""
        default = METHODS[self.method].config_class.default_backbone
        inherited = default if default["model_type"] == self.backbone["model_type"] else {}
        backbone = {**inherited, **self.backbone, **changes.pop("backbone_config", {})}
        options = {**self.options, **changes}
        if (there := options.get("distiller_config")) and "num_channels" in backbone:
            channels = {"num_channels": backbone["num_channels"]}  # a frozen teacher sees the same images
            options["distiller_config"] = there | {"backbone_config": there["backbone_config"] | channels}
        return METHODS[self.method].config_class(backbone_config=backbone, **options)

    def build(self, seed: int = 0, **changes: Any) -> SSLForPreTraining:
        """A fresh pre-training model in train mode."""
        torch.manual_seed(seed)
        model: SSLForPreTraining = METHODS[self.method].pretraining_class(self.config(**changes))
        return model.train()

    def build_encoder(self, seed: int = 0, **changes: Any) -> SSLModel:
        """A fresh encoder in eval mode."""
        torch.manual_seed(seed)
        model: SSLModel = METHODS[self.method].model_class(self.config(**changes))
        return model.eval()

    def images(self, num_images: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """A batch as the method takes it: every view is the image with its own noise."""
        generator = torch.Generator().manual_seed(seed)
        side = self.image_size
        if frames := self.backbone.get("num_frames"):
            noise = torch.randn(num_images, frames, 3, side, side, generator=generator, dtype=dtype)
            coarse = torch.randn(
                num_images, 3, 4, 4, generator=generator, dtype=dtype
            )  # neighbours are alike
            return torch.nn.functional.interpolate(coarse, side, mode="bilinear")[:, None] + 0.1 * noise
        image = torch.randn(num_images, 1, 3, side, side, generator=generator, dtype=dtype)
        if not self.num_views:
            return image[:, 0]
        noise = torch.randn(num_images, self.num_views, 3, side, side, generator=generator, dtype=dtype)
        return image + 0.3 * noise

    def batch(self, num_images: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The images as the inputs of `forward` that a loader gives."""
        pixels = self.images(num_images, seed, dtype)
        return {self.input_name: pixels, **companions(METHODS[self.method].pretraining_class, pixels)}


TINY_METHODS = [
    TinyMethod("simclr-vit", "simclr", TINY_VIT, {"projection_size": 8, "temperature": 0.5}),
    TinyMethod("simclr-cnn", "simclr", TINY_RESNET, {"projection_size": 8, "num_projection_layers": 3}),
    TinyMethod(
        "moco-v1",
        "moco",
        TINY_VIT,
        {"projection_head": "linear", "projection_size": 8, "queue_length": 64, "temperature": 0.07},
    ),
    TinyMethod("moco-v2", "moco", TINY_VIT, {"projection_size": 8, "queue_length": 64}),
    TinyMethod(
        "moco-v2-splits",
        "moco",
        TINY_RESNET,
        {"projection_size": 8, "queue_length": 64, "batch_norm_splits": 2},
        local_batch_norm=True,
    ),
    TinyMethod("mocov3-vit", "mocov3", TINY_VIT, TINY_MOCO_V3_HEADS),
    TinyMethod("mocov3-cnn", "mocov3", TINY_RESNET, TINY_MOCO_V3_HEADS),
    TinyMethod(
        "mae",
        "mae",
        TINY_VIT,
        {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2},
        num_views=0,
    ),
    TinyMethod(
        "beit_tokenizer",
        "beit_tokenizer",
        TINY_VIT,
        {"num_codes": 12, "code_size": 4, "kmeans_start": False, "restart_every": 2},
        num_views=0,
    ),
    TinyMethod(
        "beit_tokenizer-distilled",
        "beit_tokenizer",
        TINY_VIT,
        {
            "num_codes": 12,
            "code_size": 4,
            "kmeans_start": False,
            "distiller_config": {"backbone_config": {**TINY_VIT, "hidden_size": 24}},
        },
        num_views=0,
    ),
    TinyMethod(
        "beit",
        "beit",
        QUIET_VIT,
        {"tokenizer_config": {"num_codes": 12, "code_size": 4}, "min_block_patches": 2},
        num_views=0,
    ),
    TinyMethod(
        "dino-vit",
        "dino",
        QUIET_VIT,
        {**TINY_PROTOTYPES, "koleo_weight": 0.1, "koleo_group_size": 2},
    ),
    TinyMethod(
        "dino-cnn",
        "dino",
        TINY_RESNET,
        {**TINY_PROTOTYPES, "normalize_head": True, "train_prototype_scale": True},
    ),
    TinyMethod("ibot", "ibot", QUIET_VIT, {**TINY_PROTOTYPES, "patch_teacher_temperature": 0.04}),
    TinyMethod(
        "ibot-unshared",
        "ibot",
        QUIET_VIT,
        {
            **TINY_PROTOTYPES,
            "patch_teacher_temperature": 0.04,
            "shared_head": False,
            "num_patch_prototypes": 12,
        },
    ),
    TinyMethod("dinov2", "dinov2", QUIET_VIT, {**TINY_PROTOTYPES, "koleo_group_size": 2}),
    TinyMethod(
        "dinov2-anchored",
        "dinov2",
        QUIET_VIT,
        {
            **TINY_PROTOTYPES,
            "koleo_weight": 0.0,
            "gram_weight": 0.5,
            "gram_snapshot": 0,
            "gram_start": 0,
            "gram_warmup": 0,
        },
    ),
    TinyMethod(
        "dinov2-sinkhorn",
        "dinov2",
        {**QUIET_VIT, "use_swiglu_ffn": True, "layer_scale_value": 0.5},
        {
            **TINY_PROTOTYPES,
            "koleo_group_size": 2,
            "centering": "sinkhorn_knopp",
            "separate_patch_head": True,
            "num_patch_prototypes": 12,
            "patch_bottleneck_size": 4,
        },
    ),
    TinyMethod(
        "dinov2-distilled",
        "dinov2",
        QUIET_VIT,
        {
            **TINY_PROTOTYPES,
            "koleo_group_size": 2,
            "distiller_config": {
                **TINY_PROTOTYPES,
                "head_bottleneck_size": 12,
                "backbone_config": {**QUIET_VIT, "hidden_size": 24, "num_hidden_layers": 3},
            },
        },
    ),
    TinyMethod("ijepa", "ijepa", TINY_VIT, TINY_PREDICTOR, num_views=0),
    TinyMethod(
        "ijepa-random-l2",
        "ijepa",
        TINY_VIT,
        {**TINY_PREDICTOR, "loss": "l2", "truncation": "random", "reach_last_row": True, "num_targets": 2},
        num_views=0,
    ),
    TinyMethod("vjepa", "vjepa", TINY_CLIPS, TINY_CLIP_PREDICTOR, num_views=0),
    TinyMethod("clip", "clip", TINY_VIT, {**TINY_TEXTS, "projection_size": 12}, num_views=0),
    TinyMethod("clip-cnn", "clip", TINY_RESNET, {**TINY_TEXTS, "projection_size": None}, num_views=0),
    TinyMethod("siglip", "siglip", {**TINY_VIT, "use_class_token": False}, TINY_TEXTS, num_views=0),
    TinyMethod("siglip-cnn", "siglip", TINY_RESNET, TINY_TEXTS, num_views=0),
]
BY_NAME = {row.name: row for row in TINY_METHODS}
# The method itself, in its first form: for tests of what does not depend on the form.
ONE_OF_EACH = [
    BY_NAME[name]
    for name in (
        "simclr-vit",
        "moco-v2",
        "mocov3-vit",
        "mae",
        "beit_tokenizer",
        "beit",
        "dino-vit",
        "ibot",
        "dinov2",
        "ijepa",
        "vjepa",
        "clip",
        "siglip",
    )  # fmt: skip
]


def run_step(
    model: SSLForPreTraining,
    micro_batches: Iterable[Tensor],
    step: int = 0,
    total_steps: int = 10,
    optimize: Callable[[], object] | None = None,
    rank: int = 0,
    num_processes: int = 1,
) -> float:
    """One optimizer step as the trainer runs it; gradients are added to those there, the loss is the mean."""
    batches = []
    for index, pixels in enumerate(micro_batches):
        first_row = (index * num_processes + rank) * len(pixels)
        rows = torch.arange(first_row, first_row + len(pixels))
        batches.append({model.main_input_name: pixels, "row_index": rows, **companions(model, pixels)})
    model.begin_step(step, total_steps, seed=3)
    with torch.no_grad():
        model.prepare_step(batches)
    updates, total = [], 0.0
    for batch in batches:
        outputs: SSLOutput = model(**batch)
        assert outputs.loss is not None
        (outputs.loss / len(batches)).backward()
        updates.append(outputs.updates or {})
        total += outputs.loss.item() / len(batches)
    if optimize is not None:
        for parameter in model.held_parameters():
            parameter.grad = None
        optimize()
    with torch.no_grad():
        model.end_step(updates)
    return total


def companions(model: SSLForPreTraining | type[SSLForPreTraining], pixels: Tensor) -> dict[str, Tensor]:
    """What a method takes beside images: two corners of the first view, or a caption of every image."""
    taken = inspect.signature(model.forward).parameters
    if "local_pixel_values" in taken:
        side = pixels.shape[-1] // 2
        corners = [pixels[:, 0, :, :side, :side], pixels[:, 0, :, side:, side:]]
        return {"local_pixel_values": torch.stack(corners, dim=1)}
    return {"input_ids": captions(pixels)} if "input_ids" in taken else {}


def captions(pixels: Tensor, length: int = 8, vocab_size: int = 40) -> Tensor:
    """Tokens that say how bright parts of images are: start, words, end, padding (the end again)."""
    start, end = vocab_size - 2, vocab_size - 1
    parts = torch.nn.functional.adaptive_avg_pool2d(pixels.float().mean(dim=1, keepdim=True), (1, length - 3))
    words = ((parts.flatten(1) + 1) * start / 2).long().clamp(0, start - 1)
    ends = torch.full((len(words), 2), end)
    return torch.cat([torch.full((len(words), 1), start), words, ends], dim=1)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name, without those that are None."""
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def training_state(model: SSLForPreTraining) -> dict[str, Tensor]:
    """Copies of teacher, queue and centres."""
    state = model.state_dict()
    kept = ("teacher.", "queue.", "center.", "patch_center.", "anchor.", "student.head.codebook.")
    return {name: value.clone() for name, value in state.items() if name.startswith(kept)}
