"""Configuration of MoCo v3 (ViT and ResNet forms)."""

from typing import Any

from huggingface_hub.dataclasses import strict

from hf_ssl.modeling.shared.configuration import SSLConfig, SSLViTConfig


@strict
class MoCoV3Config(SSLConfig):
    """MoCo v3 (arXiv 2104.02057). Sources: the authors' `moco/builder.py`, `vits.py` and `CONFIG.md`.

    The default backbone is their ViT-S, which has 12 heads (other ViT-S have 6).
    """

    model_type = "hf_ssl_mocov3"
    default_backbone = {
        "model_type": "hf_ssl_vit",
        "hidden_size": 384,
        "num_attention_heads": 12,
        "position_embedding_type": "sincos_row_first",
        "weight_initialization": "xavier_uniform",
        "class_token_std": 1e-6,
        "freeze_patch_embedding": True,
    }

    temperature: float | int | None = None  # --moco-t; None: 0.2 for a ViT, 1.0 for a CNN
    teacher_momentum: float | int = 0.99  # --moco-m with --moco-m-cos: rises to 1; R50 at 1000 epochs: 0.996
    projection_size: int = 256  # --moco-dim
    projection_hidden_size: int = 4096  # --moco-mlp-dim
    num_projection_layers: int | None = None  # None: 3 for a ViT, 2 for a CNN
    # BatchNorm after the predictor; None: ViT yes, CNN no (as the authors' code, not the paper)
    normalize_predictions: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        is_vit = isinstance(self.backbone_config, SSLViTConfig)
        if self.temperature is None:
            self.temperature = 0.2 if is_vit else 1.0
        if self.num_projection_layers is None:
            self.num_projection_layers = 3 if is_vit else 2
        if self.normalize_predictions is None:
            self.normalize_predictions = is_vit

    def validate_ranges(self) -> None:
        """Refuse values outside their range."""
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        if not 0 <= self.teacher_momentum <= 1:
            raise ValueError(f"teacher_momentum must be in [0, 1], got {self.teacher_momentum}")
