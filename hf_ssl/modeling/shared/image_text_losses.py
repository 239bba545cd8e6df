"""Losses of pairs of images and texts, as pure functions of tensors.

Everything runs in at least float32, and embeddings are normalised here, once. The scale is stored as its
logarithm. Over several processes the mean of all losses, and of all gradients, is that of the merged batch.
Shape suffixes: B = pairs in this process, N = pairs in all processes, E = embedding width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_ssl.modeling.shared.distributed import all_gather_with_gradient, pass_to_next, rank, world_size
from hf_ssl.modeling.shared.losses import full_precision, normalize, without_autocast


def symmetric_cross_entropy(image_BE: Tensor, text_BE: Tensor, logit_scale: Tensor) -> Tensor:
    """Cross-entropy of each image choosing its text among all, and of each text its image; their mean.

    Radford et al. 2021 (arXiv 2103.00020), Fig. 3. A process computes its own B rows of both directions; the
    gather has a gradient, without which own embeddings would not be pushed as negatives of the others.

    Args:
        image_BE: image embeddings, any norm.
        text_BE: text embeddings, any norm; row b belongs to image b. As many in every process.
        logit_scale: logarithm of the factor on the cosines, one element.

    Returns:
        Scalar in nats, mean over B and both directions; ln N where pairs cannot be told apart.
    """
    with without_autocast(image_BE):
        image_BE, text_BE = normalize(image_BE), normalize(text_BE)
        images_NE, texts_NE = all_gather_with_gradient(torch.stack([image_BE, text_BE], dim=1)).unbind(1)
        scale = full_precision(logit_scale).reshape(()).exp()
        own_B = torch.arange(len(image_BE), device=image_BE.device) + rank() * len(image_BE)
        to_text = F.cross_entropy(scale * image_BE @ texts_NE.T, own_B)
        to_image = F.cross_entropy(scale * text_BE @ images_NE.T, own_B)
        return (to_text + to_image) / 2


def pairwise_sigmoid_loss(
    image_BE: Tensor, text_BE: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    """Each image with each text is a case of its own: do they belong together?

    Zhai et al. 2023 (arXiv 2303.15343), Algorithm 1 and section 3.3: summed over texts, mean over images. The
    texts of the other processes pass through this one in a ring, so that it never holds more of them, nor of
    logits, than B x B at a time; they are computed again in backward.

    Args:
        image_BE: image embeddings, any norm.
        text_BE: text embeddings, any norm; row b belongs to image b. As many in every process.
        logit_scale: logarithm of the factor on the cosines, one element.
        logit_bias: added to all logits, one element.

    Returns:
        Scalar in nats, mean over B.
    """
    with without_autocast(image_BE):
        image_BE, text_BE = normalize(image_BE), normalize(text_BE)
        scale = full_precision(logit_scale).reshape(()).exp()
        bias = full_precision(logit_bias).reshape(())
        logits_BB = scale * image_BE @ text_BE.T + bias
        total = F.softplus(logits_BB).sum() - logits_BB.diagonal().sum()
        for _ in range(world_size() - 1):
            text_BE = pass_to_next(text_BE)  # what was received, not the own texts again
            total = total + checkpoint(_sum_of_negatives, image_BE, text_BE, scale, bias, use_reentrant=False)
        return total / len(image_BE)


def _sum_of_negatives(image_BE: Tensor, text_BE: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.softplus(scale * image_BE @ text_BE.T + bias).sum()


@torch.no_grad()
def agreement_of_pairs(image_BE: Tensor, text_BE: Tensor) -> dict[str, Tensor]:
    """How well the pairs of this process are told apart: scalars worth logging.

    Args:
        image_BE: image embeddings, any norm.
        text_BE: their texts' embeddings.

    Returns:
        `positive_cosine`, `negative_cosine` (means), `image_to_text_accuracy`, `text_to_image_accuracy`.
    """
    cosines_BB = normalize(image_BE.detach()) @ normalize(text_BE.detach()).T
    own_B = torch.arange(len(cosines_BB), device=cosines_BB.device)
    positive = cosines_BB.diagonal().mean()
    num_negatives = max(len(cosines_BB) * (len(cosines_BB) - 1), 1)
    return {
        "positive_cosine": positive,
        "negative_cosine": (cosines_BB.sum() - cosines_BB.diagonal().sum()) / num_negatives,
        "image_to_text_accuracy": (cosines_BB.argmax(dim=1) == own_B).float().mean(),
        "text_to_image_accuracy": (cosines_BB.argmax(dim=0) == own_B).float().mean(),
    }
