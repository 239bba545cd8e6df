"""What the joint-embedding predictive methods share: a momentum teacher's normalised tokens as targets.

Sources: Assran et al. 2023 (arXiv 2301.08243), Bardes et al. 2024 (arXiv 2404.08471); both authors'
`train.py`.
Shape suffixes: B = images or clips, N = patches, M = patches to predict, D = width of the encoder.
"""

from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from hf_ssl.modeling.shared.backbone import build_backbone
from hf_ssl.modeling.shared.configuration import SSLConfig
from hf_ssl.modeling.shared.distributed import world_size
from hf_ssl.modeling.shared.losses import full_precision, without_autocast
from hf_ssl.modeling.shared.multi_block import TRUNCATIONS
from hf_ssl.modeling.shared.pretraining import TEACHER_TENSORS, Branch, SSLForPreTraining, generator_of_step
from hf_ssl.modeling.shared.teacher import linear_momentum, update_teacher


@strict
class JointEmbeddingConfig(SSLConfig):
    """Predictor, teacher, and how lists of patches are cut. Defaults are those of the authors' code."""

    predictor_hidden_size: int = 384  # pred_emb_dim
    predictor_num_hidden_layers: int = 12  # pred_depth
    predictor_num_attention_heads: int | None = None  # None: the encoder's
    # Lists of a group are cut to its smallest: the "first" patches stay, as in the authors' code, which
    # starves the lower rows and the last frames, or "random" ones.
    truncation: str = "first"
    # Consecutive rows among which lists are cut, a multiple of the micro-batch; None: all of a step.
    mask_group_size: int | None = None
    teacher_momentum: float | int = 0.996  # ema, its start
    teacher_momentum_end: float | int = 1.0  # reached on a line

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.require_vit()
        width, heads = self.predictor_hidden_size, self.predictor_heads
        if width % heads or width % 4:
            raise ValueError(
                f"predictor_hidden_size {width} must be a multiple of 4 and of its {heads} attention heads; "
                "change it or predictor_num_attention_heads"
            )

    @property
    def predictor_heads(self) -> int:
        """Attention heads of the predictor."""
        return self.predictor_num_attention_heads or self.encoder_config.num_attention_heads

    def validate_predictor(self) -> None:
        """Refuse a predictor without blocks."""
        if self.predictor_num_hidden_layers < 1:
            raise ValueError(
                f"predictor_num_hidden_layers must be at least 1, got {self.predictor_num_hidden_layers}"
            )

    def validate_lists(self) -> None:
        """Refuse unknown truncations and empty groups."""
        if self.truncation not in TRUNCATIONS:
            raise ValueError(f"truncation must be one of {', '.join(TRUNCATIONS)}, got '{self.truncation}'")
        if self.mask_group_size is not None and self.mask_group_size < 1:
            raise ValueError(f"mask_group_size must be at least 1, got {self.mask_group_size}")

    def validate_momenta(self) -> None:
        """Refuse momenta outside [0, 1]."""
        for name in ("teacher_momentum", "teacher_momentum_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")


class JointEmbeddingForPreTraining(SSLForPreTraining):
    """Student with predictor and teacher; a subclass draws masks and has the loss."""

    base_model_prefix = "teacher"
    _keep_in_fp32_modules_strict = [TEACHER_TENSORS]
    config: JointEmbeddingConfig
    student: Branch
    teacher: nn.Module

    def __init__(self, config: JointEmbeddingConfig) -> None:
        super().__init__(config)
        self.student = Branch(build_backbone(config.backbone_config), self.build_predictor())
        self.teacher = nn.Module()  # without a predictor
        self.teacher.backbone = build_backbone(config.backbone_config)
        self._teacher_momentum = float(config.teacher_momentum)
        self._mask_seed = (0, 0)
        self._masks_of_step: Any = None
        self.finish_construction()
        self.train(self.training)

    def build_predictor(self) -> nn.Module:
        """The student's head."""
        raise TypeError(f"{type(self).__name__} must define build_predictor")

    def draw_masks(
        self, pixel_values: Tensor, num_rows: int, group_size: int, generator: torch.Generator
    ) -> Any:
        """Masks of all rows of a step, for images or clips of this size."""
        raise TypeError(f"{type(self).__name__} must define draw_masks")

    def train(self, mode: bool = True) -> "JointEmbeddingForPreTraining":
        """The teacher stays in eval mode, so that no drop path blurs its targets."""
        super().train(mode)
        self.teacher.eval()
        return self

    def begin_step(self, step: int, total_steps: int, seed: int = 0) -> None:
        """Momentum of the teacher; masks of a step depend on (seed, step) and the row alone."""
        self._teacher_momentum = linear_momentum(
            step, total_steps, self.config.teacher_momentum, self.config.teacher_momentum_end
        )
        self._mask_seed = (seed, step)
        self._masks_of_step = None

    def prepare_step(self, batches: list[dict[str, Tensor]]) -> None:
        """Draw the masks of all rows of the step, the same on every process."""
        inputs = [batch[self.main_input_name] for batch in batches]
        num_rows = world_size() * sum(len(pixel_values) for pixel_values in inputs)
        group_size = self.config.mask_group_size or num_rows
        self._masks_of_step = self.draw_masks(
            inputs[0], num_rows, group_size, generator_of_step(*self._mask_seed)
        )

    def masks_for(self, pixel_values: Tensor, row_index: Tensor | None) -> tuple[Any, Tensor]:
        """Masks, and the rows of them that these images or clips have (B,).

        Without `row_index`, or before a step, they are drawn for this batch alone, the same in every call.
        """
        if self._masks_of_step is not None and row_index is not None:
            return self._masks_of_step, row_index
        num_rows = len(pixel_values)
        masks = self.draw_masks(pixel_values, num_rows, num_rows, generator_of_step(0, 0))
        return masks, torch.arange(num_rows, device=pixel_values.device)

    def end_step(self, updates: list[dict[str, Tensor]]) -> None:
        """Move the teacher towards the student that the optimizer has just changed."""
        self._masks_of_step = None
        update_teacher(self.teacher, self.student, self._teacher_momentum)

    def check_global_batch(self, global_batch_size: int) -> None:
        """Refuse a batch that has no whole groups."""
        size = self.config.mask_group_size
        if size and global_batch_size % size:
            raise ValueError(
                f"mask_group_size {size} does not divide the global batch {global_batch_size}; give one that "
                "does and is a multiple of the micro-batch, or leave it out"
            )

    @torch.no_grad()
    def teacher_tokens(self, pixel_values: Tensor) -> Tensor:
        """The teacher's tokens (B, N, D) of whole images or clips, each to mean 0 and variance 1."""
        backbone: Any = self.teacher.backbone
        tokens_BND: Tensor = backbone(pixel_values).last_hidden_state
        with without_autocast(tokens_BND):
            return F.layer_norm(full_precision(tokens_BND), tokens_BND.shape[-1:])

    @torch.no_grad()
    def target_std(self, targets_BMD: Tensor) -> Tensor:
        """Deviation of a target's values over images and places: 0 when they have collapsed."""
        return targets_BMD.flatten(0, 1).std(dim=0, correction=0).mean()


def gather_tokens(tokens_BND: Tensor, index_BM: Tensor) -> Tensor:
    """Tokens (B, M, D) at the places of `index_BM`, int64."""
    return tokens_BND[torch.arange(len(tokens_BND), device=tokens_BND.device)[:, None], index_BM]
