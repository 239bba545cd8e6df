"""Configuration of DINOv2."""

from typing import Any

from huggingface_hub.dataclasses import strict

from hf_ssl.modeling.shared.configuration import SSLDistillationConfig


@strict
class DINOv2Config(SSLDistillationConfig):
    """DINOv2 (arXiv 2304.07193), with Gram anchoring of DINOv3 (2508.10104) as an option.

    Sources: the authors' `ssl_default_config.yaml`, which is also the short ViT-L/16 run. The field
    `train_prototype_scale` is their head's only form.
    """

    model_type = "hf_ssl_dinov2"
    default_backbone = {
        "model_type": "hf_ssl_vit",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "layer_scale_value": 1e-5,
        "drop_path_rate": 0.3,
        "drop_path_uniform": True,
        "weight_initialization": "trunc_normal_linears",
        "class_token_std": 1e-6,
        "register_token_std": 1e-6,
        "use_mask_token": True,
    }

    train_prototype_scale: bool = True
    teacher_temperature: float | int = 0.07
    teacher_temperature_warmup: float | int = 0.3  # 30 of 100 epochs; linear
    teacher_momentum: float | int = 0.992
    centering: str = "centering"  # or "sinkhorn_knopp", as the ViT-L/14 and ViT-g/14 runs
    separate_patch_head: bool = False  # ibot.separate_head
    num_patch_prototypes: int | None = None  # of a separate head; None: num_prototypes
    patch_bottleneck_size: int | None = None  # of a separate head; None: head_bottleneck_size
    class_loss_weight: float | int = 1.0
    patch_loss_weight: float | int = 1.0
    mask_probability: float | int = 0.5  # share of the global views of a step that have a mask
    mask_ratio_min: float | int = 0.1  # of the patches of such a view, in strata over the step
    mask_ratio_max: float | int = 0.5
    koleo_weight: float | int = 0.1
    # Gram anchoring (DINOv3), for long runs whose patch features decay: patches keep the similarities that
    # an earlier teacher, the anchor, gives them. DINOv3's 7B run had weight 2, snapshot 0.17 and start 0.83.
    gram_weight: float | int = 0.0  # 0: off, and no anchor is kept
    gram_snapshot: float | int = 0.1  # when the anchor is taken from the teacher
    gram_start: float | int = 0.8  # when the loss begins
    gram_warmup: float | int = 1000  # on half a cosine to its weight
    gram_update_every: int = 0  # steps between new anchors after the start; 0: none
    gram_max_updates: int = 3
    gram_negatives: str = "kept"  # similarities below 0; or "zero", or "zero_in_anchor"

    # Distillation into a smaller model (section 5): fields of the DINOv2Config of a frozen, larger teacher
    # that makes all targets; None: targets come from the student's own average.
    distiller_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.require_vit()
        self.backbone_config.use_mask_token = True  # type: ignore[union-attr]
        if self.num_patch_prototypes is None:
            self.num_patch_prototypes = self.num_prototypes
        if self.patch_bottleneck_size is None:
            self.patch_bottleneck_size = self.head_bottleneck_size

    def validate_patch_head(self) -> None:
        """Refuse sizes for a head that does not exist, and BatchNorm where it could see no rows."""
        sizes = {
            "num_patch_prototypes": (self.num_patch_prototypes, self.num_prototypes),
            "patch_bottleneck_size": (self.patch_bottleneck_size, self.head_bottleneck_size),
        }
        for name, (own, shared) in sizes.items():
            if not self.separate_patch_head and own not in (None, shared):
                raise ValueError(f"{name} {own} needs separate_patch_head=True; the tied head has {shared}")
            if own is not None and own < 1:
                raise ValueError(f"{name} must be at least 1, got {own}")
        if self.separate_patch_head and self.normalize_head:
            raise ValueError(
                "normalize_head needs the tied head: a separate one meets hidden patches alone, which may be "
                "too few for BatchNorm; set separate_patch_head=False"
            )

    def validate_masks(self) -> None:
        """Refuse ratios and shares outside their range."""
        if self.centering not in ("centering", "sinkhorn_knopp"):
            raise ValueError(f"centering must be 'centering' or 'sinkhorn_knopp', got '{self.centering}'")
        if not 0 <= self.mask_ratio_min <= self.mask_ratio_max < 1:
            raise ValueError(
                f"masks need 0 <= mask_ratio_min <= mask_ratio_max < 1, got {self.mask_ratio_min} and "
                f"{self.mask_ratio_max}"
            )
        if not 0 <= self.mask_probability <= 1:
            raise ValueError(f"mask_probability must be in [0, 1], got {self.mask_probability}")
        for name in ("class_loss_weight", "patch_loss_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")

    def validate_distiller(self) -> None:
        """Refuse a frozen teacher whose prototypes or patches are not the student's."""
        if self.distiller_config is None:
            return
        there = self.distiller()
        pairs = {
            "num_prototypes": (there.num_prototypes, self.num_prototypes),
            "num_patch_prototypes": (there.num_patch_prototypes, self.num_patch_prototypes),
            "separate_patch_head": (there.separate_patch_head, self.separate_patch_head),
            "patch_size": (there.backbone_config.patch_size, self.backbone_config.patch_size),  # type: ignore[union-attr]
            "num_channels": (there.backbone_config.num_channels, self.backbone_config.num_channels),  # type: ignore[union-attr]
        }
        for name, (theirs, own) in pairs.items():
            if theirs != own:
                raise ValueError(f"{name} is {own} and the frozen teacher's {theirs}; they must be the same")

    def distiller(self) -> "DINOv2Config":
        """Configuration of the frozen teacher."""
        return type(self)(**(self.distiller_config or {}))

    def validate_gram(self) -> None:
        """Refuse negative weights and durations, and a loss that begins before it has an anchor."""
        names = ("weight", "snapshot", "start", "warmup", "update_every", "max_updates")
        for name in names:
            if getattr(self, f"gram_{name}") < 0:
                raise ValueError(f"gram_{name} must be >= 0, got {getattr(self, f'gram_{name}')}")
        if self.gram_negatives not in ("kept", "zero", "zero_in_anchor"):
            raise ValueError(
                f"gram_negatives must be kept, zero or zero_in_anchor, got '{self.gram_negatives}'"
            )
        same_unit = (self.gram_snapshot < 1) == (self.gram_start < 1)
        if same_unit and self.gram_start < self.gram_snapshot:
            raise ValueError(
                f"gram_start {self.gram_start} is before gram_snapshot {self.gram_snapshot}: there would be "
                "no anchor yet"
            )
