import math

import pytest
import torch

from hf_ssl.evaluation import health
from hf_ssl.modeling.shared.pretraining import std_of_normalized


def test_all_measures_match_the_stored_reference(golden):
    case = golden("health")
    x, y = case["x"], case["y"]
    found = {
        "std_of_normalised": std_of_normalized(x),
        "alignment_a2": health.alignment(x, y),
        "uniformity_t2": health.uniformity(x),
        "rankme_uncentred": health.rankme(x),
        "effective_rank_centred": health.effective_rank(x),
        "mean_pos_cos": health.mean_positive_cosine(x, y),
        "mean_neg_cos": health.mean_negative_cosine(x, y),
    }
    for name, value in found.items():
        assert float(value) == pytest.approx(case[name].item(), rel=1e-9, abs=1e-9), name


def test_effective_rank_counts_the_orthogonal_directions():
    corners = torch.cat([torch.eye(5), -torch.eye(5)]).double()
    padded = torch.cat([corners, torch.zeros(10, 3)], dim=1)
    assert health.effective_rank(padded) == pytest.approx(5, abs=1e-9)


def test_collapsed_features_have_rank_zero_std_zero_uniformity_zero():
    same = torch.full((16, 4), 0.3)
    assert health.effective_rank(same) == 0
    assert float(std_of_normalized(same)) == pytest.approx(0, abs=1e-6)
    assert health.uniformity(same) == pytest.approx(0, abs=1e-6)


def test_uniformity_of_two_opposite_points_is_minus_eight():
    assert health.uniformity(torch.tensor([[1.0, 0], [-1, 0]])) == pytest.approx(-8, abs=1e-5)


def test_spread_features_have_std_one_over_root_of_width():
    torch.manual_seed(0)
    assert float(std_of_normalized(torch.randn(4096, 64))) == pytest.approx(1 / math.sqrt(64), rel=0.01)
