"""Losses as pure functions of tensors, usable without any trainer.

Everything here runs in at least float32 whatever the caller's precision (float64 stays float64): at a
temperature of 0.07 a bfloat16 cosine is a logit error of 0.03.
Shape suffixes: B = images in this process, N = candidates or patches, K = queue length, D = embedding width,
P = values of a patch, V = 2 views.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_ssl.modeling.shared.distributed import all_gather_with_gradient, rank


def full_precision(x: Tensor) -> Tensor:
    """Raise half precision to float32; leave float32 and float64 alone."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def without_autocast(x: Tensor) -> torch.autocast:
    """Context in which autocast of the device of `x` is off."""
    return torch.autocast(x.device.type, enabled=False)


def normalize(embeddings_BD: Tensor) -> Tensor:
    """Unit vectors along the last dimension, in at least float32."""
    with without_autocast(embeddings_BD):
        return F.normalize(full_precision(embeddings_BD), dim=-1)


def _check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")


def nt_xent_loss(projection_1_BD: Tensor, projection_2_BD: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each view choosing the other view of its image among all views of all processes.

    Chen et al. 2020 (arXiv 2002.05709), Eq. 1: the mean over all 2N views. The authors' TensorFlow code sums
    the two directions and is twice this value.

    Args:
        projection_1_BD: projections of the first views, any norm.
        projection_2_BD: projections of the second views; row b is the same image.
        temperature: divisor of the cosines, > 0.

    Returns:
        Scalar in nats, mean over the own 2B views. A model that cannot tell views apart scores ln(2N - 1).

    Raises:
        ValueError: `temperature` is not positive.
    """
    _check_temperature(temperature)
    with without_autocast(projection_1_BD):
        views_BVD = torch.stack([normalize(projection_1_BD), normalize(projection_2_BD)], dim=1)
        candidates = all_gather_with_gradient(views_BVD).transpose(0, 1).flatten(0, 1)  # (2N, D), view-major
        anchors = views_BVD.transpose(0, 1).flatten(0, 1)  # (2B, D), view-major
        num_rows, num_images = len(views_BVD), len(candidates) // 2
        own_B = torch.arange(num_rows, device=anchors.device) + rank() * num_rows
        itself = torch.cat([own_B, own_B + num_images])
        other_view = torch.cat([own_B + num_images, own_B])
        loss: Tensor = _CandidateCrossEntropy.apply(anchors, candidates, itself, other_view, temperature)
        return loss


CHUNK_ELEMENTS = 2**23  # 32 MiB in float32; smaller ones are slower, larger ones not faster


class _CandidateCrossEntropy(torch.autograd.Function):
    """Cross-entropy of anchors among candidates, with its gradients, in chunks of anchors.

    The similarities of all pairs are never there at once, and none is kept for backward: at 4096 images
    each copy of them would take 256 MiB.
    """

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, candidates: Tensor, itself: Tensor, wanted: Tensor, temperature: float
    ) -> Tensor:
        total = anchors.new_zeros(())
        needs_gradient = any(ctx.needs_input_grad[:2])
        anchor_gradient, candidate_gradient = torch.zeros_like(anchors), torch.zeros_like(candidates)
        size = max(CHUNK_ELEMENTS // len(candidates), 1)
        for first in range(0, len(anchors), size):
            rows = slice(first, first + size)
            logits = (anchors[rows] @ candidates.T).div_(temperature)
            logits.scatter_(1, itself[rows, None], float("-inf"))
            normalizer = logits.logsumexp(dim=1, keepdim=True)
            total += (normalizer - logits.gather(1, wanted[rows, None])).sum()
            if needs_gradient:
                error = logits.sub_(normalizer).exp_()  # probabilities, less 1 for the wanted candidate
                error.scatter_add_(1, wanted[rows, None], error.new_full((len(error), 1), -1.0))
                anchor_gradient[rows] = error @ candidates
                candidate_gradient.addmm_(error.T, anchors[rows])
        ctx.save_for_backward(anchor_gradient, candidate_gradient)
        ctx.scale = 1 / (temperature * len(anchors))
        return total / len(anchors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        anchor_gradient, candidate_gradient = ctx.saved_tensors
        scale = gradient * ctx.scale
        return anchor_gradient * scale, candidate_gradient * scale, None, None, None


class _QueueContrastiveLoss(torch.autograd.Function):
    """Loss and gradient of the query in one pass over one (B, K) buffer that backward does not keep."""

    @staticmethod
    def forward(ctx: Any, query_BD: Tensor, key_BD: Tensor, queue_KD: Tensor, temperature: float) -> Tensor:
        positive_B = (query_BD * key_BD).sum(dim=1) / temperature
        scores_BK = (query_BD @ queue_KD.T).div_(temperature)
        largest_B = torch.maximum(scores_BK.amax(dim=1), positive_B)
        scores_BK.sub_(largest_B[:, None]).exp_()
        positive_score_B = (positive_B - largest_B).exp()
        total_B = scores_BK.sum(dim=1) + positive_score_B
        if ctx.needs_input_grad[0]:
            gradient_BD = (scores_BK @ queue_KD) / total_B[:, None]
            gradient_BD += (positive_score_B / total_B - 1)[:, None] * key_BD
            ctx.save_for_backward(gradient_BD / (temperature * len(query_BD)))
        return (total_B.log() + largest_B - positive_B).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_BD,) = ctx.saved_tensors
        return gradient_BD * gradient, None, None, None


def queue_contrastive_loss(query_BD: Tensor, key_BD: Tensor, queue_KD: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each query choosing its own key among that key and the whole queue.

    He et al. 2020 (arXiv 1911.05722), Eq. 1.

    Args:
        query_BD: student embeddings, unit norm; the only input that receives a gradient.
        key_BD: teacher embeddings of the same images, unit norm; row b belongs to query b.
        queue_KD: teacher embeddings of earlier batches, unit norm; row order has no effect.
        temperature: divisor of the cosines, > 0.

    Returns:
        Scalar in nats, mean over B. A model that cannot tell keys apart scores ln(K + 1).

    Raises:
        ValueError: `temperature` is not positive.
    """
    _check_temperature(temperature)
    with without_autocast(query_BD):
        query_BD = full_precision(query_BD)
        key_BD, queue_KD = key_BD.detach().to(query_BD.dtype), queue_KD.detach().to(query_BD.dtype)
        loss: Tensor = _QueueContrastiveLoss.apply(query_BD, key_BD, queue_KD, temperature)
        return loss


def paired_contrastive_loss(
    query_BD: Tensor, key_ND: Tensor, own_index_B: Tensor, temperature: float
) -> Tensor:
    """Twice the temperature times the cross-entropy of each query choosing its own key among N keys.

    Chen et al. 2021 (arXiv 2104.02057), Algorithm 1, `ctr`; the factor makes gradients of different
    temperatures alike.

    Args:
        query_BD: student predictions of one view, any norm; the only input that receives a gradient.
        key_ND: teacher projections of the other view, any norm, of all processes (and micro-batches).
        own_index_B: row of `key_ND` that holds the same image as each query.
        temperature: divisor of the cosines, > 0.

    Returns:
        Scalar, mean over B. Indistinguishable keys score 2 x temperature x ln(N).

    Raises:
        ValueError: `temperature` is not positive.
    """
    _check_temperature(temperature)
    with without_autocast(query_BD):
        query_BD, key_ND = normalize(query_BD), normalize(key_ND.detach())
        logits_BN = query_BD @ key_ND.to(query_BD.dtype).T / temperature
        return 2 * temperature * F.cross_entropy(logits_BN, own_index_B)


def masked_patch_loss(prediction_BNP: Tensor, target_BNP: Tensor, is_masked_BN: Tensor) -> Tensor:
    """Mean squared error over the hidden patches only.

    He et al. 2022 (arXiv 2111.06377), section 3: summed over the whole batch, then divided by the number of
    hidden patches.

    Args:
        prediction_BNP: predicted patches; receives exactly zero gradient where a patch is visible.
        target_BNP: patches to be predicted, in the same order of values.
        is_masked_BN: True = hidden; at least one patch of the batch must be.

    Returns:
        Scalar; 1 for predictions of zero if targets were normalised per patch.
    """
    with without_autocast(prediction_BNP):
        error_BNP = full_precision(prediction_BNP) - full_precision(target_BNP.detach())
        is_masked_BN = is_masked_BN.to(error_BNP.dtype)
        return (error_BNP.square().mean(dim=2) * is_masked_BN).sum() / is_masked_BN.sum()


def patch_loss(prediction_BMP: Tensor, target_BMP: Tensor) -> Tensor:
    """Mean squared error of patches, all of which were hidden: `masked_patch_loss` without the others."""
    with without_autocast(prediction_BMP):
        return F.mse_loss(full_precision(prediction_BMP), full_precision(target_BMP.detach()))


def koleo_loss(features_BD: Tensor, group_size: int | None = None) -> Tensor:
    """Spread of unit features: minus the mean log distance of each to its nearest neighbour in its group.

    Sablayrolles et al. 2018 (arXiv 1806.03198), Eq. 5, as in DINOv2's `koleo_loss.py`, whose group is the
    batch of a GPU.

    Args:
        features_BD: features of one view, any norm; both ends of a distance receive its gradient.
        group_size: number of consecutive rows among which neighbours are sought, >= 2; None: all rows.

    Returns:
        Scalar, mean over B. Falls below 0 once neighbours are more than 1 apart; 15 to 16 for equal rows.

    Raises:
        ValueError: rows are no multiple of `group_size`, or a row would be its own neighbour.
    """
    size = len(features_BD) if group_size is None else group_size
    if size < 2 or len(features_BD) % size:
        raise ValueError(
            f"KoLeo needs groups of at least 2 images that divide the {len(features_BD)} of a micro-batch, "
            f"got koleo_group_size {size}"
        )
    with without_autocast(features_BD):
        groups_GSD = F.normalize(full_precision(features_BD), dim=-1, eps=1e-8).unflatten(0, (-1, size))
        with torch.no_grad():
            cosines_GSS = groups_GSD @ groups_GSD.transpose(1, 2)
            cosines_GSS.diagonal(dim1=1, dim2=2).fill_(-1)
            nearest_GS1 = cosines_GSS.argmax(dim=2, keepdim=True)
        nearest_GSD = groups_GSD.gather(1, nearest_GS1.expand_as(groups_GSD))
        # The epsilon is added to every difference, as torch's PairwiseDistance does: equal rows stay finite.
        distance_GS = (groups_GSD - nearest_GSD + 1e-8).norm(dim=2)
        return -(distance_GS + 1e-8).log().mean()


def gram_loss(student_BND: Tensor, anchor_BND: Tensor, negatives: str = "kept") -> Tensor:
    """Mean squared difference of the cosines between all patches of an image.

    Simeoni et al. 2025 (arXiv 2508.10104), Eq. 2, as a mean over the batch and all N x N entries as in the
    authors' code, where the paper sums.

    Args:
        student_BND: patch features, any norm; the only input that receives a gradient.
        anchor_BND: features of the same patches by an earlier teacher; may have another width.
        negatives: cosines below 0 count as they are ("kept"), as 0 in both ("zero", the authors'
            `remove_neg`) or as 0 in the anchor alone ("zero_in_anchor", what their `remove_only_teacher_neg`
            does).

    Returns:
        Scalar, 0 where both have the same similarities.
    """
    with without_autocast(student_BND):
        student_BND, anchor_BND = normalize(student_BND), normalize(anchor_BND.detach())
        cosines_BNN = student_BND @ student_BND.transpose(1, 2)
        targets_BNN = (anchor_BND @ anchor_BND.transpose(1, 2)).to(cosines_BNN.dtype)
        if negatives != "kept":
            targets_BNN = targets_BNN.clamp_min(0)
        if negatives == "zero":
            cosines_BNN = cosines_BNN.relu()  # without a gradient where it was negative
        return F.mse_loss(cosines_BNN, targets_BNN)


def shrink_patches(patches_BND: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Patch features of a finer grid on a coarser one, bicubic without antialiasing, before any norm.

    Args:
        patches_BND: features in row-major order.
        grid: their (rows, columns).
        new_grid: those wanted.
    """
    if grid == new_grid:
        return patches_BND
    with without_autocast(patches_BND):
        map_BDHW = full_precision(patches_BND).transpose(1, 2).unflatten(2, grid)
        shrunk_BDHW = F.interpolate(map_BDHW, size=new_grid, mode="bicubic", align_corners=False)
        return shrunk_BDHW.flatten(2).transpose(1, 2)
