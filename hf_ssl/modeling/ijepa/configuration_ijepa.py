"""Configuration of I-JEPA."""

from huggingface_hub.dataclasses import strict

from hf_ssl.modeling.shared.configuration import SSLConfig
from hf_ssl.modeling.shared.multi_block import TRUNCATIONS


@strict
class IJEPAConfig(SSLConfig):
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

    predictor_hidden_size: int = 384  # pred_emb_dim
    predictor_num_hidden_layers: int = 12  # pred_depth of L and H; B: 6, g: 16
    predictor_num_attention_heads: int | None = None  # None: the encoder's, as the authors' code
    loss: str = "smooth_l1"  # the code; the paper says "l2"
    num_targets: int = 4  # num_pred_masks
    target_scale: list[float | int] | None = None  # pred_mask_scale; None: 0.15 to 0.2
    target_aspect: list[float | int] | None = None  # aspect_ratio; None: 0.75 to 1.5
    context_scale: list[float | int] | None = None  # enc_mask_scale; None: 0.85 to 1
    min_context_patches: int = 11  # more than min_keep, 10; smaller contexts are drawn again
    # The authors' code never draws the last offset of a block, so that the last row and column of patches
    # are neither context nor target.
    reach_last_row: bool = False
    # Contexts of a group are cut to its smallest: the "first" patches stay, as in the authors' code, which
    # starves the lower rows, or "random" ones.
    truncation: str = "first"
    # Consecutive images among which contexts are cut, a multiple of the micro-batch; None: all of a step.
    mask_group_size: int | None = None
    teacher_momentum: float | int = 0.996  # ema, its start
    teacher_momentum_end: float | int = 1.0  # reached on a line

    def __post_init__(self, **kwargs: object) -> None:
        self.target_scale = self.target_scale or [0.15, 0.2]
        self.target_aspect = self.target_aspect or [0.75, 1.5]
        self.context_scale = self.context_scale or [0.85, 1.0]
        super().__post_init__(**kwargs)
        self.require_vit()
        encoder = self.encoder_config
        if encoder.num_prefix_tokens:
            raise ValueError(
                "IJEPAConfig needs a backbone of patches alone; set use_class_token=False and "
                f"num_register_tokens=0 (it has {encoder.num_prefix_tokens} tokens before the patches)"
            )
        width, heads = self.predictor_hidden_size, self.predictor_heads
        if width % heads or width % 4:
            raise ValueError(
                f"predictor_hidden_size {width} must be a multiple of 4 and of its {heads} attention heads; "
                "change it or predictor_num_attention_heads"
            )

    @property
    def predictor_heads(self) -> int:
        """Attention heads of the predictor."""
        return self.predictor_num_attention_heads or self.encoder_config.num_attention_heads

    def validate_choices(self) -> None:
        """Refuse unknown losses and truncations."""
        for name, allowed in {"loss": ("smooth_l1", "l2"), "truncation": TRUNCATIONS}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got '{getattr(self, name)}'")

    def validate_ranges(self) -> None:
        """Refuse scales and momenta outside (0, 1] and [0, 1], aspects and counts that make no block."""
        for name, largest in (("target_scale", 1.0), ("context_scale", 1.0), ("target_aspect", float("inf"))):
            low, *others = getattr(self, name) or [1.0, 1.0]
            if len(others) != 1 or not 0 < low <= others[0] <= largest:
                limit = " at most 1" if largest == 1 else ""
                raise ValueError(f"{name} must be two rising numbers above 0{limit}, got {[low, *others]}")
        for name in ("num_targets", "min_context_patches", "predictor_num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.mask_group_size is not None and self.mask_group_size < 1:
            raise ValueError(f"mask_group_size must be at least 1, got {self.mask_group_size}")
        for name in ("teacher_momentum", "teacher_momentum_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
