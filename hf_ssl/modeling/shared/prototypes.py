"""Cross-entropy between student and teacher over many prototypes, without all logits at once.

The student's row x has probabilities softmax_k(x . w_k / T), the teacher's row y has targets
q_k = softmax_k(y . w'_k / T' + b_k); centring and Sinkhorn-Knopp differ in the bias b alone. Then
    -sum_k q_k log softmax_k(x . w_k / T)  =  LSE_k(x . w_k / T)  -  x . e / T,     e = sum_k q_k w_k,
so a loss needs one number of every student row and one vector of every teacher row. Both are computed over
chunks of prototypes, and again in backward (as attention is in flash attention): of all logits only those of
one chunk exist. Pairs of rows are then products of small vectors.
Everything here runs in at least float32.
Shape suffixes: R = student rows, I = teacher rows, K = prototypes, k = prototypes of a chunk, d = bottleneck
width, V = views, G = global views (seen by the teacher), B = images.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_ssl.modeling.shared.losses import full_precision, without_autocast

CHUNK_SIZE = 4096  # prototypes at a time; 2,048 to 8,192 are alike in time


@dataclass(frozen=True)
class PrototypeWeights:
    """K prototypes w_k = g_k v_k / |v_k|; normalised chunk by chunk, so that they never exist a second time.

    Attributes:
        direction: v (K, d), rows of any length but 0, at least float32.
        scale: g (K, 1), or None for 1.
    """

    direction: Tensor
    scale: Tensor | None = None

    def __len__(self) -> int:
        return len(self.direction)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Place and vectors (k, d) of one chunk after the other."""
        for start in range(0, len(self), CHUNK_SIZE):
            place = slice(start, min(start + CHUNK_SIZE, len(self)))
            vectors_kd = F.normalize(self.direction[place], dim=1)
            yield place, vectors_kd if self.scale is None else vectors_kd * self.scale[place]

    def scores(
        self, rows_Rd: Tensor, temperature: float, bias: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Place and x . w_k / T + b_k (R, k) of one chunk after the other."""
        scaled_Rd = rows_Rd / temperature
        for place, vectors_kd in self.chunks():
            scores_Rk = scaled_Rd @ vectors_kd.T
            yield place, scores_Rk if bias is None else scores_Rk.add_(bias[place])

    def detach(self) -> "PrototypeWeights":
        """The same memory without gradient."""
        return PrototypeWeights(self.direction.detach(), None if self.scale is None else self.scale.detach())


class _PrototypeCrossEntropy(torch.autograd.Function):
    """LSE of every student row and expected prototype of every teacher row, in one pass each way."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_Rd: Tensor,
        direction_Kd: Tensor,
        scale_K1: Tensor | None,
        targets: "PrototypeTargets",
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        scaled_Rd = rows_Rd / temperature
        normalizer_R = rows_Rd.new_full((len(rows_Rd),), float("-inf"))
        expected_Id = rows_Rd.new_zeros(len(targets), rows_Rd.shape[1])
        probabilities = targets.probabilities()
        for _, vectors_kd in PrototypeWeights(direction_Kd, scale_K1).chunks():
            normalizer_R = torch.logaddexp(normalizer_R, log_sum_exp(scaled_Rd @ vectors_kd.T, dim=1))
            expected_Id.addmm_(next(probabilities)[1], vectors_kd)
        ctx.save_for_backward(rows_Rd, direction_Kd, scale_K1, normalizer_R)
        ctx.targets, ctx.temperature = targets, temperature
        return normalizer_R, expected_Id

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient_R: Tensor, gradient_Id: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        rows_Rd, direction_Kd, scale_K1, normalizer_R = ctx.saved_tensors
        with without_autocast(rows_Rd):
            scaled_Rd, weight_R1 = rows_Rd / ctx.temperature, (gradient_R / ctx.temperature)[:, None]
            weighted_Rd = weight_R1 * rows_Rd
            rows_gradient = torch.zeros_like(rows_Rd)
            direction_gradient = torch.empty_like(direction_Kd) if ctx.needs_input_grad[1] else None
            scale_gradient = None if scale_K1 is None else torch.empty_like(scale_K1)
            targets = ctx.targets.probabilities()
            for place, vectors_kd in PrototypeWeights(direction_Kd, scale_K1).chunks():
                student_Rk = (scaled_Rd @ vectors_kd.T).sub_(normalizer_R[:, None]).exp_()
                rows_gradient.addmm_(student_Rk, vectors_kd)
                if direction_gradient is None:
                    continue
                gradient_kd = torch.mm(student_Rk.T, weighted_Rd)
                gradient_kd.addmm_(next(targets)[1].T, gradient_Id)
                _through_weight_norm(
                    gradient_kd, place, direction_Kd, scale_K1, direction_gradient, scale_gradient
                )
        return rows_gradient.mul_(weight_R1), direction_gradient, scale_gradient, None, None


def _through_weight_norm(
    gradient_kd: Tensor,
    place: slice,
    direction_Kd: Tensor,
    scale_K1: Tensor | None,
    direction_gradient: Tensor,
    scale_gradient: Tensor | None,
) -> None:
    """Turn the gradient of w = g v / |v| into those of v and g, written to their `place`."""
    length_k1 = direction_Kd[place].norm(dim=1, keepdim=True)
    unit_kd = direction_Kd[place] / length_k1
    along_k1 = (unit_kd * gradient_kd).sum(dim=1, keepdim=True)
    factor_k1 = 1 / length_k1
    if scale_K1 is not None and scale_gradient is not None:
        scale_gradient[place] = along_k1
        factor_k1 = factor_k1 * scale_K1[place]
    direction_gradient[place] = gradient_kd.sub_(unit_kd.mul_(along_k1)).mul_(factor_k1)


def log_sum_exp(scores: Tensor, dim: int) -> Tensor:
    """log sum exp along `dim`, which is not empty; overwrites `scores`."""
    largest = scores.amax(dim, keepdim=True)
    return scores.sub_(largest).exp_().sum(dim).log_().add_(largest.squeeze(dim))


@dataclass(frozen=True)
class PrototypeTargets:
    """Targets q of I teacher rows over K prototypes, kept as what they are computed from; without gradient.

    Attributes:
        bottleneck: the teacher's unit vectors y (I, d).
        weights: the teacher's prototypes w'; its own memory, so good until the teacher moves.
        bias: b (K,), e.g. minus the centre / T'.
        temperature: T' > 0.
        normalizer: LSE_k(y . w'_k / T' + b_k) (I,).
    """

    bottleneck: Tensor
    weights: PrototypeWeights
    bias: Tensor
    temperature: float
    normalizer: Tensor

    def __len__(self) -> int:
        return len(self.bottleneck)

    def rows(self, index: Tensor, weights: PrototypeWeights | None = None) -> "PrototypeTargets":
        """The targets of the rows `index`, of any shape; flattened.

        Args:
            index: of rows.
            weights: the same prototypes, where the memory of the old ones may be gone; a sharded teacher has
                whole weights only while it is used.
        """
        index = index.flatten()
        return replace(
            self,
            bottleneck=self.bottleneck[index],
            normalizer=self.normalizer[index],
            weights=self.weights if weights is None else weights.detach(),
        )

    def probabilities(self) -> Iterator[tuple[slice, Tensor]]:
        """Place and q (I, k) of one chunk of prototypes after the other."""
        for place, scores_Ik in self.weights.scores(self.bottleneck, self.temperature, self.bias):
            yield place, scores_Ik.sub_(self.normalizer[:, None]).exp_()

    @torch.no_grad()
    def statistics(self) -> dict[str, Tensor]:
        """What tells a healthy teacher from a collapsed one, in nats and counts of these rows.

        `target_entropy` is the mean entropy of the targets, `mean_target_entropy` that of their mean: both
        ln K when uniform, both 0 when all rows choose one prototype; their difference is what the targets
        say about the image. `prototypes_in_use`: how many are the largest target of some row.
        """
        entropy, mean_entropy = self.bias.new_zeros(()), self.bias.new_zeros(())
        best_I = self.bias.new_full((len(self),), float("-inf"))
        chosen_I = torch.zeros(len(self), dtype=torch.long, device=best_I.device)
        for place, probabilities_Ik in self.probabilities():
            largest_I, index_I = probabilities_Ik.max(dim=1)
            chosen_I = torch.where(largest_I > best_I, index_I + place.start, chosen_I)
            best_I = torch.maximum(best_I, largest_I)
            mean_entropy += torch.special.entr(probabilities_Ik.mean(dim=0)).sum()
            entropy += torch.special.entr(probabilities_Ik).sum() / max(len(self), 1)
        in_use = torch.zeros_like(self.bias).index_fill_(0, chosen_I, 1).sum()
        return {
            "target_entropy": entropy,
            "mean_target_entropy": mean_entropy,
            "prototypes_in_use": in_use,
        }


# Not traced: torch 2.11 traces this backward, and the gradients of prototypes are wrong.
@torch.compiler.disable
def _pass_over_prototypes(
    rows_Rd: Tensor, weights: PrototypeWeights, targets: PrototypeTargets, temperature: float
) -> tuple[Tensor, Tensor]:
    """LSE_k(x . w_k / T) (R,), and e = sum_k q_k w_k (I, d); rows and the student's w receive gradients."""
    normalizer_R, expected_Id = _PrototypeCrossEntropy.apply(
        rows_Rd, weights.direction, weights.scale, targets, temperature
    )
    return normalizer_R, expected_Id


def view_cross_entropies(
    student_VBd: Tensor, weights: PrototypeWeights, targets: PrototypeTargets, temperature: float
) -> Tensor:
    """Cross-entropy of every student view with every teacher view of the same images.

    Args:
        student_VBd: the student's unit vectors; the first G views are those of the teacher.
        weights: the student's prototypes.
        targets: of G x B teacher rows, view after view.
        temperature: of the student.

    Returns:
        (V, G) in nats, each the mean over the images. The diagonal pairs a view with itself.
    """
    num_views, num_images, _ = student_VBd.shape
    with without_autocast(student_VBd):
        student_VBd = full_precision(student_VBd)
        normalizer_R, expected_Id = _pass_over_prototypes(
            student_VBd.flatten(0, 1), weights, targets, temperature
        )
        normalizer_V = normalizer_R.view(num_views, num_images).mean(dim=1)
        expected_GBd = expected_Id.unflatten(0, (-1, num_images))
        agreement_VG = torch.einsum("vbd,gbd->vg", student_VBd, expected_GBd) / num_images
        return normalizer_V[:, None] - agreement_VG / temperature


def mean_of_other_views(cross_entropies_VG: Tensor) -> Tensor:
    """Mean over all pairs of a student view and another teacher view; a view is never its own target."""
    num_views, num_global = cross_entropies_VG.shape
    own = torch.eye(num_views, num_global, dtype=torch.bool, device=cross_entropies_VG.device)
    num_pairs = num_views * num_global - num_global
    return cross_entropies_VG.masked_fill(own, 0).sum() / num_pairs


def row_cross_entropies(
    student_Rd: Tensor, weights: PrototypeWeights, targets: PrototypeTargets, temperature: float
) -> Tensor:
    """Cross-entropy of every student row with the target of the same row (R,), in nats; R may be 0."""
    with without_autocast(student_Rd):
        student_Rd = full_precision(student_Rd)
        normalizer_R, expected_Rd = _pass_over_prototypes(student_Rd, weights, targets, temperature)
        return normalizer_R - (student_Rd * expected_Rd).sum(dim=1) / temperature
