"""Configuration of I-JEPA."""

from huggingface_hub.dataclasses import strict

from hf_ssl.modeling.shared.joint_embedding import JointEmbeddingConfig


@strict
class IJEPAConfig(JointEmbeddingConfig):
    """I-JEPA (arXiv 2301.08243), ViT-H/14. Sources: the authors' `configs/`, `train.py` and `multiblock.py`.

    Where paper and code differ, defaults follow the code, which the published weights were trained with.
    Scales are shares of the patches of an image, aspects height / width.
    """

    model_type = "hf_ssl_ijepa"
    default_backbone = {
        "model_type": "hf_ssl_vit",
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "use_class_token": False,
        "position_embedding_type": "sincos_column_first",
        "weight_initialization": "trunc_normal",
    }

    loss: str = "smooth_l1"  # the code; the paper says "l2"
    num_targets: int = 4  # num_pred_masks
    target_scale: list[float | int] | None = None  # pred_mask_scale; None: 0.15 to 0.2
    target_aspect: list[float | int] | None = None  # aspect_ratio; None: 0.75 to 1.5
    context_scale: list[float | int] | None = None  # enc_mask_scale; None: 0.85 to 1
    min_context_patches: int = 11  # more than min_keep, 10; smaller contexts are drawn again
    # The authors' code never draws the last offset of a block, so that the last row and column of patches
    # are neither context nor target.
    reach_last_row: bool = False

    def __post_init__(self, **kwargs: object) -> None:
        self.target_scale = self.target_scale or [0.15, 0.2]
        self.target_aspect = self.target_aspect or [0.75, 1.5]
        self.context_scale = self.context_scale or [0.85, 1.0]
        super().__post_init__(**kwargs)
        encoder = self.encoder_config
        if encoder.num_prefix_tokens:
            raise ValueError(
                "IJEPAConfig needs a backbone of patches alone; set use_class_token=False and "
                f"num_register_tokens=0 (it has {encoder.num_prefix_tokens} tokens before the patches)"
            )

    def validate_choices(self) -> None:
        """Refuse unknown losses."""
        if self.loss not in ("smooth_l1", "l2"):
            raise ValueError(f"loss must be one of smooth_l1, l2, got '{self.loss}'")

    def validate_ranges(self) -> None:
        """Refuse scales outside (0, 1], aspects and counts that make no block."""
        for name, largest in (("target_scale", 1.0), ("context_scale", 1.0), ("target_aspect", float("inf"))):
            low, *others = getattr(self, name) or [1.0, 1.0]
            if len(others) != 1 or not 0 < low <= others[0] <= largest:
                limit = " at most 1" if largest == 1 else ""
                raise ValueError(f"{name} must be two rising numbers above 0{limit}, got {[low, *others]}")
        for name in ("num_targets", "min_context_patches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
