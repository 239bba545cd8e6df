"""Configurations that every method shares: the base class and the two kinds of backbone.

A method's config holds its own hyper-parameters and a `backbone_config`, which is one of
`SSLViTConfig` (our ViT) and `SSLTimmConfig` (any timm model). Unknown fields are refused: transformers
would store a misspelt one without a word.
"""

import math
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# Fields that come back at every reload of a saved config, written by transformers, Trainer or the Hub export.
_FIELDS_OF_RELOADED_CONFIGS = {
    "model_type", "use_cache", "auto_map", "transformers_version", "architectures", "dtype", "torch_dtype",
    "name_or_path", "_name_or_path", "_commit_hash", "attn_implementation", "_attn_implementation_internal",
    "_experts_implementation_internal", "experts_implementation", "output_attentions", "num_labels",
    "is_custom_code", "custom_pipelines", "base_model_tp_plan",
}  # fmt: skip

# Up to this rate of drop path samples are dropped one by one, above it a fixed number of them, whose branch
# is then not computed: at low rates that would save nothing and round the rate. The limit is DINOv2's.
LARGEST_RATE_PER_SAMPLE = 0.1

# Below this a CNN gets a 3x3 stem without pooling (SimCLR paper, appendix B.9: CIFAR-10).
SMALL_IMAGE_SIDE = 64


def refuse_unknown_fields(config_class: type, unknown: dict[str, Any]) -> None:
    """Raise for keyword arguments that are no field of a config.

    Args:
        config_class: the dataclass whose fields are allowed.
        unknown: the keyword arguments that matched no field.

    Raises:
        ValueError: names the first unknown field and the nearest known one.
    """
    misspelt = sorted(set(unknown) - _FIELDS_OF_RELOADED_CONFIGS)
    if not misspelt:
        return
    known = [field.name for field in fields(config_class)]
    nearest = get_close_matches(misspelt[0], known, n=1, cutoff=0.0)
    raise ValueError(f"{config_class.__name__} has no field '{misspelt[0]}'; the nearest is '{nearest[0]}'")


@strict
class SSLViTConfig(PreTrainedConfig):
    """Vision Transformer backbone. Defaults are ViT-B/16 (arXiv 2010.11929), pre-norm, no dropout."""

    model_type = "hf_ssl_vit"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None  # None: 4 * hidden_size
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    num_frames: int = 1  # of a clip; more than one: inputs are clips
    tubelet_size: int = 1  # consecutive frames of a patch
    hidden_act: str = "gelu"  # exact (erf)
    use_swiglu_ffn: bool = False  # gated MLP of DINOv2's giant model
    qkv_bias: bool = True
    use_key_bias: bool = True  # BEiT: no; a bias of keys moves all scores of a query alike
    layer_norm_eps: float | int = 1e-6
    use_class_token: bool = True
    num_register_tokens: int = 0  # arXiv 2309.16588
    use_mask_token: bool = False
    # or "sincos_row_first" (MoCo v3; V-JEPA in three dimensions), "sincos_column_first" (MAE), "none" (BEiT),
    # "rope": queries and keys turned by time, row and column (V-JEPA 2)
    position_embedding_type: str = "learned"
    use_shared_relative_position_bias: bool = False  # one table of all layers, added to their scores (BEiT)
    # How positions are resized to another grid. 0.1 shifts them as published DINO and DINOv2 features have
    # it, and no native class does; antialiasing is what `Dinov2WithRegistersModel` does.
    interpolate_offset: float | int = 0.0
    interpolate_antialias: bool = False
    layer_scale_value: float | int | None = None  # None: no LayerScale (arXiv 2103.17239)
    drop_path_rate: float | int = 0.0  # of the last block; rises linearly from 0
    drop_path_uniform: bool = False  # the same rate in all blocks (DINOv2)
    # std 0.02; "trunc_normal_linears": the patch projection as torch starts it (DINO, iBOT, DINOv2);
    # or "xavier_uniform" (MoCo v3), "xavier_uniform_joint_qkv" (MAE), "trunc_normal_rescaled" (BEiT: cut at
    # one std, the branches of layer l divided by the root of 2 l)
    weight_initialization: str = "trunc_normal"
    class_token_std: float | int = 0.02  # MoCo v3, DINOv2: 1e-6
    register_token_std: float | int = 0.02  # DINOv2: 1e-6
    mask_token_std: float | int = 0.0  # iBOT, DINOv2: 0
    freeze_patch_embedding: bool = False  # MoCo v3 (arXiv 2104.02057, section 4.2)

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown_fields(type(self), kwargs)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)

    def validate_image_size(self) -> None:
        """Refuse an image that is not cut into whole patches."""
        if self.image_size % self.patch_size:
            below = max(self.image_size // self.patch_size, 1) * self.patch_size
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}; "
                f"use {below} or {below + self.patch_size}"
            )

    def validate_heads(self) -> None:
        """Refuse a width that heads do not divide."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )

    def validate_choices(self) -> None:
        """Refuse unknown position embeddings and initialisations."""
        choices = {
            "position_embedding_type": ("learned", "sincos_row_first", "sincos_column_first", "none", "rope"),
            "weight_initialization": (
                "trunc_normal",
                "trunc_normal_linears",
                "xavier_uniform",
                "xavier_uniform_joint_qkv",
                "trunc_normal_rescaled",
            ),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got '{getattr(self, name)}'")

    def validate_clips(self) -> None:
        """Refuse clips that are not cut into whole patches, and what no position of a clip is known for."""
        if self.tubelet_size < 1 or self.num_frames % self.tubelet_size or self.num_frames < 1:
            raise ValueError(
                f"num_frames {self.num_frames} must be a multiple of tubelet_size {self.tubelet_size}, both "
                "at least 1"
            )
        if not self.is_video and self.position_embedding_type != "rope":
            return
        if self.position_embedding_type not in ("rope", "sincos_row_first"):
            raise ValueError(
                f"clips have no positions of type '{self.position_embedding_type}'; use rope or "
                "sincos_row_first"
            )
        if self.num_prefix_tokens or self.use_shared_relative_position_bias:
            raise ValueError(
                "clips and rope need a backbone of patches alone; set use_class_token=False, "
                "num_register_tokens=0 and use_shared_relative_position_bias=False"
            )

    def validate_rotations(self) -> None:
        """Refuse heads too narrow for three axes, and dropped samples, whose turns would stay."""
        if self.position_embedding_type != "rope":
            return
        head_dim = self.hidden_size // self.num_attention_heads
        if head_dim < 6 or head_dim % 2:
            raise ValueError(
                f"rope needs heads of an even width of at least 6, got {head_dim}; change hidden_size or "
                "num_attention_heads"
            )
        if self.drop_path_rate > LARGEST_RATE_PER_SAMPLE:
            raise ValueError(
                f"rope takes a drop_path_rate of at most {LARGEST_RATE_PER_SAMPLE}, got {self.drop_path_rate}"
            )

    def validate_relative_positions(self) -> None:
        """Refuse what a table of relative positions does not know."""
        if self.use_shared_relative_position_bias and (self.num_register_tokens or not self.use_class_token):
            raise ValueError(
                "use_shared_relative_position_bias needs a class token and no registers; set "
                "use_class_token=True and num_register_tokens=0"
            )

    def describe(self) -> str:
        """The network in a few words."""
        clips = f", {self.num_frames} frames in patches of {self.tubelet_size}" if self.is_video else ""
        return (
            f"ViT of width {self.hidden_size}, {self.num_hidden_layers} layers, patch {self.patch_size} "
            f"at {self.image_size} px{clips}"
        )

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patch tokens: class token and registers."""
        return int(self.use_class_token) + self.num_register_tokens

    @property
    def grid_size(self) -> int:
        """Patches along one side of an image of `image_size`."""
        return self.image_size // self.patch_size

    @property
    def is_video(self) -> bool:
        """Whether inputs are clips."""
        return self.num_frames > 1

    @property
    def clip_grid(self) -> tuple[int, int, int]:
        """(time steps, rows, columns) of patches of a clip of `num_frames`; an image has one time step."""
        return self.num_frames // self.tubelet_size, self.grid_size, self.grid_size

    @property
    def num_patches(self) -> int:
        """Patches of an image, or of a clip of `num_frames`."""
        return math.prod(self.clip_grid)


@strict
class SSLTimmConfig(PreTrainedConfig):
    """Any timm model as a backbone, without its classifier."""

    model_type = "hf_ssl_timm"

    architecture: str = "resnet50"
    model_args: dict[str, Any] | None = None  # passed to timm.create_model
    image_size: int = 224
    num_channels: int = 3
    # 0: the architecture's own stem. 1 or 2: a 3x3 convolution of that stride, no pooling (timm's ResNets).
    small_stem_stride: int | None = None  # None: 1 for image_size < 64, else 0

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown_fields(type(self), kwargs)
        if self.small_stem_stride is None:
            self.small_stem_stride = int(self.image_size < SMALL_IMAGE_SIDE)
        if self.model_args is None:
            self.model_args = {}
        super().__post_init__(**kwargs)

    def validate_stem(self) -> None:
        """Refuse strides that cannot be exported."""
        if self.small_stem_stride not in (None, 0, 1, 2):
            raise ValueError(f"small_stem_stride must be 0, 1 or 2, got {self.small_stem_stride}")

    def describe(self) -> str:
        """The network in a few words."""
        stem = f", 3x3 stem of stride {self.small_stem_stride}" if self.small_stem_stride else ""
        return f"timm {self.architecture} at {self.image_size} px{stem}"

    @property
    def num_prefix_tokens(self) -> int:
        """A feature map has none."""
        return 0


BACKBONE_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    SSLViTConfig.model_type: SSLViTConfig,
    SSLTimmConfig.model_type: SSLTimmConfig,
}


def resolve_backbone_config(backbone: dict[str, Any] | PreTrainedConfig) -> PreTrainedConfig:
    """Build the backbone's config from its dictionary; our own table, as remote code has no registration.

    Raises:
        ValueError: `model_type` is missing or none of ours.
    """
    if isinstance(backbone, PreTrainedConfig):
        return backbone
    model_type = backbone.get("model_type", SSLViTConfig.model_type)
    if model_type not in BACKBONE_CONFIGS:
        raise ValueError(
            f"backbone_config.model_type must be one of {', '.join(BACKBONE_CONFIGS)}, got '{model_type}'"
        )
    return BACKBONE_CONFIGS[model_type](
        **{key: value for key, value in backbone.items() if key != "model_type"}
    )


@strict
class SSLConfig(PreTrainedConfig):
    """Base of every method's config: a backbone and the refusal of unknown fields."""

    # The paper's main backbone; overridden by methods.
    default_backbone: ClassVar[dict[str, Any]] = {"model_type": "hf_ssl_vit"}

    backbone_config: dict[str, Any] | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown_fields(type(self), kwargs)
        backbone = self.backbone_config if self.backbone_config is not None else self.default_backbone
        self.backbone_config = resolve_backbone_config(backbone)
        super().__post_init__(**kwargs)

    @property
    def image_size(self) -> int:
        """Side of the training images in pixels."""
        return int(self.backbone_config.image_size)  # type: ignore[union-attr]

    @property
    def encoder_config(self) -> SSLViTConfig:
        """The `backbone_config` of a method that needs a ViT, which `require_vit` has found to be ours."""
        return self.backbone_config  # type: ignore[return-value]

    def require_grid_of(self, other: PreTrainedConfig, name: str) -> None:
        """Raise unless another ViT has as many patches along a side; a CNN tells only when it runs.

        Raises:
            ValueError: it has more or fewer.
        """
        own = self.encoder_config.grid_size
        if isinstance(other, SSLViTConfig) and other.grid_size != own:
            there = other.grid_size
            raise ValueError(
                f"the {name} has {there} x {there} patches, the encoder trained {own} x {own}; set "
                "image_size and patch_size so that both have as many"
            )

    def require_vit(self) -> None:
        """Raise unless the backbone is our ViT.

        Raises:
            ValueError: the backbone has no patch tokens to hide.
        """
        if not isinstance(self.backbone_config, SSLViTConfig):
            raise ValueError(
                f"{type(self).__name__} needs a ViT backbone (model_type hf_ssl_vit), "
                f"got {type(self.backbone_config).__name__}"
            )


@strict
class SSLDistillationConfig(SSLConfig):
    """Base of the methods whose student predicts a momentum teacher's choice among prototypes.

    Durations below 1 are shares of the run's steps, others numbers of steps, as transformers' `warmup_steps`.
    Defaults are those of the authors' `main_dino.py` (arXiv 2104.14294).
    """

    num_prototypes: int = 65536  # --out_dim
    head_hidden_size: int = 2048
    head_bottleneck_size: int = 256
    num_head_layers: int = 3
    normalize_head: bool = False  # --use_bn_in_head; what makes small data learn
    # BatchNorm takes each view by itself, and patches by themselves, as lightly's does, instead of all crops
    # of a size, and all that passes the head, together, as the authors' does.
    separate_batch_norm: bool = False
    train_prototype_scale: bool = False  # not --norm_last_layer
    student_temperature: float | int = 0.1  # never scheduled
    teacher_temperature: float | int = 0.04  # --teacher_temp
    teacher_temperature_start: float | int = 0.04  # --warmup_teacher_temp
    teacher_temperature_warmup: float | int = 0.0  # duration; linear
    center_momentum: float | int = 0.9
    teacher_momentum: float | int = 0.996  # --momentum_teacher
    teacher_momentum_end: float | int = 1.0  # reached on half a cosine
    freeze_prototypes: float | int = 0.01  # duration; --freeze_last_layer, 1 epoch of 100
    koleo_weight: float | int = 0.0  # of the spread of features, DINOv2
    # Consecutive images among which KoLeo seeks neighbours; None: a micro-batch. Set it where micro-batch or
    # processes may change and the loss may not.
    koleo_group_size: int | None = None

    def validate_head(self) -> None:
        """Refuse sizes that make no head."""
        for name in ("num_prototypes", "head_hidden_size", "head_bottleneck_size", "num_head_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def validate_batch_norm(self) -> None:
        """Refuse a setting of BatchNorm where there is none."""
        is_vit = isinstance(self.backbone_config, SSLViTConfig)
        if self.separate_batch_norm and is_vit and not self.normalize_head:
            raise ValueError(
                "separate_batch_norm has no effect on a ViT whose head has no BatchNorm; set normalize_head, "
                "or leave it out"
            )

    def validate_temperatures(self) -> None:
        """Refuse temperatures that are none, and a teacher that is not sharper than its student."""
        for name in ("student_temperature", "teacher_temperature", "teacher_temperature_start"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        warmest = max(self.teacher_temperature, self.teacher_temperature_start)
        if warmest >= self.student_temperature:
            raise ValueError(
                f"the teacher's temperature {warmest} must be below student_temperature "
                f"{self.student_temperature}: without sharpening, targets become uniform"
            )

    def validate_shares(self) -> None:
        """Refuse momenta outside [0, 1] and negative durations and weights."""
        for name in ("center_momentum", "teacher_momentum", "teacher_momentum_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("teacher_temperature_warmup", "freeze_prototypes", "koleo_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.koleo_group_size is not None and self.koleo_group_size < 2:
            raise ValueError(f"koleo_group_size must be at least 2, got {self.koleo_group_size}")
