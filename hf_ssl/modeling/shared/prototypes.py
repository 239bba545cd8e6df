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
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_ssl.modeling.shared.losses import full_precision, without_autocast

CHUNK_SIZE = 4096  # prototypes at a time; 2,048 to 8,192 are alike in time


class _LogNormalizer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_Rd: Tensor, prototypes_Kd: Tensor, temperature: float) -> Tensor:
        scaled_Rd = rows_Rd / temperature
        normalizer_R = rows_Rd.new_full((len(rows_Rd),), float("-inf"))
        for chunk_kd in prototypes_Kd.split(CHUNK_SIZE):
            scores_Rk = scaled_Rd @ chunk_kd.T
            normalizer_R = torch.logaddexp(normalizer_R, log_sum_exp(scores_Rk, dim=1))
        ctx.save_for_backward(rows_Rd, prototypes_Kd, normalizer_R)
        ctx.temperature = temperature
        return normalizer_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_R: Tensor) -> tuple[Tensor, Tensor | None, None]:
        rows_Rd, prototypes_Kd, normalizer_R = ctx.saved_tensors
        with without_autocast(rows_Rd):
            scaled_Rd = rows_Rd / ctx.temperature
            weight_R1 = (gradient_R / ctx.temperature)[:, None]
            rows_gradient = torch.zeros_like(rows_Rd)
            prototypes_gradient = torch.empty_like(prototypes_Kd) if ctx.needs_input_grad[1] else None
            weighted_Rd = weight_R1 * rows_Rd
            for start, chunk_kd in _chunks(prototypes_Kd):
                probabilities_Rk = (scaled_Rd @ chunk_kd.T).sub_(normalizer_R[:, None]).exp_()
                rows_gradient.addmm_(probabilities_Rk, chunk_kd)
                if prototypes_gradient is not None:
                    part = prototypes_gradient[start : start + len(chunk_kd)]
                    torch.mm(probabilities_Rk.T, weighted_Rd, out=part)
        return rows_gradient.mul_(weight_R1), prototypes_gradient, None


class _ExpectedPrototypes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prototypes_Kd: Tensor, targets: "PrototypeTargets") -> Tensor:
        expected_Id = targets.bottleneck.new_zeros(len(targets), prototypes_Kd.shape[1])
        for start, probabilities_Ik in targets.probabilities():
            expected_Id.addmm_(probabilities_Ik, prototypes_Kd[start : start + probabilities_Ik.shape[1]])
        ctx.targets = targets
        return expected_Id

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_Id: Tensor) -> tuple[Tensor, None]:
        targets: PrototypeTargets = ctx.targets
        with without_autocast(gradient_Id):
            gradient_Kd = gradient_Id.new_empty(len(targets.prototypes), gradient_Id.shape[1])
            for start, probabilities_Ik in targets.probabilities():
                part = gradient_Kd[start : start + probabilities_Ik.shape[1]]
                torch.mm(probabilities_Ik.T, gradient_Id, out=part)
        return gradient_Kd, None


def _chunks(prototypes_Kd: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(prototypes_Kd), CHUNK_SIZE):
        yield start, prototypes_Kd[start : start + CHUNK_SIZE]


def log_sum_exp(scores: Tensor, dim: int) -> Tensor:
    """log sum exp along `dim`; overwrites `scores`, and is -inf where there is nothing to sum."""
    if scores.shape[dim] == 0:
        return scores.sum(dim) - float("inf")
    largest = scores.amax(dim, keepdim=True)
    return scores.sub_(largest).exp_().sum(dim).log_().add_(largest.squeeze(dim))


def log_normalizer(rows_Rd: Tensor, prototypes_Kd: Tensor, temperature: float) -> Tensor:
    """LSE_k(x . w_k / T) of every row (R,); rows and prototypes receive a gradient."""
    with without_autocast(rows_Rd):
        result: Tensor = _LogNormalizer.apply(full_precision(rows_Rd), prototypes_Kd, temperature)
        return result


@dataclass(frozen=True)
class PrototypeTargets:
    """Targets q of I teacher rows over K prototypes, kept as what they are computed from; without gradient.

    Attributes:
        bottleneck: the teacher's unit vectors y (I, d).
        prototypes: the teacher's w' (K, d).
        bias: b (K,), e.g. minus the centre / T'.
        temperature: T' > 0.
        normalizer: LSE_k(y . w'_k / T' + b_k) (I,).
    """

    bottleneck: Tensor
    prototypes: Tensor
    bias: Tensor
    temperature: float
    normalizer: Tensor

    def __len__(self) -> int:
        return len(self.bottleneck)

    def rows(self, index: Tensor) -> "PrototypeTargets":
        """The targets of the rows `index`, of any shape; flattened."""
        index = index.flatten()
        return replace(self, bottleneck=self.bottleneck[index], normalizer=self.normalizer[index])

    def scores(self) -> Iterator[tuple[int, Tensor]]:
        """y . w'_k / T' + b_k (I, k) of one chunk of prototypes after the other, and where it starts."""
        yield from prototype_scores(self.bottleneck, self.prototypes, self.bias, self.temperature)

    def probabilities(self) -> Iterator[tuple[int, Tensor]]:
        """q (I, k) of one chunk of prototypes after the other, and where it starts."""
        for start, scores_Ik in self.scores():
            yield start, scores_Ik.sub_(self.normalizer[:, None]).exp_()

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
        for start, probabilities_Ik in self.probabilities():
            largest_I, index_I = probabilities_Ik.max(dim=1)
            chosen_I = torch.where(largest_I > best_I, index_I + start, chosen_I)
            best_I = torch.maximum(best_I, largest_I)
            mean_entropy += torch.special.entr(probabilities_Ik.mean(dim=0)).sum()
            entropy += torch.special.entr(probabilities_Ik).sum() / max(len(self), 1)
        in_use = torch.zeros_like(self.bias).index_fill_(0, chosen_I, 1).sum()
        return {
            "target_entropy": entropy,
            "mean_target_entropy": mean_entropy,
            "prototypes_in_use": in_use,
        }


def prototype_scores(
    bottleneck_Id: Tensor, prototypes_Kd: Tensor, bias_K: Tensor, temperature: float
) -> Iterator[tuple[int, Tensor]]:
    """y . w_k / T + b_k (I, k) of one chunk of prototypes after the other, and where it starts."""
    scaled_Id = bottleneck_Id / temperature
    for start, chunk_kd in _chunks(prototypes_Kd):
        yield start, torch.addmm(bias_K[start : start + len(chunk_kd)], scaled_Id, chunk_kd.T)


def expected_prototypes(prototypes_Kd: Tensor, targets: PrototypeTargets) -> Tensor:
    """sum_k q_k w_k (I, d) of every teacher row; the student's prototypes w receive a gradient."""
    with without_autocast(prototypes_Kd):
        result: Tensor = _ExpectedPrototypes.apply(prototypes_Kd, targets)
        return result


def view_cross_entropies(
    student_VBd: Tensor, prototypes_Kd: Tensor, targets: PrototypeTargets, temperature: float
) -> Tensor:
    """Cross-entropy of every student view with every teacher view of the same images.

    Args:
        student_VBd: the student's unit vectors; the first G views are those of the teacher.
        prototypes_Kd: the student's prototypes.
        targets: of G x B teacher rows, view after view.
        temperature: of the student.

    Returns:
        (V, G) in nats, each the mean over the images. The diagonal pairs a view with itself.
    """
    num_views, num_images, _ = student_VBd.shape
    with without_autocast(student_VBd):
        student_VBd = full_precision(student_VBd)
        normalizer_V = log_normalizer(student_VBd.flatten(0, 1), prototypes_Kd, temperature)
        normalizer_V = normalizer_V.view(num_views, num_images).mean(dim=1)
        expected_GBd = expected_prototypes(prototypes_Kd, targets).unflatten(0, (-1, num_images))
        agreement_VG = torch.einsum("vbd,gbd->vg", student_VBd, expected_GBd) / num_images
        return normalizer_V[:, None] - agreement_VG / temperature


def mean_of_other_views(cross_entropies_VG: Tensor) -> Tensor:
    """Mean over all pairs of a student view and another teacher view; a view is never its own target."""
    num_views, num_global = cross_entropies_VG.shape
    own = torch.eye(num_views, num_global, dtype=torch.bool, device=cross_entropies_VG.device)
    num_pairs = num_views * num_global - num_global
    return cross_entropies_VG.masked_fill(own, 0).sum() / num_pairs


def row_cross_entropies(
    student_Rd: Tensor, prototypes_Kd: Tensor, targets: PrototypeTargets, temperature: float
) -> Tensor:
    """Cross-entropy of every student row with the target of the same row (R,), in nats."""
    with without_autocast(student_Rd):
        student_Rd = full_precision(student_Rd)
        expected_Rd = expected_prototypes(prototypes_Kd, targets)
        agreement_R = (student_Rd * expected_Rd).sum(dim=1)
        return log_normalizer(student_Rd, prototypes_Kd, temperature) - agreement_R / temperature
