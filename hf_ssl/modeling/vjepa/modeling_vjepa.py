"""V-JEPA: from what tubes leave of a clip, predict a momentum teacher's tokens of the tubes.

Source: Bardes et al. 2024 (arXiv 2404.08471), section 3; compared with the authors' `train.py`,
`vision_transformer.py`, `predictor.py` and `multiblock3d.py`, and V-JEPA 2 (arXiv 2506.09985) for positions.
Deliberate differences: masks are drawn for all rows of a step; patches are gathered before their projection
(equal to 1e-6); the predictor's tokens are not sorted by place, which changes nothing but rounding.
Shape suffixes: B = clips, N = patches, K = patches of a context, M = patches to predict, D = encoder width,
E = predictor width.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_ssl.modeling.shared.joint_embedding import JointEmbeddingForPreTraining, gather_tokens
from hf_ssl.modeling.shared.losses import full_precision, without_autocast
from hf_ssl.modeling.shared.outputs import SSLOutput
from hf_ssl.modeling.shared.patches import clip_grid
from hf_ssl.modeling.shared.positions import make_rotations
from hf_ssl.modeling.shared.predictor import PatchPredictor
from hf_ssl.modeling.shared.pretraining import SSLModel
from hf_ssl.modeling.shared.tubes import Grid, TubeMasks, draw_tube_masks

from .configuration_vjepa import VJEPAConfig

Masks = list[tuple[Tensor, Tensor]]  # of each kind: contexts (B, K) and targets (B, M), int64


class VJEPAModel(SSLModel):
    """The encoder on whole clips: the teacher's backbone."""

    config_class = VJEPAConfig
    base_model_prefix = "teacher"
    main_input_name = "pixel_values_videos"

    def forward(
        self,
        pixel_values_videos: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Encode clips.

        Args:
            pixel_values_videos: (B, T, C, H, W), normalised; T a multiple of the tubelet. An image
                (B, C, H, W) is a clip that stands still.
            output_hidden_states: also return the states between blocks.
            output_attentions: also return attention weights (eager attention only).
            return_dict: False returns a tuple.

        Returns:
            `last_hidden_state` (B, N, D) after the final norm; `pooler_output` (B, D), their mean.
        """
        return super().forward(pixel_values_videos, output_hidden_states, output_attentions, return_dict)


class VJEPAPredictor(PatchPredictor):
    """Narrow transformer over a context and mask tokens, of which every kind of mask has its own."""

    def __init__(self, config: VJEPAConfig) -> None:
        encoder = config.encoder_config
        super().__init__(
            encoder,
            config.predictor_hidden_size,
            config.predictor_num_hidden_layers,
            config.predictor_heads,
            output_size=encoder.hidden_size,
            has_mask_token=False,
        )
        num_kinds = len(config.mask_scales or ())
        self.mask_tokens = nn.Parameter(torch.empty(num_kinds, 1, 1, config.predictor_hidden_size))

    def initialize_parameters(self) -> None:
        """Positions, and mask tokens of zeros."""
        super().initialize_parameters()
        init.zeros_(self.mask_tokens)

    def forward(
        self, context_BKD: Tensor, context_index_BK: Tensor, target_index_BM: Tensor, kind: int, grid: Grid
    ) -> Tensor:
        """Predict the tokens (B, M, D) of a clip's hidden patches.

        Args:
            context_BKD: the student's tokens.
            context_index_BK: their places.
            target_index_BM: places to predict.
            kind: which kind of mask hid them.
            grid: (time steps, rows, columns) of patches.
        """
        context_BKE = self.embed(context_BKD)
        targets = self.mask_tokens[kind].to(context_BKE.dtype).expand(*target_index_BM.shape, -1)
        tokens = torch.cat([context_BKE, targets], dim=1)
        index = torch.cat([context_index_BK, target_index_BM], dim=1)
        rotations = None
        if self.position_embeddings is None:
            rotations = make_rotations(
                index, grid, self.config.hidden_size // self.config.num_attention_heads
            )
        else:
            tokens = tokens + self.position_embeddings[0, index]
        states, _ = self.layers.run(tokens, rotations=rotations)
        return self.predict(self.layernorm(states[-1][:, context_BKE.shape[1] :]))


class VJEPAForPreTraining(JointEmbeddingForPreTraining):
    """Student with predictor, teacher, masks and the loss."""

    config_class = VJEPAConfig
    main_input_name = "pixel_values_videos"
    config: VJEPAConfig

    def build_predictor(self) -> VJEPAPredictor:
        """The student's head."""
        return VJEPAPredictor(self.config)

    def draw_masks(
        self, pixel_values: Tensor, num_rows: int, group_size: int, generator: torch.Generator
    ) -> list[TubeMasks]:
        """Tubes of each kind of mask, of all rows of a step."""
        config = self.config
        kinds = zip(config.mask_num_tubes or (), config.mask_scales or (), strict=True)
        return [
            draw_tube_masks(
                num_rows,
                self._grid(pixel_values),
                generator,
                num_tubes=num_tubes,
                scale=scale,
                aspect=config.mask_aspect or (),
                temporal_scale=config.mask_temporal_scale,
                truncation=config.truncation,
                group_size=group_size,
            )
            for num_tubes, scale in kinds
        ]

    def _grid(self, clips: Tensor) -> Grid:
        encoder = self.config.encoder_config
        return clip_grid(clips, encoder.tubelet_size, encoder.patch_size)

    def forward(
        self,
        pixel_values_videos: Tensor,
        row_index: Tensor | None = None,
        context_mask: Sequence[Tensor] | None = None,
        target_mask: Sequence[Tensor] | None = None,
    ) -> SSLOutput:
        """Predict the teacher's tokens of all tubes, one kind of mask after the other.

        Args:
            pixel_values_videos: (B, T, C, H, W), normalised.
            row_index: (B,) rows of the global batch, which choose the masks drawn for the step; without it,
                masks are drawn for this batch alone, the same in every call.
            context_mask: for every kind of mask (B, K), int64 indices of the patches that the student sees.
            target_mask: for every kind (B, M), int64 indices of the patches to predict; both or neither.

        Returns:
            `loss`: the mean over the kinds of the mean over values, about 0.8 for a guess of zero;
            `features` (B, D), the mean of the student's tokens of the first kind; `is_masked` (B, N), of the
            first kind, True = not in the context. `parts`: `target_std`, over clips and places, 0 when
            collapsed; `loss_of_mean`, of the best constant guess, which the loss must beat;
            `prediction_spread`, the mean of max(0, 1 - deviation of predictions over the places of a clip),
            1 when they are one vector (monitored in all published settings, never trained).

        Raises:
            ValueError: as many masks of both sorts as kinds are wanted, or a micro-batch across groups.
        """
        masks = self._choose_masks(pixel_values_videos, row_index, context_mask, target_mask)
        teacher_BND = self.teacher_tokens(pixel_values_videos)
        losses, features, all_targets, spreads = [], [], [], []
        for kind, (context_index_BK, target_index_BM) in enumerate(masks):
            tokens_BKD, predictions = self._predict(
                pixel_values_videos, context_index_BK, target_index_BM, kind
            )
            targets = gather_tokens(teacher_BND, target_index_BM)
            losses.append(self._loss(predictions, targets))
            features.append(tokens_BKD.detach().mean(dim=1))
            all_targets.append(targets)
            spreads.append(_missing_deviation(predictions.detach()))
        is_masked_BN = torch.ones(teacher_BND.shape[:2], dtype=torch.bool, device=teacher_BND.device)
        return SSLOutput(
            loss=torch.stack(losses).mean(),
            parts={
                **self._statistics(torch.cat(all_targets, dim=1)),
                "prediction_spread": torch.stack(spreads).mean(),
            },
            features=features[0],
            is_masked=is_masked_BN.scatter(1, masks[0][0], False),
        )

    @torch.no_grad()
    def agreement_of_clips(self, pixel_values_videos: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Grid]:
        """How well the tokens of tubes are predicted, for the eye.

        Args:
            pixel_values_videos: (B, T, C, H, W), normalised.

        Returns:
            For each kind of mask `is_context` (B, N) bool and the cosine of prediction and target (B, N), NaN
            where nothing was predicted; and the grid of patches.
        """
        tokens_BND = self.teacher_tokens(pixel_values_videos)
        kinds = []
        for kind, index in enumerate(self._choose_masks(pixel_values_videos, None, None, None)):
            context_index_BK, target_index_BM = index
            _, predictions = self._predict(pixel_values_videos, *index, kind)
            targets = gather_tokens(tokens_BND, target_index_BM)
            cosines = F.cosine_similarity(full_precision(predictions), targets, dim=-1)
            empty_BN = torch.full(tokens_BND.shape[:2], torch.nan, device=cosines.device)
            is_context_BN = torch.zeros_like(empty_BN, dtype=torch.bool).scatter(1, context_index_BK, True)
            kinds.append((is_context_BN, empty_BN.scatter(1, target_index_BM, cosines)))
        return kinds, self._grid(pixel_values_videos)

    def _predict(
        self, clips: Tensor, context_index_BK: Tensor, target_index_BM: Tensor, kind: int
    ) -> tuple[Tensor, Tensor]:
        tokens_BKD = self.student.backbone(clips, kept_index=context_index_BK).last_hidden_state
        grid = self._grid(clips)
        return tokens_BKD, self.student.head(tokens_BKD, context_index_BK, target_index_BM, kind, grid)

    def _choose_masks(
        self,
        clips: Tensor,
        row_index: Tensor | None,
        context_mask: Sequence[Tensor] | None,
        target_mask: Sequence[Tensor] | None,
    ) -> Masks:
        num_kinds = len(self.config.mask_scales or ())
        if context_mask is not None and target_mask is not None:
            if len(context_mask) == len(target_mask) == num_kinds:
                return list(zip(context_mask, target_mask, strict=True))
        if context_mask is not None or target_mask is not None:
            raise ValueError(f"give {num_kinds} context_mask and {num_kinds} target_mask, or neither")
        masks, rows = self.masks_for(clips, row_index)
        return [kind.of_rows(rows) for kind in masks]

    def _loss(self, predictions: Tensor, targets: Tensor) -> Tensor:
        with without_autocast(predictions):
            predictions = full_precision(predictions)
            if self.config.loss_exponent == 1:
                return F.l1_loss(predictions, targets.to(predictions))
            power = (predictions - targets.to(predictions)).abs() ** self.config.loss_exponent
            return power.mean() / self.config.loss_exponent

    @torch.no_grad()
    def _statistics(self, targets_BMD: Tensor) -> dict[str, Tensor]:
        rows_RD = targets_BMD.flatten(0, 1)
        middle_D = rows_RD.median(dim=0).values if self.config.loss_exponent == 1 else rows_RD.mean(dim=0)
        return {
            "target_std": self.target_std(targets_BMD),
            "loss_of_mean": self._loss(middle_D.expand_as(rows_RD), rows_RD),
        }

    def expectations(self, num_images: int = 256) -> dict[str, float]:
        """Loss at the start and of a guess of zero, for targets that are normal with variance 1."""
        power = self.config.loss_exponent
        # The mean of |x|^k of a normal variable, divided by k.
        of_zero = 2 ** (power / 2) * math.gamma((power + 1) / 2) / math.sqrt(math.pi) / power
        # A fresh predictor's last Linear reads normed tokens with weights of deviation 0.02.
        spread = math.sqrt(1 + self.config.predictor_hidden_size * 0.02**2)
        return {"loss_at_start": of_zero * spread**power, "loss_of_zero": of_zero}


def _missing_deviation(predictions_BMD: Tensor) -> Tensor:
    with without_autocast(predictions_BMD):
        deviation_BD = (full_precision(predictions_BMD).var(dim=1) + 1e-4).sqrt()
        return F.relu(1 - deviation_BD).mean()
