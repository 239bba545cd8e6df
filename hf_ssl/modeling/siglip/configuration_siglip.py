"""Configuration of SigLIP."""

from huggingface_hub.dataclasses import strict

from hf_ssl.modeling.shared.configuration import SSLViTConfig
from hf_ssl.modeling.shared.image_text import SSLImageTextConfig


@strict
class SigLIPConfig(SSLImageTextConfig):
    """SigLIP (arXiv 2303.15343), ViT-B/16. Sources: the authors' `siglip_lit_coco.py`, `two_towers.py`."""

    model_type = "hf_ssl_siglip"
    default_backbone = {
        "model_type": "hf_ssl_vit",
        "use_class_token": False,
        "hidden_act": "gelu_pytorch_tanh",
    }

    text_hidden_size: int = 768
    text_num_attention_heads: int = 12
    text_max_length: int = 64  # texts are padded to it; the pipelines of transformers know no other
    vocab_size: int = 32000
    logit_scale_start: float | int = 2.302585092994046  # of the logarithm: ln 10
    logit_bias_start: float | int = -10.0

    @property
    def pools_by_attention(self) -> bool:
        """Whether the head pools the patches; an image tower with a pooled output of its own keeps that."""
        return isinstance(self.backbone_config, SSLViTConfig) and not self.backbone_config.use_class_token
