"""I-JEPA: from one block of an image, predict a momentum teacher's tokens of other blocks.

Source: Assran et al. 2023 (arXiv 2301.08243), section 3; compared with the authors' `train.py`,
`vision_transformer.py` and `multiblock.py`. Deliberate differences: masks are drawn for all rows of a step;
context patches are gathered before their projection (equal to 1e-6); one context an image, as in all
published settings.
Shape suffixes: B = images, N = patches, K = patches of a context, T = target blocks of an image, M = patches
of a target block, D = encoder width, E = predictor width. Rows T * B are blocked by target, as in the
authors' code.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ssl.modeling.shared.joint_embedding import JointEmbeddingForPreTraining, gather_tokens
from hf_ssl.modeling.shared.losses import full_precision, without_autocast
from hf_ssl.modeling.shared.multi_block import BlockMasks, draw_block_masks
from hf_ssl.modeling.shared.outputs import SSLOutput
from hf_ssl.modeling.shared.patches import patch_grid
from hf_ssl.modeling.shared.predictor import PatchPredictor
from hf_ssl.modeling.shared.pretraining import SSLModel

from .configuration_ijepa import IJEPAConfig

LOSSES = {"smooth_l1": F.smooth_l1_loss, "l2": F.mse_loss}


class IJEPAModel(SSLModel):
    """The encoder on whole images: the teacher's backbone."""

    config_class = IJEPAConfig
    base_model_prefix = "teacher"


class IJEPAPredictor(PatchPredictor):
    """Narrow transformer over a context and the mask tokens of one target block."""

    def __init__(self, config: IJEPAConfig) -> None:
        super().__init__(
            config.encoder_config,
            config.predictor_hidden_size,
            config.predictor_num_hidden_layers,
            config.predictor_heads,
            output_size=config.encoder_config.hidden_size,
        )

    def forward(
        self, context_BKD: Tensor, context_index_BK: Tensor, target_index_TBM: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        """Predict the tokens of every target block, which do not see each other.

        Args:
            context_BKD: the student's tokens.
            context_index_BK: their places.
            target_index_TBM: places to predict.
            grid: (rows, columns) of patches; positions are resized where it is not the training grid.

        Returns:
            Predicted tokens (T * B, M, D).
        """
        positions_NE = self.positions(grid)[0]
        context_BKE = self.embed(context_BKD) + positions_NE[context_index_BK]
        targets = self.mask_token.to(context_BKE.dtype) + positions_NE[target_index_TBM.flatten(0, 1)]
        context = context_BKE.repeat(len(target_index_TBM), 1, 1)
        states, _ = self.layers.run(torch.cat([context, targets], dim=1))
        return self.predict(self.layernorm(states[-1][:, context.shape[1] :]))


class IJEPAForPreTraining(JointEmbeddingForPreTraining):
    """Student with predictor, teacher, masks and the loss."""

    config_class = IJEPAConfig
    config: IJEPAConfig

    def build_predictor(self) -> IJEPAPredictor:
        """The student's head."""
        return IJEPAPredictor(self.config)

    # The masks

    def draw_masks(
        self, pixel_values: Tensor, num_rows: int, group_size: int, generator: torch.Generator
    ) -> BlockMasks:
        """Context and target blocks of all rows of a step."""
        config = self.config
        return draw_block_masks(
            num_rows,
            self._grid(pixel_values),
            generator,
            num_targets=config.num_targets,
            target_scale=config.target_scale,  # type: ignore[arg-type]
            target_aspect=config.target_aspect,  # type: ignore[arg-type]
            context_scale=config.context_scale,  # type: ignore[arg-type]
            min_context_patches=config.min_context_patches,
            reach_last=config.reach_last_row,
            truncation=config.truncation,
            group_size=group_size,
        )

    def _grid(self, pixel_values: Tensor) -> tuple[int, int]:
        return patch_grid(pixel_values, self.config.encoder_config.patch_size)

    # The loss

    def forward(
        self,
        pixel_values: Tensor,
        row_index: Tensor | None = None,
        context_mask: Sequence[Tensor] | None = None,
        target_mask: Sequence[Tensor] | None = None,
    ) -> SSLOutput:
        """Predict the teacher's tokens of all target blocks.

        Args:
            pixel_values: (B, C, H, W), normalised.
            row_index: (B,) rows of the global batch, which choose the masks drawn for the step; without it,
                masks are drawn for this batch alone, the same in every call.
            context_mask: one tensor (B, K), int64 indices of the patches that the student sees.
            target_mask: T tensors (B, M), int64 indices of the patches to predict; both masks or neither.

        Returns:
            `loss`: per value, about 0.42 for a guess of zero (smooth-L1); `features` (B, D), the mean of the
            student's tokens; `is_masked` (B, N), True = not in the context. `parts`: `target_std`, over
            images and places, 0 when collapsed; `loss_of_mean`, of the best constant guess, which the loss
            must beat; both lengths.

        Raises:
            ValueError: one mask without the other, or a micro-batch across groups of masks.
        """
        context_index_BK, target_index_TBM = self._choose_masks(
            pixel_values, row_index, context_mask, target_mask
        )
        tokens_BKD = self.student.backbone(pixel_values, kept_index=context_index_BK).last_hidden_state
        grid = self._grid(pixel_values)
        predictions = self.student.head(tokens_BKD, context_index_BK, target_index_TBM, grid)
        targets = self._targets(pixel_values, target_index_TBM)
        is_masked_BN = torch.ones(len(pixel_values), grid[0] * grid[1], dtype=torch.bool)
        is_masked_BN = is_masked_BN.to(pixel_values.device).scatter(1, context_index_BK, False)
        return SSLOutput(
            loss=self._loss(predictions, targets),
            parts=self._statistics(targets, context_index_BK),
            features=tokens_BKD.detach().mean(dim=1),
            is_masked=is_masked_BN,
        )

    def _choose_masks(
        self,
        pixel_values: Tensor,
        row_index: Tensor | None,
        context_mask: Sequence[Tensor] | None,
        target_mask: Sequence[Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        if context_mask is not None and target_mask is not None and len(context_mask) == 1:
            return context_mask[0], torch.stack(list(target_mask))
        if context_mask is not None or target_mask is not None:
            raise ValueError("give one context_mask and one or more target_mask, or neither")
        masks, rows = self.masks_for(pixel_values, row_index)
        return masks.of_rows(rows)

    @torch.no_grad()
    def agreement(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """How well the tokens of target blocks are predicted, for the eye.

        Args:
            pixel_values: (B, C, H, W), normalised.

        Returns:
            `is_context` (B, N) bool, and the cosine of prediction and target (B, N), the mean where blocks
            overlap, NaN outside all.
        """
        context_index_BK, target_index_TBM = self._choose_masks(pixel_values, None, None, None)
        grid, num_images = self._grid(pixel_values), len(pixel_values)
        tokens_BKD = self.student.backbone(pixel_values, kept_index=context_index_BK).last_hidden_state
        predictions = self.student.head(tokens_BKD, context_index_BK, target_index_TBM, grid)
        targets = self._targets(pixel_values, target_index_TBM)
        cosines = F.cosine_similarity(full_precision(predictions), targets, dim=-1)
        sums_BN = torch.zeros(num_images, math.prod(grid), device=cosines.device)
        counts_BN = torch.zeros_like(sums_BN)
        for index_BM, part_BM in zip(target_index_TBM, cosines.view(target_index_TBM.shape), strict=True):
            sums_BN.scatter_add_(1, index_BM, part_BM)
            counts_BN.scatter_add_(1, index_BM, torch.ones_like(part_BM))
        is_context_BN = torch.zeros_like(sums_BN, dtype=torch.bool).scatter(1, context_index_BK, True)
        return is_context_BN, sums_BN / counts_BN

    @torch.no_grad()
    def _targets(self, pixel_values: Tensor, target_index_TBM: Tensor) -> Tensor:
        """The teacher's tokens (T * B, M, D) of the blocks."""
        tokens_BND = self.teacher_tokens(pixel_values)
        return torch.cat([gather_tokens(tokens_BND, index_BM) for index_BM in target_index_TBM])

    def _loss(self, predictions: Tensor, targets: Tensor) -> Tensor:
        with without_autocast(predictions):
            return LOSSES[self.config.loss](
                full_precision(predictions), targets.to(full_precision(predictions))
            )

    @torch.no_grad()
    def _statistics(self, targets: Tensor, context_index_BK: Tensor) -> dict[str, Tensor]:
        rows_RD = targets.flatten(0, 1)
        mean_D = rows_RD.mean(dim=0)
        return {
            "target_std": self.target_std(targets),
            "loss_of_mean": self._loss(mean_D.expand_as(rows_RD), rows_RD),
            "context_length": targets.new_tensor(float(context_index_BK.shape[1])),
            "target_length": targets.new_tensor(float(targets.shape[1])),
        }

    def expectations(self, num_images: int = 256) -> dict[str, float]:
        """Loss at the start and of a guess of zero, for targets that are normal with variance 1.

        Those of a fresh teacher are mostly positions, less spread: smooth-L1 starts up to an eighth higher.
        """
        # A fresh predictor's last Linear reads normed tokens with weights of deviation 0.02.
        spread = math.sqrt(1 + self.config.predictor_hidden_size * 0.02**2)
        mean_loss = {"smooth_l1": _smooth_l1_of_normal, "l2": lambda std: std**2}[self.config.loss]
        return {"loss_at_start": mean_loss(spread), "loss_of_zero": mean_loss(1.0)}


def _smooth_l1_of_normal(std: float) -> float:
    """Mean smooth-L1 loss (beta 1) of an error that is normal with mean 0."""
    border = 1 / std
    density = math.exp(-(border**2) / 2) / math.sqrt(2 * math.pi)
    inside = math.erf(border / math.sqrt(2))
    return 0.5 * std**2 * (inside - 2 * border * density) + 2 * std * density - 0.5 * (1 - inside)
