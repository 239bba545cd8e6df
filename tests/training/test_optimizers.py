"""LARS against three published implementations, and optimizers by name."""

import pytest
import torch
from torch import Tensor, nn

from hf_ssl.training.optimizers import LARS, build_optimizer
from tests.closeness import near, precision

NAMES = ("weight", "bias", "bn_gamma", "zero_weight", "zerograd_weight")
variants = pytest.mark.parametrize(
    ("variant", "prefix"), [("tf", "A_tf"), ("moco", "B_mocov3"), ("larc", "C_larc")]
)


def lars_of_the_authors_case(case: dict[str, Tensor], variant: str, dtype: torch.dtype) -> tuple[LARS, dict]:
    parameters = {name: nn.Parameter(case[f"init.{name}"].to(dtype, copy=True)) for name in NAMES}
    decay = case["weight_decay"].item()
    groups = [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": decay},
        {
            "params": [p for p in parameters.values() if p.ndim <= 1],
            "weight_decay": 0.0,
            "exclude_from_adaptation": True,
        },
    ]
    momentum, trust = case["sgd_momentum"].item(), case["eta"].item()
    return LARS(groups, lr=0.0, momentum=momentum, trust_coefficient=trust, variant=variant), parameters


def run_step(
    case: dict[str, Tensor], step: int, optimizer: LARS, parameters: dict[str, nn.Parameter]
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = case["lrs"][step].item()
    for name, parameter in parameters.items():
        parameter.grad = case[f"grad{step}.{name}"].to(parameter.dtype)
    optimizer.step()


@precision
@variants
def test_three_steps_of_changing_rate_match_the_published_code(golden, dtype, tolerance, variant, prefix):
    case = golden("lars")
    optimizer, parameters = lars_of_the_authors_case(case, variant, dtype)
    for step in range(3):
        run_step(case, step, optimizer, parameters)
        for name, parameter in parameters.items():
            near(parameter.detach(), case[f"{prefix}.step{step + 1}.{name}"], tolerance)


def test_variants_part_at_the_second_step_when_the_rate_changes(golden):
    case = golden("lars")
    near(case["A_tf.step1.weight"], case["B_mocov3.step1.weight"])
    results = []
    for variant in ("tf", "moco"):
        optimizer, parameters = lars_of_the_authors_case(case, variant, torch.float64)
        for step in range(2):
            run_step(case, step, optimizer, parameters)
        results.append(parameters["weight"].detach())
    step = case["A_tf.step2.weight"] - case["A_tf.step1.weight"]
    assert (results[0] - results[1]).abs().max() > 0.1 * step.abs().max()


@variants
def test_saved_and_restored_state_continues_as_if_never_stopped(golden, variant, prefix):
    case = golden("lars")
    optimizer, parameters = lars_of_the_authors_case(case, variant, torch.float64)
    run_step(case, 0, optimizer, parameters)
    other, copies = lars_of_the_authors_case(case, variant, torch.float64)
    other.load_state_dict(optimizer.state_dict())
    for name, parameter in copies.items():
        parameter.data.copy_(parameters[name].data)
    for step in (1, 2):
        run_step(case, step, other, copies)
    for name, parameter in copies.items():
        near(parameter.detach(), case[f"{prefix}.step3.{name}"])


@precision
def test_probe_optimizer_matches_the_authors_code(golden, dtype, tolerance):
    case = golden("mae")
    weight, bias = (nn.Parameter(case[f"lars.{name}0"].to(dtype, copy=True)) for name in ("w", "b"))
    groups = [
        {"params": [weight], "weight_decay": 0.01},
        {"params": [bias], "exclude_from_adaptation": True},
    ]
    optimizer = build_optimizer("lars", groups, 0.8, lars_variant="moco")
    for step in (1, 2, 3):
        weight.grad, bias.grad = case[f"lars.gw{step}"].to(dtype), case[f"lars.gb{step}"].to(dtype)
        optimizer.step()
        near(weight.detach(), case[f"lars.w{step}"], tolerance)
        near(bias.detach(), case[f"lars.b{step}"], tolerance)


@pytest.mark.parametrize("variant", ["tf", "moco"])
def test_trust_uses_the_gradient_with_decay_and_not_the_raw_one(variant):
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    weight.grad = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    LARS([weight], lr=1.0, momentum=0.0, weight_decay=1.0, trust_coefficient=0.1, variant=variant).step()
    decayed = torch.tensor([[3.0, 5.0]], dtype=torch.float64)
    near(weight.detach(), torch.tensor([[3.0, 4.0]]).double() - 0.1 * 5 / 34**0.5 * decayed)


@pytest.mark.parametrize("variant", ["tf", "moco", "larc"])
def test_excluded_parameters_take_the_plain_step(variant):
    bias = nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    bias.grad = torch.tensor([1.0, 1.0], dtype=torch.float64)
    LARS([{"params": [bias], "exclude_from_adaptation": True}], lr=0.5, variant=variant).step()
    near(bias.detach(), torch.tensor([1.5, -1.5]).double())


@pytest.mark.parametrize("variant", ["tf", "moco"])
def test_nesterov_steps_by_momentum_times_the_new_buffer_plus_the_change(variant):
    bias = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    group = {"params": [bias], "exclude_from_adaptation": True}
    optimizer = LARS([group], lr=0.5, momentum=0.9, variant=variant, nesterov=True)
    for _ in range(2):
        bias.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()
    near(bias.item(), -(0.5 * (0.9 * 1.0 + 1) + 0.5 * (0.9 * 1.9 + 1)))


def test_a_parameter_without_gradient_is_not_decayed():
    weight = nn.Parameter(torch.ones(2, 2))
    LARS([weight], lr=1.0, weight_decay=0.5).step()
    assert weight.eq(1).all()


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_torch_optimizers_are_fused_and_take_their_settings(name, kind):
    groups = [
        {"params": [nn.Parameter(torch.ones(2, 2))], "weight_decay": 0.1},
        {"params": [nn.Parameter(torch.ones(2))], "lr_multiplier": 0.5},
    ]
    optimizer = build_optimizer(name, groups, 0.2, betas=(0.9, 0.95), momentum=0.8)
    assert isinstance(optimizer, kind) and optimizer.defaults["fused"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]
    setting = optimizer.defaults["betas"] if name == "adamw" else optimizer.defaults["momentum"]
    assert setting == ((0.9, 0.95) if name == "adamw" else 0.8)


def test_sgd_decays_everything_its_groups_say_by_coupled_decay():
    weight = nn.Parameter(torch.full((1,), 2.0))
    optimizer = build_optimizer("sgd", [{"params": [weight], "weight_decay": 0.1}], 0.5, momentum=0.0)
    weight.grad = torch.ones(1)
    optimizer.step()
    near(weight.detach(), torch.tensor([2 - 0.5 * (1 + 0.1 * 2)]), 1e-6)


def test_frozen_parameters_are_left_out_and_not_decayed():
    frozen, trained = nn.Parameter(torch.ones(1), requires_grad=False), nn.Parameter(torch.ones(1))
    groups = [{"params": [frozen]}, {"params": [trained, frozen]}]
    optimizer = build_optimizer("adamw", groups, 0.1)
    assert [group["params"] for group in optimizer.param_groups] == [[trained]]


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer("sgd", [{"params": []}], 0.1)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="unknown optimizer 'adamv'; did you mean 'adamw'"):
        build_optimizer("adamv", [], 0.1)
    with pytest.raises(ValueError, match="unknown LARS variant 'mocov'; did you mean 'moco'"):
        LARS([nn.Parameter(torch.ones(1))], lr=0.1, variant="mocov")


@pytest.mark.parametrize(
    "setting", [{"lr": -1.0}, {"lr": 0.1, "trust_coefficient": 0.0}, {"lr": 0.1, "momentum": 1.0}]
)
def test_numbers_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match="LARS needs|optimizer momentum"):
        LARS([nn.Parameter(torch.ones(1))], **setting)
