"""DINO: the student's view of any crop predicts the teacher's choice among prototypes for another view.

Source: Caron et al. 2021 (arXiv 2104.14294), Algorithm 1 and Eq. 1-4; compared with the authors'
`main_dino.py`. Deliberate differences: temperature and frozen last layer follow steps instead of epochs; the
centre covers all micro-batches of a step; positions are resized without the authors' offset of 0.1, so that
`ViTModel` computes the same (`interpolate_offset`); the drop path above a rate of 0.1 is DINOv2's.
Shape suffixes: B = images in this process, V = views, G = 2 global views, D = backbone width, d = bottleneck
width, K = prototypes.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hf_ssl.modeling.shared.centering import PrototypeCenter
from hf_ssl.modeling.shared.distillation import (
    NUM_GLOBAL_VIEWS,
    SelfDistillation,
    StepTargets,
    view_by_view,
)
from hf_ssl.modeling.shared.outputs import SSLOutput
from hf_ssl.modeling.shared.pretraining import SSLModel, join_views, std_of_normalized
from hf_ssl.modeling.shared.prototypes import PrototypeTargets, mean_of_other_views, view_cross_entropies

from .configuration_dino import DINOConfig


class DINOModel(SSLModel):
    """The encoder: the teacher's backbone."""

    config_class = DINOConfig
    base_model_prefix = "teacher"


class DINOForPreTraining(SelfDistillation):
    """Student, teacher, centre and the multi-crop loss."""

    config_class = DINOConfig

    def __init__(self, config: DINOConfig) -> None:
        super().__init__(config)
        self.student = self.build_branch(config)
        self.teacher = self.build_branch(config)
        self.center = PrototypeCenter(config.num_prototypes)
        self.finish_construction()

    def prepare_step(self, batches: list[dict[str, Tensor]]) -> None:
        """Let the teacher see all micro-batches of the step."""
        vectors = [self.class_vectors(batch["pixel_values"]) for batch in batches]
        self.keep_class_targets(torch.cat(vectors), len(vectors[0]))

    @torch.no_grad()
    def class_vectors(self, pixel_values: Tensor) -> Tensor:
        """The teacher's bottleneck vectors (B, G, d) of the global views (B, G, C, H, W)."""
        crops = join_views(pixel_values, NUM_GLOBAL_VIEWS)
        features_RD = self._features(self.target_branch.backbone, crops, NUM_GLOBAL_VIEWS)
        vectors = self._over_views(self.target_branch.head, features_RD, NUM_GLOBAL_VIEWS)
        return vectors.unflatten(0, (NUM_GLOBAL_VIEWS, -1)).transpose(0, 1)

    def _features(self, backbone: nn.Module, crops: Tensor, num_views: int) -> Tensor:
        """Pooled features (V * B, D) of crops of one size (V * B, C, H, W), blocked by view."""
        return self._over_views(lambda part: backbone(part).pooler_output, crops, num_views)

    def _over_views(self, network: Callable[[Tensor], Tensor], rows: Tensor, num_views: int) -> Tensor:
        if self.config.separate_batch_norm:
            return view_by_view(network, rows, num_views)
        return network(rows)

    def _targets(self, pixel_values: Tensor, row_index: Tensor | None) -> PrototypeTargets:
        """Targets of a micro-batch, view after view: the prepared ones, or of this batch alone."""
        prepared = self._class_targets
        if prepared is None or row_index is None:
            prepared = StepTargets(self.targets_of(self.class_vectors(pixel_values)), len(pixel_values))
            row_index = prepared.first_rows(pixel_values)
        return prepared.of_rows(row_index, self.target_branch.head.prototypes.weights())  # type: ignore[union-attr, operator]

    def forward(  # type: ignore[override]  # as for all methods with small crops, before the rows
        self,
        pixel_values: Tensor,
        local_pixel_values: Tensor | None = None,
        row_index: Tensor | None = None,
    ) -> SSLOutput:
        """Predict the teacher's targets of every other view.

        Args:
            pixel_values: (B, 2, C, H, W) global views, normalised.
            local_pixel_values: (B, V - 2, C, h, w) local views, of the student alone.
            row_index: (B,) rows of the global batch among the prepared targets; without it, targets are made
                of this batch.

        Returns:
            `loss` in nats, mean over all pairs of different views, plus KoLeo where it has a weight;
            ln K for a student that cannot tell prototypes apart.
        """
        num_images = len(pixel_values)
        targets = self._targets(pixel_values, row_index)
        # Crops of one size make one pass; another size is another pass.
        sizes = [join_views(pixel_values, NUM_GLOBAL_VIEWS)]
        if local_pixel_values is not None:
            sizes.append(local_pixel_values.transpose(0, 1).flatten(0, 1))
        backbone = self.student.backbone
        features_RD = torch.cat(
            [self._features(backbone, crops, len(crops) // num_images) for crops in sizes]
        )
        vectors_Rd = self._over_views(self.student.head, features_RD, len(features_RD) // num_images)
        cross_entropies_VG = view_cross_entropies(
            vectors_Rd.unflatten(0, (-1, num_images)),
            self.student.head.prototypes.weights(),  # type: ignore[union-attr, operator]
            targets,
            self.config.student_temperature,
        )
        loss = mean_of_other_views(cross_entropies_VG)
        statistics = targets.statistics()
        parts = statistics | {
            "divergence": loss.detach() - statistics["target_entropy"],
            "center_norm": self.center.value.norm(),
            "feature_std": std_of_normalized(features_RD[:num_images]),
        }
        if self.config.koleo_weight:
            koleo = self.koleo(features_RD, num_images)
            parts["koleo"] = koleo.detach()
            loss = loss + self.config.koleo_weight * koleo
        return SSLOutput(
            loss=loss,
            parts=parts,
            features=features_RD[: NUM_GLOBAL_VIEWS * num_images].detach(),
            projections=vectors_Rd[: NUM_GLOBAL_VIEWS * num_images].detach(),
        )
