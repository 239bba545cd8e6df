"""Our ViT as a native transformers model.

`ViTModel` takes every plain ViT with a class token: names in memory are ours, the pooler is the identity, so
that `pooler_output` is the class token. `IJepaModel` takes ViTs without class token; the DINOv2 classes take
registers, gated MLPs, and LayerScale beside a mask token; `BeitModel` takes relative positions. LayerScale,
where the native class has none, is folded into the Linear before it: lambda * (W x + b) = (lambda W) x +
lambda b.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_ssl.hub.native import Landing
from hf_ssl.modeling.shared.configuration import SSLViTConfig
from hf_ssl.modeling.shared.image_processing import SSLImageProcessor
from hf_ssl.modeling.shared.vit import SSLViTBackbone

_PROCESSOR_FIELDS = (
    "do_convert_rgb", "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale",
    "rescale_factor", "do_normalize", "image_mean", "image_std",
)  # fmt: skip


def land_vit(backbone: SSLViTBackbone, processor: SSLImageProcessor) -> Landing:
    """Choose the native class of a ViT.

    Raises:
        ValueError: no native class computes what the backbone computes.
    """
    native_class = choose_native_class(backbone.config)
    notes = []
    if native_class == "IJepaModel":
        notes.append("no class token: there is no pooled output, pool=True fails; average last_hidden_state")
    if backbone.config.use_mask_token and not native_class.startswith(("Dinov2", "Beit")):
        notes.append("the mask token stays in the pre-training checkpoint")
    if backbone.config.interpolate_offset or (
        backbone.config.interpolate_antialias != (native_class == "Dinov2WithRegistersModel")
    ):
        notes.append("features of other image sizes differ: positions are resized in another way there")
    names = [f"layers.{index}" for index in range(backbone.config.num_hidden_layers)]
    return Landing(
        native_class=native_class,
        write=lambda folder: write_vit(backbone, processor, native_class, folder),
        state_names=["embeddings", *names],
        has_pooled_output=native_class != "IJepaModel",
        notes=notes,
    )


def choose_native_class(config: SSLViTConfig) -> str:
    """Name of the transformers class for a backbone config.

    Raises:
        ValueError: there is none.
    """
    plain = not config.num_register_tokens and not config.use_swiglu_ffn
    if config.use_shared_relative_position_bias or config.position_embedding_type == "none":
        if plain and config.use_class_token and config.qkv_bias and not config.use_key_bias:
            return "BeitModel"
        raise ValueError(
            "BeitModel, the only native class with relative or no positions, has a class token, no registers "
            "and no gated MLP, and biases of queries and values but not of keys; set use_key_bias=False"
        )
    if not config.use_key_bias:
        raise ValueError(
            "only BeitModel has no bias of keys, and it needs relative positions; set use_key_bias"
        )
    if not config.use_class_token:
        if plain:
            return "IJepaModel"
        raise ValueError(
            "no native class has registers or a gated MLP but no class token; train with use_class_token=True"
        )
    has_whole_ratio = config.intermediate_size % config.hidden_size == 0  # type: ignore[operator]
    has_both = config.layer_scale_value is not None and config.use_mask_token
    if plain and not (has_both and has_whole_ratio):
        return "ViTModel"
    if not has_whole_ratio:
        raise ValueError(
            f"the native class needs an intermediate_size that is a multiple of hidden_size, got "
            f"{config.intermediate_size} and {config.hidden_size}"
        )
    return "Dinov2WithRegistersModel" if config.num_register_tokens else "Dinov2Model"


def write_vit(
    backbone: SSLViTBackbone, processor: SSLImageProcessor, native_class: str, folder: Path
) -> None:
    """Write the native model and its `ViTImageProcessor`."""
    from transformers import ViTImageProcessor

    model = _build_native(backbone.config, native_class)
    if native_class.startswith("Dinov2"):
        state = _dinov2_state(backbone)
    elif native_class == "BeitModel":
        state = _beit_state(backbone)
    else:
        state = _vit_state(backbone, native_class)
    model.load_state_dict(state, strict=True)
    model.save_pretrained(folder)
    ViTImageProcessor(**processor_options(processor)).save_pretrained(folder)


def processor_options(processor: SSLImageProcessor) -> dict[str, Any]:
    """Arguments of a native image processor that prepares images as ours does."""
    values = {name: getattr(processor, name) for name in _PROCESSOR_FIELDS}
    return {name: value for name, value in values.items() if value is not None}


def _build_native(config: SSLViTConfig, native_class: str) -> PreTrainedModel:
    import transformers

    model_class = getattr(transformers, native_class)
    shared = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "num_channels",
        "hidden_act", "qkv_bias", "layer_norm_eps",
    )  # fmt: skip
    options: dict[str, Any] = {name: getattr(config, name) for name in shared}
    if native_class.startswith("Dinov2"):
        options["mlp_ratio"] = config.intermediate_size // config.hidden_size  # type: ignore[operator]
        options["use_swiglu_ffn"] = config.use_swiglu_ffn
        if config.num_register_tokens:
            options["num_register_tokens"] = config.num_register_tokens
    else:
        options["intermediate_size"] = config.intermediate_size
    if native_class == "BeitModel":
        options |= {
            "use_mask_token": config.use_mask_token,
            "use_absolute_position_embeddings": config.position_embedding_type != "none",
            "use_shared_relative_position_bias": config.use_shared_relative_position_bias,
            "layer_scale_init_value": config.layer_scale_value or 0.0,  # 0: none there
            "drop_path_rate": 0.0,
            "use_mean_pooling": False,  # normed tokens, and the class token as pooled output
        }
        del options["qkv_bias"]
    elif not native_class.startswith("Dinov2"):
        options["encoder_stride"] = config.patch_size
    if native_class == "ViTModel":
        # With an identity weight the pooler returns the class token; left out, AutoModel makes a random one.
        options["pooler_act"] = "linear"
    return model_class(model_class.config_class(**options))


def _vit_state(backbone: SSLViTBackbone, native_class: str) -> dict[str, Tensor]:
    state = _fold_layer_scale(backbone.state_dict())
    state.pop("embeddings.mask_token", None)
    if native_class == "ViTModel":
        state["pooler.dense.weight"] = torch.eye(backbone.hidden_size)
        state["pooler.dense.bias"] = torch.zeros(backbone.hidden_size)
    return state


def own_vit_state(state: dict[str, Tensor], has_layer_scale: bool) -> dict[str, Tensor]:
    """Tensors of a native ViT under the names of our backbone.

    Args:
        state: of any class that `choose_native_class` names, in memory.
        has_layer_scale: whether our backbone has LayerScale; if not, it is folded, which is exact for ones.
    """
    own = {}
    for name, tensor in state.items():
        name = re.sub(r"^encoder\.layer\.", "layers.", name)
        name = re.sub(r"\.lambda_([12])$", r".layer_scale\1.lambda1", name)
        own[name.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")] = tensor
    return own if has_layer_scale else _fold_layer_scale(own)


def _beit_state(backbone: SSLViTBackbone) -> dict[str, Tensor]:
    return {
        re.sub(r"layer_scale([12])\.lambda1$", r"lambda_\1", name): tensor
        for name, tensor in backbone.state_dict().items()
    }


def _fold_layer_scale(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Multiply each LayerScale into the rows of the Linear before it, rounded once."""
    folded = {name: tensor for name, tensor in state.items() if not name.endswith(".lambda1")}
    for name in state.keys() - folded.keys():
        layer, scale = name.rsplit(".", 2)[0], state[name].double()
        after = "attention.o_proj" if ".layer_scale1." in name else "mlp.fc2"
        if f"{layer}.{after}.weight" not in state:  # a gated MLP
            after = "mlp.down_proj"
        linear = f"{layer}.{after}"
        folded[f"{linear}.weight"] = (state[f"{linear}.weight"].double() * scale[:, None]).float()
        folded[f"{linear}.bias"] = (state[f"{linear}.bias"].double() * scale).float()
    return folded


def _dinov2_state(backbone: SSLViTBackbone) -> dict[str, Tensor]:
    width = backbone.hidden_size
    state: dict[str, Tensor] = {"embeddings.mask_token": torch.zeros(1, width)}
    if backbone.embeddings.mask_token is not None:
        state["embeddings.mask_token"] = backbone.embeddings.mask_token.detach()[0]
    for index in range(backbone.config.num_hidden_layers):  # identity where ours has no LayerScale
        for number in (1, 2):
            state[f"encoder.layer.{index}.layer_scale{number}.lambda1"] = torch.ones(width)
    for name, tensor in backbone.state_dict().items():
        name = re.sub(r"^layers\.", "encoder.layer.", name)
        name = name.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")
        if ".weights_in." in name:
            gate, value = tensor.chunk(2)
            state[name.replace("weights_in", "gate_proj")] = gate.clone()
            state[name.replace("weights_in", "up_proj")] = value.clone()
        elif name != "embeddings.mask_token":
            state[name.replace("weights_out", "down_proj")] = tensor
    return state
