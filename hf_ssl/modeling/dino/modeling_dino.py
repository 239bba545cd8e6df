"""DINO: the student's view of any crop predicts the teacher's choice among prototypes for another view.

Source: Caron et al. 2021 (arXiv 2104.14294), Algorithm 1 and Eq. 1-4; compared with the authors'
`main_dino.py`. Deliberate differences: temperature and frozen last layer follow steps instead of epochs; the
centre covers all micro-batches of a step; positions are resized without the authors' offset of 0.1, so that
`ViTModel` computes the same (`interpolate_offset`); the drop path above a rate of 0.1 is DINOv2's.
Shape suffixes: B = images in this process, V = views, G = 2 global views, D = backbone width, d = bottleneck
width, K = prototypes.
"""

from torch import Tensor

from hf_ssl.modeling.shared.centering import PrototypeCenter
from hf_ssl.modeling.shared.distillation import NUM_GLOBAL_VIEWS, SelfDistillation
from hf_ssl.modeling.shared.outputs import SSLOutput
from hf_ssl.modeling.shared.pretraining import SSLModel, std_of_normalized
from hf_ssl.modeling.shared.prototypes import mean_of_other_views, view_cross_entropies

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
        targets = self.targets_of_rows(pixel_values, row_index)
        features_RD, _ = self.student_features(pixel_values, local_pixel_values)
        vectors_Rd = self.student.head(features_RD)  # once for all views: BatchNorm sees them together
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
