"""What features and labels must be before anything is fitted to them."""

import torch
from torch import Tensor


def check_features(features_ND: Tensor, name: str = "features") -> Tensor:
    """The features in at least float32.

    Raises:
        ValueError: not a matrix with rows, or a value is not finite.
    """
    if features_ND.ndim != 2 or len(features_ND) == 0:
        raise ValueError(
            f"{name} must be a matrix with at least one row, got shape {tuple(features_ND.shape)}"
        )
    is_bad_N = ~torch.isfinite(features_ND).all(dim=1)
    if is_bad_N.any():
        first = int(is_bad_N.nonzero()[0])
        raise ValueError(
            f"{name} hold NaN or infinity in {int(is_bad_N.sum())} of {len(is_bad_N)} rows, "
            f"first row {first}; the encoder's weights or its precision are broken"
        )
    return features_ND if features_ND.dtype == torch.float64 else features_ND.float()


def check_labels(
    labels_N: Tensor | None, num_rows: int, *, several: bool = False, name: str = "labels"
) -> Tensor:
    """The labels as int64.

    Args:
        labels_N: classes, 0 and up.
        num_rows: how many there must be.
        several: whether more than one class must occur.
        name: what they are called in the error.

    Raises:
        ValueError: labels are missing, negative, of another number, or of one class only.
    """
    if labels_N is None:
        raise ValueError(f"{name} are missing; name the label column (label_column=...) or use labelled data")
    if len(labels_N) != num_rows:
        raise ValueError(f"{name}: {len(labels_N)} for {num_rows} rows of features; need one a row")
    if labels_N.is_floating_point() or int(labels_N.min()) < 0:
        raise ValueError(
            f"{name} must be integers from 0, got {labels_N.dtype} with minimum {labels_N.min().item()}"
        )
    if several and int(labels_N.min()) == int(labels_N.max()):
        raise ValueError(
            f"{name} hold the class {int(labels_N[0])} only; a classifier needs two classes or more"
        )
    return labels_N.long()
