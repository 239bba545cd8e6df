"""Configuration of BEiT v2's tokenizer."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_ssl.modeling.shared.configuration import SSLConfig, resolve_backbone_config


@strict
class BEiTTokenizerConfig(SSLConfig):
    """VQ-KD (arXiv 2208.06366, section 3.1). Source: the authors' `modeling_vqkd.py`.

    With a `distiller_config` the codes must say what a frozen encoder sees in a patch, as in the paper;
    without one, what its pixels are.
    """

    model_type = "hf_ssl_beit_tokenizer"
    default_backbone = {"model_type": "hf_ssl_vit", "weight_initialization": "trunc_normal"}

    num_codes: int = 8192  # n_code
    code_size: int = 32  # code_dim
    decoder_num_hidden_layers: int = 1  # with 3: 97 % of the codes are used, with 1: all
    commitment_weight: float | int = 1.0  # beta
    codebook_momentum: float | int = 0.99  # decay
    kmeans_start: bool = True  # --quantize_kmeans_init
    restart_every: int = 100  # steps; codes with less than 1 % of their even share start again. 0: never
    distiller_config: dict[str, Any] | None = None  # of the encoder distilled: its backbone_config

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        self.require_vit()
        distiller = self.distiller()
        if distiller is not None:
            self.require_grid_of(distiller, "encoder distilled")

    @property
    def normalize_targets(self) -> bool:
        """Pixels are those of patches of mean 0 and variance 1."""
        return True

    def distiller(self) -> PreTrainedConfig | None:
        """Config of the frozen encoder's backbone."""
        if self.distiller_config is None:
            return None
        return resolve_backbone_config(self.distiller_config["backbone_config"])

    def validate_counts(self) -> None:
        """Refuse sizes that make no codebook."""
        for name, least in (("num_codes", 2), ("code_size", 2), ("decoder_num_hidden_layers", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.restart_every < 0:
            raise ValueError(f"restart_every must be >= 0, got {self.restart_every}")

    def validate_shares(self) -> None:
        """Refuse momenta outside [0, 1) and negative weights."""
        if not 0 <= self.codebook_momentum < 1:
            raise ValueError(f"codebook_momentum must be in [0, 1), got {self.codebook_momentum}")
        if self.commitment_weight < 0:
            raise ValueError(f"commitment_weight must be >= 0, got {self.commitment_weight}")
