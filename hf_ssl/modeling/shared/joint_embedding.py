"""What the joint-embedding predictive methods share: a momentum teacher's normalised tokens as targets.

Sources: Assran et al. 2023 (arXiv 2301.08243), Bardes et al. 2024 (arXiv 2404.08471); both authors'
`train.py`.
Shape suffixes: B = images or clips, N = patches, M = patches to predict, D = width of the encoder.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_ssl.modeling.shared.backbone import build_backbone
from hf_ssl.modeling.shared.configuration import SSLConfig
from hf_ssl.modeling.shared.losses import full_precision, without_autocast
from hf_ssl.modeling.shared.pretraining import TEACHER_TENSORS, SSLForPreTraining
from hf_ssl.modeling.shared.teacher import linear_momentum, update_teacher


class JointEmbeddingBranch(nn.Module):
    """A backbone, with the predictor in the student alone."""

    def __init__(self, config: SSLConfig, head: nn.Module | None) -> None:
        super().__init__()
        self.backbone = build_backbone(config.backbone_config)
        if head is not None:
            self.head = head


class JointEmbeddingForPreTraining(SSLForPreTraining):
    """Student with predictor and teacher; a subclass draws masks and has the loss."""

    base_model_prefix = "teacher"
    _keep_in_fp32_modules_strict = [TEACHER_TENSORS]
    config: Any
    student: JointEmbeddingBranch
    teacher: JointEmbeddingBranch

    def __init__(self, config: SSLConfig) -> None:
        super().__init__(config)
        self.student = JointEmbeddingBranch(config, self.build_predictor())
        self.teacher = JointEmbeddingBranch(config, None)
        self._teacher_momentum = float(self.config.teacher_momentum)
        self._mask_seed = (0, 0)
        self._masks_of_step: Any = None
        self.finish_construction()
        self.train(self.training)

    def build_predictor(self) -> nn.Module:
        """The student's head."""
        raise NotImplementedError

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
        tokens_BND = self.teacher.backbone(pixel_values).last_hidden_state
        with without_autocast(tokens_BND):
            return F.layer_norm(full_precision(tokens_BND), tokens_BND.shape[-1:])

    @torch.no_grad()
    def target_std(self, targets_BMD: Tensor) -> Tensor:
        """Deviation of a target's values over images and places: 0 when they have collapsed."""
        return targets_BMD.flatten(0, 1).std(dim=0, correction=0).mean()


def gather_tokens(tokens_BND: Tensor, index_BM: Tensor) -> Tensor:
    """Tokens (B, M, D) at the places of `index_BM`, int64."""
    return tokens_BND[torch.arange(len(tokens_BND), device=tokens_BND.device)[:, None], index_BM]
