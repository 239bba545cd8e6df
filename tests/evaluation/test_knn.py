import math

import pytest
import torch
from torch.testing import assert_close

from hf_ssl.evaluation.knn import knn_accuracy, knn_scores, largest, nearest_neighbors


@pytest.mark.parametrize("num_neighbors", [1, 5, 20])
@pytest.mark.parametrize("temperature", [0.07, 0.1])
def test_scores_and_accuracies_match_the_authors_code(golden, num_neighbors, temperature):
    case = golden("knn")
    key = f"k{num_neighbors}_T{temperature}"
    data = case["train_features"], case["train_labels"], case["test_features"], case["test_labels"]
    scores = knn_scores(data[2], data[0], data[1], 6, num_neighbors, temperature)
    assert_close(scores, case[f"{key}.scores"], rtol=1e-9, atol=1e-9)
    assert torch.equal(scores.argmax(dim=1), case[f"{key}.pred"])
    result = knn_accuracy(*data, num_neighbors=num_neighbors, temperature=temperature)
    assert 100 * result.top1 == pytest.approx(case[f"{key}.top1"].item(), abs=1e-9)
    if f"{key}.top5" in case:
        assert 100 * result.top5 == pytest.approx(case[f"{key}.top5"].item(), abs=1e-9)


@pytest.fixture
def clusters():
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(3, 8, generator=generator)
    labels = torch.arange(90) % 3
    features = centers[labels] + 1.5 * torch.randn(90, 8, generator=generator)
    return features[:60], labels[:60], features[60:], labels[60:]


def test_one_equal_neighbor_scores_the_exponential_of_the_inverse_temperature():
    scores = knn_scores(torch.eye(2).double(), torch.eye(2).double(), torch.tensor([1, 0]), 3, 1, 0.1)
    expected = torch.tensor([[0, math.exp(10), 0], [math.exp(10), 0, 0]], dtype=torch.float64)
    assert_close(scores, expected)


def test_length_of_features_has_no_effect(clusters):
    """Mistake 43: neighbours must be found by direction."""
    train, train_labels, test, test_labels = clusters
    lengths = torch.rand(60, 1, generator=torch.Generator().manual_seed(1)) * 100 + 0.01
    plain = knn_scores(test, train, train_labels, 3)
    assert_close(knn_scores(test * 1000, train * lengths, train_labels, 3), plain, rtol=1e-4, atol=1e-2)


def test_more_neighbors_than_bank_images_are_clamped(clusters):
    """Mistake 43."""
    train, train_labels, test, test_labels = clusters
    result = knn_accuracy(*clusters, num_neighbors=10_000)
    assert result == knn_accuracy(*clusters, num_neighbors=60)
    assert result.num_neighbors == 60


def test_half_precision_features_give_finite_scores():
    """Mistake 43: exp(1 / 0.07) overflows float16."""
    scores = knn_scores(torch.eye(2).half(), torch.eye(2).half(), torch.tensor([0, 1]), 2)
    assert scores.dtype == torch.float32 and torch.isfinite(scores).all()
    assert scores[0, 0].item() == pytest.approx(math.exp(1 / 0.07), rel=1e-4)


def test_chunk_size_has_no_effect(clusters):
    train, train_labels, test, _ = clusters
    whole = knn_scores(test.double(), train.double(), train_labels, 3, chunk_size=1000)
    assert_close(knn_scores(test.double(), train.double(), train_labels, 3, chunk_size=7), whole)


@pytest.mark.parametrize("num_columns", [5, 64, 1000, 1029, 1279, 1280])
@pytest.mark.parametrize("k", [1, 3])
def test_selection_by_blocks_finds_what_sorting_finds(num_columns, k):
    generator = torch.Generator().manual_seed(num_columns)
    scores = torch.randperm(8 * num_columns, generator=generator).double().view(8, num_columns)
    values, columns = largest(scores, k)
    expected = scores.sort(dim=1, descending=True)
    assert torch.equal(values, expected.values[:, :k])
    assert torch.equal(columns, expected.indices[:, :k])


@pytest.mark.parametrize("spread", [1.5, 0.01])  # far apart; and so near that bfloat16 tells nothing apart
def test_candidates_chosen_in_half_precision_give_the_neighbors_of_full_precision(spread):
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(20, 64, generator=generator)
    vectors = centers[torch.randint(0, 20, (3000,), generator=generator)]
    vectors = torch.nn.functional.normalize(
        vectors + spread * torch.randn(3000, 64, generator=generator), dim=1
    )
    query, bank = vectors[:100], vectors[100:]
    cosines, rows = nearest_neighbors(query, bank, 10, chunk_size=33, in_bf16=True)
    expected = (query @ bank.T).topk(10, dim=1)
    assert_close(cosines, expected.values)
    assert_close((query @ bank.T).gather(1, rows), expected.values)


def test_centering_undoes_a_common_offset(clusters):
    train, train_labels, test, test_labels = (x.double() if x.is_floating_point() else x for x in clusters)
    mean = train.mean(dim=0)
    centered = knn_accuracy(train - mean, train_labels, test - mean, test_labels)
    assert knn_accuracy(train + 50, train_labels, test + 50, test_labels, center=True) == centered


def test_standardizing_undoes_a_scale_of_each_dimension(clusters):
    train, train_labels, test, test_labels = (x.double() if x.is_floating_point() else x for x in clusters)
    scale = torch.logspace(-3, 3, 8).double()
    plain = knn_accuracy(train, train_labels, test, test_labels, standardize=True)
    assert knn_accuracy(train * scale, train_labels, test * scale, test_labels, standardize=True) == plain


def test_constant_dimension_does_not_decide_after_standardizing(clusters):
    train, train_labels, test, test_labels = clusters
    plain = knn_accuracy(*clusters, standardize=True)
    padded_train = torch.cat([train, torch.zeros(60, 1)], dim=1)
    padded_test = torch.cat([test, torch.full((30, 1), 9.0)], dim=1)
    assert knn_accuracy(padded_train, train_labels, padded_test, test_labels, standardize=True) == plain


def test_class_only_in_the_test_set_counts_as_wrong():
    result = knn_accuracy(
        torch.eye(2), torch.tensor([0, 1]), torch.eye(2), torch.tensor([0, 7]), num_neighbors=1
    )
    assert result.top1 == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels_N": None}, "train labels are missing"),
        ({"test_labels_Q": None}, "test labels are missing"),
        ({"train_labels_N": torch.zeros(60, dtype=torch.long)}, "class 0 only"),
        ({"train_features_ND": torch.full((60, 8), math.nan)}, "NaN or infinity in 60 of 60 rows"),
        ({"temperature": 0}, "temperature"),
    ],
)
def test_unusable_input_is_refused_in_one_line(clusters, change, message):
    names = ("train_features_ND", "train_labels_N", "test_features_QD", "test_labels_Q")
    with pytest.raises(ValueError, match=message) as caught:
        knn_accuracy(**{**dict(zip(names, clusters, strict=True)), **change})
    assert "\n" not in str(caught.value)
