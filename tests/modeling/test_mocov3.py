"""MoCo v3: heads, symmetric loss and teacher against the authors' code, and the mistakes of its section."""

import math

import pytest
import torch
from torch import nn

from hf_ssl.modeling.mocov3 import MoCoV3Config, MoCoV3ForPreTraining, MoCoV3ImageProcessor
from hf_ssl.modeling.shared.losses import paired_contrastive_loss
from tests.closeness import near
from tests.modeling.tiny import BY_NAME, TINY_RESNET, TINY_VIT, gradients, run_step

VIT, CNN = BY_NAME["mocov3-vit"], BY_NAME["mocov3-cnn"]


@pytest.mark.parametrize(("name", "row"), [("ViT", VIT), ("ResNet", CNN)])
def test_heads_of_the_model_match_the_authors_heads_of_that_backbone(golden, name, row):
    """Mistakes 27, 31, 32: predictor in the student, last norms without scale, no biases (strict keys)."""
    case = golden("mocov3")
    model = row.build(projection_size=5, projection_hidden_size=9)
    # The golden features are 6 wide.
    model.student.head.layers[0] = nn.Linear(6, 9, bias=False)
    for head, kind in ((model.student.head, "projector"), (model.student.predictor, "predictor")):
        prefix = f"{name}.{kind}."
        state = {key.removeprefix(prefix): value for key, value in case.items() if key.startswith(prefix)}
        head.double().layers.load_state_dict(state, strict=True)
    projected = model.student.head(case["head_in"])
    near(projected, case[f"{name}.projector_out"])
    near(model.student.predictor(projected), case[f"{name}.predictor_out"])


@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_symmetric_loss_matches_the_authors_code(golden, temperature):
    """Mistake 26: both directions summed, each with 2T."""
    case = golden("mocov3")
    own = torch.arange(6)
    total = sum(
        paired_contrastive_loss(case[query], case[key], own, temperature)
        for query, key in (("q1", "k2"), ("q2", "k1"))
    )
    near(total, case[f"T{temperature}.loss"])


@pytest.mark.parametrize("row", [VIT, CNN], ids=lambda row: row.name)
def test_loss_pairs_the_predictions_of_each_view_with_the_keys_of_the_other(row):
    model = row.build(temperature=0.3).double()
    first, second = row.images(6, dtype=torch.float64).unbind(1)
    pixels = torch.stack([first, second], dim=1)
    model.eval()
    queries = [model.student.predictor(model.student(view)[1]) for view in (first, second)]
    keys = [model.teacher(view)[1] for view in (first, second)]
    own = torch.arange(6)
    expected = paired_contrastive_loss(queries[0], keys[1], own, 0.3)
    expected = expected + paired_contrastive_loss(queries[1], keys[0], own, 0.3)
    near(model(pixels).loss, expected)


def test_views_are_normalised_apart_in_two_forwards():
    """BatchNorm statistics of one view; concatenated views would give another loss."""
    model = CNN.build()
    model(CNN.images(6))
    assert int(model.student.backbone.network.bn1.num_batches_tracked) == 2
    assert int(model.teacher.backbone.network.bn1.num_batches_tracked) == 2


def test_teacher_follows_the_authors_schedule_over_its_steps(golden):
    case = golden("mocov3")
    model = VIT.build().double()
    student, teacher = model.student.head.layers[1].bias, model.teacher.head.layers[1].bias
    teacher.data[:5] = case["ema_init"]
    for step, (epoch, _) in enumerate(case["ema_epoch_and_m"].tolist()):
        student.data[:5] = case[f"ema_online{step}"]
        model.begin_step(round(epoch * 312), 300 * 312)  # 312 steps an epoch
        near(teacher[:5], case[f"ema_target{step}"])


def test_teacher_stands_still_when_the_momentum_has_risen_to_one():
    model = VIT.build()
    with torch.no_grad():
        model.student.head.layers[0].weight.add_(1)
    before = model.teacher.head.layers[0].weight.clone()
    model.begin_step(100, 100)
    assert model.teacher.head.layers[0].weight.equal(before)


def test_teacher_has_no_predictor():
    """Mistake 27."""
    model = VIT.build()
    assert not hasattr(model.teacher, "predictor") and hasattr(model.student, "predictor")
    run_step(model, [VIT.images(4)])
    assert any(name.startswith("student.predictor") for name in gradients(model))


def test_default_small_model_has_twelve_heads():
    """Mistake 28: weights of 12 heads load silently into 6."""
    backbone = MoCoV3Config().backbone_config
    assert (backbone.hidden_size, backbone.num_attention_heads, backbone.layer_norm_eps) == (384, 12, 1e-6)


def test_positions_are_row_first_fixed_and_without_a_row_for_the_class_token(golden):
    """Mistake 29: MAE's table is this one with the grid transposed."""
    model = VIT.build()
    table = model.student.backbone.embeddings.position_embeddings
    near(table, golden("mocov3")["pos_embed_g4_d16"], 2e-5)
    assert not table.requires_grad


def test_patch_projection_is_frozen_and_not_decayed():
    """Mistake 30: a zero gradient would not be skipped by weight decay, a missing one is."""
    model = VIT.build()
    projection = model.student.backbone.embeddings.patch_embeddings.projection
    before = projection.weight.clone()
    optimizer = torch.optim.AdamW(model.parameter_groups(0.5, decay_norms_and_biases=True), lr=0.1)
    run_step(model, [VIT.images(8)], optimize=optimizer.step)
    assert projection.weight.grad is None and projection.weight.equal(before)
    assert projection.weight.abs().max() > 0  # random, not zero


def test_a_frozen_patch_projection_is_still_frozen_after_loading(tmp_path):
    model = VIT.build()
    model.save_pretrained(tmp_path)
    loaded = MoCoV3ForPreTraining.from_pretrained(tmp_path)
    assert not loaded.student.backbone.embeddings.patch_embeddings.projection.weight.requires_grad


def test_weights_start_as_the_authors_vit():
    model = VIT.build(backbone_config={"hidden_size": 64})
    layer = model.student.backbone.layers[0]
    for linear in (layer.attention.q_proj, layer.attention.o_proj):
        bound = math.sqrt(6 / 128)
        assert 0.98 * bound < linear.weight.abs().max() <= bound and not linear.bias.any()
    patch = model.student.backbone.embeddings.patch_embeddings.projection
    bound = math.sqrt(6 / (48 + 64))
    assert 0.97 * bound < patch.weight.abs().max() <= bound and not patch.bias.any()
    assert model.student.backbone.embeddings.cls_token.std().item() == pytest.approx(1e-6, rel=0.5)


@pytest.mark.parametrize(
    ("backbone", "expected"), [(TINY_VIT, (0.2, 3, True)), (TINY_RESNET, (1.0, 2, False))], ids=["vit", "cnn"]
)
def test_form_of_heads_and_temperature_follow_the_backbone(backbone, expected, tmp_path):
    config = MoCoV3Config(backbone_config=backbone)
    values = (config.temperature, config.num_projection_layers, config.normalize_predictions)
    assert values == expected
    config.save_pretrained(tmp_path)
    again = MoCoV3Config.from_pretrained(tmp_path)
    assert (again.temperature, again.num_projection_layers, again.normalize_predictions) == expected


def test_keys_of_an_earlier_step_are_forgotten():
    model = VIT.build()
    run_step(model, [VIT.images(8)])
    model.begin_step(1, 10)
    assert model(VIT.images(4), row_index=torch.arange(4)).loss.isfinite()
    assert model._prepared_keys is None


def test_loss_of_a_fresh_model_is_near_that_of_equal_keys():
    model = VIT.build(projection_size=64, projection_hidden_size=128)
    torch.manual_seed(0)
    loss = model(torch.randn(64, 2, 3, 16, 16)).loss.item()
    expected = model.expectations(num_images=64)["loss_at_start"]
    assert expected == pytest.approx(0.8 * math.log(64)) and loss == pytest.approx(expected, rel=0.1)


def test_one_image_has_no_negatives():
    with pytest.raises(ValueError, match="at least 2 images per step"):
        VIT.build().check_global_batch(1)


def test_the_two_views_are_drawn_differently():
    """Mistake 36: blur and solarization are asymmetric."""
    first, second = MoCoV3ImageProcessor.default_views(224)
    chances = [{step["type"]: step["probability"] for step in view["transforms"]} for view in (first, second)]
    assert (chances[0]["gaussian_blur"], chances[1]["gaussian_blur"]) == (1.0, 0.1)
    assert "solarize" not in chances[0] and chances[1]["solarize"] == 0.2
