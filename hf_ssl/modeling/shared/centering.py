"""What keeps a teacher's targets from collapsing: a running centre, or Sinkhorn-Knopp over the step.

Both add a bias to the logits of the prototypes before the softmax. Centring: Caron et al. 2021 (arXiv
2104.14294), Eq. 4; the centre is of raw logits, without temperature. Sinkhorn-Knopp: arXiv 2006.09882 as in
DINOv2's `dino_clstoken_loss.py`, here in the logarithmic form, which cannot overflow; the result is the same
to rounding, and constant factors of the official code (K, number of rows) cancel in the softmax.
Shape suffixes: I = teacher rows of this process, K = prototypes, k = prototypes of a chunk, d = bottleneck
width.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hf_ssl.modeling.shared.distributed import max_over_processes, sum_over_processes
from hf_ssl.modeling.shared.losses import full_precision, without_autocast
from hf_ssl.modeling.shared.prototypes import PrototypeTargets, PrototypeWeights, log_sum_exp

SINKHORN_ITERATIONS = 3  # published


class PrototypeCenter(nn.Module):
    """Running mean of the teacher's logits; training state that is saved.

    Args:
        num_prototypes: K.
    """

    value: Tensor

    def __init__(self, num_prototypes: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.empty(num_prototypes, dtype=torch.float32))
        self.initialize_parameters()

    def initialize_parameters(self) -> None:
        """Start at 0."""
        init.zeros_(self.value)

    @torch.no_grad()
    def update(self, mean_logits_K: Tensor, momentum: float) -> None:
        """value <- momentum x value + (1 - momentum) x mean; after the loss, once per optimizer step."""
        self.value.lerp_(mean_logits_K.to(self.value.dtype), 1 - momentum)


@torch.no_grad()
def mean_logits(bottleneck_sum_d: Tensor, num_rows: int, weights: PrototypeWeights) -> Tensor:
    """Mean logits (K,) of the rows of all processes, from the sum of their bottleneck vectors.

    Args:
        bottleneck_sum_d: sum over the rows of this process.
        num_rows: how many there are; processes may differ.
        weights: the teacher's prototypes.

    Returns:
        Equal in every process; 0 where no process has a row.
    """
    with without_autocast(bottleneck_sum_d):
        count = bottleneck_sum_d.new_tensor([float(num_rows)])
        totals = sum_over_processes(torch.cat([full_precision(bottleneck_sum_d), count]))
        mean_1d = (totals[:-1] / totals[-1].clamp_min(1))[None]
        return torch.cat([scores_1k[0] for _, scores_1k in weights.scores(mean_1d, temperature=1.0)])


@torch.no_grad()
def centered_targets(
    bottleneck_Id: Tensor, weights: PrototypeWeights, center: PrototypeCenter, temperature: float
) -> PrototypeTargets:
    """softmax((logits - centre) / temperature).

    Args:
        bottleneck_Id: the teacher's unit vectors.
        weights: the teacher's prototypes.
        center: of earlier steps; reads it, does not move it.
        temperature: > 0, below the student's.
    """
    with without_autocast(bottleneck_Id):
        weights = weights.detach()
        bias_K = center.value.to(bottleneck_Id.dtype) / -temperature
        normalizer_I = bottleneck_Id.new_full((len(bottleneck_Id),), float("-inf"))
        for _, scores_Ik in weights.scores(bottleneck_Id, temperature, bias_K):
            normalizer_I = torch.logaddexp(normalizer_I, log_sum_exp(scores_Ik, dim=1))
        return PrototypeTargets(bottleneck_Id, weights, bias_K, temperature, normalizer_I)


@torch.no_grad()
def sinkhorn_targets(
    bottleneck_Id: Tensor,
    weights: PrototypeWeights,
    temperature: float,
    iterations: int = SINKHORN_ITERATIONS,
) -> PrototypeTargets:
    """Targets that use all prototypes alike over the rows of all processes.

    Args:
        bottleneck_Id: the teacher's unit vectors of the whole step; their number may differ by process, and
            be 0.
        weights: the teacher's prototypes.
        temperature: > 0.
        iterations: of normalising prototypes, then rows; each looks at all logits once, chunk by chunk.
    """
    with without_autocast(bottleneck_Id):
        weights = weights.detach()
        bias_K = bottleneck_Id.new_zeros(len(weights))
        normalizer_I = bottleneck_Id.new_zeros(len(bottleneck_Id))
        for _ in range(iterations):
            next_normalizer_I = torch.full_like(normalizer_I, float("-inf"))
            for place, scores_Ik in weights.scores(bottleneck_Id, temperature):
                # A chunk holds all rows, so that its part of the bias is final.
                bias_K[place] = -_log_sum_exp_over_rows(scores_Ik - normalizer_I[:, None])
                scores_Ik += bias_K[place]
                next_normalizer_I = torch.logaddexp(next_normalizer_I, log_sum_exp(scores_Ik, dim=1))
            normalizer_I = next_normalizer_I
        return PrototypeTargets(bottleneck_Id, weights, bias_K, temperature, normalizer_I)


def _log_sum_exp_over_rows(scores_Ik: Tensor) -> Tensor:
    """Over the rows of all processes; overwrites its input."""
    if len(scores_Ik) == 0:
        scores_Ik = scores_Ik.new_full((1, scores_Ik.shape[1]), torch.finfo(scores_Ik.dtype).min)
    largest_k = max_over_processes(scores_Ik.amax(dim=0))
    return sum_over_processes(scores_Ik.sub_(largest_k).exp_().sum(dim=0)).log_().add_(largest_k)
