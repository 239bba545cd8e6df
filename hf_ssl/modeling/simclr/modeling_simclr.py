"""SimCLR: two views of an image attract, all other views of the batch repel.

Source: Chen et al. 2020 (arXiv 2002.05709), Eq. 1 and Algorithm 1; v2 (2006.10029) has a third head layer.
Compared with the authors' `tf2/model.py` and `tf2/objective.py`, which return twice the paper's loss; ours is
the paper's mean. As in their code (not in the paper's formula) every head layer is normalised.
Shape suffixes: B = images in this process, D = backbone width, d = projection width.
"""

import math

import torch
from torch import Tensor

from hf_ssl.modeling.shared.backbone import build_backbone
from hf_ssl.modeling.shared.distributed import convert_batchnorm
from hf_ssl.modeling.shared.heads import MLPHead
from hf_ssl.modeling.shared.initialization import set_weight_initialization
from hf_ssl.modeling.shared.losses import nt_xent_loss
from hf_ssl.modeling.shared.outputs import SSLOutput
from hf_ssl.modeling.shared.pretraining import (
    Branch,
    SSLForPreTraining,
    SSLModel,
    join_views,
    std_of_normalized,
)

from .configuration_simclr import SimCLRConfig


class SimCLRModel(SSLModel):
    """The encoder: features before the projection head (SimCLR paper, section 4.2)."""

    config_class = SimCLRConfig


class SimCLRForPreTraining(SSLForPreTraining):
    """Encoder, projection head and the NT-Xent loss."""

    config_class = SimCLRConfig
    student: Branch

    def __init__(self, config: SimCLRConfig) -> None:
        super().__init__(config)
        backbone = build_backbone(config.backbone_config)
        head = MLPHead(
            backbone.hidden_size,
            config.projection_hidden_size or backbone.hidden_size,
            config.projection_size,
            config.num_projection_layers,
            hidden_norm=True,
            last_norm="scale",
            bias=False,
        )
        set_weight_initialization(head, "normal_0.01")
        self.student = Branch(backbone, head)
        convert_batchnorm(self.student, "synchronized")
        self.finish_construction()

    def forward(
        self, pixel_values: Tensor, row_index: Tensor | None = None, embed_only: bool = False
    ) -> SSLOutput:
        """Contrast two views.

        Args:
            pixel_values: (B, 2, C, H, W), normalised.
            row_index: (B,) rows of the global batch; unused.
            embed_only: stop before the head and return `embeddings` for `loss_from_embeddings`.

        Returns:
            `loss`: mean over 2B anchors in nats; ln(2N - 1) for a uniform softmax, N images on all processes.
        """
        features = self.student.backbone(join_views(pixel_values, num_views=2)).pooler_output
        embeddings = {"features": torch.stack(features.chunk(2), dim=1)}
        return SSLOutput(embeddings=embeddings) if embed_only else self.loss_from_embeddings(embeddings)

    def loss_from_embeddings(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """Head and loss of `features` (B, 2, D); the head's BatchNorm sees all images of the step."""
        features = embeddings["features"].transpose(0, 1).flatten(0, 1)  # (2B, D), blocked by view
        projections = self.student.head(features)
        first_Bd, second_Bd = projections.chunk(2)
        return SSLOutput(
            loss=nt_xent_loss(first_Bd, second_Bd, self.config.temperature),
            parts={"projection_std": std_of_normalized(projections)},
            features=features.detach(),
            projections=projections.detach(),
        )

    @property
    def loss_couples_the_batch(self) -> bool:
        """Other images are the negatives."""
        return True

    def check_global_batch(self, global_batch_size: int) -> None:
        """Refuse a batch without negatives."""
        if global_batch_size < 2:
            raise ValueError(
                f"SimCLR needs at least 2 images per step for negatives, got {global_batch_size}"
            )

    def expectations(self, num_images: int = 256) -> dict[str, float]:
        """Loss of a uniform softmax over `num_images` pairs; of aligned positives among uniform negatives."""
        candidates = 2 * num_images - 1
        aligned = math.log1p((candidates - 1) * math.exp(-1 / self.config.temperature))
        return {"loss_at_start": math.log(candidates), "loss_when_learned": aligned}
