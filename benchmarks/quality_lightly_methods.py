"""Methods built of lightly's parts, for the benchmarks: SimCLR, MoCo v2, MAE, I-JEPA.

Shape suffixes: B = images, T = tokens with class token, M = masked tokens, P = pixel values of a patch.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from lightly.loss import NTXentLoss
from lightly.models import utils
from lightly.models.modules import IJEPAPredictorTIMM, MAEDecoderTIMM, MaskedVisionTransformerTIMM
from lightly.models.modules.heads import MoCoProjectionHead, SimCLRProjectionHead
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from hf_ssl.modeling.shared.backbone import SSLTimmBackbone
from hf_ssl.modeling.shared.configuration import SSLTimmConfig


class Method(nn.Module):
    """What the loop below runs."""

    def move_teacher(self, step: int, total_steps: int) -> None:
        """Before a step; nothing where there is no teacher."""


def masked_vit(config: Any, **options: Any) -> MaskedVisionTransformerTIMM:
    """lightly's ViT that can hide patches, of timm's ViT with the sizes of ours."""
    vit = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        num_classes=0,
        init_values=config.layer_scale_value or None,
        **options,
    )
    return MaskedVisionTransformerTIMM(vit)


class Backbone(nn.Module):
    """Pooled features (B, D) of a CNN, the same module as ours, or of lightly's ViT of the same sizes."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        if isinstance(config, SSLTimmConfig):
            self.network: nn.Module = SSLTimmBackbone(config)
            self.hidden_size = self.network.hidden_size
        else:
            self.network = masked_vit(config, dynamic_img_size=True)
            self.hidden_size = config.hidden_size

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Mean of the last map, or the class token."""
        if isinstance(self.network, SSLTimmBackbone):
            return self.network(pixel_values).pooler_output
        return self.network(pixel_values)

    @property
    def encoder(self) -> nn.Module:
        """What is evaluated."""
        return self.network if isinstance(self.network, SSLTimmBackbone) else TokenEncoder(self.network)


class SimCLR(Method):
    """Backbone, SimCLR head, NT-Xent without memory bank."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.backbone = Backbone(config.backbone_config)
        width = self.backbone.hidden_size
        self.projection_head = SimCLRProjectionHead(
            width,
            config.projection_hidden_size or width,
            config.projection_size,
            num_layers=config.num_projection_layers,
        )
        self.criterion = NTXentLoss(temperature=config.temperature)
        self.trained = [self.backbone, self.projection_head]

    @property
    def encoder(self) -> nn.Module:
        """What is evaluated."""
        return self.backbone.encoder

    def project(self, pixel_values: Tensor) -> Tensor:
        """Projections (B, d)."""
        return self.projection_head(self.backbone(pixel_values))

    def loss(self, views: list[Tensor], autocast: Callable[[], Any]) -> Tensor:
        """Loss of a batch."""
        with autocast():
            first, second = self.project(views[0]), self.project(views[1])
        return self.criterion(first.float(), second.float())


class MoCo(Method):
    """Backbone, MoCo head, their momentum copies, NT-Xent with memory bank."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.momentum = config.teacher_momentum
        self.backbone = Backbone(config.backbone_config)
        width = self.backbone.hidden_size
        self.projection_head = MoCoProjectionHead(
            width, width, config.projection_size, batch_norm=config.normalize_projection
        )
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        utils.deactivate_requires_grad(self.backbone_momentum)
        utils.deactivate_requires_grad(self.projection_head_momentum)
        bank = (config.queue_length, config.projection_size)
        self.criterion = NTXentLoss(temperature=config.temperature, memory_bank_size=bank)
        self.trained = [self.backbone, self.projection_head]

    @property
    def encoder(self) -> nn.Module:
        """What is evaluated."""
        return self.backbone.encoder

    def move_teacher(self, step: int, total_steps: int) -> None:
        """The momentum copies, at one momentum."""
        utils.update_momentum(self.backbone, self.backbone_momentum, m=self.momentum)
        utils.update_momentum(self.projection_head, self.projection_head_momentum, m=self.momentum)

    def loss(self, views: list[Tensor], autocast: Callable[[], Any]) -> Tensor:
        """Loss of a batch."""
        with autocast():
            query = self.projection_head(self.backbone(views[0]))
            with torch.no_grad():
                key = self.projection_head_momentum(self.backbone_momentum(views[1]))
        return self.criterion(query.float(), key.float())


class MAE(Method):
    """Masked ViT and decoder, squared error of hidden patches."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        vit = config.backbone_config
        self.mask_ratio, self.normalize_targets = config.mask_ratio, config.normalize_targets
        self.patch_size = vit.patch_size
        self.backbone = masked_vit(vit)
        self.decoder = MAEDecoderTIMM(
            num_patches=self.backbone.vit.patch_embed.num_patches,
            patch_size=vit.patch_size,
            embed_dim=vit.hidden_size,
            decoder_embed_dim=config.decoder_hidden_size,
            decoder_depth=config.decoder_num_hidden_layers,
            decoder_num_heads=config.decoder_num_attention_heads,
        )
        self.trained = [self.backbone, self.decoder]

    @property
    def encoder(self) -> nn.Module:
        """What is evaluated."""
        return TokenEncoder(self.backbone)

    def loss(self, views: list[Tensor], autocast: Callable[[], Any]) -> Tensor:
        """Loss of a batch."""
        images = views[0]
        size = (len(images), self.backbone.sequence_length)
        kept_index, masked_index_BM = utils.random_token_mask(
            size, mask_ratio=self.mask_ratio, device=images.device
        )
        with autocast():
            visible = self.decoder.embed(self.backbone.encode(images, idx_keep=kept_index))
            tokens = utils.repeat_token(self.decoder.mask_token, size)
            tokens = utils.set_at_index(tokens, kept_index, visible.type_as(tokens))
            hidden = utils.get_at_index(self.decoder.decode(tokens), masked_index_BM)
            prediction_BMP = self.decoder.predict(hidden)
        patches = utils.patchify(images, self.patch_size)
        target_BMP = utils.get_at_index(patches, masked_index_BM - 1)  # patches have no class token
        if self.normalize_targets:
            target_BMP = utils.normalize_mean_var(target_BMP)
        return nn.functional.mse_loss(prediction_BMP.float(), target_BMP)


class IJEPA(Method):
    """Masked ViT, its momentum copy on whole images, and predictor; smooth-L1 on normed tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        vit = config.backbone_config
        self.momentum = config.teacher_momentum
        self.backbone = masked_vit(vit, class_token=False, global_pool="avg")
        self.target_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.predictor = IJEPAPredictorTIMM(
            num_patches=self.backbone.vit.patch_embed.num_patches,
            depth=config.predictor_num_hidden_layers,
            mlp_dim=vit.hidden_size,
            predictor_embed_dim=config.predictor_hidden_size,
            num_heads=config.predictor_heads,
        )
        self.trained = [self.backbone, self.predictor]

    def move_teacher(self, step: int, total_steps: int) -> None:
        """The momentum copy, at one momentum."""
        utils.update_momentum(self.backbone, self.target_backbone, m=self.momentum)

    def loss(self, views: list[Tensor], autocast: Callable[[], Any]) -> Tensor:
        """Loss of a batch: images, indices of the context, indices of every target block."""
        images, context_BK, *targets_BM = views
        with torch.no_grad(), autocast():
            whole = self.target_backbone.encode(images)
            whole = nn.functional.layer_norm(whole.float(), whole.shape[-1:])
            wanted = utils.apply_masks(whole, targets_BM)
        with autocast():
            seen = self.backbone.encode(images, idx_keep=context_BK)
            predicted = self.predictor(seen, [context_BK], targets_BM)
        return nn.functional.smooth_l1_loss(predicted.float(), wanted)


class TokenEncoder(nn.Module):
    """The masked ViT on whole images, with the output that our evaluation reads."""

    def __init__(self, backbone: MaskedVisionTransformerTIMM) -> None:
        super().__init__()
        self.patch_size = backbone.vit.patch_embed.patch_size
        self.backbone = backbone

    def forward(self, pixel_values: Tensor) -> BaseModelOutput:
        """All tokens (B, T, D), class token first."""
        return BaseModelOutput(last_hidden_state=self.backbone.encode(pixel_values))
