"""Configuration of MAE."""

from huggingface_hub.dataclasses import strict

from hf_ssl.modeling.shared.configuration import SSLConfig


@strict
class MAEConfig(SSLConfig):
    """MAE (arXiv 2111.06377). Sources: the authors' `models_mae.py`, `main_pretrain.py` and PRETRAIN.md."""

    model_type = "hf_ssl_mae"
    default_backbone = {
        "model_type": "hf_ssl_vit",
        "position_embedding_type": "sincos_column_first",
        "weight_initialization": "xavier_uniform_joint_qkv",
    }

    mask_ratio: float | int = 0.75  # --mask_ratio
    normalize_targets: bool = True  # --norm_pix_loss, on in the published recipe
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        self.require_vit()

    def validate_ranges(self) -> None:
        """Refuse values outside their range."""
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must be in (0, 1), got {self.mask_ratio}")
        if self.decoder_hidden_size % self.decoder_num_attention_heads or self.decoder_hidden_size % 4:
            raise ValueError(
                f"decoder_hidden_size {self.decoder_hidden_size} must be a multiple of 4 and of "
                f"decoder_num_attention_heads {self.decoder_num_attention_heads}"
            )
