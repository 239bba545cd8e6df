"""DINO and iBOT built of lightly's parts, for the quality benchmark; the order is that of its examples.

Shape suffixes: B = images, N = patches.
"""

from collections.abc import Callable
from typing import Any

import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
from lightly.models import utils
from lightly.models.modules.heads import DINOProjectionHead
from lightly.utils.scheduler import cosine_schedule
from quality_lightly_methods import Backbone, Method
from torch import Tensor, nn

NUM_GLOBAL_VIEWS = 2


class Branch(nn.Module):
    """Backbone and head, as our config describes them, of student or teacher."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.backbone = Backbone(config.backbone_config)
        self.head = DINOProjectionHead(
            self.backbone.hidden_size,
            config.head_hidden_size,
            config.head_bottleneck_size,
            config.num_prototypes,
            batch_norm=config.normalize_head,
        )

    def logits(self, features: Tensor) -> Tensor:
        """Logits of prototypes (B, K)."""
        return self.head(features)


class DINO(Method):
    """Student and teacher over multi-crop views, and the loss of views; KoLeo as our recipe has it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.student, self.teacher = (Branch(config) for _ in range(2))
        self.teacher.load_state_dict(self.student.state_dict())
        utils.deactivate_requires_grad(self.teacher)
        self.criterion = DINOLoss(
            config.num_prototypes,
            student_temp=config.student_temperature,
            center_momentum=config.center_momentum,
        )
        self.koleo = KoLeoLoss()
        self.trained = [self.student]

    @property
    def encoder(self) -> nn.Module:
        """What is evaluated: the teacher, as with ours."""
        return self.teacher.backbone.encoder

    def move_teacher(self, step: int, total_steps: int) -> None:
        """At a momentum on half a cosine."""
        momentum = cosine_schedule(
            step, total_steps, self.config.teacher_momentum, self.config.teacher_momentum_end
        )
        utils.update_momentum(self.student, self.teacher, m=momentum)

    def loss(self, views: list[Tensor], autocast: Callable[[], Any]) -> Tensor:
        """Loss of a batch."""
        with autocast():
            with torch.no_grad():
                targets = [
                    self.teacher.logits(self.teacher.backbone(view)) for view in views[:NUM_GLOBAL_VIEWS]
                ]
            features = [self.student.backbone(view) for view in views]
            logits = [self.student.logits(feature) for feature in features]
        return self.class_loss(targets, logits, features)

    def class_loss(self, targets: list[Tensor], logits: list[Tensor], features: list[Tensor]) -> Tensor:
        """Cross-entropy between views, and KoLeo of the global ones, in float32."""
        loss = self.criterion(
            [target.float() for target in targets],
            [logit.float() for logit in logits],
            teacher_temp=self.config.teacher_temperature,
        )
        koleo = sum(self.koleo(feature.float()) for feature in features[:NUM_GLOBAL_VIEWS])
        return loss + self.config.koleo_weight * koleo


class iBOT(DINO):  # noqa: N801  (the paper's spelling)
    """DINO, and the loss of hidden patches with a head that both share."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.patch_criterion = IBOTPatchLoss(
            config.num_prototypes,
            teacher_temp=config.patch_teacher_temperature,
            student_temp=config.student_temperature,
            center_momentum=config.center_momentum,
        )

    def loss(self, views: list[Tensor], autocast: Callable[[], Any]) -> Tensor:
        """Loss of a batch; of each pair of entries of `mask_ratios`, half of the views are whole."""
        global_views, local_views = torch.cat(views[:NUM_GLOBAL_VIEWS]), views[NUM_GLOBAL_VIEWS:]
        side = self.student.backbone.network.vit.patch_embed.grid_size[0]
        highest = max(
            ratio + spread
            for ratio, spread in zip(self.config.mask_ratios, self.config.mask_ratio_spreads, strict=True)
        )
        mask_BHW = utils.random_block_mask((len(global_views), side, side), max_image_mask_ratio=highest)
        mask_BHW = mask_BHW.to(global_views.device)
        mask_BN = nn.functional.pad(mask_BHW.flatten(1), (1, 0))  # the class token is never hidden
        with autocast():
            with torch.no_grad():
                seen = self.teacher.backbone.network.encode(global_views)
                targets, patch_targets = self.teacher.logits(seen[:, 0]), self.teacher.logits(seen[mask_BN])
            tokens = self.student.backbone.network.encode(global_views, mask=mask_BN)
            features = [*tokens[:, 0].chunk(NUM_GLOBAL_VIEWS), *map(self.student.backbone, local_views)]
            logits = [self.student.logits(feature) for feature in features]
            patch_logits = self.student.logits(tokens[mask_BN])
        class_loss = self.class_loss(list(targets.chunk(NUM_GLOBAL_VIEWS)), logits, features)
        patch_loss = self.patch_criterion(patch_targets.float(), patch_logits.float(), mask_BHW)
        return self.config.class_loss_weight * class_loss + self.config.patch_loss_weight * patch_loss
