"""The ViT backbone against transformers' ViTModel, whose names it has, and its own options."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import Dinov2Config, ViTConfig, ViTModel
from transformers.models.dinov2.modeling_dinov2 import Dinov2SwiGLUFFN

from hf_ssl.modeling.shared.configuration import SSLViTConfig
from hf_ssl.modeling.shared.vit import SSLViTBackbone, SSLViTDropPath
from hf_ssl.modeling.simclr import SimCLRConfig, SimCLRModel
from tests.closeness import near

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "layer_norm_eps": 1e-6,
}


def backbone(attention: str = "sdpa", **changes) -> SSLViTBackbone:
    """A fresh backbone, initialised as inside a model."""
    torch.manual_seed(0)
    model = SimCLRModel(SimCLRConfig(backbone_config={"model_type": "hf_ssl_vit", **SIZES, **changes})).eval()
    model.set_attn_implementation(attention)
    return model.backbone


def native_vit(ours: SSLViTBackbone, **changes) -> ViTModel:
    native = ViTModel(
        ViTConfig(**{**SIZES, "intermediate_size": 64, **changes}), add_pooling_layer=False
    ).eval()
    native.load_state_dict(ours.state_dict(), strict=True)
    return native


def test_weights_load_into_the_native_class_by_name_and_give_its_outputs():
    ours, pixels = backbone(), torch.randn(2, 3, 16, 16)
    native = native_vit(ours)
    near(ours(pixels).last_hidden_state, native(pixels).last_hidden_state, 1e-6)


def test_hidden_states_are_those_of_the_native_class():
    ours, pixels = backbone(), torch.randn(2, 3, 16, 16)
    states = ours(pixels, output_hidden_states=True).hidden_states
    expected = native_vit(ours)(pixels, output_hidden_states=True).hidden_states
    assert len(states) == len(expected) == 3
    for mine, theirs in zip(states, expected, strict=True):
        near(mine, theirs, 1e-6)


def test_attention_weights_are_those_of_the_native_class():
    ours, pixels = backbone("eager"), torch.randn(2, 3, 16, 16)
    native = native_vit(ours)
    native.set_attn_implementation("eager")
    weights = ours(pixels, output_attentions=True).attentions
    for mine, theirs in zip(weights, native(pixels, output_attentions=True).attentions, strict=True):
        near(mine, theirs, 1e-6)


@pytest.mark.parametrize(("height", "width"), [(24, 24), (8, 32)])
def test_other_sizes_are_those_of_the_native_class(height, width):
    ours, pixels = backbone(), torch.randn(2, 3, height, width)
    expected = native_vit(ours)(pixels, interpolate_pos_encoding=True).last_hidden_state
    near(ours(pixels).last_hidden_state, expected, 1e-5)


def test_gated_mlp_is_that_of_dinov2_under_its_names():
    ours = backbone(use_swiglu_ffn=True).layers[0].mlp
    native = Dinov2SwiGLUFFN(Dinov2Config(**SIZES, mlp_ratio=4))
    native.load_state_dict(ours.state_dict(), strict=True)
    tokens = torch.randn(2, 17, 16)
    near(ours(tokens), native(tokens), 1e-6)


def test_layer_scale_starts_at_its_value_and_scales_both_branches():
    layer = backbone(layer_scale_value=0.5).layers[0]
    assert layer.layer_scale1.lambda1.eq(0.5).all() and layer.layer_scale2.lambda1.eq(0.5).all()
    with torch.no_grad():
        layer.layer_scale1.lambda1.zero_()
        layer.layer_scale2.lambda1.zero_()
    tokens = torch.randn(2, 17, 16)
    assert layer(tokens)[0].equal(tokens)


def test_kept_patches_are_encoded_as_if_the_others_were_cut_out():
    ours, pixels = backbone(), torch.randn(2, 3, 16, 16)
    kept = torch.tensor([[3, 0, 15], [7, 8, 1]])
    every = ours.embeddings(pixels)[:, 1:].gather(1, kept[..., None].expand(-1, -1, 16))
    near(ours.embeddings(pixels, kept_index_BM=kept)[:, 1:], every, 1e-6)
    assert ours(pixels, kept_index=kept).last_hidden_state.shape == (2, 4, 16)


def test_kept_patches_do_not_depend_on_the_hidden_pixels():
    ours, pixels = backbone(), torch.randn(1, 3, 16, 16)
    kept = torch.tensor([[0, 5]])
    changed = pixels.clone()
    changed[..., 8:, :] += 1  # rows of patches 8 to 15
    assert ours(changed, kept_index=kept).last_hidden_state.equal(
        ours(pixels, kept_index=kept).last_hidden_state
    )


def test_the_mask_token_replaces_hidden_patches_and_keeps_their_position():
    ours, pixels = backbone(use_mask_token=True), torch.randn(1, 3, 16, 16)
    hidden = (torch.arange(16) % 2 == 0)[None]
    tokens, plain = ours.embeddings(pixels, bool_masked_pos=hidden)[:, 1:], ours.embeddings(pixels)[:, 1:]
    assert tokens[~hidden].equal(plain[~hidden])
    near(
        tokens[hidden],
        (ours.embeddings.mask_token[0] + ours.embeddings.position_embeddings[0, 1:])[hidden[0]],
        1e-6,
    )


def test_a_mask_without_mask_token_is_refused():
    with pytest.raises(ValueError, match="use_mask_token=True in the backbone_config"):
        backbone()(torch.randn(1, 3, 16, 16), bool_masked_pos=torch.zeros(1, 16, dtype=torch.bool))


def test_registers_stand_between_class_token_and_patches_and_have_no_position():
    ours = backbone(num_register_tokens=3)
    tokens = ours.embeddings(torch.randn(2, 3, 16, 16))
    assert tokens.shape == (2, 20, 16) and ours.config.num_prefix_tokens == 4
    assert tokens[0, 1:4].equal(ours.embeddings.register_tokens[0])
    near(tokens[0, 0], (ours.embeddings.cls_token + ours.embeddings.position_embeddings[:, :1])[0, 0], 1e-6)


def test_without_class_token_the_pooled_output_is_the_mean_of_patches():
    ours = backbone(use_class_token=False, num_register_tokens=2)
    outputs = ours(torch.randn(2, 3, 16, 16))
    near(outputs.pooler_output, outputs.last_hidden_state[:, 2:].mean(1), 1e-6)
    assert ours.embeddings.position_embeddings.shape == (1, 16, 16)


@pytest.mark.parametrize("rate", [0.08, 0.25])
def test_drop_path_drops_whole_samples_scales_the_rest_and_sleeps_in_eval(rate):
    drop, tokens = SSLViTDropPath(rate), torch.ones(4000, 2, 3)
    torch.manual_seed(0)
    change = (drop.train()(tokens, lambda kept: 2 * kept) - tokens)[:, 0, 0]
    torch.testing.assert_close(change.unique(), torch.tensor([0.0, 2 / (1 - rate)]))
    assert (change == 0).float().mean().item() == pytest.approx(rate, abs=0.02)
    assert drop.eval()(tokens, lambda kept: 2 * kept).equal(3 * tokens)


@pytest.mark.parametrize(("num_samples", "num_kept"), [(10, 6), (7, 4), (1, 1)])
def test_branch_is_computed_for_the_kept_samples_alone(num_samples, num_kept):
    """A fixed number of them, int(b (1 - p)) and at least one; the sum over samples keeps its expectation."""
    seen = []

    def branch(tokens: torch.Tensor) -> torch.Tensor:
        seen.append(len(tokens))
        return torch.ones_like(tokens)

    change = SSLViTDropPath(0.4).train()(torch.zeros(num_samples, 2, 3), branch)
    assert seen == [num_kept] and (change[:, 0, 0] != 0).sum() == num_kept
    assert change[:, 0, 0].sum().item() == pytest.approx(num_samples)


def test_drop_path_rises_linearly_to_the_last_block_or_is_uniform():
    rising = backbone(num_hidden_layers=3, drop_path_rate=0.2)
    uniform = backbone(num_hidden_layers=3, drop_path_rate=0.2, drop_path_uniform=True)
    assert [layer.drop_path.rate for layer in rising.layers] == [0.0, 0.1, 0.2]
    assert [layer.drop_path.rate for layer in uniform.layers] == [0.2, 0.2, 0.2]


def test_patch_projection_may_start_as_torch_starts_it():
    """DINO's initialisation passes over the convolution: U(-1/sqrt(48), 1/sqrt(48)), bias too."""
    ours = backbone(hidden_size=64, weight_initialization="trunc_normal_linears")
    patch, linear = ours.embeddings.patch_embeddings.projection, ours.layers[0].attention.q_proj
    bound = 48**-0.5
    assert 0.97 * bound < patch.weight.abs().max() <= bound and patch.bias.any()
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05) and not linear.bias.any()


def test_dropped_paths_are_the_same_when_activations_are_recomputed():
    model = SimCLRModel(
        SimCLRConfig(backbone_config={"model_type": "hf_ssl_vit", **SIZES, "drop_path_rate": 0.5})
    )
    results = []
    for recompute in (False, True):
        if recompute:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model.train()
        torch.manual_seed(1)
        model(torch.ones(8, 3, 16, 16)).pooler_output.square().sum().backward()
        results.append(model.backbone.layers[0].mlp.fc1.weight.grad.clone())
    assert_close(*results)


@pytest.mark.parametrize(
    ("rule", "deviation"), [("trunc_normal", 0.02), ("xavier_uniform", (2 / 128) ** 0.5)]
)
def test_weights_start_by_the_configured_rule(rule, deviation):
    layer = backbone(hidden_size=64, weight_initialization=rule).layers[0]
    assert layer.attention.q_proj.weight.std().item() == pytest.approx(deviation, rel=0.05)
    assert not layer.attention.q_proj.bias.any() and layer.layernorm_before.weight.eq(1).all()


def test_learned_positions_train_and_fixed_ones_do_not():
    for kind, trains in (("learned", True), ("sincos_row_first", False), ("sincos_column_first", False)):
        assert backbone(position_embedding_type=kind).embeddings.position_embeddings.requires_grad is trains


def test_query_key_value_may_go_without_bias():
    attention = backbone(qkv_bias=False).layers[0].attention
    assert attention.q_proj.bias is attention.k_proj.bias is attention.v_proj.bias is None
    assert attention.o_proj.bias is not None


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 18, 16), "image of 18x16 pixels is not a multiple of patch_size 4"),
        ((1, 1, 16, 16), "3 channels, got 1"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        backbone()(torch.zeros(shape))


def test_float64_stays_float64_in_eager_attention():
    ours = backbone("eager").double()
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    eager = ours(pixels).last_hidden_state
    near(eager, native_vit(ours).double()(pixels).last_hidden_state)


def test_config_describes_its_grid():
    config = SSLViTConfig(**SIZES)
    assert (config.grid_size, config.num_prefix_tokens, config.intermediate_size) == (4, 1, 64)
    assert isinstance(backbone().layers, nn.ModuleList)


def test_rates_by_layer_match_the_authors_groups(golden):
    """Mistake 34: the last block has one factor, the final norm none, the patch projection a further 0.2."""
    case = golden("dinov2")
    ours = backbone(num_hidden_layers=12, num_register_tokens=2, use_mask_token=True)
    multipliers = dict(ours.learning_rate_multipliers(float(case["lr_decay"]), 0.2))
    tokens = ("cls_token", "position_embeddings", "mask_token", "register_tokens")
    names = [f"embeddings.{name}" for name in (*tokens, "patch_embeddings.projection.weight")]
    names += [f"layers.{index}.mlp.fc1.weight" for index in range(12)] + ["layernorm.weight"]
    near(torch.tensor([multipliers[name] for name in names], dtype=torch.float64), case["lr_mult"])
    assert len(multipliers) == len(list(ours.parameters()))
