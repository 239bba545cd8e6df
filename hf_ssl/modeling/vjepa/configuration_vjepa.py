"""Configuration of V-JEPA."""

from huggingface_hub.dataclasses import strict

from hf_ssl.modeling.shared.configuration import SSLConfig
from hf_ssl.modeling.shared.multi_block import TRUNCATIONS


@strict
class VJEPAConfig(SSLConfig):
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

    predictor_hidden_size: int = 384  # pred_embed_dim
    predictor_num_hidden_layers: int = 12  # pred_depth
    predictor_num_attention_heads: int | None = 12  # V-JEPA 2; None: the encoder's, as V-JEPA
    loss_exponent: float | int = 1.0  # loss_exp: mean |prediction - target|^k / k
    # One kind of mask per entry: short-range, then long-range.
    mask_num_tubes: list[int] | None = None  # num_blocks; None: 8 and 2
    mask_scales: list[float | int] | None = None  # spatial_scale; None: 0.15 and 0.7
    mask_aspect: list[float | int] | None = None  # aspect_ratio, rows / columns; None: 0.75 to 1.5
    mask_temporal_scale: float | int = 1.0  # temporal_scale: tubes through the whole clip
    # Lists are cut to the smallest of a group: the "first" patches stay, as in the authors' code, which
    # starves the last frames, or "random" ones.
    truncation: str = "first"
    mask_group_size: int | None = None  # clips among which lists are cut; None: all of a step
    teacher_momentum: float | int = 0.998  # ema, its start
    teacher_momentum_end: float | int = 1.0  # reached on a line; V-JEPA 2: 0.99925 from start to end

    def __post_init__(self, **kwargs: object) -> None:
        self.mask_num_tubes = self.mask_num_tubes or [8, 2]
        self.mask_scales = self.mask_scales or [0.15, 0.7]
        self.mask_aspect = self.mask_aspect or [0.75, 1.5]
        super().__post_init__(**kwargs)
        self.require_vit()
        if not self.encoder_config.is_video:
            raise ValueError("VJEPAConfig needs a backbone of clips; set num_frames above 1 and tubelet_size")
        width, heads = self.predictor_hidden_size, self.predictor_heads
        if width % heads:
            raise ValueError(
                f"predictor_hidden_size {width} must be a multiple of its {heads} attention heads; change it "
                "or predictor_num_attention_heads"
            )

    @property
    def predictor_heads(self) -> int:
        """Attention heads of the predictor."""
        return self.predictor_num_attention_heads or self.encoder_config.num_attention_heads

    def validate_choices(self) -> None:
        """Refuse unknown truncations."""
        if self.truncation not in TRUNCATIONS:
            raise ValueError(f"truncation must be one of {', '.join(TRUNCATIONS)}, got '{self.truncation}'")

    def validate_ranges(self) -> None:
        """Refuse kinds of masks that do not match, shares outside (0, 1], momenta outside [0, 1]."""
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
        if self.predictor_num_hidden_layers < 1:
            raise ValueError(
                f"predictor_num_hidden_layers must be at least 1, got {self.predictor_num_hidden_layers}"
            )
        if self.mask_group_size is not None and self.mask_group_size < 1:
            raise ValueError(f"mask_group_size must be at least 1, got {self.mask_group_size}")
        for name in ("teacher_momentum", "teacher_momentum_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
