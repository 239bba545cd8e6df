"""Configuration of SimCLR (v1 and v2 heads)."""

from huggingface_hub.dataclasses import strict

from hf_ssl.modeling.shared.configuration import SSLConfig


@strict
class SimCLRConfig(SSLConfig):
    """SimCLR (arXiv 2002.05709; v2: 2006.10029).

    Sources: the authors' `model_util.py`, `run.py` and README.
    """

    model_type = "hf_ssl_simclr"
    default_backbone = {"model_type": "hf_ssl_timm", "architecture": "resnet50"}

    temperature: float | int = 0.1  # --temperature; CIFAR-10: 0.5
    projection_size: int = 128  # --proj_out_dim
    projection_hidden_size: int | None = None  # None: the width of the backbone's features
    num_projection_layers: int = 2  # --num_proj_layers; v2: 3

    def validate_temperature(self) -> None:
        """Refuse a temperature that no softmax can take."""
        if self.temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
