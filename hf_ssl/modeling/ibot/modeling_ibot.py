"""iBOT: DINO, and the teacher's choice among prototypes for every hidden patch of the student's own view.

Source: Zhou et al. 2021 (arXiv 2111.07832), Eq. 1-3; compared with the authors' `main_ibot.py`, `head.py` and
`loader.py`. Deliberate differences: prototypes meet the hidden patches alone, which gives the same loss;
masks are drawn for global views alone, by (seed, step, row) instead of in the dataset; temperatures follow
steps instead of epochs; the teacher, too, has a mask token, which it does not use.
Shape suffixes: B = images, G = 2 global views, N = patches.
"""

import random

import torch
from torch import Tensor

from hf_ssl.modeling.shared.backbone import build_backbone
from hf_ssl.modeling.shared.centering import PrototypeCenter
from hf_ssl.modeling.shared.distillation import NUM_GLOBAL_VIEWS, build_head
from hf_ssl.modeling.shared.distributed import convert_batchnorm
from hf_ssl.modeling.shared.heads import Prototypes
from hf_ssl.modeling.shared.masks import block_mask, generator_of_row, random_mask
from hf_ssl.modeling.shared.outputs import SSLOutput
from hf_ssl.modeling.shared.patch_distillation import PatchBranch, PatchSelfDistillation
from hf_ssl.modeling.shared.pretraining import SSLModel
from hf_ssl.modeling.shared.teacher import linear_warmup, num_steps

from .configuration_ibot import iBOTConfig


class iBOTModel(SSLModel):  # noqa: N801  (the paper's spelling)
    """The encoder: the teacher's backbone."""

    config_class = iBOTConfig
    base_model_prefix = "teacher"


class iBOTForPreTraining(PatchSelfDistillation):  # noqa: N801  (the paper's spelling)
    """Student, teacher, the centres of views and patches, and both losses."""

    config_class = iBOTConfig
    config: iBOTConfig
    centers_all_patches = True

    def __init__(self, config: iBOTConfig) -> None:
        super().__init__(config)
        self.student = self.build_branch(config)
        self.teacher = self.build_branch(config)
        self.center = PrototypeCenter(config.num_prototypes)
        self.patch_center = PrototypeCenter(config.num_patch_prototypes)  # type: ignore[arg-type]
        self._hides_patches = True
        if not config.teacher_temperature_warmup:
            self._patch_temperature = float(config.patch_teacher_temperature)
        self.finish_construction()

    @staticmethod
    def build_branch(config: iBOTConfig) -> PatchBranch:  # type: ignore[override]
        """Backbone and one MLP; prototypes of patches unless they are those of views."""
        backbone = build_backbone(config.backbone_config)
        own = None
        if not config.shared_head:
            own = Prototypes(
                config.head_bottleneck_size,
                config.num_patch_prototypes,  # type: ignore[arg-type]
                train_scale=config.train_prototype_scale,
            )
        branch = PatchBranch(
            backbone,
            build_head(config, backbone.hidden_size),
            patch_prototypes=own,
            separate_batch_norm=config.separate_batch_norm,
        )
        convert_batchnorm(branch, "synchronized")
        return branch

    def begin_step(self, step: int, total_steps: int, seed: int = 0) -> None:
        """As DINO; the temperature of patches starts with the masks."""
        super().begin_step(step, total_steps, seed)
        config = self.config
        start = num_steps(config.mask_start, total_steps)
        self._hides_patches = step >= start
        self._patch_temperature = linear_warmup(
            max(step - start, 0),
            num_steps(config.teacher_temperature_warmup, total_steps),
            config.patch_teacher_temperature_start,
            config.patch_teacher_temperature,
        )

    def draw_masks(
        self, row_index: Tensor, num_rows: int, grid: tuple[int, int], seed: tuple[int, int]
    ) -> Tensor:
        """Masks (B, G, N) of rows of a step; each depends on (seed, step, row) alone."""
        if not self._hides_patches:
            return torch.zeros(len(row_index), NUM_GLOBAL_VIEWS, grid[0] * grid[1], dtype=torch.bool)
        return torch.stack(
            [self._draw_masks_of_row(generator_of_row(*seed, row), grid) for row in row_index.tolist()]
        )

    def _draw_masks_of_row(self, generator: random.Random, grid: tuple[int, int]) -> Tensor:
        config = self.config
        entries = list(zip(config.mask_ratios, config.mask_ratio_spreads, strict=True))  # type: ignore[arg-type]
        smallest_area = (min(grid) // 3) ** 2
        masks = []
        for _ in range(NUM_GLOBAL_VIEWS):
            ratio, spread = generator.choice(entries)
            target = generator.uniform(ratio - spread, ratio + spread) * grid[0] * grid[1]
            if config.mask_shape == "random":
                masks.append(random_mask(grid, target, generator))
            else:
                masks.append(block_mask(grid, target, smallest_area, float("inf"), generator))
        return torch.stack(masks).flatten(1)

    def forward(  # type: ignore[override]  # as for all methods with small crops, before the rows
        self,
        pixel_values: Tensor,
        local_pixel_values: Tensor | None = None,
        row_index: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
    ) -> SSLOutput:
        """Both losses, see `PatchSelfDistillation.distill`."""
        return self.distill(pixel_values, local_pixel_values, row_index, bool_masked_pos)

    def masked_share_of_views(self) -> float:
        """Share of the views that have a mask."""
        entries = zip(self.config.mask_ratios, self.config.mask_ratio_spreads, strict=True)  # type: ignore[arg-type]
        hides = [ratio + spread > 0 for ratio, spread in entries]
        return sum(hides) / len(hides)
