"""How close a value must come to a stored one: 1e-9 in float64, 1e-5 when the inputs are cast to float32."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

precision = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])


def near(actual: Tensor | float, expected: Tensor | float, tolerance: float = 1e-9) -> None:
    """Both in float64, absolute and relative."""
    actual, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)
