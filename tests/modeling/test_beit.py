"""BEiT against the authors' model, and the mistakes its masks, tokens and relative positions invite."""

import math
import random

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModel

from hf_ssl.hub import export_encoder
from hf_ssl.modeling.beit import BEiTConfig, BEiTForPreTraining, BEiTImageProcessor
from hf_ssl.modeling.shared.masks import block_mask, fill_up
from hf_ssl.modeling.shared.tokenizer import VisualTokenizer
from hf_ssl.modeling.shared.vit import SSLViTRelativePositionBias, relative_position_index
from hf_ssl.training.schedules import ScheduleSpan, cosine
from tests.closeness import near
from tests.conftest import ROOT
from tests.modeling.tiny import BY_NAME, run_step

ROW = BY_NAME["beit"]
GRID, TARGET, SMALLEST = (14, 14), 75, 16
LAYERS = {"attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
          "norm1": "layernorm_before", "norm2": "layernorm_after"}  # fmt: skip


def constants() -> dict[str, str]:
    with safe_open(ROOT / "tests" / "golden" / "beit.safetensors", "pt") as file:
        return file.metadata()


def authors_model(case: dict[str, Tensor]) -> BEiTForPreTraining:
    """The authors' tiny model under our names."""
    weights = {name.removeprefix("model.sd."): value for name, value in case.items()}
    block, ours = "blocks.0", "layers.0"
    state = {
        "embeddings.cls_token": weights["cls_token"],
        "embeddings.mask_token": weights["mask_token"],
        "shared_position_bias.relative_position_bias_table": weights[
            "rel_pos_bias.relative_position_bias_table"
        ],
        f"{ours}.attention.q_proj.bias": weights[f"{block}.attn.q_bias"],
        f"{ours}.attention.v_proj.bias": weights[f"{block}.attn.v_bias"],
        f"{ours}.layer_scale1.lambda1": weights[f"{block}.gamma_1"],
        f"{ours}.layer_scale2.lambda1": weights[f"{block}.gamma_2"],
    }
    for name, part in zip("qkv", weights[f"{block}.attn.qkv.weight"].chunk(3), strict=True):
        state[f"{ours}.attention.{name}_proj.weight"] = part
    for kind in ("weight", "bias"):
        state[f"embeddings.patch_embeddings.projection.{kind}"] = weights[f"patch_embed.proj.{kind}"]
        state[f"layernorm.{kind}"] = weights[f"norm.{kind}"]
        state |= {f"{ours}.{mine}.{kind}": weights[f"{block}.{name}.{kind}"] for name, mine in LAYERS.items()}
    backbone = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
                "patch_size": 4, "drop_path_rate": 0.0}  # fmt: skip
    config = BEiTConfig(
        backbone_config={**BEiTConfig.default_backbone, **backbone}, tokenizer_config={"num_codes": 12}
    )
    model = BEiTForPreTraining(config).double()
    model.student.backbone.load_state_dict(state)
    model.student.head.load_state_dict({kind: weights[f"lm_head.{kind}"] for kind in ("weight", "bias")})
    return model


@pytest.fixture
def case(golden) -> dict[str, Tensor]:
    return golden("beit")


# The authors' numbers


def test_loss_and_gradients_match_the_authors_model(case):
    model = authors_model(case)
    outputs = model(case["model.img"], bool_masked_pos=case["model.mask"].bool(), tokens=case["model.labels"])
    near(outputs.loss, case["model.loss"], 1e-9)
    outputs.loss.backward()
    backbone = model.student.backbone
    near(backbone.embeddings.mask_token.grad, case["model.grad.mask_token"], 1e-9)
    table = backbone.shared_position_bias.relative_position_bias_table
    near(table.grad, case["model.grad.rel_pos_bias_table"], 1e-9)


def test_logits_and_tokens_match_the_authors_model(case):
    model = authors_model(case)
    whole = model.student.backbone(case["model.img"]).last_hidden_state
    near(whole, case["model.tokens_unmasked_normed"], 1e-9)
    masked = model.student.backbone(case["model.img"], bool_masked_pos=case["model.mask"].bool())
    near(model.student.head(masked.last_hidden_state[:, 1:]), case["model.logits_all"], 1e-9)


def test_relative_positions_are_the_authors(case):
    """Mistakes 16, 17: order of rows and columns, of the class token's rows, and size of the table."""
    for rows, columns in ((4, 4), (3, 5)):
        assert torch.equal(relative_position_index((rows, columns)), case[f"relpos.index_{rows}x{columns}"])
    config = ROW.config().encoder_config
    bias = SSLViTRelativePositionBias(config).double()
    assert bias.relative_position_bias_table.shape == case["relpos.table"].shape
    with torch.no_grad():
        bias.relative_position_bias_table.copy_(case["relpos.table"])
    near(bias((4, 4))[0], case["relpos.bias"], 1e-9)


def test_masks_have_the_authors_statistics(case):
    counts, maps, agreement = [], torch.zeros(GRID), []
    for draw in range(4000):
        mask = block_mask(GRID, TARGET, SMALLEST, TARGET, random.Random(draw))
        counts.append(int(mask.sum()))
        maps += mask
        agreement.append((mask[1:] == mask[:-1]).double().mean().item())
    assert max(counts) <= TARGET
    assert sum(counts) / 4000 == pytest.approx(case["mask.count_mean"].item(), abs=0.08)
    histogram = case["mask.count_hist"]
    exact = counts.count(TARGET) / 4000
    assert exact == pytest.approx((histogram[TARGET] / histogram.sum()).item(), abs=0.03)
    assert (maps / 4000 - case["mask.mean_map"]).abs().max() < 0.03
    assert sum(agreement) / 4000 == pytest.approx(case["mask.neighbour_agreement_rows"].item(), abs=0.005)


def test_rate_matches_the_authors_schedule_but_for_the_repeated_peak(case):
    """Their array holds the peak twice; ours passes it once."""
    known = constants()
    steps, warmup = int(known["ep"]) * int(known["ipe"]), int(known["wu"]) * int(known["ipe"])
    lowest = float(known["lrmin"]) / float(known["lr"])
    span = ScheduleSpan(total_steps=steps, warmup_steps=warmup, steps_per_epoch=20, final_factor=lowest)
    rates = torch.tensor([float(known["lr"]) * cosine(step, span) for step in range(steps)])
    assert (rates - case["lr.schedule"]).abs().max() < 0.03 * float(known["lr"])


# Masks


def test_exactly_as_many_patches_are_hidden_in_every_image():
    for draw in range(200):
        generator = random.Random(draw)
        mask = block_mask(GRID, TARGET, SMALLEST, TARGET, generator)
        filled = fill_up(mask, TARGET, generator)
        assert filled.sum() == TARGET and bool(filled[mask].all())
    hidden = ROW.build()(ROW.images(8)).is_masked
    assert set(hidden.sum(dim=1).tolist()) == {ROW.config().num_hidden_patches(16)}


def test_blocks_alone_hide_fewer_now_and_then_as_in_version_1():
    hidden = ROW.build(exact_mask=False, mask_ratio=0.5)(ROW.images(64)).is_masked.sum(dim=1)
    assert hidden.max() <= 8 and hidden.min() < 8


def test_masks_depend_on_seed_step_and_row_alone():
    model, grid = ROW.build(), (4, 4)
    masks = model.draw_masks(torch.arange(8), grid, (3, 5))
    assert torch.equal(masks[2:5], model.draw_masks(torch.arange(2, 5), grid, (3, 5)))
    assert not torch.equal(masks, model.draw_masks(torch.arange(8), grid, (3, 6)))
    assert not torch.equal(masks, model.draw_masks(torch.arange(8), grid, (4, 5)))


def test_loss_is_that_of_hidden_patches_alone():
    """Mistake 21: visible patches have no loss, and their tokens do not matter."""
    model = ROW.build().eval()
    pixels, hidden = ROW.images(4), torch.rand(4, 16) < 0.4
    tokens = model.tokenizer.tokens(pixels)
    loss = model(pixels, bool_masked_pos=hidden, tokens=tokens).loss
    changed = torch.where(hidden, tokens, (tokens + 1) % 12)
    assert torch.equal(model(pixels, bool_masked_pos=hidden, tokens=changed).loss, loss)
    assert model(pixels, bool_masked_pos=hidden, tokens=(tokens + 1) % 12).loss != loss


def test_pixels_of_hidden_patches_do_not_reach_the_predictions():
    model = ROW.build().eval()
    pixels, hidden = ROW.images(2), torch.zeros(2, 16, dtype=torch.bool)
    hidden[:, 0] = True
    tokens = model.tokenizer.tokens(pixels)
    loss = model(pixels, bool_masked_pos=hidden, tokens=tokens).loss
    pixels[:, :, :4, :4] += 1
    assert torch.equal(model(pixels, bool_masked_pos=hidden, tokens=tokens).loss, loss)


# Tokens


def test_tokens_belong_to_the_patches_of_the_view():
    """Mistake 19: a flipped view has flipped tokens."""
    model = ROW.build().eval()
    tokenizer = model.tokenizer
    with torch.no_grad():
        tokenizer.backbone.embeddings.position_embeddings.zero_()
        # A patch that looks the same in a mirror.
        weight = tokenizer.backbone.embeddings.patch_embeddings.projection.weight
        weight.copy_((weight + weight.flip(3)) / 2)
    pixels = ROW.images(2)
    tokens = tokenizer.tokens(pixels).view(2, 4, 4)
    assert torch.equal(tokenizer.tokens(pixels.flip(3)).view(2, 4, 4), tokens.flip(2))
    assert tokens.unique().numel() > 1


def test_tokenizer_stands_still_in_eval_mode_and_float32():
    """Mistakes 22, 23."""
    model = ROW.build()
    before = {name: value.clone() for name, value in model.tokenizer.state_dict().items()}
    optimizer = torch.optim.SGD([value for _, value in model.trainable_parameters()], lr=0.1)
    for step in range(3):
        run_step(model, [ROW.images(8, seed=step)], step, optimize=optimizer.step)
    assert not model.tokenizer.training and model.training
    assert not any(parameter.requires_grad for parameter in model.tokenizer.parameters())
    for name, value in model.tokenizer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_another_grid_of_tokens_is_refused():
    """Mistake 20."""
    tokenizer = {
        "backbone_config": {"hidden_size": 16, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    }
    with pytest.raises(ValueError, match="the tokenizer has 2 x 2 patches, the encoder trained 4 x 4"):
        ROW.config(tokenizer_config=tokenizer)


def test_a_tokenizer_of_another_size_sees_resized_images():
    tokenizer = {
        "backbone_config": {"hidden_size": 16, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    }
    model = ROW.build(tokenizer_config={**tokenizer, "num_codes": 12}).eval()
    assert model(ROW.images(4)).loss.isfinite()


def test_another_tokenizer_than_the_config_s_is_refused():
    model = ROW.build()
    other = VisualTokenizer(model.config.tokenizer_backbone(), num_codes=10, code_size=4)
    with pytest.raises(ValueError, match="the tokenizer is not as tokenizer_config says"):
        model.take_tokenizer(other)


# Start, decay, landing


def test_loss_starts_at_ln_v_and_the_norm_of_a_token():
    torch.manual_seed(0)
    backbone = {**BEiTConfig.default_backbone, "hidden_size": 192, "num_hidden_layers": 2, "image_size": 32}
    config = BEiTConfig(
        backbone_config={**backbone, "num_attention_heads": 3, "patch_size": 4},
        tokenizer_config={"num_codes": 2048},
    )
    model = BEiTForPreTraining(config).eval()
    expected = model.expectations()["loss_at_start"]
    assert expected == pytest.approx(math.log(2048) + 0.011, abs=1e-3)
    assert model(torch.randn(8, 3, 32, 32)).loss.item() == pytest.approx(expected, abs=0.02)


def test_branches_start_smaller_with_depth_and_weights_cut_at_one_std():
    backbone = {
        **BEiTConfig.default_backbone,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    config = BEiTConfig(backbone_config={**backbone, "image_size": 32, "patch_size": 8})
    layers = BEiTForPreTraining(config).student.backbone.layers
    for index, layer in enumerate(layers, 1):
        for linear in (layer.attention.o_proj, layer.mlp.fc2):
            bound = 0.02 / math.sqrt(2 * index)
            assert linear.weight.abs().max() <= bound and linear.weight.std() > 0.5 * bound
        assert 0.01 < layer.attention.q_proj.weight.std() < 0.012
        assert layer.attention.k_proj.bias is None and layer.attention.q_proj.bias is not None  # mistake 15
        assert torch.equal(layer.layer_scale1.lambda1, torch.full((64,), 0.1))  # mistake 18


def test_class_token_is_not_decayed_mask_token_and_table_are():
    model = ROW.build()
    decayed = {
        id(p) for group in model.parameter_groups(0.1) if group["weight_decay"] for p in group["params"]
    }
    backbone = model.student.backbone
    assert id(backbone.embeddings.cls_token) not in decayed
    assert id(backbone.embeddings.mask_token) in decayed
    assert id(backbone.shared_position_bias.relative_position_bias_table) in decayed


def test_lands_in_beit_model_with_normed_tokens_at_every_size(tmp_path):
    """Mistake 13 too: the norm's epsilon."""
    model = ROW.build().eval()
    with torch.no_grad():
        torch.nn.init.normal_(model.student.backbone.shared_position_bias.relative_position_bias_table)
    report = export_encoder(model, tmp_path / "encoder", BEiTImageProcessor.for_image_size(16))
    native = AutoModel.from_pretrained(tmp_path / "encoder").eval()
    assert report.native_class == type(native).__name__ == "BeitModel" and report.max_abs_difference < 1e-5
    assert native.config.layer_norm_eps == 1e-6
    for side in (16, 24):
        pixels = torch.rand(2, 3, side, side)
        expected = model.student.backbone(pixels)
        found = native(pixels)
        torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=0, atol=1e-5)


def test_flash_attention_is_refused_as_it_adds_no_positions():
    with pytest.raises(ValueError, match="adds no relative positions to its scores"):
        model = ROW.build()
        model.config._attn_implementation = "flash_attention_2"
        model._share_attention_implementation()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 1.0}, r"mask_ratio must be in \(0, 1\)"),
        ({"min_block_patches": 0}, "min_block_patches must be at least 1"),
        ({"max_block_patches": 1, "min_block_patches": 2}, "max_block_patches 1 must be no less than"),
        ({"tokenizer_config": {"codes": 3}}, "tokenizer_config has backbone_config, num_codes and code_size"),
        ({"backbone_config": {"use_mask_token": False}}, "BEiTConfig needs a mask token"),
        ({"backbone_config": {"num_register_tokens": 1}}, "needs a class token and no registers"),
    ],
)
def test_values_that_make_no_model_are_refused(options, message):
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=message):
        ROW.config(**options)
