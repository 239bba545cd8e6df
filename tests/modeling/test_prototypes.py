"""The prototype loss against the authors' values and against its plain form, with all logits at once."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ssl.modeling.shared import prototypes
from hf_ssl.modeling.shared.centering import PrototypeCenter, centered_targets, sinkhorn_targets
from hf_ssl.modeling.shared.heads import PrototypeHead
from hf_ssl.modeling.shared.initialization import initialize_module
from hf_ssl.modeling.shared.prototypes import (
    PrototypeTargets,
    PrototypeWeights,
    mean_of_other_views,
    row_cross_entropies,
    view_cross_entropies,
)
from tests.closeness import near, precision

STUDENT_TEMPERATURE = 0.1


def unit(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def all_targets(targets: PrototypeTargets) -> Tensor:
    """Every probability (I, K)."""
    return torch.cat([part.clone() for _, part in targets.probabilities()], dim=1)


def axes(count: int, dtype: torch.dtype = torch.float64) -> PrototypeWeights:
    """Prototypes for which a bottleneck vector is its own logits."""
    return PrototypeWeights(torch.eye(count, dtype=dtype))


def from_logits(logits: Tensor, center: Tensor, temperature: float) -> PrototypeTargets:
    """Targets whose logits are given: the prototypes are the axes."""
    holder = PrototypeCenter(logits.shape[1]).to(logits.dtype)
    holder.value.copy_(center)
    return centered_targets(logits, axes(logits.shape[1], logits.dtype), holder, temperature)


# Against the authors' code


@precision
def test_multi_crop_loss_gradient_and_centre_match_the_authors_code(golden, dtype, tolerance):
    """Mistakes 1, 2, 4, 5: three steps, each with the centre of the steps before."""
    case = golden("dino")
    center = PrototypeCenter(16).to(dtype)
    directions = axes(16, dtype)
    for step in range(3):
        student = case["student_logits"][step].to(dtype).requires_grad_()
        teacher = case["teacher_logits"][step].to(dtype)
        temperature = case["teacher_temp_schedule"][step].item()
        targets = centered_targets(teacher, directions, center, temperature)
        loss = mean_of_other_views(
            view_cross_entropies(student.view(6, 3, 16), directions, targets, STUDENT_TEMPERATURE)
        )
        center.update(teacher.mean(dim=0), 0.9)
        loss.backward()
        near(loss, case["loss"][step], tolerance)
        near(student.grad, case["grad_student"][step], tolerance)
        near(center.value, case["center_after"][step], tolerance)


@pytest.mark.parametrize("with_norm", [False, True])
def test_head_matches_the_authors_head(golden, with_norm):
    """Mistakes 18 to 21: rows of unit length, erf GELU, the unit vector before the last layer."""
    case = golden("dino_head")
    start = "bn_" if with_norm else ""
    head = PrototypeHead(12, 20, 8, 16, 3, hidden_norm=with_norm, train_scale=with_norm).double()
    state = {}
    for name, value in case.items():
        if name.startswith(f"{start}param."):
            name = name.removeprefix(f"{start}param.").replace("mlp.", "layers.")
            state[name.replace("last_layer", "prototypes")] = value
    if not with_norm:
        assert state.pop("prototypes.weight_g").eq(1).all()
    missing, unexpected = head.load_state_dict(state, strict=False)
    assert not unexpected and all("running" in name or "tracked" in name for name in missing)
    x = case["x"].clone().requires_grad_()
    bottleneck = head(x)
    logits = torch.cat([part for _, part in head.prototypes.weights().scores(bottleneck, 1.0)], dim=1)
    near(logits, case[f"{start}y"])
    logits.backward(case[f"{start}grad_y"])
    if not with_norm:
        near(x.grad, case["grad_x"])
    for name, parameter in head.named_parameters():
        official = name.replace("layers.", "mlp.").replace("prototypes", "last_layer")
        near(parameter.grad, case[f"{start}grad.{official}"])
    for name, buffer in head.named_buffers():
        near(buffer, case[f"bn_buffer_after.{name.replace('layers.', 'mlp.')}"])


def test_last_layer_starts_as_torch_starts_a_linear_layer():
    """Mistake 19: it is made after the pass that starts the MLP at 0.02."""
    head = PrototypeHead(64, 64, 64, 512, 2, hidden_norm=False, train_scale=True)
    for module in head.modules():
        initialize_module(module)
    weight = head.prototypes.weight_v
    assert 0.97 / 8 < weight.abs().max() <= 1 / 8 and head.prototypes.weight_g.eq(1).all()
    assert head.layers[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not head.layers[0].bias.any()
    for _, vectors in head.prototypes.weights().chunks():
        near(vectors.norm(dim=1), torch.ones(512), 1e-5)


# Against the plain form


def plain_view_loss(student: Tensor, weights: Tensor, targets: Tensor, num_global: int) -> Tensor:
    """DINO's loss as its code has it, with all logits."""
    num_views, num_images, _ = student.shape
    log_probabilities = (student @ weights.T / STUDENT_TEMPERATURE).log_softmax(-1)
    targets = targets.view(num_global, num_images, -1)
    terms = [
        -(targets[own] * log_probabilities[view]).sum(-1).mean()
        for own in range(num_global)
        for view in range(num_views)
        if view != own
    ]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 4096])
@pytest.mark.parametrize("kind", ["centered", "sinkhorn"])
def test_chunked_loss_and_gradients_equal_the_plain_form(monkeypatch, chunk_size, kind):
    """All of: loss, gradients of rows and of the weights before their normalisation, to 1e-9 in float64."""
    monkeypatch.setattr(prototypes, "CHUNK_SIZE", chunk_size)
    student, teacher = unit(5, 4, 8, seed=0), unit(8, 8, seed=1)
    own, scale = 3 * unit(50, 8, seed=2), torch.linspace(0.5, 2, 50, dtype=torch.float64)[:, None]
    other = unit(50, 8, seed=3) * scale
    teacher_weights = PrototypeWeights(5 * unit(50, 8, seed=3), scale)
    center = PrototypeCenter(50).double()
    center.value.copy_(torch.linspace(-0.1, 0.1, 50))
    if kind == "centered":
        targets = centered_targets(teacher, teacher_weights, center, 0.05)
        expected_targets = ((teacher @ other.T - center.value) / 0.05).softmax(-1)
    else:
        targets = sinkhorn_targets(teacher, teacher_weights, 0.05)
        expected_targets = plain_sinkhorn(teacher @ other.T, 0.05)
    near(all_targets(targets), expected_targets)

    results = []
    for chunked in (True, False):
        rows, direction, length = (value.clone().requires_grad_() for value in (student, own, scale))
        if chunked:
            weights = PrototypeWeights(direction, length)
            loss = mean_of_other_views(view_cross_entropies(rows, weights, targets, STUDENT_TEMPERATURE))
        else:
            loss = plain_view_loss(rows, F.normalize(direction, dim=1) * length, expected_targets, 2)
        (3 * loss).backward()
        results.append((loss, rows.grad, direction.grad, length.grad))
    for mine, plain in zip(*results, strict=True):
        near(mine, plain)


def plain_sinkhorn(logits: Tensor, temperature: float) -> Tensor:
    """The published loop, with all logits."""
    q = torch.exp(logits / temperature).T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(dim=1, keepdim=True) * q.shape[0]
        q /= q.sum(dim=0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).T


def test_row_loss_equals_the_plain_form_with_a_weight_for_every_row():
    student, teacher, own, other = (unit(12, 8, seed=seed) for seed in range(4))
    weights = torch.linspace(0.1, 2, 12, dtype=torch.float64)
    targets = sinkhorn_targets(teacher, PrototypeWeights(other), 0.06)
    results = []
    for chunked in (True, False):
        rows, vectors = student.clone().requires_grad_(), own.clone().requires_grad_()
        if chunked:
            losses = row_cross_entropies(rows, PrototypeWeights(vectors), targets, STUDENT_TEMPERATURE)
        else:
            log_probabilities = (rows @ F.normalize(vectors, dim=1).T / STUDENT_TEMPERATURE).log_softmax(-1)
            losses = -(plain_sinkhorn(teacher @ other.T, 0.06) * log_probabilities).sum(-1)
        (losses * weights).sum().backward()
        results.append((losses, rows.grad, vectors.grad))
    for mine, plain in zip(*results, strict=True):
        near(mine, plain)


def test_no_row_gives_an_empty_loss_whose_gradients_are_zero():
    """A process without a masked patch must still take part: its parameters get zeros and not None."""
    rows = torch.zeros(0, 8, requires_grad=True)
    vectors = unit(16, 8, seed=0).float().requires_grad_()
    weights = PrototypeWeights(vectors)
    targets = sinkhorn_targets(torch.zeros(0, 8), weights, 0.05)
    row_cross_entropies(rows, weights, targets, 0.1).sum().backward()
    assert rows.grad.shape == (0, 8) and vectors.grad.eq(0).all()


# Properties


def test_a_view_is_never_its_own_target():
    """Mistake 4: a change of the diagonal moves nothing."""
    values = torch.arange(10.0).view(5, 2)
    changed = values.clone()
    changed[0, 0] = changed[1, 1] = 1e6
    assert mean_of_other_views(values) == mean_of_other_views(changed) == (45 - 0 - 3) / 8


def test_all_pairs_weigh_alike_whatever_the_size_of_their_crops():
    """Mistake 44: 2 global and 8 local views make 18 pairs, and not two means of their own."""
    values = torch.zeros(10, 2)
    values[2:] = 1
    assert mean_of_other_views(values).item() == pytest.approx(16 / 18)
    assert mean_of_other_views(torch.tensor([[9.0, 2.0], [4.0, 9.0]])) == 3  # without local crops: 2 terms


def test_uniform_targets_and_prototypes_that_cannot_be_told_apart_cost_log_k():
    student = unit(2, 3, 8, seed=0)
    vectors = unit(1, 8, seed=2).expand(20, 8).contiguous()
    targets = from_logits(torch.zeros(6, 20, dtype=torch.float64), torch.zeros(20), 0.04)
    for loss in view_cross_entropies(student, PrototypeWeights(vectors), targets, 0.1).flatten():
        near(loss, math.log(20))
    statistics = targets.statistics()
    near(statistics["target_entropy"], math.log(20))
    near(statistics["mean_target_entropy"], math.log(20))


@pytest.mark.parametrize("chunk_size", [3, 4096])
def test_statistics_tell_one_prototype_from_one_for_every_image(monkeypatch, chunk_size):
    monkeypatch.setattr(prototypes, "CHUNK_SIZE", chunk_size)
    apart = from_logits(torch.eye(8, dtype=torch.float64) * 100, torch.zeros(8), 0.04).statistics()
    same = from_logits(torch.eye(8, dtype=torch.float64)[:1].expand(8, 8) * 100, torch.zeros(8), 0.04)
    assert apart["prototypes_in_use"] == 8 and same.statistics()["prototypes_in_use"] == 1
    near(apart["mean_target_entropy"], math.log(8))
    near(apart["target_entropy"], 0.0)
    near(same.statistics()["mean_target_entropy"], 0.0)


def test_targets_receive_no_gradient_and_rows_of_them_are_theirs():
    """Mistake 7."""
    teacher = unit(6, 8, seed=0).requires_grad_()
    weights = PrototypeWeights(unit(10, 8, seed=1).requires_grad_())
    targets = sinkhorn_targets(teacher, weights, 0.05)
    others = PrototypeWeights(unit(10, 8, seed=3))
    loss = view_cross_entropies(unit(2, 3, 8, seed=2), others, targets, 0.1).sum()
    assert not loss.requires_grad
    index = torch.tensor([[4, 1], [0, 4]])
    near(all_targets(targets.rows(index)), all_targets(targets)[index.flatten()])


def test_half_precision_rows_are_raised_and_autocast_changes_nothing():
    student, vectors = unit(2, 4, 8, seed=0).float(), PrototypeWeights(unit(16, 8, seed=1).float())
    targets = sinkhorn_targets(unit(8, 8, seed=2).float(), vectors, 0.05)
    full = view_cross_entropies(student, vectors, targets, 0.1)
    rows = student.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = view_cross_entropies(rows, vectors, targets, 0.1)
        half.sum().backward()
    assert half.dtype == torch.float32 and half.equal(full) and rows.grad.dtype == torch.float32
    assert view_cross_entropies(student.bfloat16(), vectors, targets, 0.1).dtype == torch.float32
