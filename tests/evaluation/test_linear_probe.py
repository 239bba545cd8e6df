import math

import pytest
import torch
from torch.testing import assert_close

from hf_ssl.evaluation.linear_probe import fit_linear_probe, fit_linear_probe_sgd


def gaussian_classes(num_rows, width=16, num_classes=4, spread=1.6, seed=0):
    """Rows around class centres; no classifier beats the nearest centre."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    return centers[labels] + spread * torch.randn(num_rows, width, generator=generator), labels, centers


def test_weights_equal_scikit_learns_at_the_same_strength():
    from sklearn.linear_model import LogisticRegression

    features, labels, _ = gaussian_classes(400)
    features = features.double()
    probe = fit_linear_probe(features, labels, [0.01], max_iterations=500)
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0)
    reference = LogisticRegression(C=1 / (400 * 0.01), tol=1e-6, max_iter=1000)
    reference.fit(((features - mean) / deviation).numpy(), labels.numpy())
    weight = torch.from_numpy(reference.coef_) / deviation
    assert_close(probe.weight, weight, rtol=0, atol=1e-3)


def test_accuracy_equals_scikit_learns_within_a_fifth_of_a_point():
    from sklearn.linear_model import LogisticRegression

    features, labels, _ = gaussian_classes(1000)
    test_features, test_labels, _ = gaussian_classes(4000, seed=1)
    probe = fit_linear_probe(features, labels)
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0)
    reference = LogisticRegression(C=1 / (1000 * probe.chosen), max_iter=1000)
    reference.fit(((features - mean) / deviation).numpy(), labels.numpy())
    expected = reference.score(((test_features - mean) / deviation).numpy(), test_labels.numpy())
    assert probe.accuracy(test_features, test_labels) == pytest.approx(expected, abs=0.002)


@pytest.mark.parametrize("fit", [fit_linear_probe, fit_linear_probe_sgd])
def test_reaches_the_best_possible_accuracy_on_gaussian_classes(fit):
    features, labels, centers = gaussian_classes(4000)
    test_features, test_labels, _ = gaussian_classes(4000, seed=1)
    best = (torch.cdist(test_features, centers).argmin(dim=1) == test_labels).double().mean().item()
    assert fit(features, labels).accuracy(test_features, test_labels) == pytest.approx(best, abs=0.015)


@pytest.mark.parametrize("fit", [fit_linear_probe, fit_linear_probe_sgd])
def test_scale_of_the_features_has_no_effect(fit):
    """Mistake 41: MoCo's features are tiny, and a rate of 0.1 on them as they are learns nothing."""
    features, labels, _ = gaussian_classes(400)
    scale = torch.logspace(-4, 2, 16)
    plain, scaled = fit(features, labels), fit(features * scale, labels)
    assert scaled.chosen == plain.chosen
    assert scaled.accuracy(features * scale, labels) == pytest.approx(
        plain.accuracy(features, labels), abs=0.006
    )


@pytest.mark.parametrize("fit", [fit_linear_probe, fit_linear_probe_sgd])
def test_values_solved_together_equal_values_solved_alone(fit):
    features, labels, _ = gaussian_classes(300)
    together = fit(features.double(), labels, (0.3, 0.01))
    alone = fit(features.double(), labels, (together.chosen,))
    assert_close(together.weight, alone.weight)
    assert set(together.held_out_accuracy) == {0.3, 0.01}


def test_strength_is_chosen_by_the_held_out_part():
    """Ten dimensions tell the classes apart, 490 are noise that a weak penalty fits."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(800) % 2
    features = torch.randn(800, 500, generator=generator)
    features[:, :10] += 1.0 * labels[:, None]
    probe = fit_linear_probe(features, labels, (1e-6, 1.0))
    assert probe.chosen == 1.0
    assert probe.held_out_accuracy[1.0] > probe.held_out_accuracy[1e-6]


def test_constant_dimensions_get_no_weight():
    features, labels, _ = gaussian_classes(200)
    padded = torch.cat([features, torch.full((200, 2), 0.1)], dim=1)
    weight = fit_linear_probe(padded, labels, [0.01]).weight
    assert torch.isfinite(weight).all() and (weight[:, -2:] == 0).all()


def test_class_only_in_the_test_set_counts_as_wrong():
    features = torch.tensor([[0.0], [1.0]]).repeat(10, 1)
    probe = fit_linear_probe(features, torch.arange(20) % 2, [0.01])
    assert probe.accuracy(torch.tensor([[0.0], [0.0]]), torch.tensor([0, 9])) == 0.5


@pytest.mark.parametrize("fit", [fit_linear_probe, fit_linear_probe_sgd])
@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.ones(4, 2), None, "train labels are missing"),
        (torch.ones(4, 2), torch.zeros(4, dtype=torch.long), "class 0 only"),
        (torch.full((4, 2), math.inf), torch.arange(4), "NaN or infinity in 4 of 4 rows"),
        (torch.ones(4, 2), torch.arange(3), "3 for 4 rows"),
        (torch.ones(4, 2), torch.tensor([-1, 0, 1, 2]), "integers from 0"),
    ],
)
def test_unusable_input_is_refused_in_one_line(fit, features, labels, message):
    with pytest.raises(ValueError, match=message) as caught:
        fit(features, labels)
    assert "\n" not in str(caught.value)
