"""DINOv2: distillation of views and hidden patches, spread by KoLeo; and Gram anchoring of patches.

Source: Oquab et al. 2023 (arXiv 2304.07193), section 4; compared with the authors' `ssl_meta_arch.py`,
`losses` and `masking.py`. Deliberate differences: without local crops the loss is the mean over its two pairs
(theirs divides by three); the centre of patches is the mean over all of them, not of processes' means;
Sinkhorn-Knopp covers all micro-batches of a step; masks are stratified over the whole step; KoLeo works on
fixed groups of images; a frozen last layer gets no gradient instead of a rate of 0, so no moments gather.
Gram anchoring: Simeoni et al. 2025 (arXiv 2508.10104), section 4; compared with DINOv3's `gram_loss.py`. The
anchor's larger view is cut from the image itself, where theirs makes the student's view from it.
Shape suffixes: B = images, G = 2 global views, N = patches, D = backbone width, I = teacher rows,
d = bottleneck width, R = view rows.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hf_ssl.modeling.shared.backbone import build_backbone
from hf_ssl.modeling.shared.centering import PrototypeCenter, sinkhorn_targets
from hf_ssl.modeling.shared.distillation import CENTER_TENSORS, NUM_GLOBAL_VIEWS, build_head
from hf_ssl.modeling.shared.distributed import convert_batchnorm
from hf_ssl.modeling.shared.heads import PrototypeHead
from hf_ssl.modeling.shared.losses import full_precision, gram_loss, shrink_patches
from hf_ssl.modeling.shared.masks import block_mask, generator_of_row, stratified_counts
from hf_ssl.modeling.shared.outputs import SSLOutput
from hf_ssl.modeling.shared.patch_distillation import PatchBranch, PatchSelfDistillation
from hf_ssl.modeling.shared.pretraining import TEACHER_TENSORS, SSLModel, generator_of_step, join_views
from hf_ssl.modeling.shared.prototypes import PrototypeTargets, PrototypeWeights
from hf_ssl.modeling.shared.teacher import num_steps

from .configuration_dinov2 import DINOv2Config

SMALLEST_BLOCK = 4  # patches
LARGEST_BLOCK = 0.5  # of all patches


class DINOv2Model(SSLModel):
    """The encoder: the teacher's backbone."""

    config_class = DINOv2Config
    base_model_prefix = "teacher"


class DINOv2Anchor(nn.Module):
    """An earlier teacher's backbone, whose similarities between patches are kept."""

    def __init__(self, config: DINOv2Config) -> None:
        super().__init__()
        self.backbone = build_backbone(config.backbone_config)


class DINOv2ForPreTraining(PatchSelfDistillation):
    """Student, teacher, the centres of views and patches, all losses, and maybe an anchor."""

    config_class = DINOv2Config
    config: DINOv2Config
    centers_all_patches = False
    _keep_in_fp32_modules_strict = [TEACHER_TENSORS, CENTER_TENSORS, r"^(anchor|distiller)\."]

    def __init__(self, config: DINOv2Config) -> None:
        super().__init__(config)
        self.student = self.build_branch(config)
        self.teacher = self.build_branch(config)
        self.center = PrototypeCenter(config.num_prototypes)
        self.patch_center = PrototypeCenter(config.num_patch_prototypes)  # type: ignore[arg-type]
        self.anchor = DINOv2Anchor(config) if config.gram_weight else None
        has_distiller = config.distiller_config is not None
        self.distiller = self.build_branch(config.distiller()) if has_distiller else None
        self._gram_weight = 0.0 if config.gram_start or config.gram_warmup else float(config.gram_weight)
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
        branch = PatchBranch(
            backbone,
            build_head(config, backbone.hidden_size),
            patch_head=own,
            separate_batch_norm=config.separate_batch_norm,
        )
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

    # The anchor

    def finish_construction(self) -> None:
        """As for all of the kind; the anchor starts as the teacher."""
        super().finish_construction()
        if self.anchor is not None and not next(self.parameters()).is_meta:
            self.take_snapshot()

    def train(self, mode: bool = True) -> "DINOv2ForPreTraining":
        """What only makes targets stays in eval mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def _frozen_modules(self) -> Iterable[nn.Module]:
        return (module for module in (self.anchor, self.distiller) if module is not None)

    # The frozen teacher

    @property
    def target_branch(self) -> PatchBranch:
        """The frozen teacher where there is one, else the student's average."""
        return self.teacher if self.distiller is None else self.distiller

    @property
    def hides_patches(self) -> bool:  # type: ignore[override]
        """A student of a frozen teacher sees its views whole, as the authors' ViT-S to L did."""
        return self.distiller is None

    @torch.no_grad()
    def take_distiller(self, source: "DINOv2ForPreTraining") -> None:
        """Copy the teacher, heads included, of a model that was trained.

        Raises:
            ValueError: it is not the one that `distiller_config` describes.
        """
        if self.distiller is None:
            raise ValueError("this model has no frozen teacher; give distiller_config")
        try:
            self.distiller.load_state_dict(source.teacher.state_dict())
        except RuntimeError as error:
            raise ValueError(f"the frozen teacher is not as distiller_config says: {error}") from error
        # Centres belong to the logits of who makes the targets.
        self.center.load_state_dict(source.center.state_dict())
        self.patch_center.load_state_dict(source.patch_center.state_dict())

    def freeze_targets(self) -> None:
        """The anchor and a frozen teacher are targets too."""
        super().freeze_targets()
        for module in self._frozen_modules():
            module.requires_grad_(False)
        if self.distiller is not None:  # nothing is hidden, and DDP wants every parameter to be used
            self.student.backbone.embeddings.mask_token.requires_grad_(False)  # type: ignore[union-attr]

    @torch.no_grad()
    def _after_loading(self, info: dict[str, Any]) -> None:
        """What a checkpoint lacks of the anchor is the teacher's."""
        super()._after_loading(info)
        if self.anchor is None:
            return
        for tensor in self.anchor.parameters():
            tensor.data = full_precision(tensor.data)
        state = self.state_dict()
        for name in [name for name in info["missing_keys"] if name.startswith("anchor.")]:
            state[name].copy_(state[name.replace("anchor.", "teacher.", 1)])

    def fresh_tensors(self, missing: Iterable[str]) -> set[str]:
        """The teacher supplies the anchor."""
        return {name for name in super().fresh_tensors(missing) if not name.startswith("anchor.")}

    def take_snapshot(self) -> None:
        """Let the anchor be what the teacher is now."""
        assert self.anchor is not None
        self.anchor.backbone.load_state_dict(self.teacher.backbone.state_dict())

    def begin_step(self, step: int, total_steps: int, seed: int = 0) -> None:
        """As without anchor; and take the anchor, or a new one, and set the weight of its loss."""
        super().begin_step(step, total_steps, seed)
        config = self.config
        if self.anchor is None:
            return
        start = num_steps(config.gram_start, total_steps)
        age, every = step - start, config.gram_update_every
        is_refresh = every > 0 and 0 < age <= every * config.gram_max_updates and age % every == 0
        if is_refresh or step == num_steps(config.gram_snapshot, total_steps):
            self.take_snapshot()
        self._gram_weight = gram_weight_at(
            age, num_steps(config.gram_warmup, total_steps), config.gram_weight
        )

    def further_terms(
        self, features_RD: Tensor, patches_BGND: Tensor, anchor_pixel_values: Tensor
    ) -> list[tuple[str, float, Tensor]]:
        """KoLeo, and the similarities of the anchor's patches once that loss has begun."""
        terms = super().further_terms(features_RD, patches_BGND, anchor_pixel_values)
        if self._gram_weight:
            terms.append(("gram", self._gram_weight, self.gram(patches_BGND, anchor_pixel_values)))
        return terms

    def gram(self, patches_BGND: Tensor, anchor_pixel_values: Tensor) -> Tensor:
        """How far the student's similarities between patches are from the anchor's.

        Raises:
            ValueError: the anchor's views are no whole multiple of the student's.
        """
        assert self.anchor is not None
        rows, columns = self._grid(anchor_pixel_values)
        factor = max(math.isqrt(rows * columns // patches_BGND.shape[2]), 1)
        grid = (rows // factor, columns // factor)
        if grid[0] * grid[1] != patches_BGND.shape[2] or rows % factor or columns % factor:
            raise ValueError(
                f"anchor views have {rows} x {columns} patches, the student's {patches_BGND.shape[2]}; their "
                "sides must be a whole multiple"
            )
        with torch.no_grad():
            tokens = self.anchor.backbone(join_views(anchor_pixel_values, NUM_GLOBAL_VIEWS)).last_hidden_state
            prefix = self.config.backbone_config.num_prefix_tokens  # type: ignore[union-attr]
            targets = shrink_patches(tokens[:, prefix:], (rows, columns), grid)
        return gram_loss(patches_BGND.transpose(0, 1).flatten(0, 1), targets, self.config.gram_negatives)

    def forward(  # type: ignore[override]  # as for all methods with small crops, before the rows
        self,
        pixel_values: Tensor,
        local_pixel_values: Tensor | None = None,
        row_index: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        anchor_pixel_values: Tensor | None = None,
    ) -> SSLOutput:
        """All losses, see `PatchSelfDistillation.distill`.

        `anchor_pixel_values` (B, 2, C, H', W') are the global views for the anchor, at a whole multiple of
        their size; without them it sees `pixel_values`.
        """
        return self.distill(pixel_values, local_pixel_values, row_index, bool_masked_pos, anchor_pixel_values)


def gram_weight_at(age: int, warmup_steps: int, weight: float) -> float:
    """Weight `age` steps after the start: half a cosine that ends with the last step of the warm-up."""
    if age < 0:
        return 0.0
    if age >= warmup_steps:
        return weight
    return weight * 0.5 * (1 - math.cos(math.pi * age / max(warmup_steps - 1, 1)))
