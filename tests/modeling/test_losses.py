"""Losses against the authors' values, closed forms, and the mistakes that leave the loss plausible."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from hf_ssl.modeling.shared import losses
from hf_ssl.modeling.shared.losses import (
    gram_loss,
    koleo_loss,
    masked_patch_loss,
    normalize,
    nt_xent_loss,
    paired_contrastive_loss,
    queue_contrastive_loss,
    shrink_patches,
)
from tests.closeness import near, precision


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(normal(*shape, seed=seed), dim=1)


# Two views against each other


@precision
def test_two_view_loss_and_gradients_match_the_authors_code(golden, dtype, tolerance):
    case = golden("simclr")
    z_a, z_b = (case[name].to(dtype).requires_grad_() for name in ("z_a", "z_b"))
    loss = nt_xent_loss(z_a, z_b, case["temperature"].item())
    loss.backward()
    near(loss, case["loss"], tolerance)
    near(loss, case["loss_per_anchor"].mean(), tolerance)
    near(z_a.grad, case["grad_z_a"], tolerance)
    near(z_b.grad, case["grad_z_b"], tolerance)


def test_indistinguishable_views_score_the_log_of_all_candidates_but_oneself(golden):
    case = golden("simclr")
    same = torch.ones(6, 8, dtype=torch.float64)
    near(nt_xent_loss(same, same, 0.5), case["initial_loss_expected"])
    near(case["initial_loss_expected"], math.log(11))


def test_two_view_loss_is_the_mean_and_not_the_sum_of_both_directions():
    same = torch.ones(4, 3)
    assert nt_xent_loss(same, same, 0.1).item() == pytest.approx(math.log(7), abs=1e-6)


def test_self_similarity_is_excluded_so_aligned_views_reach_the_floor():
    views = torch.eye(4, dtype=torch.float64)  # positives 1, all others 0; with oneself the floor is ln 2
    expected = math.log(1 + 6 * math.exp(-1 / 0.1))
    near(nt_xent_loss(views, views, 0.1), expected)


def test_positive_stays_in_the_denominator_so_the_loss_is_never_negative():
    views = torch.eye(4, dtype=torch.float64)
    assert nt_xent_loss(views, views, 0.05) > 0


def test_views_are_paired_block_by_block_and_not_interleaved():
    views = torch.eye(8, dtype=torch.float64)
    assert nt_xent_loss(views, views, 0.1) < 0.01
    assert nt_xent_loss(views, views.roll(1, dims=0), 0.1) > math.log(15)


def test_two_view_loss_ignores_the_norm_of_a_row():
    first, second = normal(5, 4), normal(5, 4, seed=1)
    scale = torch.tensor([0.01, 1, 3, 50, 1000], dtype=torch.float64)[:, None]
    near(nt_xent_loss(first * scale, second, 0.07), nt_xent_loss(first, second, 0.07))


def test_two_view_loss_is_symmetric_and_ignores_the_order_of_pairs():
    first, second = normal(5, 4), normal(5, 4, seed=1)
    order = torch.tensor([3, 0, 4, 1, 2])
    near(nt_xent_loss(first, second, 0.2), nt_xent_loss(second, first, 0.2))
    near(nt_xent_loss(first, second, 0.2), nt_xent_loss(first[order], second[order], 0.2))


def plain_two_view_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Eq. 1 of the paper, with all similarities at once."""
    views = F.normalize(torch.cat([first, second]), dim=-1)
    logits = views @ views.T / temperature
    logits = logits.masked_fill(torch.eye(len(views), dtype=torch.bool), float("-inf"))
    other = torch.arange(len(views)).roll(len(first))
    return F.cross_entropy(logits, other)


@pytest.mark.parametrize("elements", [1, 60, 100, 2**20])  # anchors at a time: 1, 3, 5 and all 20
def test_two_view_loss_and_gradients_do_not_depend_on_the_chunks(monkeypatch, elements):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", elements)
    views = [normal(10, 4, seed=seed).requires_grad_() for seed in (1, 2)]
    loss, plain = nt_xent_loss(*views, 0.1), plain_two_view_loss(*views, 0.1)
    near(loss, plain)
    for gradient, expected in zip(
        torch.autograd.grad(3 * loss, views), torch.autograd.grad(3 * plain, views), strict=True
    ):
        near(gradient, expected)


def test_temperature_divides_so_a_small_one_sharpens():
    views = torch.eye(4, dtype=torch.float64)
    assert nt_xent_loss(views, views, 0.1) < nt_xent_loss(views, views, 1.0)


# A queue of negatives


@precision
def test_queue_loss_and_gradient_match_the_authors_code(golden, dtype, tolerance):
    case = golden("moco")
    raw = case["q"].to(dtype).requires_grad_()
    query = F.normalize(raw, dim=1)
    key, queue = case["k"].to(dtype), case["queue"].to(dtype).T
    loss = queue_contrastive_loss(query, key, queue, case["temperature"].item())
    loss.backward()
    near(loss, case["loss"], tolerance)
    near(raw.grad, case["grad_q"], tolerance)


def test_queue_loss_is_the_cross_entropy_of_the_authors_logits(golden):
    case = golden("moco")
    near(F.cross_entropy(case["logits"], torch.zeros(4, dtype=torch.long)), case["loss"])
    query = F.normalize(case["q"], dim=1)
    near(queue_contrastive_loss(query, case["k"], case["queue"].T, case["temperature"].item()), case["loss"])


def test_queue_loss_of_indistinguishable_keys_is_log_of_candidate_count():
    query = torch.full((2, 4), 0.5, dtype=torch.float64)
    near(queue_contrastive_loss(query, query, query[:1].expand(7, 4), 0.2), math.log(8))


def test_queue_loss_gradient_reaches_the_query_only():
    query, key, queue = (torch.eye(3, dtype=torch.float64).requires_grad_() for _ in range(3))
    queue_contrastive_loss(query, key, queue, 0.2).backward()
    assert query.grad is not None and key.grad is None and queue.grad is None


def test_fused_queue_gradient_passes_numerical_differentiation():
    query, key, queue = unit(3, 4), unit(3, 4, seed=1), unit(6, 4, seed=2)
    assert torch.autograd.gradcheck(
        lambda q: queue_contrastive_loss(q, key, queue, 0.3), query.requires_grad_(), atol=1e-7
    )


def test_queue_may_be_overwritten_before_backward_without_changing_the_gradient():
    query, key, queue = unit(3, 4).requires_grad_(), unit(3, 4, seed=1), unit(6, 4, seed=2)
    queue_contrastive_loss(query, key, queue, 0.2).backward()
    expected, query.grad = query.grad.clone(), None
    loss = queue_contrastive_loss(query, key, queue, 0.2)
    queue.zero_()
    loss.backward()
    near(query.grad, expected)


def test_positive_that_is_already_in_the_queue_puts_a_floor_of_ln_2():
    query = torch.eye(4, dtype=torch.float64)
    assert queue_contrastive_loss(query, query, query, 0.05) > math.log(2)
    assert queue_contrastive_loss(query[:2], query[:2], query[2:], 0.05) < 1e-6


def test_large_logits_do_not_overflow():
    query = torch.eye(2)
    assert queue_contrastive_loss(query, -query, query, 1e-3).isfinite()


# Keys of the other view


@precision
@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_paired_loss_and_gradients_match_the_authors_code(golden, dtype, tolerance, temperature):
    case = golden("mocov3")
    q1, q2 = (case[name].to(dtype).requires_grad_() for name in ("q1", "q2"))
    own = torch.arange(len(q1))
    first = paired_contrastive_loss(q1, case["k2"].to(dtype), own, temperature)
    second = paired_contrastive_loss(q2, case["k1"].to(dtype), own, temperature)
    (first + second).backward()
    near(first, case[f"T{temperature}.loss_q1k2"], tolerance)
    near(second, case[f"T{temperature}.loss_q2k1"], tolerance)
    near(first + second, case[f"T{temperature}.loss"], tolerance)
    near(q1.grad, case[f"T{temperature}.grad_q1"], tolerance)
    near(q2.grad, case[f"T{temperature}.grad_q2"], tolerance)


def test_paired_loss_carries_twice_the_temperature():
    same = torch.ones(5, 3, dtype=torch.float64)
    near(paired_contrastive_loss(same, same, torch.arange(5), 0.2), 0.4 * math.log(5))


def test_paired_loss_gives_keys_no_gradient():
    query, key = normal(3, 4).requires_grad_(), normal(3, 4, seed=1).requires_grad_()
    paired_contrastive_loss(query, key, torch.arange(3), 0.2).backward()
    assert query.grad is not None and key.grad is None


def test_paired_loss_finds_its_keys_by_index():
    keys = torch.eye(6, dtype=torch.float64)
    right = paired_contrastive_loss(keys[3:], keys, torch.arange(3) + 3, 0.1)
    without_offset = paired_contrastive_loss(keys[3:], keys, torch.arange(3), 0.1)
    assert right < 1e-3 < 1 < without_offset


# Hidden patches


@precision
@pytest.mark.parametrize("target", ["loss.norm", "loss.plain"])
def test_masked_loss_and_gradient_match_the_authors_code(golden, dtype, tolerance, target):
    case = golden("mae")
    prediction = case["loss.pred"].to(dtype).requires_grad_()
    goal = case["loss.norm.target"] if target == "loss.norm" else case["loss.patches"]
    loss = masked_patch_loss(prediction, goal.to(dtype), case["loss.mask"].bool())
    loss.backward()
    near(loss, case[target], tolerance)
    near(prediction.grad, case[f"{target}.grad_pred"], tolerance)


def test_gradient_at_visible_patches_is_exactly_zero_and_not_elsewhere():
    prediction, target = normal(2, 4, 3).requires_grad_(), normal(2, 4, 3, seed=1)
    is_masked = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 1]], dtype=torch.bool)
    masked_patch_loss(prediction, target, is_masked).backward()
    assert (prediction.grad[~is_masked] == 0).all() and (prediction.grad[is_masked] != 0).all()


def test_masked_loss_is_averaged_over_the_batch_and_not_per_image():
    prediction, target = torch.zeros(2, 4, 1), torch.zeros(2, 4, 1)
    target[0], target[1] = 1.0, 2.0  # squared errors 1 and 4
    is_masked = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    assert masked_patch_loss(prediction, target, is_masked).item() == pytest.approx((3 * 1 + 4) / 4)


# All of them


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_unit_vectors_are_computed_in_at_least_float32(dtype):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vectors = normalize(normal(3, 7).to(dtype))
    assert vectors.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    near(vectors.norm(dim=1), torch.ones(3), 1e-6)


LOSSES = {
    "two views": lambda x, y: nt_xent_loss(x, y, 0.1),
    "queue": lambda x, y: queue_contrastive_loss(x, y, y, 0.1),
    "paired": lambda x, y: paired_contrastive_loss(x, y, torch.arange(len(x)), 0.1),
    "patches": lambda x, y: masked_patch_loss(x[None], y[None], torch.ones(1, len(x), dtype=torch.bool)),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(name, dtype):
    x, y = unit(4, 8).to(dtype), unit(4, 8, seed=1).to(dtype)
    loss = LOSSES[name](x.clone().requires_grad_(), y)
    assert loss.dtype == torch.float32
    assert_close(loss, LOSSES[name](x.float(), y.float()), rtol=0, atol=0)
    loss.backward()


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_does_not_reach_inside(name):
    x, y = unit(4, 8).float(), unit(4, 8, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = LOSSES[name](x, y)
    assert_close(inside, LOSSES[name](x, y), rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_float64_stays_float64(name):
    assert LOSSES[name](unit(4, 8), unit(4, 8, seed=1)).dtype == torch.float64


@pytest.mark.parametrize("temperature", [0.0, -0.1])
def test_temperature_must_be_positive(temperature):
    x, index = torch.eye(2), torch.arange(2)
    for loss in (
        lambda: nt_xent_loss(x, x, temperature),
        lambda: queue_contrastive_loss(x, x, x, temperature),
        lambda: paired_contrastive_loss(x, x, index, temperature),
    ):
        with pytest.raises(ValueError, match=f"temperature must be > 0, got {temperature}"):
            loss()


# KoLeo


@precision
def test_koleo_matches_the_authors_code(golden, dtype, tolerance):
    """Mistake 29: a row is not its own neighbour; both ends of a distance get its gradient."""
    case = golden("dinov2")
    features = case["koleo_x"].to(dtype).requires_grad_()
    loss = koleo_loss(features)
    loss.backward()
    near(loss, case["koleo_loss"][0], tolerance)
    near(features.grad, case["koleo_grad"], 10 * tolerance)  # differences of near neighbours


def test_koleo_of_equal_rows_is_finite_as_the_authors(golden):
    case = golden("dinov2")
    near(koleo_loss(case["koleo_dup_x"]), case["koleo_dup_loss"][0])
    equal = torch.ones(4, 384, requires_grad=True)
    loss = koleo_loss(equal.bfloat16())
    assert loss.dtype == torch.float32 and 15 < loss.item() < 16


def test_koleo_seeks_neighbours_within_its_group_alone():
    features = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features[4] = features[0]  # far apart in the batch
    halves = [koleo_loss(half) for half in features.chunk(2)]
    near(koleo_loss(features, group_size=4), torch.stack(halves).mean())
    assert koleo_loss(features) > koleo_loss(features, group_size=4)


@pytest.mark.parametrize("group_size", [1, 3, 16])
def test_koleo_refuses_groups_that_do_not_fit(group_size):
    with pytest.raises(ValueError, match=f"divide the 8 of a micro-batch, got koleo_group_size {group_size}"):
        koleo_loss(torch.randn(8, 4), group_size)


# Gram anchoring


@precision
def test_gram_loss_matches_the_authors_code(golden, dtype, tolerance):
    """Mistakes 31 and 32: normalised, a mean and not a sum, no gradient for the anchor."""
    case = golden("gram")
    student, anchor = (case[name].to(dtype).requires_grad_() for name in ("student", "teacher"))
    loss = gram_loss(student, anchor)
    loss.backward()
    near(loss, case["loss_img"][0], tolerance)
    near(student.grad, case["grad_img"], tolerance)
    assert anchor.grad is None


@precision
@pytest.mark.parametrize(
    ("negatives", "name"), [("zero", "img_removeneg"), ("zero_in_anchor", "img_removeteacherneg")]
)
def test_gram_loss_without_negatives_matches_the_authors_code(golden, dtype, tolerance, negatives, name):
    """Mistake 30: the option on the anchor alone, as their code does it."""
    case = golden("gram")
    student = case["student"].to(dtype).requires_grad_()
    loss = gram_loss(student, case["teacher"].to(dtype), negatives)
    loss.backward()
    near(loss, case[f"loss_{name}"][0], tolerance)
    near(student.grad, case[f"grad_{name}"], tolerance)


@precision
def test_gram_targets_of_higher_resolution_are_shrunk_before_their_norm(golden, dtype, tolerance):
    """Mistake 31."""
    case = golden("gram")
    student = case["student"].to(dtype).requires_grad_()
    shrunk = shrink_patches(case["teacher_hr"].to(dtype), (8, 8), (4, 4))
    near(shrunk, case["teacher_hr_down"], max(tolerance, 1e-6))
    loss = gram_loss(student, shrunk)
    loss.backward()
    near(loss, case["loss_hr"][0], max(tolerance, 1e-6))
    near(student.grad, case["grad_hr"], max(tolerance, 1e-6))


def test_gram_loss_of_equal_similarities_is_zero_whatever_the_width():
    features = normal(2, 5, 4)
    near(gram_loss(features, 3 * features), 0.0)
    near(gram_loss(features, F.pad(features, (0, 3))), 0.0)
