"""Configuration of BEiT."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_ssl.modeling.shared.configuration import SSLConfig, SSLViTConfig, resolve_backbone_config

DEFAULT_CODES, DEFAULT_CODE_SIZE = 8192, 32


@strict
class BEiTConfig(SSLConfig):
    """BEiT (arXiv 2106.08254) with the tokenizer of BEiT v2 (2208.06366). Sources: the authors' `beit` code.

    Where the versions differ, defaults follow version 2: exactly as many patches are hidden in every image.
    """

    model_type = "hf_ssl_beit"
    default_backbone = {
        "model_type": "hf_ssl_vit",
        "position_embedding_type": "none",
        "use_shared_relative_position_bias": True,
        "use_key_bias": False,
        "layer_scale_value": 0.1,
        "drop_path_rate": 0.1,
        "use_mask_token": True,
        "mask_token_std": 0.02,
        "weight_initialization": "trunc_normal_rescaled",
    }

    mask_ratio: float | int = 75 / 196  # --num_mask_patches of the 14 x 14 patches; the paper says 40 %
    min_block_patches: int = 16  # --min_mask_patches_per_block
    max_block_patches: int | None = None  # --max_mask_patches_per_block; None: all that are hidden
    exact_mask: bool = True  # version 2: random patches fill up what blocks left
    tokenizer_config: dict[str, Any] | None = None  # its backbone_config, num_codes and code_size

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        self.require_vit()
        if not self.encoder_config.use_mask_token:
            raise ValueError("BEiTConfig needs a mask token; set use_mask_token=True in the backbone_config")
        self.require_grid_of(self.tokenizer_backbone(), "tokenizer")

    def tokenizer_backbone(self) -> PreTrainedConfig:
        """Config of the tokenizer's encoder; of the encoder's size where none is given."""
        given = (self.tokenizer_config or {}).get("backbone_config")
        if given is not None:
            return resolve_backbone_config(given)
        sizes = (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "image_size",
            "patch_size",
            "num_channels",
        )
        return SSLViTConfig(**{name: getattr(self.encoder_config, name) for name in sizes})

    @property
    def vocab_size(self) -> int:
        """Tokens that there are."""
        return int((self.tokenizer_config or {}).get("num_codes", DEFAULT_CODES))

    @property
    def code_size(self) -> int:
        """Width of a code of the tokenizer."""
        return int((self.tokenizer_config or {}).get("code_size", DEFAULT_CODE_SIZE))

    def num_hidden_patches(self, num_patches: int) -> int:
        """Patches that are hidden of so many, at most."""
        return max(round(self.mask_ratio * num_patches), 1)

    def validate_masks(self) -> None:
        """Refuse masks that hide nothing or everything, and blocks of no size."""
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must be in (0, 1), got {self.mask_ratio}")
        if self.min_block_patches < 1:
            raise ValueError(f"min_block_patches must be at least 1, got {self.min_block_patches}")
        if self.max_block_patches is not None and self.max_block_patches < self.min_block_patches:
            raise ValueError(
                f"max_block_patches {self.max_block_patches} must be no less than min_block_patches "
                f"{self.min_block_patches}"
            )

    def validate_tokenizer(self) -> None:
        """Refuse keys that no tokenizer has."""
        unknown = set(self.tokenizer_config or {}) - {"backbone_config", "num_codes", "code_size"}
        if unknown:
            raise ValueError(
                f"tokenizer_config has backbone_config, num_codes and code_size, got '{sorted(unknown)[0]}'"
            )
