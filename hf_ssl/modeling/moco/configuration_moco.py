"""Configuration of MoCo v1 and v2."""

from huggingface_hub.dataclasses import strict

from hf_ssl.modeling.shared.configuration import SSLConfig


@strict
class MoCoConfig(SSLConfig):
    """MoCo v2 by default (arXiv 2003.04297); v1: 1911.05722.

    Sources: the authors' `main_moco.py` and README.
    """

    model_type = "hf_ssl_moco"
    default_backbone = {"model_type": "hf_ssl_timm", "architecture": "resnet50"}

    projection_head: str = "mlp"  # --mlp; v1: "linear"
    normalize_projection: bool = False  # BatchNorm in the hidden layer; not in the paper
    projection_size: int = 128  # --moco-dim
    queue_length: int = 65536  # --moco-k; a multiple of the global batch
    temperature: float | int = 0.2  # --moco-t, README for v2; v1: 0.07
    teacher_momentum: float | int = 0.999  # --moco-m; constant, no schedule
    batch_norm_splits: int = 1  # groups of virtual devices; 8 in the authors' CIFAR-10 notebook on one GPU

    def validate_choices(self) -> None:
        """Refuse values outside their range."""
        if self.projection_head not in ("linear", "mlp"):
            raise ValueError(
                f"projection_head must be 'linear' (v1) or 'mlp' (v2), got '{self.projection_head}'"
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        if not 0 <= self.teacher_momentum < 1:
            raise ValueError(f"teacher_momentum must be in [0, 1), got {self.teacher_momentum}")
        if self.batch_norm_splits < 1 or self.queue_length < 1:
            raise ValueError("batch_norm_splits and queue_length must be at least 1")
