"""V-JEPA against the authors' model, and the mistakes its tubes, clips and teacher invite."""

import math

import pytest
import torch
from torch import Tensor

from hf_ssl.modeling.shared.joint_embedding import gather_tokens
from hf_ssl.modeling.shared.teacher import linear_momentum
from hf_ssl.modeling.shared.tubes import draw_tube_masks, draw_tube_size, draw_tubes
from hf_ssl.modeling.vjepa import VJEPAConfig, VJEPAForPreTraining, VJEPAModel
from tests.closeness import near
from tests.modeling.test_ijepa import our_block
from tests.modeling.tiny import BY_NAME, gradients, run_step

ROW = BY_NAME["vjepa"]
KINDS = {"short": (8, 0.15), "long": (2, 0.7)}
GOLDEN_GRID = (4, 8, 8)  # 8 frames of 64 pixels, tubelet 2, patch 8


def authors_model(case: dict[str, Tensor]) -> VJEPAForPreTraining:
    """V-JEPA with fixed positions, whose student is the authors' encoder and predictor."""
    backbone = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 4, "num_frames": 6, "tubelet_size": 2, "use_class_token": False,
        "position_embedding_type": "sincos_row_first",
    }  # fmt: skip
    predictor = {"predictor_hidden_size": 8, "predictor_num_hidden_layers": 1}
    config = VJEPAConfig(backbone_config=backbone, predictor_num_attention_heads=2, **predictor)
    model = VJEPAForPreTraining(config).double()
    weights = {name.removeprefix("enc.sd."): value for name, value in case.items()}
    state = our_block(weights, "blocks.0", "student.backbone.layers.0")
    state["student.backbone.embeddings.position_embeddings"] = weights["pos_embed"]
    for kind in ("weight", "bias"):
        projection = f"student.backbone.embeddings.patch_embeddings.projection.{kind}"
        state[projection] = weights[f"patch_embed.proj.{kind}"]
        state[f"student.backbone.layernorm.{kind}"] = weights[f"norm.{kind}"]
    weights = {name.removeprefix("pred.sd."): value for name, value in case.items()}
    state |= our_block(weights, "predictor_blocks.0", "student.head.layers.0")
    state["student.head.mask_tokens"] = torch.stack([weights["mask_tokens.0"], weights["mask_tokens.1"]])
    state["student.head.position_embeddings"] = weights["predictor_pos_embed"]
    names = {"predictor_embed": "embed", "predictor_norm": "layernorm", "predictor_proj": "predict"}
    for theirs, ours in names.items():
        state |= {f"student.head.{ours}.{kind}": weights[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert all(name.startswith("teacher.") for name in missing.missing_keys)
    return model


def authors_masks(case: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    return {
        "context_mask": [case["fwd.mask_enc0"], case["fwd.mask_enc1"]],
        "target_mask": [case["fwd.mask_pred0"], case["fwd.mask_pred1"]],
    }


def with_authors_targets(model: VJEPAForPreTraining, case: dict[str, Tensor], monkeypatch) -> None:
    tokens = case["fwd.target_full_ln_input"]
    monkeypatch.setattr(
        model, "teacher_tokens", lambda _: torch.nn.functional.layer_norm(tokens, tokens.shape[-1:])
    )


def test_loss_predictions_and_gradients_are_the_authors(golden, monkeypatch):
    case = golden("vjepa")
    model, masks = authors_model(case), authors_masks(case)
    with_authors_targets(model, case, monkeypatch)
    clips = case["fwd.clip"]
    if clips.shape[1] == 3:  # the authors' order is channels before frames
        clips = clips.transpose(1, 2)
    for kind in (0, 1):
        index = (masks["context_mask"][kind], masks["target_mask"][kind])
        near(model._predict(clips, *index, kind)[1], case[f"fwd.pred{kind}"], 1e-7)
        near(gather_tokens(model.teacher_tokens(clips), index[1]), case[f"fwd.targets{kind}"])
    outputs = model(clips, **masks)
    # The table of positions is kept in float32, as published.
    near(outputs.loss, case["fwd.loss_l1"], 1e-7)
    near(outputs.parts["prediction_spread"], case["fwd.reg"], 1e-7)
    outputs.loss.backward()
    found = gradients(model)
    projection = "student.backbone.embeddings.patch_embeddings.projection.weight"
    near(found[projection], case["fwd.grad.enc.patch_embed.proj.weight"], 1e-7)
    tokens = [case[f"fwd.grad.pred.mask_tokens.{kind}"] for kind in (0, 1)]
    near(found["student.head.mask_tokens"], torch.stack(tokens), 1e-7)


def test_loss_of_another_exponent_is_the_authors(golden, monkeypatch):
    case = golden("vjepa")
    model = authors_model(case)
    model.config.loss_exponent = 2.0
    with_authors_targets(model, case, monkeypatch)
    clips = case["fwd.clip"] if case["fwd.clip"].shape[2] == 3 else case["fwd.clip"].transpose(1, 2)
    near(model(clips, **authors_masks(case)).loss, case["fwd.loss_exp2"], 1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_of_tubes_are_the_authors(golden, kind):
    sizes = golden("vjepa")[f"mask.{kind}.sizes_by_seed_t_h_w"].tolist()
    for seed, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(seed)
        assert list(draw_tube_size(GOLDEN_GRID, KINDS[kind][1], (0.75, 1.5), 1.0, generator)) == size


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_share_is_the_authors(golden, kind):
    generator = torch.Generator().manual_seed(0)
    num_tubes, scale = KINDS[kind]
    shares = []
    for _ in range(600):
        size = draw_tube_size(GOLDEN_GRID, scale, (0.75, 1.5), 1.0, generator)
        shares.append(draw_tubes(1, num_tubes, size, GOLDEN_GRID, generator).float().mean())
    case = golden("vjepa")
    near(torch.stack(shares).mean(), case[f"mask.{kind}.masked_fraction_mean_B1"], 0.02)
    near(torch.stack(shares).std(), case[f"mask.{kind}.masked_fraction_std_B1"], 0.02)


def test_tubes_go_through_all_time_and_reach_the_last_row_and_column():
    covered = draw_tubes(500, 1, (4, 3, 3), GOLDEN_GRID, torch.Generator().manual_seed(0)).view(
        500, *GOLDEN_GRID
    )
    assert torch.equal(covered, covered[:, :1].expand_as(covered))
    assert covered[:, 0].any(dim=0).all()


def test_contexts_and_targets_are_disjoint_and_cut_to_one_size():
    options = {"num_tubes": 8, "scale": 0.15, "aspect": (0.75, 1.5), "temporal_scale": 1.0}
    masks = draw_tube_masks(
        24, GOLDEN_GRID, torch.Generator().manual_seed(1), **options, truncation="first", group_size=12
    )
    for contexts, targets in zip(masks.contexts, masks.targets, strict=True):
        assert len(contexts) == len(targets) == 12
        for context, target in zip(contexts, targets, strict=True):
            assert not set(context.tolist()) & set(target.tolist())
            assert context.tolist() == sorted(context.tolist())


def test_cutting_at_random_spares_the_last_frames():
    options = {"num_tubes": 8, "scale": 0.15, "aspect": (0.75, 1.5), "temporal_scale": 1.0}
    shares = {}
    for truncation in ("first", "random"):
        generator = torch.Generator().manual_seed(1)
        masks = draw_tube_masks(24, GOLDEN_GRID, generator, **options, truncation=truncation, group_size=24)
        steps = torch.bincount((masks.targets[0] // 64).flatten(), minlength=4)
        shares[truncation] = float(steps[3] / steps[0])
    assert shares["first"] < 0.6 < 0.8 < shares["random"]


def test_tubes_that_hide_everything_are_refused():
    with pytest.raises(ValueError, match="hide whole clips of 2 x 4 x 4; lower mask_scales"):
        ROW.build(mask_scales=[0.2, 1.0], mask_aspect=[1.0, 1.0])(ROW.images(2))


def test_so_many_tubes_that_nothing_is_left_are_refused():
    with pytest.raises(ValueError, match="60 tubes .* hide whole clips of 2 x 4 x 4"):
        ROW.build(mask_num_tubes=[60, 1], mask_scales=[0.6, 0.2])(ROW.images(2))


def test_hidden_pixels_do_not_reach_the_context():
    model = ROW.build().eval()
    clips, index = ROW.images(2), torch.tensor([[0, 9], [3, 21]])
    before = model.student.backbone(clips, kept_index=index).last_hidden_state
    changed = clips.clone()
    changed[:, :, :, 12:, :4] += 1.0  # the patches of the last row's first column, 12 and 28
    after = model.student.backbone(changed, kept_index=index).last_hidden_state
    near(after, before, 0.0)


def test_every_kind_of_mask_has_its_token_and_equal_weight():
    model = ROW.build()
    clips = ROW.images(3)
    contexts = [torch.tensor([[0, 1]] * 3), torch.tensor([[0, 1, 2]] * 3)]
    targets = [torch.tensor([[5] * 2] * 3), torch.tensor([[9] * 7] * 3)]
    outputs = model(clips, context_mask=contexts, target_mask=targets)
    tokens = model.teacher_tokens(clips)
    losses = [
        (model._predict(clips, context, target, kind)[1] - gather_tokens(tokens, target)).abs().mean()
        for kind, (context, target) in enumerate(zip(contexts, targets, strict=True))
    ]
    near(outputs.loss, torch.stack(losses).mean(), 1e-6)
    outputs.loss.backward()
    assert (gradients(model)["student.head.mask_tokens"].abs().sum(dim=(1, 2, 3)) > 0).all()


def test_a_guess_of_zero_scores_what_is_expected():
    model = ROW.build()
    targets = torch.randn(64, 50, 16)
    near(model._loss(torch.zeros_like(targets), targets), model.expectations()["loss_of_zero"], 0.01)
    near(model.expectations()["loss_of_zero"], math.sqrt(2 / math.pi))


def test_momentum_is_the_authors_cut_schedule(golden):
    used = golden("vjepa")["ema.momentum_used"]  # of a schedule 1.25 times as long as the run
    for step, momentum in enumerate(used.tolist()):
        near(linear_momentum(step, 200, 0.998, 1.0), momentum)


def test_masks_depend_on_seed_step_and_row_alone():
    model = ROW.build()
    clips = ROW.images(4)
    model.begin_step(5, 10, seed=1)
    model.prepare_step([{"pixel_values_videos": clips[:2]}, {"pixel_values_videos": clips[2:]}])
    parts = [model._choose_masks(clips[:2], torch.arange(i, i + 2), None, None) for i in (0, 2)]
    model.prepare_step([{"pixel_values_videos": clips}])
    whole = model._choose_masks(clips, torch.arange(4), None, None)
    for kind in (0, 1):
        for sort in (0, 1):
            assert torch.equal(torch.cat([part[kind][sort] for part in parts]), whole[kind][sort])


def test_teacher_moves_after_the_step():
    model = ROW.build(teacher_momentum=0.5, teacher_momentum_end=0.5)
    name = "layernorm.weight"
    start = model.teacher.backbone.get_parameter(name).clone()

    def optimize() -> None:
        with torch.no_grad():
            model.student.backbone.get_parameter(name).add_(1.0)

    run_step(model, [ROW.images(2)], optimize=optimize)
    near(model.teacher.backbone.get_parameter(name), start + 0.5, 1e-6)


def test_encoder_takes_clips_of_other_lengths_and_images():
    encoder = VJEPAModel(ROW.config()).eval()
    assert encoder(torch.randn(1, 8, 3, 16, 16)).last_hidden_state.shape == (1, 64, 16)
    assert encoder(torch.randn(1, 3, 16, 16)).pooler_output.shape == (1, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_scales": [0.2]}, "must have an entry, at least 1 tube, for each kind"),
        ({"mask_scales": [0.2, 1.5]}, "mask_scales must be above 0 and at most 1"),
        ({"mask_aspect": [2.0, 1.0]}, "two rising numbers above 0"),
        ({"loss_exponent": 0.5}, "loss_exponent must be at least 1"),
        ({"truncation": "last"}, "truncation must be one of first, random"),
        ({"predictor_num_attention_heads": 5}, "must be a multiple of 4 and of its 5 attention heads"),
        ({"backbone_config": {"num_frames": 1, "tubelet_size": 1}}, "needs a backbone of clips"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(Exception, match=message):
        ROW.config(**options)
