"""Accuracy of class scores.

Shape suffixes in this file: N = images, C = classes.
"""

from torch import Tensor


def top_k_accuracy(scores_NC: Tensor, labels_N: Tensor, k: int = 1) -> float:
    """Share of images whose true class is among the `k` best-scored classes.

    Args:
        scores_NC: any real scores, higher is better.
        labels_N: true classes, 0 to C - 1.
        k: how many classes may be named; more than C counts as C. Of equal scores the lower class
            is named first.

    Returns:
        A share between 0 and 1; with k >= C it is 1.

    Raises:
        ValueError: there are no images, or rows and labels differ in number.
    """
    if len(scores_NC) == 0 or len(scores_NC) != len(labels_N):
        raise ValueError(
            f"got {len(scores_NC)} rows of scores and {len(labels_N)} labels; need one label a row"
        )
    # A stable sort, not topk: kNN scores are full of zeros, and which of them is named must not vary.
    best_Nk = scores_NC.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return (best_Nk == labels_N[:, None]).any(dim=1).double().mean().item()
