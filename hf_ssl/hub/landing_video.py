"""Our ViT of clips as `VJEPA2Model`, with a `VJEPA2VideoProcessor`.

The native class has a predictor, which features do not pass through (`skip_predictor=True`); here it is
empty: no blocks, zeros as weights. The trained predictor stays in the pre-training checkpoint.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from hf_ssl.hub.landing_vit import processor_options
from hf_ssl.hub.native import VIDEO_CLASS, Landing
from hf_ssl.modeling.shared.configuration import SSLViTConfig
from hf_ssl.modeling.shared.image_processing import SSLImageProcessor
from hf_ssl.modeling.shared.vit import SSLViTBackbone


def land_video(backbone: SSLViTBackbone, processor: SSLImageProcessor) -> Landing:
    """`VJEPA2Model` for a ViT of clips.

    Raises:
        ValueError: it computes something else than the backbone.
    """
    _check(backbone.config)
    return Landing(
        native_class=VIDEO_CLASS,
        write=lambda folder: _write(backbone, processor, folder),
        state_names=["embeddings", *(f"layers.{n}" for n in range(backbone.config.num_hidden_layers))],
        has_pooled_output=False,
        forward_options={"skip_predictor": True},
        notes=[
            "no pooled output: call it with skip_predictor=True and average last_hidden_state",
            f"for clips of {backbone.config.image_size} px alone: others have their patches misplaced",
            "the trained predictor stays in the pre-training checkpoint",
        ],
    )


def _check(config: SSLViTConfig) -> None:
    if config.position_embedding_type != "rope":
        raise ValueError(
            "no native class has a table of positions for clips; train with position_embedding_type rope"
        )
    if config.use_swiglu_ffn or not config.use_key_bias:
        raise ValueError("VJEPA2Model has no gated MLP and biases of keys; set use_swiglu_ffn=False")


def _write(backbone: SSLViTBackbone, processor: SSLImageProcessor, folder: Path) -> None:
    from transformers import VJEPA2Config, VJEPA2Model, VJEPA2VideoProcessor

    config = backbone.config
    model = VJEPA2Model(
        VJEPA2Config(
            patch_size=config.patch_size,
            crop_size=config.image_size,
            frames_per_clip=config.num_frames,
            tubelet_size=config.tubelet_size,
            hidden_size=config.hidden_size,
            in_chans=config.num_channels,
            num_attention_heads=config.num_attention_heads,
            num_hidden_layers=config.num_hidden_layers,
            mlp_ratio=config.intermediate_size / config.hidden_size,  # type: ignore[operator]
            layer_norm_eps=config.layer_norm_eps,
            qkv_bias=config.qkv_bias,
            hidden_act=config.hidden_act,
            pred_hidden_size=config.hidden_size,
            pred_num_attention_heads=config.num_attention_heads,
            pred_num_hidden_layers=0,
            pred_num_mask_tokens=1,
        )
    )
    state = model.state_dict()
    empty = {name: torch.zeros_like(value) for name, value in state.items() if name.startswith("predictor.")}
    model.load_state_dict(empty | _state(backbone), strict=True)
    model.save_pretrained(folder)
    # The native processor's side before the crop follows from the crop's, as ours does.
    options = processor_options(processor) | {"crop_size": config.image_size}
    VJEPA2VideoProcessor(**options).save_pretrained(folder)


def _state(backbone: SSLViTBackbone) -> dict[str, Tensor]:
    state = {}
    for name, tensor in backbone.state_dict().items():
        name = re.sub(r"^embeddings\.(.*)\.projection", r"encoder.embeddings.\1.proj", name)
        name = re.sub(r"^layers\.", "encoder.layer.", name)
        name = re.sub(r"^layernorm\.", "encoder.layernorm.", name)
        for ours, theirs in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("o_proj", "proj")):
            name = name.replace(f"attention.{ours}", f"attention.{theirs}")
        state[name.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")] = tensor
    return state
