"""Training loops with lightly's parts, with the settings of our recipes.

Taken from lightly: transforms, heads, losses with memory bank, momentum update, masked ViT and decoder, split
of parameters by weight decay; the order of a step is that of its examples. Same as ours: backbone, images,
steps, batch, AdamW (fused), schedule, autocast. Losses are computed in float32, outside autocast.
Shape suffixes: B = images, T = tokens with class token, M = masked tokens, P = pixel values of a patch.
"""

import copy
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from lightly.loss import NTXentLoss
from lightly.models import utils
from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
from lightly.models.modules.heads import MoCoProjectionHead, SimCLRProjectionHead
from lightly.transforms import MAETransform, MoCoV2Transform, SimCLRTransform
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers.modeling_outputs import BaseModelOutput

from hf_ssl.data.sources import open_images
from hf_ssl.modeling.shared.backbone import SSLTimmBackbone
from hf_ssl.training.arguments import SSLTrainingArguments
from hf_ssl.training.recipes import Recipe
from hf_ssl.training.schedules import ScheduleSpan, learning_rate_schedule


class EncodedImages(Dataset[list[Tensor]]):
    """JPEG bytes in memory, decoded when they are used, as our loader does."""

    def __init__(self, source: Any, transform: Callable[[Image.Image], list[Tensor]]) -> None:
        self.images = [row["image"] for row in source.rows()]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        image = self.images[index]
        picture = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
        return self.transform(picture.convert("RGB"))


class SimCLR(nn.Module):
    """Backbone, SimCLR head, NT-Xent without memory bank."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.backbone = SSLTimmBackbone(config.backbone_config)
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
        return self.backbone

    def project(self, pixel_values: Tensor) -> Tensor:
        """Projections (B, d)."""
        return self.projection_head(self.backbone(pixel_values).pooler_output.flatten(start_dim=1))

    def loss(self, views: list[Tensor], autocast: Callable[[], Any]) -> Tensor:
        """Loss of a batch."""
        with autocast():
            first, second = self.project(views[0]), self.project(views[1])
        return self.criterion(first.float(), second.float())


class MoCo(nn.Module):
    """Backbone, MoCo head, their momentum copies, NT-Xent with memory bank."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.momentum = config.teacher_momentum
        self.backbone = SSLTimmBackbone(config.backbone_config)
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
        return self.backbone

    def loss(self, views: list[Tensor], autocast: Callable[[], Any]) -> Tensor:
        """Loss of a batch; moves the momentum copies first."""
        utils.update_momentum(self.backbone, self.backbone_momentum, m=self.momentum)
        utils.update_momentum(self.projection_head, self.projection_head_momentum, m=self.momentum)
        with autocast():
            query = self.projection_head(self.backbone(views[0]).pooler_output.flatten(start_dim=1))
            with torch.no_grad():
                features = self.backbone_momentum(views[1]).pooler_output.flatten(start_dim=1)
                key = self.projection_head_momentum(features)
        return self.criterion(query.float(), key.float())


class MAE(nn.Module):
    """Masked ViT and decoder, squared error of hidden patches."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        vit = config.backbone_config
        self.mask_ratio, self.normalize_targets = config.mask_ratio, config.normalize_targets
        self.patch_size = vit.patch_size
        self.backbone = MaskedVisionTransformerTIMM(
            VisionTransformer(
                img_size=vit.image_size,
                patch_size=vit.patch_size,
                embed_dim=vit.hidden_size,
                depth=vit.num_hidden_layers,
                num_heads=vit.num_attention_heads,
                mlp_ratio=vit.intermediate_size / vit.hidden_size,
                num_classes=0,
            )
        )
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
        kept_index, masked_index_BM = utils.random_token_mask(size, mask_ratio=self.mask_ratio)
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


class TokenEncoder(nn.Module):
    """The masked ViT on whole images, with the output that our evaluation reads."""

    def __init__(self, backbone: MaskedVisionTransformerTIMM) -> None:
        super().__init__()
        self.patch_size = backbone.vit.patch_embed.patch_size
        self.backbone = backbone

    def forward(self, pixel_values: Tensor) -> BaseModelOutput:
        """All tokens (B, T, D), class token first."""
        return BaseModelOutput(last_hidden_state=self.backbone.encode(pixel_values))


MODELS = {"simclr": SimCLR, "moco": MoCo, "mae": MAE}
IMPLEMENTED = tuple(MODELS)


def build_transform(method: str, view: dict[str, Any]) -> Callable[[Image.Image], list[Tensor]]:
    """lightly's transform with the strengths of one of our views.

    Raises:
        ValueError: the view has something that lightly's transform cannot be told.
    """
    if tuple(view["crop"]["ratio"]) != (0.75, 4 / 3):
        raise ValueError(f"lightly's crops have the ratios 3/4 to 4/3, not {view['crop']['ratio']}")
    min_scale, largest = view["crop"]["scale"]
    steps = {step["type"]: step for step in view["transforms"]}
    known = {"horizontal_flip"} if method == "mae" else {"horizontal_flip", "color_jitter", "grayscale"}
    if set(steps) - known or largest != 1:
        raise ValueError(f"lightly's transform of {method} has no setting for {view}")
    if method == "mae":
        return MAETransform(input_size=view["size"], min_scale=min_scale)
    jitter = steps["color_jitter"]
    transform = {"simclr": SimCLRTransform, "moco": MoCoV2Transform}[method]
    return transform(
        input_size=view["size"],
        min_scale=min_scale,
        hf_prob=steps["horizontal_flip"]["probability"],
        cj_prob=jitter["probability"],
        cj_strength=1.0,  # the strengths below are final
        cj_bright=jitter["brightness"],
        cj_contrast=jitter["contrast"],
        cj_sat=jitter["saturation"],
        cj_hue=jitter["hue"],
        random_gray_scale=steps["grayscale"]["probability"],
        gaussian_blur=0.0,
    )


class LightlyRun:
    """Model, data and optimizer of one run."""

    def __init__(self, recipe: Recipe, args: SSLTrainingArguments) -> None:
        self.args = args
        self.model = MODELS[recipe.method](recipe.config())
        self.encoder = self.model.encoder
        view = {"size": recipe.config().image_size, **recipe.processor["views"][0]}
        transform = build_transform(recipe.method, view)
        dataset = EncodedImages(open_images(recipe.data.dataset, split="train"), transform)
        self.loader = DataLoader(dataset, batch_size=args.global_batch_size, shuffle=True, drop_last=True)
        decayed, undecayed = utils.get_weight_decay_parameters(self.model.trained)
        groups = [
            {"params": decayed, "weight_decay": args.weight_decay},
            {"params": undecayed, "weight_decay": 0.0},
        ]
        betas = (args.adam_beta1, args.adam_beta2)
        self.optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=betas, fused=True)
        span = ScheduleSpan(args.max_steps, args.get_warmup_steps(args.max_steps))
        factor = partial(learning_rate_schedule(args.learning_rate_schedule), span=span)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def batches(self) -> Iterator[list[Tensor]]:
        """Batches of views, epoch after epoch."""
        while True:
            yield from self.loader

    def train(self) -> list[float]:
        """All steps; the loss of each."""
        autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=self.args.bf16)
        self.model.train()
        losses = []
        for _, views in zip(range(self.args.max_steps), self.batches(), strict=False):
            loss = self.model.loss(views, autocast)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            losses.append(loss.detach())
        return torch.stack(losses).tolist()
