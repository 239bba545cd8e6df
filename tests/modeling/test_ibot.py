"""iBOT: both losses and centres against the authors' values, masks, and the mistakes of its section."""

import pytest
import torch
from torch import Tensor

from hf_ssl.modeling.ibot import iBOTConfig, iBOTImageProcessor
from hf_ssl.modeling.shared.centering import PrototypeCenter, centered_targets, mean_logits
from hf_ssl.modeling.shared.patch_distillation import mean_over_masked_views
from hf_ssl.modeling.shared.prototypes import mean_of_other_views, row_cross_entropies, view_cross_entropies
from tests.closeness import near, precision
from tests.modeling.test_prototypes import axes
from tests.modeling.tiny import BY_NAME, companions, gradients, run_step

SHARED, UNSHARED = BY_NAME["ibot"], BY_NAME["ibot-unshared"]
both_forms = pytest.mark.parametrize("row", [SHARED, UNSHARED], ids=lambda row: row.name)


def by_image(value: Tensor) -> Tensor:
    """(B, G, ...) of values in the authors' order, view after view."""
    return value.unflatten(0, (2, -1)).transpose(0, 1)


@precision
def test_three_steps_match_the_authors_code(golden, dtype, tolerance):
    """Mistakes 22, 24, 25: mean of every image's own mean, unmasked images count, all patches in centre 2."""
    case = {name: value.to(dtype) for name, value in golden("ibot").items() if name != "masks"}
    masks = golden("ibot")["masks"].bool()
    views, patches = axes(16, dtype), axes(12, dtype)
    center, patch_center = PrototypeCenter(16).to(dtype), PrototypeCenter(12).to(dtype)
    for step in range(3):
        names = ("student_cls", "student_local_cls", "student_patch")
        student, local, student_patches = (case[name][step].clone().requires_grad_() for name in names)
        teacher, teacher_patches = case["teacher_cls"][step], by_image(case["teacher_patch"][step])
        is_masked = masks[step].flatten(2).transpose(0, 1)
        targets = centered_targets(teacher, views, center, case["teacher_temp"][step].item())
        patch_targets = centered_targets(
            teacher_patches[is_masked], patches, patch_center, case["teacher_patch_temp"][step].item()
        )
        rows = torch.cat([student, local]).unflatten(0, (-1, 3))
        class_loss = mean_of_other_views(view_cross_entropies(rows, views, targets, 0.1))
        losses = row_cross_entropies(by_image(student_patches)[is_masked], patches, patch_targets, 0.1)
        patch_loss = mean_over_masked_views(losses, is_masked)
        (class_loss + patch_loss).backward()
        near(class_loss, case["out_cls"][step], tolerance)
        near(patch_loss, case["out_patch"][step], tolerance)
        near(class_loss + patch_loss, case["out_loss"][step], tolerance)
        for value, name in ((student, "out_g_cls"), (local, "out_g_local"), (student_patches, "out_g_patch")):
            near(value.grad, case[name][step], tolerance)
        center.update(mean_logits(teacher.sum(0), len(teacher), views), 0.9)
        all_patches = teacher_patches.flatten(0, 2)
        patch_center.update(mean_logits(all_patches.sum(0), len(all_patches), patches), 0.9)
        near(center.value, case["out_center"][step][0], tolerance)
        near(patch_center.value, case["out_center2"][step][0, 0], tolerance)


def test_an_image_with_a_large_mask_weighs_as_one_with_a_small_mask():
    """Mistake 22."""
    is_masked = torch.tensor([[[True, True, True], [True, False, False]], [[False] * 3, [False] * 3]])
    losses = torch.tensor([1.0, 2.0, 3.0, 10.0])
    assert mean_over_masked_views(losses, is_masked) == (2 + 10) / 4


@both_forms
def test_patch_loss_of_the_model_is_that_of_every_hidden_patch_with_the_teachers_own_view(row):
    """Mistake 24: the teacher's view is whole; v = q, and no other pair."""
    model = row.build().double()
    pixels = row.images(3, dtype=torch.float64)
    hidden = torch.rand(3, 2, 16, generator=torch.Generator().manual_seed(0)) < 0.4
    outputs = model(pixels, bool_masked_pos=hidden)
    terms = []
    for image in range(3):
        for view in range(2):
            mask = hidden[image, view]
            seen = model.student.backbone(pixels[image, view][None], bool_masked_pos=mask[None])
            whole = model.teacher.backbone(pixels[image, view][None])
            student, teacher = seen.last_hidden_state[0, 1:], whole.last_hidden_state[0, 1:]
            logits = [
                torch.cat([part for _, part in side.patch_weights().scores(side.head(rows), 1.0)], dim=1)
                for side, rows in ((model.student, student), (model.teacher, teacher))
            ]
            targets = ((logits[1] - model.patch_center.value) / 0.04).softmax(-1)
            losses = -(targets * (logits[0] / 0.1).log_softmax(-1)).sum(-1)
            terms.append((losses * mask).sum() / mask.sum().clamp_min(1))
    near(outputs.parts["patch_loss"], torch.stack(terms).mean())
    assert outputs.is_masked.equal(hidden)


def test_local_views_and_teacher_see_everything():
    """Mistake 24."""
    model = SHARED.build()
    calls: dict[str, list[bool]] = {"student": [], "teacher": []}
    for branch, masked in calls.items():
        getattr(model, branch).backbone.register_forward_pre_hook(
            lambda _, inputs, options, masked=masked: masked.append(
                options.get("bool_masked_pos") is not None
            ),
            with_kwargs=True,
        )
    pixels = SHARED.images(4)
    model(pixels, **companions(model, pixels))
    assert calls == {"student": [True, False], "teacher": [False]}


def test_centre_of_patches_covers_those_that_are_not_hidden_too():
    """Mistake 25."""
    model = UNSHARED.build().double()
    pixels = UNSHARED.images(4, dtype=torch.float64)
    tokens = model.teacher.backbone(pixels.transpose(0, 1).flatten(0, 1)).last_hidden_state[:, 1:]
    rows = model.teacher.head(tokens.flatten(0, 1))
    logits = torch.cat([part for _, part in model.teacher.patch_weights().scores(rows, 1.0)], dim=1)
    run_step(model, [pixels])
    near(model.patch_center.value, 0.1 * logits.mean(0))


def test_shared_heads_share_prototypes_and_others_share_the_mlp():
    assert SHARED.build().student.patch_prototypes is None
    student = UNSHARED.build().student
    assert student.patch_prototypes.weight_v.shape == (12, 8) and student.patch_head is None
    names = {name for name, _ in student.named_parameters() if name.startswith(("head", "patch"))}
    assert "patch_prototypes.weight_v" in names and not any(name.startswith("patch_head") for name in names)


def test_all_prototypes_are_held_at_the_start():
    """The authors' names match `last_layer` and `last_layer2`."""
    model = UNSHARED.build(freeze_prototypes=1)
    held = {id(value) for value in model.held_parameters()}
    assert not held
    model.begin_step(0, 10)
    held = {id(value) for value in model.held_parameters()}
    assert held == {
        id(model.student.head.prototypes.weight_v),
        id(model.student.patch_prototypes.weight_v),
    }


# Masks


def masks_of(model: torch.nn.Module, num_rows: int = 400, step: int = 0) -> Tensor:
    model.begin_step(step, 10)
    return model.draw_masks(torch.arange(num_rows), num_rows, (4, 4), seed=(3, step))


@pytest.mark.parametrize("shape", ["block", "random"])
def test_half_of_the_views_are_whole_and_the_others_have_at_most_their_target(shape):
    model = SHARED.build(mask_shape=shape)
    counts = masks_of(model).sum(dim=2).flatten()
    assert 0.42 < (counts == 0).double().mean() < 0.58
    masked = counts[counts > 0]
    assert masked.max() <= 8 and masked.double().mean().item() == pytest.approx(0.28 * 16, rel=0.12)


def test_masks_depend_on_seed_step_and_row_alone():
    """Mistake 45."""
    model = SHARED.build()
    masks = masks_of(model)
    torch.manual_seed(5)
    again = model.draw_masks(torch.tensor([7, 300]), 400, (4, 4), seed=(3, 0))
    assert again.equal(masks[[7, 300]])
    assert not masks_of(model, step=1).equal(masks)


def test_masks_and_the_patch_temperature_start_late_where_wanted():
    model = SHARED.build(mask_start=2, teacher_temperature_warmup=3, patch_teacher_temperature=0.07)
    temperatures = []
    for step in range(6):
        assert masks_of(model, 50, step).any() == (step >= 2)
        temperatures.append(round(model._patch_temperature, 4))
    assert temperatures == [0.04, 0.04, 0.04, 0.055, 0.07, 0.07]
    model.begin_step(0, 10)
    pixels = SHARED.images(4)
    outputs = model(pixels)
    outputs.loss.backward()
    assert outputs.parts["patch_loss"] == 0
    mask_token = model.student.backbone.embeddings.mask_token
    assert mask_token.grad is not None and not mask_token.grad.any()
    assert all(name in gradients(model) for name, _ in model.trainable_parameters())


def test_mask_token_starts_at_zero_and_is_the_students():
    model = SHARED.build()
    assert not model.student.backbone.embeddings.mask_token.any()
    run_step(model, [SHARED.images(8)])
    assert model.student.backbone.embeddings.mask_token.grad.any()


# Configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared_head": False, "shared_head_teacher": True}, "the branches must have the same heads"),
        ({"shared_head": True, "shared_head_teacher": False}, "the branches must have the same heads"),
        ({"num_patch_prototypes": 4096}, "a shared head has num_prototypes 8192 for patches too"),
        ({"mask_shape": "tube"}, "mask_shape must be 'block' or 'random'"),
        ({"mask_ratios": [0.3]}, "must be as many"),
        ({"mask_ratios": [0.1, 0.9]}, "0 <= ratio - spread"),
        ({"patch_teacher_temperature": 0.1}, "below student_temperature"),
        ({"backbone_config": {"model_type": "hf_ssl_timm"}}, "needs a ViT backbone"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(Exception, match=message):
        iBOTConfig(**options)


def test_defaults_are_those_of_the_published_runs(tmp_path):
    config = iBOTConfig()
    assert (config.num_prototypes, config.shared_head, config.mask_ratios) == (8192, True, [0.0, 0.3])
    assert config.backbone_config.use_mask_token and config.backbone_config.hidden_size == 384
    config.save_pretrained(tmp_path)
    assert iBOTConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    views = iBOTImageProcessor.default_views(224)
    assert [(view["count"], view["crop"]["scale"]) for view in views] == [
        (1, [0.25, 1.0]),
        (1, [0.25, 1.0]),
        (10, [0.05, 0.25]),
    ]


def test_separate_batch_norm_of_the_head_treats_views_and_patches_as_batches_of_their_own():
    """Class tokens and patches have other statistics; together, BatchNorm would take out neither's."""
    model = SHARED.build(normalize_head=True, separate_batch_norm=True).double()
    branch = model.student
    generator = torch.Generator().manual_seed(1)
    width = branch.backbone.config.hidden_size
    classes, patches = (torch.randn(n, width, dtype=torch.float64, generator=generator) for n in (8, 5))
    views, own = branch.vectors(classes, patches + 3, num_views=2)
    near(views, torch.cat([branch.head(part) for part in classes.chunk(2)]))
    near(own, branch.head(patches + 3))
    together, _ = (
        SHARED.build(normalize_head=True).double().student.vectors(classes, patches + 3, num_views=2)
    )
    assert (views - together).abs().max() > 1e-3
    for number in (0, 1):  # no batch of their own
        assert branch.vectors(classes, patches[:number], num_views=2)[1].shape == (number, 8)
