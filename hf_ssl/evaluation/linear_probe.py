"""Linear classifier on frozen features: L-BFGS with a chosen L2 strength, or SGD with a chosen learning rate.

Both standardise the features, since the best learning rate and strength otherwise vary by orders of
magnitude with the features' length (MoCo's need a rate of 30), and both return a classifier for the features
as they came.
Choices are made on a held-out part of the training set, never on the test set.
The L2 term is strength / 2 * |W|^2 beside the mean cross-entropy; scikit-learn's C is 1 / (N * strength).
Shape suffixes in this file: N = images, D = width, C = classes, S = settings tried at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ssl.evaluation.checks import check_features, check_labels
from hf_ssl.evaluation.metrics import top_k_accuracy

DEFAULT_STRENGTHS = (0.1, 0.01, 0.001, 0.0001)
DEFAULT_LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # per 256 images a batch


@dataclass(frozen=True)
class LinearProbe:
    """A fitted linear classifier of raw features; standardisation is folded into it.

    Attributes:
        weight: (C, D).
        bias: (C,).
        chosen: the L2 strength or learning rate that was best on the held-out part.
        held_out_accuracy: top-1 there, for every value that was tried.
    """

    weight: Tensor
    bias: Tensor
    chosen: float
    held_out_accuracy: dict[float, float]

    def scores(self, features_ND: Tensor) -> Tensor:
        """Class scores (N, C), logits."""
        return F.linear(check_features(features_ND).to(self.weight.dtype), self.weight, self.bias)

    def accuracy(self, features_ND: Tensor, labels_N: Tensor | None, k: int = 1) -> float:
        """Top-k accuracy between 0 and 1."""
        scores = self.scores(features_ND)
        labels = check_labels(labels_N, len(scores), name="test labels")
        # A class never seen in training has no score: it counts as wrong.
        missing = max(0, int(labels.max()) + 1 - scores.shape[1])
        return top_k_accuracy(F.pad(scores, (0, missing), value=float("-inf")), labels, k)


def fit_linear_probe(
    features_ND: Tensor,
    labels_N: Tensor | None,
    strengths: Sequence[float] = DEFAULT_STRENGTHS,
    *,
    held_out_share: float = 0.2,
    max_iterations: int = 100,
    seed: int = 0,
) -> LinearProbe:
    """Multinomial regression by L-BFGS; the L2 strength is chosen from `strengths`, then all images are used.

    Args:
        features_ND: frozen features of the training images, in any scale.
        labels_N: their classes.
        strengths: L2 strengths, all solved at once; one value is used as it is.
        held_out_share: part of the training images on which the strength is chosen.
        max_iterations: of L-BFGS; it stops earlier when converged.
        seed: of the split.

    Raises:
        ValueError: labels missing or of one class, features not finite, a strength not positive.
    """
    if min(strengths, default=0) <= 0:
        raise ValueError(f"strengths must be > 0 and at least one, got {tuple(strengths)}")

    def fit(standard_ND: Tensor, labels: Tensor, values: Sequence[float]) -> Tensor:
        return _solve(standard_ND, labels, values, max_iterations)

    # Stronger first: of two equally good strengths the simpler classifier is kept.
    return _choose_and_fit(fit, features_ND, labels_N, sorted(strengths, reverse=True), held_out_share, seed)


def fit_linear_probe_sgd(
    features_ND: Tensor,
    labels_N: Tensor | None,
    learning_rates: Sequence[float] = DEFAULT_LEARNING_RATES,
    *,
    epochs: int = 30,
    batch_size: int = 256,
    held_out_share: float = 0.2,
    seed: int = 0,
) -> LinearProbe:
    """Linear probe as papers train it: SGD without weight decay, cosine rate, best of several rates.

    Momentum 0.9, BatchNorm without affine part before the linear layer (as MAE), no augmentation.
    For training sets whose L-BFGS does not fit into memory.

    Args:
        features_ND: frozen features of the training images, in any scale.
        labels_N: their classes.
        learning_rates: per 256 images a batch, all trained at once; one value is used as it is.
        epochs: passes over the training features.
        batch_size: images a step.
        held_out_share: part of the training images on which the rate is chosen.
        seed: of the split and of the order.

    Raises:
        ValueError: labels missing or of one class, features not finite, a rate not positive.
    """
    if min(learning_rates, default=0) <= 0:
        raise ValueError(f"learning_rates must be > 0 and at least one, got {tuple(learning_rates)}")

    def fit(standard_ND: Tensor, labels: Tensor, values: Sequence[float]) -> Tensor:
        return _descend(standard_ND, labels, values, epochs, batch_size, seed)

    return _choose_and_fit(fit, features_ND, labels_N, sorted(learning_rates), held_out_share, seed)


# (standardised features, labels, S values) -> weights (S, D + 1, C), the last row of D + 1 is the bias
_Fit = Callable[[Tensor, Tensor, Sequence[float]], Tensor]


def _choose_and_fit(
    fit: _Fit,
    features_ND: Tensor,
    labels_N: Tensor | None,
    values: Sequence[float],
    held_out_share: float,
    seed: int,
) -> LinearProbe:
    features = check_features(features_ND, "train features")
    labels = check_labels(labels_N, len(features), several=True, name="train labels")
    held_out_accuracy: dict[float, float] = {}
    best = values[0]
    if len(values) > 1:
        part, rest = _split(len(features), held_out_share, seed)
        part, rest = part.to(features.device), rest.to(features.device)
        mean_D, scale_D = _standardization(features[rest])
        weights = fit((features[rest] - mean_D) * scale_D, labels[rest], values)
        for value, weight in zip(values, weights, strict=True):
            probe = LinearProbe(*_fold(weight, mean_D, scale_D), value, {})
            held_out_accuracy[value] = probe.accuracy(features[part], labels[part])
        best = max(values, key=lambda value: held_out_accuracy[value])
    mean_D, scale_D = _standardization(features)
    weight = fit((features - mean_D) * scale_D, labels, [best])[0]
    return LinearProbe(*_fold(weight, mean_D, scale_D), best, held_out_accuracy)


def _split(num_rows: int, held_out_share: float, seed: int) -> tuple[Tensor, Tensor]:
    num_held_out = round(num_rows * held_out_share)
    if not 0 < num_held_out < num_rows:
        raise ValueError(
            f"held_out_share {held_out_share} of {num_rows} images leaves an empty part; give one value"
        )
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    return order[:num_held_out], order[num_held_out:]


def _standardization(features_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and inverse standard deviation (0 for constant dimensions, which tell nothing apart)."""
    deviation_D = features_ND.std(dim=0, correction=0)
    floor = features_ND.abs().amax(dim=0) * torch.finfo(features_ND.dtype).eps * 4
    return features_ND.mean(dim=0), torch.where(deviation_D > floor, 1 / deviation_D, 0)


def _fold(weight_D1C: Tensor, mean_D: Tensor, scale_D: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias for raw features from those for standardised ones."""
    weight_CD = (weight_D1C[:-1] * scale_D[:, None]).T.contiguous()
    return weight_CD, weight_D1C[-1] - weight_CD @ mean_D


def _with_bias(standard_ND: Tensor) -> Tensor:
    return torch.cat([standard_ND, standard_ND.new_ones(len(standard_ND), 1)], dim=1)


def _sum_of_losses(features_ND1: Tensor, labels_N: Tensor, weight_SD1C: Tensor) -> Tensor:
    """Mean cross-entropy of each of the S classifiers, summed; one wide product for all of them."""
    num_settings, _, num_classes = weight_SD1C.shape
    wide_DSC = weight_SD1C.transpose(0, 1).reshape(-1, num_settings * num_classes)
    logits = (features_ND1 @ wide_DSC).unflatten(1, (num_settings, num_classes))
    labels_NS = labels_N[:, None].expand(-1, num_settings)
    return F.cross_entropy(logits.transpose(1, 2), labels_NS, reduction="sum") / len(labels_N)


def _solve(standard_ND: Tensor, labels_N: Tensor, strengths: Sequence[float], max_iterations: int) -> Tensor:
    """L-BFGS for all strengths at once, in coordinates in which it needs few iterations.

    The Hessian of the loss is at most half of the features' covariance, plus the strength (Boehning 1992,
    "Multinomial logistic regression algorithm"); in the coordinates used here this bound is the identity.
    """
    num_rows, width = standard_ND.shape
    shape = len(strengths), width + 1, int(labels_N.max()) + 1
    variance_D, axes_DD = torch.linalg.eigh(standard_ND.T @ standard_ND / num_rows)
    features_ND1 = _with_bias(standard_ND @ axes_DD)
    strength_S1 = standard_ND.new_tensor(list(strengths))[:, None]
    curvature_SD = variance_D.clamp_min(0) / 2 + strength_S1
    scale_SD1 = F.pad(curvature_SD, (0, 1), value=0.5).rsqrt()[:, :, None]  # the bias sees a feature of 1
    penalty_SD1 = F.pad(strength_S1.expand(-1, width), (0, 1))[:, :, None]  # and is not penalised
    labels_NS1 = labels_N[:, None, None].expand(-1, len(strengths), 1)
    minus_one_NS1 = features_ND1.new_full(labels_NS1.shape, -1.0)
    point = standard_ND.new_zeros(shape)
    optimizer = torch.optim.LBFGS(
        [point],
        max_iter=max_iterations,
        tolerance_grad=1e-5,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        weight_SDC = point * scale_SD1
        wide_DSC = weight_SDC.transpose(0, 1).flatten(1)  # one wide product for all strengths
        logits_NSC = (features_ND1 @ wide_DSC).unflatten(1, (shape[0], shape[2]))
        normalizer_NS1 = logits_NSC.logsumexp(dim=2, keepdim=True)
        loss = (normalizer_NS1 - logits_NSC.gather(2, labels_NS1)).sum() / num_rows
        error_NSC = logits_NSC.sub_(normalizer_NS1).exp_().scatter_add_(2, labels_NS1, minus_one_NS1)
        slope_DSC = (features_ND1.T @ error_NSC.flatten(1)).unflatten(1, (shape[0], shape[2]))
        slope_SDC = slope_DSC.transpose(0, 1) / num_rows + penalty_SD1 * weight_SDC
        point.grad = (slope_SDC * scale_SD1).contiguous()
        return loss + (penalty_SD1 / 2 * weight_SDC.square()).sum()

    optimizer.step(closure)
    weight_SDC = point * scale_SD1
    return torch.cat([axes_DD @ weight_SDC[:, :-1], weight_SDC[:, -1:]], dim=1)


def _descend(
    standard_ND: Tensor,
    labels_N: Tensor,
    learning_rates: Sequence[float],
    epochs: int,
    batch_size: int,
    seed: int,
) -> Tensor:
    """SGD of all rates at once; the running statistics of the BatchNorm are folded in afterwards."""
    num_rows, width = standard_ND.shape
    batch_size = min(batch_size, num_rows)
    norm = nn.BatchNorm1d(width, eps=1e-6, affine=False, device=standard_ND.device, dtype=standard_ND.dtype)
    num_classes = int(labels_N.max()) + 1
    weights = [standard_ND.new_zeros(width + 1, num_classes, requires_grad=True) for _ in learning_rates]
    scale = batch_size / 256
    optimizer = torch.optim.SGD(
        [{"params": [w], "lr": lr * scale} for w, lr in zip(weights, learning_rates, strict=True)],
        momentum=0.9,
    )
    steps_per_epoch = num_rows // batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps_per_epoch)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(epochs):
            order = torch.randperm(num_rows, generator=generator).to(standard_ND.device)
            for index in order[: steps_per_epoch * batch_size].split(batch_size):
                optimizer.zero_grad()
                batch = _with_bias(norm(standard_ND[index]))
                _sum_of_losses(batch, labels_N[index], torch.stack(weights)).backward()
                optimizer.step()
                schedule.step()
    return torch.stack([_fold_norm(w.detach(), norm) for w in weights])


def _fold_norm(weight_D1C: Tensor, norm: nn.BatchNorm1d) -> Tensor:
    assert norm.running_mean is not None and norm.running_var is not None
    weight_CD, bias_C = _fold(weight_D1C, norm.running_mean, (norm.running_var + norm.eps).rsqrt())
    return torch.cat([weight_CD.T, bias_C[None]])
