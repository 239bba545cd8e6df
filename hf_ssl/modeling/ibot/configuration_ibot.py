"""Configuration of iBOT."""

from typing import Any

from huggingface_hub.dataclasses import strict

from hf_ssl.modeling.shared.configuration import SSLDistillationConfig


@strict
class iBOTConfig(SSLDistillationConfig):  # noqa: N801  (the paper's spelling)
    """iBOT (arXiv 2111.07832). Sources: the authors' `main_ibot.py`, `loader.py` and the published arguments.

    Defaults are those of the published ViT runs where they differ from the code's: one head of 8,192
    prototypes for views and patches, on both branches. The default backbone is their ViT-S/16.
    """

    model_type = "hf_ssl_ibot"
    default_backbone = {
        "model_type": "hf_ssl_vit",
        "hidden_size": 384,
        "num_attention_heads": 6,
        "drop_path_rate": 0.1,
        "weight_initialization": "trunc_normal_linears",
        "use_mask_token": True,
    }

    num_prototypes: int = 8192  # --out_dim
    # --shared_head: views and patches have the same prototypes, not only the same MLP. The authors' code can
    # share on one branch alone; the branches could then not be copied to each other.
    shared_head: bool = True
    shared_head_teacher: bool | None = None  # None: as the student's; another value is refused
    num_patch_prototypes: int | None = None  # --patch_out_dim; None: num_prototypes
    teacher_temperature: float | int = 0.07
    patch_teacher_temperature: float | int = 0.07  # --teacher_patch_temp
    patch_teacher_temperature_start: float | int = 0.04  # --warmup_teacher_patch_temp
    class_loss_weight: float | int = 1.0  # --lambda1
    patch_loss_weight: float | int = 1.0  # --lambda2
    mask_shape: str = "block"  # --pred_shape; or "random"
    # --pred_ratio, --pred_ratio_var: a view chooses one entry, then U(ratio - spread, ratio + spread).
    mask_ratios: list[float | int] | None = None  # None: [0, 0.3], so half of the views are whole
    mask_ratio_spreads: list[float | int] | None = None  # None: [0, 0.2]
    mask_start: float | int = 0.0  # --pred_start_epoch; duration without masks or patch warm-up

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.require_vit()
        self.backbone_config.use_mask_token = True  # type: ignore[union-attr]
        if self.shared_head_teacher is None:
            self.shared_head_teacher = self.shared_head
        if self.num_patch_prototypes is None:
            self.num_patch_prototypes = self.num_prototypes
        if self.mask_ratios is None:
            self.mask_ratios = [0.0, 0.3]
        if self.mask_ratio_spreads is None:
            self.mask_ratio_spreads = [0.0, 0.2]

    def validate_heads(self) -> None:
        """Refuse branches of different heads, and a shared head of two sizes."""
        if self.shared_head_teacher not in (None, self.shared_head):
            raise ValueError(
                f"shared_head is {self.shared_head} and shared_head_teacher {self.shared_head_teacher}: the "
                "branches must have the same heads; set both alike"
            )
        if self.shared_head and self.num_patch_prototypes not in (None, self.num_prototypes):
            raise ValueError(
                f"a shared head has num_prototypes {self.num_prototypes} for patches too, got "
                f"num_patch_prototypes {self.num_patch_prototypes}; leave it out, or set shared_head=False"
            )

    def validate_masks(self) -> None:
        """Refuse shapes and ratios that hide nothing sensible, and a patch teacher that is not sharper."""
        if self.mask_shape not in ("block", "random"):
            raise ValueError(f"mask_shape must be 'block' or 'random', got '{self.mask_shape}'")
        ratios, spreads = self.mask_ratios or [0.0, 0.3], self.mask_ratio_spreads or [0.0, 0.2]
        if len(ratios) != len(spreads) or not all(
            0 <= ratio - spread and ratio + spread < 1 for ratio, spread in zip(ratios, spreads, strict=False)
        ):
            raise ValueError(
                f"mask_ratios {ratios} and mask_ratio_spreads {spreads} must be as many, with "
                "0 <= ratio - spread and ratio + spread < 1"
            )
        for name in ("patch_teacher_temperature", "patch_teacher_temperature_start"):
            if not 0 < getattr(self, name) < self.student_temperature:
                raise ValueError(
                    f"{name} must be > 0 and below student_temperature {self.student_temperature}, got "
                    f"{getattr(self, name)}"
                )
        for name in ("mask_start", "class_loss_weight", "patch_loss_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
