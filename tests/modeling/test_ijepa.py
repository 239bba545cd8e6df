"""I-JEPA against the authors' model, and the mistakes its blocks, targets and teacher invite."""

import math

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from hf_ssl.modeling.ijepa import IJEPAConfig, IJEPAForPreTraining, IJEPAImageProcessor, IJEPAModel
from hf_ssl.modeling.shared.teacher import linear_momentum, update_teacher
from hf_ssl.training.schedules import ScheduleSpan, cosine, cosine_weight_decay
from tests.closeness import near
from tests.conftest import ROOT
from tests.modeling.tiny import BY_NAME, TINY_RESNET, gradients, run_step

ROW = BY_NAME["ijepa"]
LAYERS = {
    "attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    "norm1": "layernorm_before", "norm2": "layernorm_after",
}  # fmt: skip


def constants() -> dict[str, str]:
    with safe_open(ROOT / "tests" / "golden" / "ijepa.safetensors", "pt") as file:
        return file.metadata()


def our_block(authors: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    """A block under our names; the authors' joint query-key-value matrix in three."""
    state = {}
    for kind in ("weight", "bias"):
        parts = authors[f"{theirs}.attn.qkv.{kind}"].chunk(3)
        state |= {f"{ours}.attention.{n}_proj.{kind}": part for n, part in zip("qkv", parts, strict=True)}
        state |= {
            f"{ours}.{mapped}.{kind}": authors[f"{theirs}.{name}.{kind}"] for name, mapped in LAYERS.items()
        }
    return state


def our_state(case: dict[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for theirs, branch in (("enc", "student"), ("tgt", "teacher")):
        weights = {name.removeprefix(f"{theirs}.sd."): value for name, value in case.items()}
        ours = f"{branch}.backbone"
        # The authors' target encoder is a copy, with the fixed positions of the context encoder.
        state[f"{ours}.embeddings.position_embeddings"] = case["enc.sd.pos_embed"]
        state |= our_block(weights, "blocks.0", f"{ours}.layers.0")
        for kind in ("weight", "bias"):
            state[f"{ours}.embeddings.patch_embeddings.projection.{kind}"] = weights[
                f"patch_embed.proj.{kind}"
            ]
            state[f"{ours}.layernorm.{kind}"] = weights[f"norm.{kind}"]
    weights = {name.removeprefix("pred.sd."): value for name, value in case.items()}
    state |= our_block(weights, "predictor_blocks.0", "student.head.layers.0")
    state["student.head.mask_token"] = weights["mask_token"]
    state["student.head.position_embeddings"] = weights["predictor_pos_embed"]
    names = {"predictor_embed": "embed", "predictor_norm": "layernorm", "predictor_proj": "predict"}
    for theirs, ours in names.items():
        state |= {f"student.head.{ours}.{kind}": weights[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    return state


def authors_config(**changes: object) -> IJEPAConfig:
    values = constants()
    backbone = {
        **IJEPAConfig.default_backbone,
        "hidden_size": int(values["D"]),
        "num_hidden_layers": 1,
        "num_attention_heads": int(values["H"]),
        "image_size": int(values["g"]) * int(values["p"]),
        "patch_size": int(values["p"]),
    }
    sizes = {"predictor_hidden_size": int(values["Dp"]), "predictor_num_hidden_layers": 1}
    return IJEPAConfig(backbone_config=backbone, **{**sizes, **changes})


def with_authors_weights(case: dict[str, Tensor], **changes: object) -> IJEPAForPreTraining:
    model = IJEPAForPreTraining(authors_config(**changes)).double()
    model.load_state_dict(our_state(case), strict=True)
    return model


def masks_of(case: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    return {"context_mask": [case["fwd.mask_enc"]], "target_mask": list(case["fwd.mask_pred"])}


@pytest.fixture
def case(golden):
    return golden("ijepa")


# Against the authors' code


@pytest.mark.parametrize(("loss", "name"), [("smooth_l1", "loss_smooth_l1"), ("l2", "loss_l2")])
def test_loss_matches_the_authors_model(case, loss, name):
    """Mistakes 27, 31, 32, 36: norm of targets, order of rows, the predictor's own positions."""
    near(with_authors_weights(case, loss=loss)(case["fwd.img"], **masks_of(case)).loss, case[f"fwd.{name}"])


def test_context_predictions_and_targets_match_the_authors_model(case):
    model = with_authors_weights(case)
    context_index, target_index = case["fwd.mask_enc"], case["fwd.mask_pred"]
    tokens = model.student.backbone(case["fwd.img"], kept_index=context_index).last_hidden_state
    near(tokens, case["fwd.context"])
    near(model.student.head(tokens, context_index, target_index, (6, 6)), case["fwd.pred"])
    near(model.teacher.backbone(case["fwd.img"]).last_hidden_state, case["fwd.target_full"])
    near(model._targets(case["fwd.img"], target_index), case["fwd.targets"])


def test_gradients_match_the_authors_model(case):
    model = with_authors_weights(case)
    model(case["fwd.img"], **masks_of(case)).loss.backward()
    ours = gradients(model)
    near(ours["student.head.mask_token"], case["fwd.grad.pred.mask_token"])
    near(
        ours["student.backbone.embeddings.patch_embeddings.projection.weight"],
        case["fwd.grad.enc.patch_embed.proj.weight"],
    )


def test_encoder_of_a_saved_run_is_the_authors_target_encoder(case, tmp_path):
    """Mistake 47."""
    with_authors_weights(case).save_pretrained(tmp_path)
    outputs = IJEPAModel.from_pretrained(tmp_path, dtype=torch.float64)(case["fwd.img"])
    near(outputs.last_hidden_state, case["fwd.target_full"])
    near(outputs.pooler_output, case["fwd.target_full"].mean(dim=1))


def test_positions_are_the_authors_column_first(case):
    """Mistake 2, in both networks; each has its own width."""
    model = IJEPAForPreTraining(authors_config())
    near(model.student.backbone.embeddings.position_embeddings[0], case["pos_embed"], 1e-6)
    near(model.student.head.position_embeddings, case["pred.sd.predictor_pos_embed"], 1e-6)


def test_teacher_momentum_matches_the_authors_over_a_run(case):
    """Mistakes 30, 41: on a line over optimizer steps, from the first step's 0.996 on."""
    num_values = int(case["ema.num"])  # one more than updates: the authors' generator yields the end too
    momenta = [linear_momentum(step, num_values - 1, 0.996, 1.0) for step in range(num_values)]
    near(torch.tensor(momenta[:10], dtype=torch.float64), case["ema.momentum_first10"])
    near(torch.tensor(momenta[-3:], dtype=torch.float64), case["ema.momentum_last3"])
    teacher, student = torch.nn.ParameterList([case["ema.target0"].clone()]), torch.nn.ParameterList([0])
    for step in range(3):
        student[0] = torch.nn.Parameter(case[f"ema.online{step + 1}"])
        update_teacher(teacher, student, momenta[step])
        near(teacher[0], case[f"ema.target{step + 1}"])


def test_decay_follows_the_authors_half_cosine(case):
    """The authors count from 1 where we count from 0."""
    ours = [cosine_weight_decay(step, 300, 0.04, 0.4) for step in range(1, 301)]
    near(torch.tensor(ours, dtype=torch.float64), case["sched.wd"])


def test_rate_after_the_warm_up_follows_the_authors_half_cosine(case):
    """Warm-up differs: ours starts at 0, the authors' at a fifth of the rate."""
    span = ScheduleSpan(total_steps=300, warmup_steps=40, final_factor=1e-3)
    ours = [1e-3 * cosine(step, span) for step in range(40, 301)]
    near(torch.tensor(ours, dtype=torch.float64), case["sched.lr"][39:])


# Mistakes


def test_positions_are_not_zero_after_construction_and_after_loading_an_encoder(tmp_path):
    """Mistake 1: native classes start with other positions."""
    ROW.build_encoder().save_pretrained(tmp_path)
    loaded = IJEPAForPreTraining.from_pretrained(tmp_path, allow_new_heads=True)
    for model in (ROW.build(), loaded):
        for part in (
            model.student.backbone.embeddings,
            model.teacher.backbone.embeddings,
            model.student.head,
        ):
            assert part.position_embeddings.abs().max() > 0.9 and not part.position_embeddings.requires_grad


def fixed_masks() -> dict[str, list[Tensor]]:
    context = torch.tensor([[0, 1, 4], [0, 1, 4]])
    return {"context_mask": [context], "target_mask": [context + 9, context + 6]}


def test_target_pixels_do_not_reach_the_context():
    """Mistake 28: an encoder that sees everything and is gathered afterwards leaks the answer."""
    model, pixels = ROW.build().eval(), ROW.images(2)
    changed = pixels.clone()
    changed[:, :, 8:] = 7.0  # the lower half, which holds no context
    outputs, others = model(pixels, **fixed_masks()), model(changed, **fixed_masks())
    assert others.features.equal(outputs.features)
    assert not others.loss.equal(outputs.loss)


def test_teacher_sees_the_whole_image():
    """Mistake 28 from the other side: a pixel that is neither context nor target moves the targets."""
    model, pixels = ROW.build().eval(), ROW.images(2)
    changed = pixels.clone()
    changed[:, :, :4, 12:] += 5.0  # patch 3
    outputs, others = model(pixels, **fixed_masks()), model(changed, **fixed_masks())
    assert others.features.equal(outputs.features) and not others.loss.equal(outputs.loss)


def test_targets_are_normalised_over_the_width_without_gradient_or_affine_part():
    """Mistakes 27, 29: whatever the teacher's last norm does, each target has mean 0 and variance 1."""
    model = ROW.build()
    torch.nn.init.constant_(model.teacher.backbone.layernorm.weight, 3.0)
    torch.nn.init.constant_(model.teacher.backbone.layernorm.bias, 2.0)
    targets = model._targets(ROW.images(2), torch.tensor([[[0, 5]] * 2]))
    assert targets.shape == (2, 2, 16) and not targets.requires_grad
    near(targets.mean(dim=-1), torch.zeros(2, 2), 1e-5)
    near(targets.var(dim=-1, correction=0), torch.ones(2, 2), 1e-3)


def test_target_blocks_do_not_see_each_other():
    model, pixels = ROW.build().eval(), ROW.images(2)
    masks = fixed_masks()
    index = masks["context_mask"][0]
    tokens = model.student.backbone(pixels, kept_index=index).last_hidden_state
    both = model.student.head(tokens, index, torch.stack(masks["target_mask"]), (4, 4))
    for number, target in enumerate(masks["target_mask"]):
        alone = model.student.head(tokens, index, target[None], (4, 4))
        near(both.unflatten(0, (2, 2))[number], alone, 1e-6)


def test_a_perfect_predictor_has_no_loss():
    """Mistake 31: rows of predictions and targets in another order."""
    model, pixels, masks = ROW.build(), ROW.images(2), fixed_masks()
    targets = model._targets(pixels, torch.stack(masks["target_mask"]))
    model.student.head.forward = lambda *arguments: targets
    assert model(pixels, **masks).loss == 0


def test_teacher_moves_after_the_optimizer_by_the_momentum_of_the_step():
    """Mistakes 29, 30."""
    model = ROW.build(teacher_momentum=0.9, teacher_momentum_end=1.0)
    before = {name: value.clone() for name, value in model.teacher.named_parameters()}
    optimizer = torch.optim.SGD([value for _, value in model.trainable_parameters()], lr=0.5)
    run_step(model, [ROW.images(8)], step=2, total_steps=10, optimize=optimizer.step)
    student = dict(model.student.named_parameters())
    for name, value in model.teacher.named_parameters():
        near(value, 0.92 * before[name] + 0.08 * student[name], 1e-6)


def test_teacher_has_no_drop_path_in_training_and_no_predictor():
    model = ROW.build(backbone_config={"drop_path_rate": 0.5})
    assert model.student.training and not any(part.training for part in model.teacher.modules())
    assert not hasattr(model.teacher, "head")


def test_masks_depend_on_seed_step_and_row_alone():
    """Mistakes 35, 45: repeated forwards, other micro-batches and resumed runs see the same masks."""
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
    model = ROW.build()
    first = model(pixels).is_masked
    model.begin_step(7, 10, seed=1)
    assert model(pixels).is_masked.equal(first)  # without rows: evaluation, which no step changes


def test_groups_of_masks_must_fit_the_micro_batch_and_the_global_batch():
    model, pixels = ROW.build(mask_group_size=4), ROW.images(8)
    with pytest.raises(ValueError, match="a micro-batch of 8 rows spans 2 groups"):
        run_step(model, [pixels])
    assert math.isfinite(run_step(model, list(pixels.split(2))))
    with pytest.raises(ValueError, match="mask_group_size 4 does not divide the global batch 6"):
        model.check_global_batch(6)
    model.check_global_batch(8)


def test_mask_token_is_decayed_and_frozen_tables_are_not_trained():
    """Mistakes 40, 46."""
    model = ROW.build()
    decayed, plain = ([id(p) for p in group["params"]] for group in model.parameter_groups(0.05))
    assert id(model.student.head.mask_token) in decayed
    for table in (
        model.student.backbone.embeddings.position_embeddings,
        model.student.head.position_embeddings,
    ):
        assert id(table) not in decayed + plain


def test_views_are_a_crop_that_is_never_flipped_or_coloured():
    """Mistake 48."""
    (view,) = IJEPAImageProcessor.default_views(224)
    assert view["crop"]["scale"] == [0.3, 1.0] and view["crop"]["interpolation"] == "bilinear"
    assert view["count"] == 1 and view["transforms"] == []


def test_layer_norm_epsilon_and_start_of_the_weights():
    """Fact 7: no weights are scaled down with depth."""
    model = ROW.build(backbone_config={"hidden_size": 128, "num_attention_heads": 4})
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}
    for layer in model.student.backbone.layers:
        for linear in (layer.attention.o_proj, layer.mlp.fc2):
            assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05) and not linear.bias.any()


# Numbers


def test_statistics_show_collapse_and_the_best_constant_guess():
    model = ROW.build()
    parts = model(
        ROW.images(8), **{key: [v[:1].expand(8, -1) for v in value] for key, value in fixed_masks().items()}
    ).parts
    assert (parts["context_length"], parts["target_length"]) == (3, 3)
    assert 0 < parts["target_std"] < 1 and parts["loss_of_mean"] > 0
    torch.nn.init.zeros_(model.teacher.backbone.layernorm.weight)
    torch.nn.init.normal_(model.teacher.backbone.layernorm.bias)
    collapsed = model(ROW.images(8)).parts
    near(collapsed["target_std"], 0.0, 1e-5)
    near(collapsed["loss_of_mean"], 0.0, 1e-5)


def test_expected_losses_are_those_of_normal_targets():
    """0.425 for a guess of zero; the mean over many random numbers."""
    expected = IJEPAForPreTraining(authors_config(predictor_hidden_size=384)).expectations()
    normal = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for key, std in (("loss_of_zero", 1.0), ("loss_at_start", math.sqrt(1 + 384 * 4e-4))):
        mean = torch.nn.functional.smooth_l1_loss(std * normal, torch.zeros_like(normal))
        assert expected[key] == pytest.approx(mean.item(), rel=3e-3)
    assert IJEPAForPreTraining(authors_config(loss="l2")).expectations()["loss_of_zero"] == 1


def test_loss_of_a_fresh_model_lies_between_normal_targets_and_half_the_variance():
    """Fresh targets are mostly positions, which are less spread than normal; smooth-L1 is at most x^2 / 2."""
    options = {"predictor_hidden_size": 96, "predictor_num_hidden_layers": 2}
    model = ROW.build(**options, backbone_config={"hidden_size": 96, "num_attention_heads": 4})
    loss = model(torch.randn(16, 3, 16, 16)).loss.item()
    assert model.expectations()["loss_at_start"] < loss < 0.5 * (1 + 96 * 4e-4)


def test_images_of_another_size_are_predicted():
    outputs = ROW.build()(torch.randn(2, 3, 24, 16))
    assert outputs.is_masked.shape == (2, 24) and outputs.loss.isfinite()


def test_defaults_are_those_of_the_published_vit_h():
    config = IJEPAConfig()
    assert (config.target_scale, config.target_aspect, config.context_scale) == (
        [0.15, 0.2],
        [0.75, 1.5],
        [0.85, 1],
    )
    assert (config.num_targets, config.min_context_patches, config.loss) == (4, 11, "smooth_l1")
    assert (config.predictor_hidden_size, config.predictor_heads) == (384, 16)
    assert (config.truncation, config.reach_last_row) == ("first", False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "l1"}, "loss must be one of smooth_l1, l2, got 'l1'"),
        ({"truncation": "last"}, "truncation must be one of first, random"),
        ({"predictor_hidden_size": 100}, "predictor_hidden_size 100 must be a multiple of 4 and of its 16"),
        ({"target_scale": [0.3, 0.2]}, "target_scale must be two rising numbers above 0 at most 1"),
        ({"context_scale": [0.9, 1.2]}, "context_scale must be two rising numbers"),
        ({"target_aspect": [0.5]}, "target_aspect must be two rising numbers"),
        ({"num_targets": 0}, "num_targets must be at least 1, got 0"),
        ({"mask_group_size": 0}, "mask_group_size must be at least 1"),
        ({"teacher_momentum": 1.5}, "teacher_momentum must be in"),
        ({"backbone_config": TINY_RESNET}, "IJEPAConfig needs a ViT backbone"),
        ({"backbone_config": {"model_type": "hf_ssl_vit"}}, "set use_class_token=False"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(Exception, match=message):
        IJEPAConfig(**options)


@pytest.mark.parametrize("given", ["context_mask", "target_mask"])
def test_one_mask_without_the_other_is_refused(given):
    with pytest.raises(ValueError, match="or neither"):
        ROW.build()(ROW.images(2), **{given: fixed_masks()[given]})


def test_agreement_is_that_of_the_target_blocks_and_1_where_the_predictor_is_perfect(monkeypatch):
    model = ROW.build().eval()
    pixels = ROW.images(3)
    is_context, cosines = model.agreement(pixels)
    assert is_context.shape == cosines.shape == (3, 16) and bool(is_context.any(dim=1).all())
    assert cosines.isfinite().any(dim=1).all()
    targets = model._targets
    monkeypatch.setattr(
        model.student.head, "forward", lambda tokens, context, target, grid: targets(pixels, target)
    )
    _, perfect = model.agreement(pixels)
    torch.testing.assert_close(perfect[perfect.isfinite()], torch.ones(int(perfect.isfinite().sum())))
