"""Numbers that tell spread features from collapsed ones; none needs labels.

One more, `std_of_normalized`, is logged while training and lies in `hf_ssl.modeling.shared.pretraining`.

Sources: effective rank Roy & Vetterli 2007; RankMe arXiv 2210.02885; alignment and uniformity
arXiv 2005.10242 (Eq. 1 and 2 with alpha = t = 2).
Shape suffixes in this file: N = images, D = width.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def _at_least_float32(features_ND: Tensor) -> Tensor:
    return features_ND.detach() if features_ND.dtype == torch.float64 else features_ND.detach().float()


def effective_rank(features_ND: Tensor) -> float:
    """Dimensions in use: exp(entropy of the singular values of the centred features).

    Between 1 (a line) and min(N, D) (all directions alike); 0 if all rows are equal. Wants N >= 4 D.
    """
    features_ND = _at_least_float32(features_ND)
    singular = torch.linalg.svdvals(features_ND - features_ND.mean(dim=0))
    # Rounding leaves tiny singular values where all rows are equal; they are no directions.
    scale = features_ND.abs().max() * torch.finfo(features_ND.dtype).eps * max(features_ND.shape)
    if singular.sum() <= scale:
        return 0.0
    return torch.special.entr(singular / singular.sum()).sum().exp().item()


def rankme(features_ND: Tensor) -> float:
    """RankMe: the same without centring, and with 1e-7 added inside the logarithm."""
    singular = torch.linalg.svdvals(_at_least_float32(features_ND))
    share = singular / singular.sum().clamp_min(torch.finfo(singular.dtype).tiny)
    return (-(share * (share + 1e-7).log()).sum()).exp().item()


def alignment(first_ND: Tensor, second_ND: Tensor) -> float:
    """Mean squared distance of the unit-length features of two views of an image; 0 perfect, 2 unrelated."""
    first_ND, second_ND = (F.normalize(_at_least_float32(x), dim=1) for x in (first_ND, second_ND))
    return (first_ND - second_ND).square().sum(dim=1).mean().item()


def uniformity(features_ND: Tensor) -> float:
    """Log of the mean of exp(-2 squared distance) over pairs of images; 0 collapsed, towards -4 spread."""
    unit_ND = F.normalize(_at_least_float32(features_ND), dim=1)
    squared_distance = torch.pdist(unit_ND).square()
    return torch.logsumexp(-2 * squared_distance, dim=0).item() - math.log(len(squared_distance))


def mean_positive_cosine(first_ND: Tensor, second_ND: Tensor) -> float:
    """Mean cosine of the two views of an image."""
    return F.cosine_similarity(_at_least_float32(first_ND), _at_least_float32(second_ND), dim=1).mean().item()


def mean_negative_cosine(first_ND: Tensor, second_ND: Tensor) -> float:
    """Mean cosine of view one of an image and view two of another."""
    first_ND, second_ND = (F.normalize(_at_least_float32(x), dim=1) for x in (first_ND, second_ND))
    num_images = len(first_ND)
    all_pairs = first_ND.sum(dim=0) @ second_ND.sum(dim=0)
    return ((all_pairs - (first_ND * second_ND).sum()) / (num_images * (num_images - 1))).item()
