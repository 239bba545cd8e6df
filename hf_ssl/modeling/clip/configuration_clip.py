"""Configuration of CLIP."""

from huggingface_hub.dataclasses import strict

from hf_ssl.modeling.shared.image_text import SSLImageTextConfig


@strict
class SSLCLIPConfig(SSLImageTextConfig):
    """CLIP (arXiv 2103.00020), ViT-B/32. Sources: the authors' `model.py`, open_clip's `model_configs`."""

    model_type = "hf_ssl_clip"
    default_backbone = {"model_type": "hf_ssl_vit", "patch_size": 32, "layer_norm_eps": 1e-5}

    projection_size: int | None = 512  # embed_dim; None: texts are projected into the image tower's own space
    logit_scale_start: float | int = 2.659260036932778  # of the logarithm: ln(1 / 0.07)
    logit_scale_limit: float | int = 4.605170185988092  # ln 100, after every step

    def validate_projection(self) -> None:
        """Refuse an embedding of no width."""
        if self.projection_size is not None and self.projection_size < 1:
            raise ValueError(f"projection_size must be at least 1, got {self.projection_size}")

    def validate_scale(self) -> None:
        """Refuse a scale that starts beyond its limit; both are logarithms."""
        if not 0 <= self.logit_scale_start <= self.logit_scale_limit:
            raise ValueError(
                f"logit_scale_start {self.logit_scale_start:g} and logit_scale_limit "
                f"{self.logit_scale_limit:g} are logarithms: 0 <= start <= limit, such as 2.659 and 4.605"
            )

    def validate_end_token(self) -> None:
        """Refuse the id for which the native text model pools the largest id instead of the end token."""
        if self.eos_token_id == 2:
            raise ValueError(
                "eos_token_id must not be 2, for which CLIPTextModel pools the token of the largest id; take "
                "a tokenizer whose end token comes last"
            )
