"""MAE against the authors' model, and the mistakes its masks, positions and targets invite."""

import math

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.testing import assert_close

from hf_ssl.modeling.mae import MAEConfig, MAEForPreTraining, MAEImageProcessor, MAEModel
from tests.closeness import near
from tests.conftest import ROOT
from tests.modeling.tiny import BY_NAME, TINY_RESNET, gradients

ROW = BY_NAME["mae"]
HALVES = {"attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
NORMS = {"norm1": "layernorm_before", "norm2": "layernorm_after"}


def our_state(authors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state dict under our names; their joint query-key-value matrix in three."""
    state: dict[str, Tensor] = {
        "student.backbone.embeddings.cls_token": authors["cls_token"],
        "student.backbone.embeddings.position_embeddings": authors["pos_embed"],
        "student.head.mask_token": authors["mask_token"],
        # Their decoder adds a row of zeros to the class token.
        "student.head.position_embeddings": authors["decoder_pos_embed"][:, 1:],
    }
    layers = {
        "patch_embed.proj": "student.backbone.embeddings.patch_embeddings.projection",
        "norm": "student.backbone.layernorm",
        "decoder_embed": "student.head.embed",
        "decoder_norm": "student.head.layernorm",
        "decoder_pred": "student.head.predict",
    }
    for theirs, ours in (
        ("blocks.0", "student.backbone.layers.0"),
        ("decoder_blocks.0", "student.head.layers.0"),
    ):
        layers |= {f"{theirs}.{name}": f"{ours}.{mapped}" for name, mapped in (HALVES | NORMS).items()}
        for kind in ("weight", "bias"):
            parts = authors[f"{theirs}.attn.qkv.{kind}"].chunk(3)
            state |= {
                f"{ours}.attention.{name}_proj.{kind}": part for name, part in zip("qkv", parts, strict=True)
            }
    for theirs, ours in layers.items():
        state |= {f"{ours}.{kind}": authors[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    return state


def authors_config() -> MAEConfig:
    with safe_open(ROOT / "tests" / "golden" / "mae.safetensors", "pt") as file:
        constants = file.metadata()
    patch_size, grid = int(constants["p"]), int(constants["g"])
    backbone = {
        **MAEConfig.default_backbone,
        "hidden_size": int(constants["D"]),
        "num_hidden_layers": 1,
        "num_attention_heads": int(constants["H"]),
        "image_size": grid * patch_size,
        "patch_size": patch_size,
    }
    return MAEConfig(
        backbone_config=backbone,
        decoder_hidden_size=int(constants["Dd"]),
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=int(constants["Hd"]),
        mask_ratio=float(constants["ratio"]),
    )


@pytest.fixture
def authors(golden):
    """The authors' tensors of one forward and backward, and our model with their weights, in float64."""
    case = {
        name.removeprefix("model."): value
        for name, value in golden("mae").items()
        if name.startswith("model.")
    }
    model = MAEForPreTraining(authors_config()).double()
    weights = {name.removeprefix("sd."): value for name, value in case.items() if name.startswith("sd.")}
    model.load_state_dict(our_state(weights), strict=True)
    return case, model


def test_forward_matches_the_authors_model(authors):
    """Mistakes 4 to 12: the class token's position, gathered positions, mask tokens in the decoder alone,
    restored order, normalised targets; visible patches stand in the order of their noise."""
    case, model = authors
    near(model(case["img"], noise=case["noise"]).loss, case["loss"])
    outputs = model.eval()(case["img"], noise=case["noise"])
    near(outputs.loss, case["loss"])
    near(outputs.predictions, case["pred"])
    kept = case["noise"].argsort(dim=1)[:, :4]
    near(model.student.backbone(case["img"], kept_index=kept).last_hidden_state, case["latent"])


def test_gradients_match_the_authors_model(authors):
    case, model = authors
    model(case["img"], noise=case["noise"]).loss.backward()
    ours = gradients(model)
    near(ours["student.backbone.embeddings.cls_token"], case["grad.cls_token"])
    near(ours["student.head.mask_token"], case["grad.mask_token"])
    near(
        ours["student.backbone.embeddings.patch_embeddings.projection.weight"],
        case["grad.patch_embed.proj.weight"],
    )


def test_gradients_pass_numerical_differentiation_where_no_golden_value_exists(authors):
    case, model = authors
    loss = model(case["img"], noise=case["noise"]).loss
    loss.backward()
    names = ["student.backbone.layers.0.attention.k_proj.weight", "student.head.embed.weight"]
    for name in [*names, "student.head.layers.0.mlp.fc2.bias"]:
        parameter = model.get_parameter(name)
        values = []
        for delta in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.view(-1)[3] += delta
                values.append(model(case["img"], noise=case["noise"]).loss)
                parameter.view(-1)[3] -= delta
        near(parameter.grad.view(-1)[3], (values[0] - values[1]) / 2e-5, 1e-7)


def test_encoder_gives_all_tokens_as_the_authors_encoder_without_masking(authors, tmp_path):
    case, model = authors
    model.save_pretrained(tmp_path)
    encoder = MAEModel.from_pretrained(tmp_path, dtype=torch.float64)
    outputs = encoder(case["img"])
    near(outputs.last_hidden_state, case["full_tokens"])
    near(outputs.pooler_output, case["full_tokens"][:, 0])


# Mistakes


@pytest.mark.parametrize("branch", ["student.backbone.embeddings", "student.head"])
def test_positions_are_not_zero_after_construction_and_after_loading_an_encoder(branch, tmp_path):
    """Mistake 1: transformers' own MAE starts with positions of zero."""
    fresh = ROW.build()
    assert fresh.get_submodule(branch).position_embeddings.abs().max() > 0.9
    encoder = ROW.build_encoder()
    encoder.save_pretrained(tmp_path)
    loaded = MAEForPreTraining.from_pretrained(tmp_path, allow_new_heads=True)
    assert_close(
        loaded.get_submodule(branch).position_embeddings, fresh.get_submodule(branch).position_embeddings
    )


def test_first_half_of_a_position_encodes_the_column():
    """Mistake 2: moving right changes the first half of the width, moving down the second."""
    for table in (
        ROW.build().student.backbone.embeddings.position_embeddings[0, 1:],
        ROW.build().student.head.position_embeddings[0],
    ):
        grid = table.unflatten(0, (4, 4))
        half = table.shape[1] // 2
        assert grid[0, 1, half:].equal(grid[0, 0, half:]) and not grid[0, 1, :half].equal(grid[0, 0, :half])
        assert grid[1, 0, :half].equal(grid[0, 0, :half]) and not grid[1, 0, half:].equal(grid[0, 0, half:])


def test_loss_ignores_predictions_of_visible_patches():
    """Mistakes 5 and 6: gradient of the prediction is exactly zero where a patch was seen."""
    model = ROW.build().eval()  # while training, such patches are not predicted
    captured = {}
    model.student.head.predict.register_forward_hook(
        lambda module, inputs, output: (output.retain_grad(), captured.update(prediction=output))[0]
    )
    outputs = model(ROW.images(4))
    outputs.loss.backward()
    gradient = captured["prediction"].grad
    assert not gradient[~outputs.is_masked].any() and gradient[outputs.is_masked].any()


def test_training_predicts_the_hidden_patches_alone_with_the_same_loss_and_gradients():
    model = ROW.build().double()
    pixels, noise = ROW.images(3).double(), torch.rand(3, 16, generator=torch.Generator().manual_seed(1))
    gradients = []
    for training in (True, False):
        model.train(training).zero_grad()
        outputs = model(pixels, noise=noise)
        outputs.loss.backward()
        assert (outputs.predictions is None) == training
        gradients.append(
            [outputs.loss, *(weight.grad for weight in model.parameters() if weight.requires_grad)]
        )
    for while_training, whole in zip(*gradients, strict=True):
        near(while_training, whole)


def test_hidden_pixels_do_not_reach_the_encoder():
    """Mistake 6 from the other side."""
    model, pixels = ROW.build().eval(), ROW.images(2)
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(1))
    outputs = model(pixels, noise=noise)
    hidden = outputs.is_masked.unflatten(1, (4, 4)).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    changed = model(torch.where(hidden, 7.0, pixels), noise=noise)
    assert changed.features.equal(outputs.features) and changed.predictions.equal(outputs.predictions)
    assert not changed.loss.equal(outputs.loss)


def test_mask_is_the_rank_of_the_noise_and_of_the_configured_size():
    """Mistakes 7 and 8."""
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(2))
    outputs = ROW.build()(ROW.images(3), noise=noise)
    assert outputs.is_masked.equal(noise.argsort(1).argsort(1) >= 4)
    assert ROW.build(mask_ratio=0.6)(ROW.images(3)).is_masked.sum(1).tolist() == [10] * 3  # int(6.4) stay


def test_a_ratio_that_hides_everything_is_refused():
    """Mistake 8."""
    with pytest.raises(ValueError, match="hides all 16 patches"):
        ROW.build(mask_ratio=0.99)(ROW.images(2))


def test_visible_tokens_carry_the_position_of_their_place():
    """Mistakes 9 and 36: identical pixels everywhere, so only the position can tell patches apart."""
    model = ROW.build()
    embeddings = model.student.backbone.embeddings
    pixels = torch.ones(1, 3, 16, 16)
    kept = torch.tensor([[9, 2]])
    tokens, every = embeddings(pixels, kept_index_BM=kept), embeddings(pixels)
    near(tokens[:, 1:], every[:, 1:][:, kept[0]], 1e-6)


def test_encoder_sees_no_mask_token():
    """Mistake 11."""
    model = ROW.build()
    assert model.student.backbone.embeddings.mask_token is None
    tokens = model.student.backbone(
        ROW.images(2), kept_index=torch.tensor([[0, 5, 7, 9]] * 2)
    ).last_hidden_state
    assert tokens.shape == (2, 5, 16)


def test_two_calls_of_the_published_encoder_are_equal():
    """Mistakes 14 and 45: transformers' ViTMAE hides three quarters at random even in eval mode."""
    encoder, pixels = ROW.build_encoder(), ROW.images(2)
    assert encoder(pixels).last_hidden_state.equal(encoder(pixels).last_hidden_state)
    assert encoder(pixels).last_hidden_state.shape == (2, 17, 16)


def test_layer_norm_epsilon_is_written_into_the_config():
    """Mistake 13: native defaults are 1e-12."""
    model = ROW.build()
    assert model.config.to_dict()["backbone_config"]["layer_norm_eps"] == 1e-6
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


def test_masks_depend_on_seed_step_and_row_alone():
    """Mistake 45: repeated forwards, other batch sizes and resumed runs see the same masks."""
    pixels = ROW.images(8)

    def masks(seed: int, step: int, pieces: int) -> Tensor:
        model = ROW.build()
        batches = [
            {"pixel_values": part, "row_index": rows}
            for part, rows in zip(pixels.chunk(pieces), torch.arange(8).chunk(pieces), strict=True)
        ]
        model.begin_step(step, 10, seed=seed)
        model.prepare_step(batches)
        return torch.cat([model(**batch).is_masked for batch in batches])

    assert masks(0, 5, 1).equal(masks(0, 5, 1)) and masks(0, 5, 1).equal(masks(0, 5, 4))
    assert not masks(0, 5, 1).equal(masks(0, 6, 1)) and not masks(0, 5, 1).equal(masks(1, 5, 1))
    assert len({tuple(row.tolist()) for row in masks(0, 5, 1)}) == 8


def test_frozen_tables_are_not_in_the_optimizer_and_tokens_are_decayed():
    """Mistake 46; class and mask token are decayed as by the authors."""
    model = ROW.build()
    decayed, plain = ([id(p) for p in group["params"]] for group in model.parameter_groups(0.05))
    embeddings, decoder = model.student.backbone.embeddings, model.student.head
    for table in (embeddings.position_embeddings, decoder.position_embeddings):
        assert not table.requires_grad and id(table) not in decayed + plain
    assert id(embeddings.cls_token) in decayed and id(decoder.mask_token) in decayed


def test_pooled_output_is_the_class_token_after_the_norm():
    """Mistake 50."""
    outputs = ROW.build_encoder()(ROW.images(2))
    assert outputs.pooler_output.equal(outputs.last_hidden_state[:, 0])


# Masks from outside, sizes, start


def test_a_given_mask_is_used_and_keeps_image_order_semantics():
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, :10], mask[1, 6:] = True, True
    model = ROW.build()
    assert model(ROW.images(2), bool_masked_pos=mask).is_masked.equal(mask)


@pytest.mark.parametrize("hidden", [[3, 4], [16, 16], [0, 0]])
def test_masks_of_unequal_size_or_that_hide_all_or_nothing_are_refused(hidden):
    mask = torch.stack([torch.arange(16) < count for count in hidden])
    with pytest.raises(ValueError, match="same number of patches visible"):
        ROW.build()(ROW.images(2), bool_masked_pos=mask)


def test_images_of_another_size_are_reconstructed():
    outputs = ROW.build().eval()(torch.randn(2, 3, 24, 8))
    assert outputs.predictions.shape == (2, 12, 48) and outputs.loss.isfinite()


def test_loss_of_a_fresh_model_is_that_of_a_xavier_decoder():
    """1 + 2 E / (E + P) for targets of variance 1 and normed decoder tokens."""
    options = {"decoder_hidden_size": 96, "decoder_num_attention_heads": 3, "decoder_num_hidden_layers": 2}
    model = ROW.build(**options, backbone_config={"hidden_size": 96, "num_attention_heads": 3})
    expected = model.expectations()["loss_at_start"]
    assert expected == pytest.approx(1 + 2 * 96 / (96 + 48))
    assert model(torch.randn(16, 3, 16, 16)).loss.item() == pytest.approx(expected, rel=0.1)


def test_the_best_constant_guess_is_that_of_the_hidden_targets():
    """Perfect where all patches are alike; of unrelated ones no better than their variance."""
    alike = torch.randn(1, 3, 4, 4).repeat(2, 1, 4, 4)
    near(ROW.build()(alike).parts["loss_of_mean"], 0.0, 1e-6)
    unrelated = ROW.build()(torch.randn(64, 3, 16, 16)).parts["loss_of_mean"]
    assert unrelated.item() == pytest.approx(47 / 48, rel=0.02)  # unbiased variance of 48 values is 1


def test_joint_query_key_value_matrix_starts_as_one_xavier_matrix():
    attention = ROW.build(backbone_config={"hidden_size": 128}).student.backbone.layers[0].attention
    bound = math.sqrt(6 / (4 * 128))
    assert bound * 0.98 < attention.q_proj.weight.abs().max() <= bound
    assert attention.o_proj.weight.abs().max() > math.sqrt(6 / (2 * 128)) * 0.98


def test_plain_pixels_are_a_choice():
    model = ROW.build(normalize_targets=False)
    with torch.no_grad():
        model.student.head.predict.weight.zero_()
        model.student.head.predict.bias.zero_()
        near(model(torch.full((2, 3, 16, 16), 2.0)).loss, 4.0, 1e-6)


def test_a_cnn_is_refused():
    with pytest.raises(ValueError, match="MAEConfig needs a ViT backbone .*got SSLTimmConfig"):
        MAEConfig(backbone_config=TINY_RESNET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 1}, "mask_ratio must be in"),
        ({"decoder_hidden_size": 500}, "decoder_hidden_size 500 must be"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(Exception, match=message):
        MAEConfig(**options)


def test_defaults_are_those_of_the_published_recipe():
    config = MAEConfig()
    decoder = (
        config.decoder_hidden_size,
        config.decoder_num_hidden_layers,
        config.decoder_num_attention_heads,
    )
    assert (config.mask_ratio, config.normalize_targets, decoder) == (0.75, True, (512, 8, 16))
    assert config.backbone_config.position_embedding_type == "sincos_column_first"


def test_views_are_one_crop_and_a_flip():
    """Mistake 48: colour jitter hurts."""
    (view,) = MAEImageProcessor.default_views(224)
    assert view["crop"]["scale"] == [0.2, 1.0] and view["crop"]["interpolation"] == "bicubic"
    assert view["count"] == 1 and [step["type"] for step in view["transforms"]] == ["horizontal_flip"]
