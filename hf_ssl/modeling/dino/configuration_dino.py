"""Configuration of DINO."""

from huggingface_hub.dataclasses import strict

from hf_ssl.modeling.shared.configuration import SSLDistillationConfig


@strict
class DINOConfig(SSLDistillationConfig):
    """DINO (arXiv 2104.14294). Sources: the authors' `main_dino.py`, `vision_transformer.py` and README.

    The fields are those of all self-distillation methods; the default backbone is their ViT-S/16. `ViTModel`
    and timm's CNNs take the paper's place for XCiT and torchvision's ResNets.
    """

    model_type = "hf_ssl_dino"
    default_backbone = {
        "model_type": "hf_ssl_vit",
        "hidden_size": 384,
        "num_attention_heads": 6,
        "drop_path_rate": 0.1,  # of the student; the teacher has none
        "weight_initialization": "trunc_normal_linears",
    }
