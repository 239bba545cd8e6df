"""The network under the heads: our ViT or any timm model.

The small-image stem (a 3x3 convolution without pooling, SimCLR appendix B.9) exists for timm's ResNets only,
because only theirs can be exported to stock timm.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_ssl.modeling.shared.configuration import SMALL_IMAGE_SIDE, SSLTimmConfig, SSLViTConfig
from hf_ssl.modeling.shared.vit import SSLViTBackbone


class SSLTimmBackbone(nn.Module):
    """A timm model without its classifier.

    Raises:
        ValueError: timm does not know the architecture; small images with a network that has no small stem.
    """

    def __init__(self, config: SSLTimmConfig) -> None:
        super().__init__()
        self.config = config
        self.network = _create_timm_model(config)
        # Not `num_features`: networks that widen after their pooling give more than the map has.
        self.hidden_size = int(self.network.head_hidden_size)  # type: ignore[arg-type]
        if not next(self.network.parameters()).is_meta:
            # timm has initialised it as the architecture wants; `_init_weights` must not do it again.
            for module in self.network.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]

    @torch.no_grad()
    def start_afresh(self, names: Collection[str]) -> None:
        """Give tensors of `network` the values of a new one; `from_pretrained` builds on the meta device.

        Args:
            names: keys of `network.state_dict()`.
        """
        if not names:
            return
        state, fresh = self.network.state_dict(), _create_timm_model(self.config).state_dict()
        for name in names:
            state[name].copy_(fresh[name])

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool = False, output_attentions: bool = False
    ) -> BaseModelOutputWithPooling:
        """Encode images (B, C, H, W).

        Returns:
            `last_hidden_state`: the last feature map (B, D, H', W'), or tokens (B, T, D) of a transformer;
            `pooler_output` (B, D): timm's own pooling of it (global average for CNNs).

        Raises:
            ValueError: attention weights were asked for.
        """
        if output_attentions:
            raise ValueError("timm backbones return no attention weights; use an hf_ssl_vit backbone")
        pixel_values = pixel_values.to(next(self.network.parameters()).dtype)
        hidden_states = None
        if output_hidden_states:
            features, maps = self.network.forward_intermediates(pixel_values)  # type: ignore[operator]
            hidden_states = tuple(maps)
        else:
            features = self.network.forward_features(pixel_values)  # type: ignore[operator]
        pooled = self.network.forward_head(features, pre_logits=True)  # type: ignore[operator]
        return BaseModelOutputWithPooling(
            last_hidden_state=features, pooler_output=pooled, hidden_states=hidden_states
        )


def _create_timm_model(config: SSLTimmConfig) -> nn.Module:
    # Caught, because transformers refuses remote code that imports what is not there, except in a `try`.
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"the backbone '{config.architecture}' needs timm: pip install timm") from error
    arguments = {"num_classes": 0, "in_chans": config.num_channels, **(config.model_args or {})}
    try:
        network = timm.create_model(config.architecture, pretrained=False, **arguments)
    except RuntimeError as error:
        similar = ", ".join(timm.list_models(f"*{config.architecture[:8]}*")[:5]) or "see timm.list_models()"
        raise ValueError(
            f"timm knows no architecture '{config.architecture}' (similar: {similar})"
        ) from error
    if config.small_stem_stride:
        _use_small_stem(network, config)
    return network


def _use_small_stem(network: nn.Module, config: SSLTimmConfig) -> None:
    """Replace the 7x7 convolution and the pooling by one 3x3 convolution."""
    stem = getattr(network, "conv1", None)
    if not (isinstance(stem, nn.Conv2d) and hasattr(network, "maxpool") and hasattr(network, "layer4")):
        raise ValueError(
            f"images under {SMALL_IMAGE_SIDE} px need the small stem, which only timm's ResNets with a 7x7 "
            f"stem have; got '{config.architecture}': use resnet18 or resnet50, larger images, or "
            "small_stem_stride=0"
        )
    stride = int(config.small_stem_stride or 1)
    small = nn.Conv2d(stem.in_channels, stem.out_channels, 3, stride=stride, padding=1, bias=False)
    with torch.no_grad():
        nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
    network.conv1 = small
    network.maxpool = nn.Identity()


def build_backbone(config: dict[str, Any] | PreTrainedConfig | None) -> SSLViTBackbone | SSLTimmBackbone:
    """Build the backbone that the `backbone_config` of a finished config describes.

    Told apart by `model_type`: of code in a local folder transformers loads a second copy of our classes.
    """
    model_type = getattr(config, "model_type", None)
    if model_type == SSLViTConfig.model_type:
        return SSLViTBackbone(config)  # type: ignore[arg-type]
    if model_type == SSLTimmConfig.model_type:
        return SSLTimmBackbone(config)  # type: ignore[arg-type]
    raise ValueError(f"no backbone for {type(config).__name__}; use SSLViTConfig or SSLTimmConfig")
