"""Configuration of V-JEPA."""

from huggingface_hub.dataclasses import strict

from hf_ssl.modeling.shared.joint_embedding import JointEmbeddingConfig


@strict
class VJEPAConfig(JointEmbeddingConfig):
    """V-JEPA (arXiv 2404.08471), ViT-L/16. Sources: the authors' `configs/`, `train.py`, `multiblock3d.py`.

    Masks and loss are V-JEPA's; positions are rotations, as V-JEPA 2 (arXiv 2506.09985) has them, since no
    native class has V-JEPA's own table (`position_embedding_type: sincos_row_first`).
    """

    model_type = "hf_ssl_vjepa"
    default_backbone = {
        "model_type": "hf_ssl_vit",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 16,
        "num_frames": 16,
        "tubelet_size": 2,
        "use_class_token": False,
        "position_embedding_type": "rope",
        "weight_initialization": "trunc_normal",
    }

    predictor_num_attention_heads: int | None = 12  # V-JEPA 2; None: the encoder's, as V-JEPA
    loss_exponent: float | int = 1.0  # loss_exp: mean |prediction - target|^k / k
    # One kind of mask per entry: short-range, then long-range.
    mask_num_tubes: list[int] | None = None  # num_blocks; None: 8 and 2
    mask_scales: list[float | int] | None = None  # spatial_scale; None: 0.15 and 0.7
    mask_aspect: list[float | int] | None = None  # aspect_ratio, rows / columns; None: 0.75 to 1.5
    mask_temporal_scale: float | int = 1.0  # temporal_scale: tubes through the whole clip
    teacher_momentum: float | int = 0.998  # V-JEPA 2: 0.99925 from start to end

    def __post_init__(self, **kwargs: object) -> None:
        self.mask_num_tubes = self.mask_num_tubes or [8, 2]
        self.mask_scales = self.mask_scales or [0.15, 0.7]
        self.mask_aspect = self.mask_aspect or [0.75, 1.5]
        super().__post_init__(**kwargs)
        if not self.encoder_config.is_video:
            raise ValueError("VJEPAConfig needs a backbone of clips; set num_frames above 1 and tubelet_size")

    def validate_ranges(self) -> None:
        """Refuse kinds of masks that do not match, and shares outside (0, 1]."""
        tubes, scales = self.mask_num_tubes or [8, 2], self.mask_scales or [0.15, 0.7]
        if len(tubes) != len(scales) or min(tubes) < 1:
            raise ValueError(
                f"mask_num_tubes {tubes} and mask_scales {scales} must have an entry, at least 1 tube, for "
                "each kind of mask"
            )
        shares = {"mask_scales": scales, "mask_temporal_scale": [self.mask_temporal_scale]}
        for name, values in shares.items():
            if not all(0 < value <= 1 for value in values):
                raise ValueError(f"{name} must be above 0 and at most 1, got {values}")
        low, *others = self.mask_aspect or [0.75, 1.5]
        if len(others) != 1 or not 0 < low <= others[0]:
            raise ValueError(f"mask_aspect must be two rising numbers above 0, got {[low, *others]}")
        if self.loss_exponent < 1:
            raise ValueError(f"loss_exponent must be at least 1, got {self.loss_exponent}")
