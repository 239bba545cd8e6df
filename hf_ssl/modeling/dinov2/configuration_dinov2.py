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
