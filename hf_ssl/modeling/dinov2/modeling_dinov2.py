"""DINOv2: distillation of views and hidden patches, spread by KoLeo; and Gram anchoring of patches.

Source: Oquab et al. 2023 (arXiv 2304.07193), section 4; compared with the authors' `ssl_meta_arch.py`,
`losses` and `masking.py`. Deliberate differences: without local crops the loss is the mean over its two pairs
(theirs divides by three); the centre of patches is the mean over all of them, not of processes' means;
Sinkhorn-Knopp covers all micro-batches of a step; masks are stratified over the whole step; KoLeo works on
fixed groups of images; a frozen last layer gets no gradient instead of a rate of 0, so no moments gather.
Shape suffixes: B = images, G = 2 global views, N = patches, D = backbone width, I = teacher rows,
d = bottleneck width, R = view rows.
"""

import torch
from torch import Tensor

from hf_ssl.modeling.shared.backbone import build_backbone
from hf_ssl.modeling.shared.centering import PrototypeCenter, sinkhorn_targets
from hf_ssl.modeling.shared.distillation import NUM_GLOBAL_VIEWS, build_head
from hf_ssl.modeling.shared.distributed import convert_batchnorm
from hf_ssl.modeling.shared.heads import PrototypeHead
from hf_ssl.modeling.shared.masks import block_mask, generator_of_row, stratified_counts
from hf_ssl.modeling.shared.outputs import SSLOutput
from hf_ssl.modeling.shared.patch_distillation import PatchBranch, PatchSelfDistillation
from hf_ssl.modeling.shared.pretraining import SSLModel, generator_of_step
from hf_ssl.modeling.shared.prototypes import PrototypeTargets, PrototypeWeights

from .configuration_dinov2 import DINOv2Config

SMALLEST_BLOCK = 4  # patches
LARGEST_BLOCK = 0.5  # of all patches


class DINOv2Model(SSLModel):
    """The encoder: the teacher's backbone."""

    config_class = DINOv2Config
    base_model_prefix = "teacher"


class DINOv2ForPreTraining(PatchSelfDistillation):
    """Student, teacher, the centres of views and patches, and all losses."""

    config_class = DINOv2Config
    config: DINOv2Config
    centers_all_patches = False

    def __init__(self, config: DINOv2Config) -> None:
        super().__init__(config)
        self.student = self.build_branch(config)
        self.teacher = self.build_branch(config)
        self.center = PrototypeCenter(config.num_prototypes)
        self.patch_center = PrototypeCenter(config.num_patch_prototypes)  # type: ignore[arg-type]
        self.finish_construction()

    @staticmethod
    def build_branch(config: DINOv2Config) -> PatchBranch:  # type: ignore[override]
        """Backbone and head; a second head for patches unless it is tied to the first."""
        backbone = build_backbone(config.backbone_config)
        own = None
        if config.separate_patch_head:
            own = PrototypeHead(
                backbone.hidden_size,
                config.head_hidden_size,
                config.patch_bottleneck_size,  # type: ignore[arg-type]
                config.num_patch_prototypes,  # type: ignore[arg-type]
                config.num_head_layers,
                hidden_norm=False,
                train_scale=config.train_prototype_scale,
            )
        branch = PatchBranch(backbone, build_head(config, backbone.hidden_size), patch_head=own)
        convert_batchnorm(branch, "synchronized")
        return branch

    def make_targets(
        self, vectors_Id: Tensor, weights: PrototypeWeights, center: PrototypeCenter, temperature: float
    ) -> PrototypeTargets:
        """Sinkhorn-Knopp over all rows of the step, both views together; or the centre of earlier steps."""
        if self.config.centering == "sinkhorn_knopp":
            return sinkhorn_targets(vectors_Id, weights, temperature)
        return super().make_targets(vectors_Id, weights, center, temperature)

    def draw_masks(
        self, row_index: Tensor, num_rows: int, grid: tuple[int, int], seed: tuple[int, int]
    ) -> Tensor:
        """Masks (B, G, N): how much of each view by strata over the step, where by (seed, step, row)."""
        config, num_patches = self.config, grid[0] * grid[1]
        counts = stratified_counts(
            num_rows * NUM_GLOBAL_VIEWS,
            num_patches,
            config.mask_probability,
            (config.mask_ratio_min, config.mask_ratio_max),
            generator_of_step(*seed),
        ).view(num_rows, NUM_GLOBAL_VIEWS)
        masks = []
        for row in row_index.tolist():
            generator = generator_of_row(*seed, row)
            views = [
                block_mask(grid, count, SMALLEST_BLOCK, int(LARGEST_BLOCK * num_patches), generator)
                for count in counts[row].tolist()
            ]
            masks.append(torch.stack(views).flatten(1))
        return torch.stack(masks)

    def masked_share_of_views(self) -> float:
        """Share of the views that have a mask."""
        return float(self.config.mask_probability)

    def forward(  # type: ignore[override]  # as for all methods with small crops, before the rows
        self,
        pixel_values: Tensor,
        local_pixel_values: Tensor | None = None,
        row_index: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
    ) -> SSLOutput:
        """All losses, see `PatchSelfDistillation.distill`."""
        return self.distill(pixel_values, local_pixel_values, row_index, bool_masked_pos)
