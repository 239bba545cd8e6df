"""Heads against the authors' values: order of layers, which norms exist, running statistics."""

import pytest
import torch

from hf_ssl.modeling.shared.heads import MLPHead
from tests.closeness import near, precision


@precision
@pytest.mark.parametrize(("version", "num_layers"), [("v1", 2), ("v2", 3)])
def test_scaled_output_norm_head_matches_the_authors_code(golden, dtype, tolerance, version, num_layers):
    case = golden("simclr")
    head = MLPHead(7, 7, 4, num_layers, hidden_norm=True, last_norm="scale", bias=False).to(dtype)
    linears = [layer for layer in head.layers if isinstance(layer, torch.nn.Linear)]
    norms = [layer for layer in head.layers if isinstance(layer, torch.nn.BatchNorm1d)]
    with torch.no_grad():
        for index, (linear, norm) in enumerate(zip(linears, norms, strict=True)):
            linear.weight.copy_(case[f"head_{version}_l{index}_weight"])
            norm.weight.copy_(case[f"head_{version}_l{index}_gamma"])
            if index < num_layers - 1:
                norm.bias.copy_(case[f"head_{version}_l{index}_beta"])
    near(head(case["head_in"].to(dtype)), case[f"head_{version}_out"], tolerance)
    for index, norm in enumerate(norms):
        near(norm.running_mean, case[f"head_{version}_l{index}_running_mean"], tolerance)
        near(norm.running_var, case[f"head_{version}_l{index}_running_var"], tolerance)
    if version == "v2":
        near(head.layers[:3](case["head_in"].to(dtype)), case["head_v2_after_first_layer"], tolerance)


@precision
@pytest.mark.parametrize(
    ("name", "sizes", "last_norm"),
    [
        ("ResNet.projector", (6, 9, 5, 2), "plain"),
        ("ViT.projector", (6, 9, 5, 3), "plain"),
        ("ResNet.predictor", (5, 9, 5, 2), "none"),
        ("ViT.predictor", (5, 9, 5, 2), "plain"),
    ],
)
def test_projectors_and_predictors_match_the_authors_code(golden, dtype, tolerance, name, sizes, last_norm):
    case = golden("mocov3")
    head = MLPHead(*sizes, hidden_norm=True, last_norm=last_norm, bias=False).to(dtype)
    state = {key.removeprefix(f"{name}."): value for key, value in case.items() if key.startswith(f"{name}.")}
    head.layers.load_state_dict(state)  # strict: the same layers with the same names
    features = case["head_in"] if name.endswith("projector") else case[name.split(".")[0] + ".projector_out"]
    near(head(features.to(dtype)), case[f"{name}_out"], tolerance)


@pytest.mark.parametrize(("version", "num_layers"), [("v1", 1), ("v2", 2)])
def test_heads_without_norm_have_the_authors_layers(golden, version, num_layers):
    case = golden("moco")
    head = MLPHead(7, 7, 6, num_layers, hidden_norm=False, last_norm="none", bias=True).double()
    prefix = f"{version}_init.fc." + ("" if num_layers == 2 else "")
    state = {key.removeprefix(prefix): value for key, value in case.items() if key.startswith(prefix)}
    (head.layers if num_layers == 2 else head.layers[0]).load_state_dict(state)


def test_scale_norm_has_a_scale_and_no_shift():
    head = MLPHead(3, 4, 2, 2, hidden_norm=True, last_norm="scale", bias=False)
    assert [name for name, _ in head.named_parameters()] == [
        "layers.0.weight", "layers.1.weight", "layers.1.bias", "layers.3.weight", "layers.4.weight",
    ]  # fmt: skip


def test_plain_norm_has_no_parameters():
    head = MLPHead(3, 4, 2, 1, hidden_norm=True, last_norm="plain", bias=False)
    assert [name for name, _ in head.named_parameters()] == ["layers.0.weight"]


def test_the_output_is_not_cut_at_zero():
    head = MLPHead(3, 4, 2, 2, hidden_norm=True, last_norm="affine", bias=False)
    assert head(torch.randn(16, 3)).min() < 0


def test_unknown_norm_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="unknown last_norm 'afine'; did you mean 'affine'"):
        MLPHead(3, 4, 2, 2, hidden_norm=True, last_norm="afine", bias=False)


def test_a_head_needs_a_layer():
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        MLPHead(3, 4, 2, 0, hidden_norm=True, last_norm="none", bias=False)
