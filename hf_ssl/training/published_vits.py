"""Published vision transformers as our ViT: transformers' plain and DINOv2 classes, and timm's.

What can be copied computes the same features, which is measured at every start: numbers of heads, activations
and constants show in no shape.
"""

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn

from hf_ssl.hub.landing_vit import own_vit_state
from hf_ssl.modeling.shared.configuration import SSLConfig, SSLViTConfig
from hf_ssl.modeling.shared.positions import resize_positions
from hf_ssl.modeling.shared.vit import SSLViTBackbone
from hf_ssl.training.recipes import own_values

PLAIN = ("vit", "vit_mae", "vit_msn", "ijepa")  # model types of one network
DINOV2 = ("dinov2", "dinov2_with_registers")
BEIT = "beit"  # with one table of relative positions, as it is pre-trained
TIMM_WRAPPER = "timm_wrapper"
REFUSED = {  # what only looks like our ViT
    "deit": "has a distillation token",
    "dinov3_vit": "turns its queries and keys by their positions (RoPE), and has no position table",
    "dinov3_convnext": "is no vision transformer",
    "data2vec-vision": "adds relative positions to its attention",
    "swin": "attends in windows",
    "hiera": "is hierarchical",
}
NOT_LEARNED_HERE = ("pooler.", "attn_pool.", "embeddings.mask_token")  # our backbones may lack them
PARITY = 1e-3  # of the largest feature; roundings are a thousand times smaller
_TIMM_NAMES = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^reg_token$", "embeddings.register_tokens"),
    (r"^blocks\.", "layers."),
    (r"^norm\.", "layernorm."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
)


def refuse_foreign(config: Any) -> None:
    """Raise ValueError for a network that our ViT cannot compute."""
    reason = REFUSED.get(config.model_type)
    if config.model_type == BEIT and config.use_relative_position_bias:
        reason = "has relative positions of its own in every layer"
    if config.model_type == BEIT and config.use_mean_pooling:
        reason = "has no norm after its last layer (use_mean_pooling)"
    if reason:
        raise ValueError(
            f"a model of type {config.model_type} {reason}, which our ViT cannot compute; start from a "
            f"{', '.join((*PLAIN, *DINOV2, BEIT))} model or one of timm's VisionTransformers"
        )


def backbone_config_of(config: Any, image_size: int | None) -> dict[str, Any] | None:
    """The `backbone_config` that computes what a published model computes; None: it is of no known kind.

    Args:
        config: of a native class, or of transformers' wrapper of timm's models.
        image_size: side of the images to train on; None, or no whole number of patches: the model's own.

    Raises:
        ValueError: a network that our ViT cannot compute.
    """
    refuse_foreign(config)
    if config.model_type == TIMM_WRAPPER:
        return _of_timm(config, image_size)
    if isinstance(config, SSLConfig):  # of another method of ours
        return {"model_type": config.backbone_config.model_type, **own_values(config.backbone_config)}  # type: ignore[union-attr]
    if config.model_type not in (*PLAIN, *DINOV2, BEIT):
        return None
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "num_channels",
             "hidden_act", "layer_norm_eps")  # fmt: skip
    backbone = {"model_type": SSLViTConfig.model_type, **{name: getattr(config, name) for name in names}}
    backbone["qkv_bias"] = getattr(config, "qkv_bias", True)
    backbone["use_class_token"] = config.model_type != "ijepa"
    if config.model_type in DINOV2:
        backbone["intermediate_size"] = int(config.hidden_size * config.mlp_ratio)
        backbone["use_swiglu_ffn"] = config.use_swiglu_ffn
        backbone["layer_scale_value"] = float(config.layerscale_value)
        backbone["num_register_tokens"] = getattr(config, "num_register_tokens", 0)
        backbone["interpolate_antialias"] = config.model_type == "dinov2_with_registers"
    else:
        backbone["intermediate_size"] = config.intermediate_size
    if config.model_type == BEIT:
        backbone |= {
            "use_key_bias": False,
            "use_shared_relative_position_bias": config.use_shared_relative_position_bias,
            "position_embedding_type": "learned" if config.use_absolute_position_embeddings else "none",
            "layer_scale_value": config.layer_scale_init_value or None,
            "use_mask_token": config.use_mask_token,
        }
    return backbone | {"image_size": _side(image_size, config.image_size, config.patch_size)}


def _of_timm(config: Any, image_size: int | None) -> dict[str, Any]:
    network = _timm_network(config.architecture)
    if not is_timm_vit(network):
        side = image_size or int(network.pretrained_cfg["input_size"][-1])
        return {"model_type": "hf_ssl_timm", "architecture": config.architecture, "image_size": side}
    block, (side, patch) = (
        network.blocks[0],
        (network.patch_embed.img_size[0], network.patch_embed.patch_size[0]),
    )
    is_gated = block.mlp.fc1.out_features != block.mlp.fc2.in_features
    scale = getattr(block.ls1, "init_values", None)
    return {
        "model_type": SSLViTConfig.model_type,
        "hidden_size": network.embed_dim,
        "num_hidden_layers": len(network.blocks),
        "num_attention_heads": block.attn.num_heads,
        # Of a gated one our config has the width before its two thirds, which is always four times.
        "intermediate_size": 4 * network.embed_dim if is_gated else block.mlp.fc1.out_features,
        "use_swiglu_ffn": is_gated,
        "image_size": _side(image_size, side, patch),
        "patch_size": patch,
        "num_channels": network.patch_embed.proj.in_channels,
        "qkv_bias": block.attn.qkv.bias is not None,
        "layer_norm_eps": network.norm.eps,
        "use_class_token": network.cls_token is not None,
        "num_register_tokens": network.num_reg_tokens,
        # The value only starts fresh ones; those of a checkpoint replace it.
        "layer_scale_value": None if isinstance(block.ls1, nn.Identity) else float(scale or 1e-5),
        "interpolate_antialias": True,  # as timm resizes them
    }


def _timm_network(architecture: str) -> Any:
    import timm

    with torch.device("meta"):
        return timm.create_model(architecture, num_classes=0)


def is_timm_vit(network: nn.Module) -> bool:
    """Whether a network is one of timm's plain vision transformers, with a norm after the last block."""
    from timm.models.vision_transformer import VisionTransformer

    return type(network) is VisionTransformer and isinstance(network.norm, nn.LayerNorm)


def _side(wanted: int | None, own: int, patch_size: int) -> int:
    return wanted if wanted and wanted % patch_size == 0 else own


def start_vit(backbone: SSLViTBackbone, encoder: nn.Module, config_there: Any) -> tuple[str, float]:
    """Give our ViT the weights of a published one; learned positions of another grid are resized.

    Args:
        backbone: in whose mask token, if it has one the encoder lacks, nothing changes.
        encoder: a model as `AutoModel` gives it.
        config_there: its config.

    Returns:
        What was resized, for the log; and the largest difference between the features of the two at the
        encoder's own image size, as a share of the largest feature.

    Raises:
        ValueError: tensors are missing, too many or of other shapes, or the features differ.
    """
    refuse_foreign(config_there)
    state, side = _own_state(backbone, encoder)
    config = backbone.config
    there = copy.deepcopy(config)
    there.image_size = side
    as_there = SSLViTBackbone(there)
    _keep_token(state, backbone)
    check_tensors(as_there.state_dict(), state, type(encoder).__name__)
    as_there.load_state_dict(state, strict=False)
    difference = _difference(as_there, encoder, side)
    if not difference <= PARITY:
        raise ValueError(
            f"a {type(encoder).__name__} with these weights computes other features (by {difference:.1%}); "
            "give the same backbone_config (num_attention_heads, hidden_act, layer_norm_eps)"
        )
    old, new = as_there.config.grid_size, config.grid_size
    if (positions := state.get("embeddings.position_embeddings")) is not None:
        state["embeddings.position_embeddings"] = resize_positions(
            positions, (old, old), (new, new), config.use_class_token, antialias=config.interpolate_antialias
        )
    if as_there.shared_position_bias is not None:
        name = "shared_position_bias.relative_position_bias_table"
        state[name] = as_there.shared_position_bias.table_for((new, new))
    backbone.load_state_dict(state, strict=False)
    return (f", positions resized from {old} x {old} to {new} x {new}" if old != new else ""), difference


def _own_state(backbone: SSLViTBackbone, encoder: Any) -> tuple[dict[str, Tensor], int]:
    """Tensors by our names, and the image side that their positions are for."""
    network = getattr(encoder, "timm_model", None)
    if network is not None:
        if not is_timm_vit(network):
            raise ValueError(f"timm's {type(network).__name__} is not the ViT of backbone_config")
        state, side = _timm_state(network), int(network.patch_embed.img_size[0])
    else:
        names = {key.removeprefix("backbone."): value for key, value in encoder.state_dict().items()}
        config = getattr(encoder.config, "backbone_config", None) or encoder.config
        state, side = names, int(config.image_size)
    has_layer_scale = backbone.config.layer_scale_value is not None
    state = own_vit_state(state, has_layer_scale)
    if has_layer_scale:  # ones where it has none: the same network
        wanted = backbone.state_dict().items()
        ones = {name: torch.ones_like(value) for name, value in wanted if name.endswith(".lambda1")}
        state = ones | state
    return state, side


def _timm_state(network: Any) -> dict[str, Tensor]:
    state = {}
    for name, tensor in network.state_dict().items():
        for pattern, own in _TIMM_NAMES:
            name = re.sub(pattern, own, name)
        if ".attn.qkv." in name:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace(".attn.qkv.", f".attention.{part}_proj.")] = third.clone()
        elif ".mlp.fc1." in name and network.blocks[0].mlp.fc2.in_features * 2 == len(tensor):
            for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                state[name.replace("fc1", part)] = half.clone()
            continue
        else:
            state[name] = tensor
    if any(".gate_proj." in name for name in state):
        state = {name.replace(".mlp.fc2.", ".mlp.down_proj."): value for name, value in state.items()}
    positions = state.get("embeddings.position_embeddings")
    if network.no_embed_class and network.cls_token is not None and positions is not None:
        # There the class token holds its own position.
        state["embeddings.position_embeddings"] = torch.cat(
            [torch.zeros_like(positions[:, :1]), positions], 1
        )
    return state


def _keep_token(state: dict[str, Tensor], backbone: SSLViTBackbone) -> None:
    """A native class has no mask token, or one of another shape."""
    own = backbone.embeddings.mask_token
    if own is not None:
        state["embeddings.mask_token"] = state.get("embeddings.mask_token", own.detach()).reshape(own.shape)


@torch.no_grad()
def _difference(backbone: SSLViTBackbone, encoder: Any, side: int) -> float:
    """Largest difference of the final tokens of one random image, as a share of the largest value."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, backbone.config.num_channels, side, side, generator=generator)
    options: dict[str, Any] = {}
    if encoder.config.model_type == "vit_mae":  # would hide patches and shuffle the others
        encoder.config.mask_ratio = 0.0
        options["noise"] = torch.arange(backbone.config.grid_size**2, dtype=torch.float32)[None]
    expected = encoder.float().eval()(pixels, **options).last_hidden_state
    found = backbone.float().eval()(pixels).last_hidden_state
    if found.shape != expected.shape:
        raise ValueError(
            f"it gives {tuple(expected.shape[1:])} features and the backbone {tuple(found.shape[1:])}"
        )
    return float((found - expected).abs().max() / expected.abs().max())


def check_tensors(wanted: dict[str, Tensor], given: dict[str, Tensor], class_name: str) -> None:
    """Compare the tensors of a backbone with those it is to be given.

    Raises:
        ValueError: one is missing, too much or of another shape.
    """
    missing = sorted(set(wanted) - set(given))
    if missing:
        raise ValueError(
            f"a {class_name} lacks {len(missing)} of {len(wanted)} tensors, e.g. '{missing[0]}'; the "
            "backbones are of different kinds"
        )
    for name, tensor in wanted.items():
        if given[name].shape != tensor.shape:
            raise ValueError(
                f"'{name}' is {tuple(given[name].shape)} there and {tuple(tensor.shape)} here; give the same "
                "backbone_config"
            )
    unknown = sorted(name for name in set(given) - set(wanted) if not name.startswith(NOT_LEARNED_HERE))
    if unknown:
        raise ValueError(
            f"it has {len(unknown)} tensors more than this backbone, e.g. '{unknown[0]}'; give the same "
            "backbone_config"
        )
