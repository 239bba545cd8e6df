"""MoCo v3: predictions of one view find the teacher's key of the other view among the batch; no queue.

Source: Chen et al. 2021 (arXiv 2104.02057), Algorithm 1; compared with the authors' `moco/builder.py`. Their
ResNet predictor has no normalisation at its output although the paper says so; ours follows the code.
Deliberate difference: the keys of all micro-batches of a step are made first (`prepare_step`), so that
accumulation has the negatives of the whole step.
Shape suffixes: B = images in this process, N = images of the whole step on all processes, d = projection
width.
"""

import math

import torch
from torch import Tensor, nn

from hf_ssl.modeling.shared.backbone import build_backbone
from hf_ssl.modeling.shared.distributed import all_gather, convert_batchnorm, rank
from hf_ssl.modeling.shared.heads import MLPHead
from hf_ssl.modeling.shared.losses import paired_contrastive_loss
from hf_ssl.modeling.shared.outputs import SSLOutput
from hf_ssl.modeling.shared.pretraining import (
    TEACHER_TENSORS,
    Branch,
    SSLForPreTraining,
    SSLModel,
    split_views,
    std_of_normalized,
)
from hf_ssl.modeling.shared.teacher import cosine_momentum, update_teacher

from .configuration_mocov3 import MoCoV3Config


class MoCoV3Model(SSLModel):
    """The encoder: the student backbone."""

    config_class = MoCoV3Config


class MoCoV3ForPreTraining(SSLForPreTraining):
    """Student with predictor, teacher, and the symmetric contrastive loss."""

    config_class = MoCoV3Config
    _keep_in_fp32_modules_strict = [TEACHER_TENSORS]

    def __init__(self, config: MoCoV3Config) -> None:
        super().__init__(config)
        self.student = self._build_branch(config)
        self.student.predictor = MLPHead(
            config.projection_size,
            config.projection_hidden_size,
            config.projection_size,
            num_layers=2,
            hidden_norm=True,
            last_norm="plain" if config.normalize_predictions else "none",
            bias=False,
        )
        self.student = convert_batchnorm(self.student, "synchronized")
        self.teacher = convert_batchnorm(self._build_branch(config), "synchronized")
        self._prepared_keys: tuple[Tensor, Tensor] | None = None
        self.finish_construction()

    @staticmethod
    def _build_branch(config: MoCoV3Config) -> nn.Module:
        backbone = build_backbone(config.backbone_config)
        head = MLPHead(
            backbone.hidden_size,
            config.projection_hidden_size,
            config.projection_size,
            num_layers=config.num_projection_layers,  # type: ignore[arg-type]
            hidden_norm=True,
            last_norm="plain",
            bias=False,
        )
        return Branch(backbone, head)

    def begin_step(self, step: int, total_steps: int, seed: int = 0) -> None:
        """Move the teacher with momentum m(step), which rises to 1; before it makes keys."""
        momentum = cosine_momentum(step, total_steps, self.config.teacher_momentum)
        update_teacher(self.teacher, self.student, momentum)
        self._prepared_keys = None

    def prepare_step(self, batches: list[dict[str, Tensor]]) -> None:
        """Make the keys of all micro-batches, in the order of the global batch."""
        keys = [self.make_keys(batch["pixel_values"]) for batch in batches]
        self._prepared_keys = tuple(torch.cat(keys_of_view) for keys_of_view in zip(*keys, strict=True))  # type: ignore[assignment]

    @torch.no_grad()
    def make_keys(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher projections (B*W, d) of both views (B, 2, C, H, W), gathered in rank order."""
        first, second = (all_gather(self.teacher(view)[1]) for view in split_views(pixel_values, num_views=2))
        return first, second

    def forward(self, pixel_values: Tensor, row_index: Tensor | None = None) -> SSLOutput:
        """Contrast the predictions of each view with the keys of the other.

        Args:
            pixel_values: (B, 2, C, H, W), normalised.
            row_index: (B,) rows of the global batch among the prepared keys; without it, keys are made of
                this batch alone.

        Returns:
            `loss`: both directions summed, each 2T times a cross-entropy; 4T ln N when keys are alike.
        """
        if row_index is None or self._prepared_keys is None:
            keys = self.make_keys(pixel_values)
            row_index = torch.arange(len(pixel_values), device=pixel_values.device) + rank() * len(
                pixel_values
            )
        else:
            keys = self._prepared_keys
        predictions, features = [], []
        for view in split_views(pixel_values, num_views=2):
            features_BD, projections_Bd = self.student(view)
            predictions.append(self.student.predictor(projections_Bd))  # type: ignore[operator]
            features.append(features_BD.detach())
        first, second = (
            paired_contrastive_loss(prediction_Bd, key_Nd, row_index, self.config.temperature)
            for prediction_Bd, key_Nd in zip(predictions, reversed(keys), strict=True)
        )
        return SSLOutput(
            loss=first + second,
            parts={"projection_std": std_of_normalized(predictions[0])},
            features=torch.cat(features),
            projections=torch.cat(predictions).detach(),
        )

    @property
    def loss_couples_the_batch(self) -> bool:
        """Keys of a step are made together, so accumulation is a larger batch but for BatchNorm."""
        return False

    def check_global_batch(self, global_batch_size: int) -> None:
        """Refuse a batch without negatives."""
        if global_batch_size < 2:
            raise ValueError(
                f"MoCo v3 needs at least 2 images per step for negatives, got {global_batch_size}"
            )

    def expectations(self, num_images: int = 256) -> dict[str, float]:
        """Loss when the keys of `num_images` cannot be told apart."""
        return {"loss_at_start": 4 * self.config.temperature * math.log(num_images)}
