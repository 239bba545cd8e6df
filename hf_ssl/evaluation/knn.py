"""Weighted nearest-neighbour classification of features.

Source: Wu et al. 2018 (arXiv 1805.01978), section 3.4; compared with DINO's `eval_knn.py`, from which it
differs on purpose: the number of neighbours is clamped to the bank, and chunks have a fixed size (the
authors' hundredth of the test set fails under 100 images).
Shape suffixes in this file: Q = queries, N = bank (training images), D = width, K = neighbours, C = classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_ssl.evaluation.checks import check_features, check_labels
from hf_ssl.evaluation.metrics import top_k_accuracy
from hf_ssl.modeling.shared.precision import has_fast_bf16


@dataclass(frozen=True)
class KNNResult:
    """Accuracies between 0 and 1, and the number of neighbours that voted."""

    top1: float
    top5: float
    num_neighbors: int


def knn_scores(
    query_QD: Tensor,
    bank_ND: Tensor,
    bank_labels_N: Tensor,
    num_classes: int,
    num_neighbors: int = 20,
    temperature: float = 0.07,
    chunk_size: int = 256,
) -> Tensor:
    """Votes of the nearest bank images, each weighted by exp(cosine / temperature).

    Args:
        query_QD: features to classify, any length; they are normalised here.
        bank_ND: features that vote, likewise.
        bank_labels_N: their classes.
        num_classes: C, over bank and queries together.
        num_neighbors: how many vote; clamped to N. DINO: best of 10, 20, 100, 200; MoCo's demo 200.
        temperature: > 0 (DINO 0.07, MoCo's demo 0.1).
        chunk_size: queries at a time: the matrix of cosines never has more rows. No effect on the result.

    Returns:
        (Q, C) in at least float32. One neighbour of the same direction gives its class exp(1 / temperature).

    Raises:
        ValueError: temperature, neighbours or chunk are not positive, or features or labels are unusable.
    """
    if min(temperature, num_neighbors, chunk_size) <= 0:
        raise ValueError(
            "temperature, num_neighbors and chunk_size must be > 0, "
            f"got {temperature}, {num_neighbors} and {chunk_size}"
        )
    # At least float32: exp(1 / 0.07) = 1.6e6 overflows float16.
    query_QD = F.normalize(check_features(query_QD, "test features"), dim=1)
    bank_ND = F.normalize(check_features(bank_ND, "train features"), dim=1)
    labels_N = check_labels(bank_labels_N, len(bank_ND), name="train labels")
    if int(labels_N.max()) >= num_classes:
        raise ValueError(f"train label {int(labels_N.max())} does not fit into num_classes {num_classes}")
    cosine_QK, index_QK = nearest_neighbors(query_QD, bank_ND, min(num_neighbors, len(bank_ND)), chunk_size)
    scores_QC = query_QD.new_zeros(len(query_QD), num_classes)
    return scores_QC.scatter_add_(1, labels_N[index_QK], (cosine_QK / temperature).exp())


# A cosine of unit vectors in bfloat16: each factor is off by 2^-9 of itself, and so is the result.
_BF16_ERROR = 0.0065
_MOST_COSINES = 2**27  # held at once: 512 MiB in float32
_SMALL_BANK = 16384  # below, a product in half precision saves less than choosing again costs


def nearest_neighbors(
    query_QD: Tensor, bank_ND: Tensor, k: int, chunk_size: int = 256, in_bf16: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines (Q, k) and rows (Q, k) of the nearest bank vectors, nearest first.

    The matrix of cosines never has more than `chunk_size` rows, fewer for a bank of more than 500,000. Where
    bfloat16 is fast, twice as many candidates are chosen by cosines in it and ranked in full precision; a
    query for which its error could have hidden a neighbour is looked up again in full precision, so the
    result is that of full precision.

    Args:
        query_QD: unit vectors.
        bank_ND: unit vectors.
        k: at most N.
        chunk_size: queries at a time.
        in_bf16: whether to choose candidates in bfloat16; None: float32 and a large bank where it is fast.
    """
    if in_bf16 is None:
        is_large = bank_ND.dtype == torch.float32 and len(bank_ND) >= _SMALL_BANK
        in_bf16 = is_large and has_fast_bf16(bank_ND.device.type)
    in_bf16 = in_bf16 and 2 * k <= len(bank_ND)
    cosine_QK = query_QD.new_empty(len(query_QD), k)
    index_QK = torch.empty(len(query_QD), k, dtype=torch.int64, device=query_QD.device)
    rough_bank = bank_ND.bfloat16() if in_bf16 else bank_ND
    chunk_size = max(min(chunk_size, _MOST_COSINES // len(bank_ND)), 1)
    buffer = rough_bank.new_empty(min(chunk_size, len(query_QD)), len(bank_ND))
    for start in range(0, len(query_QD), chunk_size):
        chunk = query_QD[start : start + chunk_size]
        rough = torch.mm(chunk.to(rough_bank.dtype), rough_bank.T, out=buffer[: len(chunk)])
        if not in_bf16:
            found = largest(rough, k)
        else:
            found, is_sure = _rank_candidates(chunk, bank_ND, *largest(rough, 2 * k), k)
            unsure = (~is_sure).nonzero()[:, 0]
            if len(unsure):
                exact = chunk[unsure] @ bank_ND.T
                for all_rows, rows in zip(found, largest(exact, k), strict=True):
                    all_rows[unsure] = rows
        cosine_QK[start : start + chunk_size], index_QK[start : start + chunk_size] = found
    return cosine_QK, index_QK


def _rank_candidates(
    query_QD: Tensor, bank_ND: Tensor, rough_QM: Tensor, index_QM: Tensor, k: int
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The k nearest of M candidates, and for which queries no other vector can be nearer."""
    exact_QM = torch.bmm(bank_ND[index_QM], query_QD[:, :, None])[:, :, 0]
    cosine_QK, place_QK = exact_QM.topk(k, dim=1)
    highest_of_others = rough_QM.amin(dim=1).to(exact_QM.dtype) + _BF16_ERROR
    return (cosine_QK, index_QM.gather(1, place_QK)), cosine_QK[:, -1] >= highest_of_others


def largest(scores_QN: Tensor, k: int, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """The `k` largest of each row and their columns, as `topk` finds them but for the choice among equals.

    Faster where N is large: each of the k largest lies in one of the k blocks with the largest maxima, so all
    other blocks are never sorted.
    """
    num_blocks = scores_QN.shape[1] // block_size
    if num_blocks <= 4 * k:
        values_QK, columns_QK = scores_QN.topk(k, dim=1)
        return values_QK, columns_QK
    tail = num_blocks * block_size
    blocks = scores_QN[:, :tail].unflatten(1, (num_blocks, block_size))
    best_block_QK = blocks.amax(dim=2).topk(k, dim=1).indices
    members = blocks.gather(1, best_block_QK[:, :, None].expand(-1, -1, block_size)).flatten(1)
    values_QK, place_QK = torch.cat([members, scores_QN[:, tail:]], dim=1).topk(k, dim=1)
    block_QK = best_block_QK.gather(1, (place_QK // block_size).clamp_max(k - 1))
    in_tail = place_QK >= k * block_size
    columns_QK = block_QK * block_size + place_QK % block_size
    return values_QK, torch.where(in_tail, place_QK - k * block_size + tail, columns_QK)


def knn_accuracy(
    train_features_ND: Tensor,
    train_labels_N: Tensor | None,
    test_features_QD: Tensor,
    test_labels_Q: Tensor | None,
    *,
    num_neighbors: int = 20,
    temperature: float = 0.07,
    center: bool = False,
    standardize: bool = False,
    chunk_size: int = 256,
) -> KNNResult:
    """Accuracy of the weighted kNN classifier.

    Args:
        train_features_ND: the bank.
        train_labels_N: its classes.
        test_features_QD: the queries.
        test_labels_Q: their classes.
        num_neighbors: how many vote, clamped to N.
        temperature: of the weights.
        center: subtract the mean of the bank from both. Raises raw pixels by 9 points on CIFAR-10.
        standardize: also divide by the bank's standard deviation of each dimension.
        chunk_size: queries at a time.
    """
    train = check_features(train_features_ND, "train features")
    test = check_features(test_features_QD, "test features")
    train_labels = check_labels(train_labels_N, len(train), several=True, name="train labels")
    test_labels = check_labels(test_labels_Q, len(test), name="test labels")
    if center or standardize:
        mean_D = train.mean(dim=0)
        train, test = train - mean_D, test - mean_D
    if standardize:
        deviation_D = train.std(dim=0, correction=0)
        # A constant dimension tells nothing apart and must not blow up in the test set.
        scale_D = torch.where(deviation_D > 0, 1 / deviation_D, 0)
        train, test = train * scale_D, test * scale_D
    num_classes = max(int(train_labels.max()), int(test_labels.max())) + 1
    scores = knn_scores(test, train, train_labels, num_classes, num_neighbors, temperature, chunk_size)
    return KNNResult(
        top1=top_k_accuracy(scores, test_labels, 1),
        top5=top_k_accuracy(scores, test_labels, 5),
        num_neighbors=min(num_neighbors, len(train)),
    )
