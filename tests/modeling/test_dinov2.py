"""DINOv2: the whole loss against the authors' step, masks, heads, and the mistakes of its section."""

import pytest
import torch
from torch import Tensor

from hf_ssl.modeling.dinov2 import DINOv2Config, DINOv2ImageProcessor
from hf_ssl.modeling.dinov2.modeling_dinov2 import gram_weight_at
from hf_ssl.modeling.shared.centering import PrototypeCenter, centered_targets, sinkhorn_targets
from hf_ssl.modeling.shared.losses import gram_loss, koleo_loss, shrink_patches
from hf_ssl.modeling.shared.masks import block_mask, generator_of_row, stratified_counts
from hf_ssl.modeling.shared.patch_distillation import mean_over_masked_views
from hf_ssl.modeling.shared.prototypes import mean_of_other_views, row_cross_entropies, view_cross_entropies
from tests.closeness import near, precision
from tests.modeling.test_ibot import by_image
from tests.modeling.test_prototypes import axes
from tests.modeling.tiny import BY_NAME, run_step

TIED, SEPARATE, ANCHORED = (BY_NAME[f"dinov2{form}"] for form in ("", "-sinkhorn", "-anchored"))


@precision
@pytest.mark.parametrize("kind", ["center", "sk"])
def test_whole_loss_matches_the_authors_step(golden, kind, dtype, tolerance):
    """Mistakes 26 to 28, 44: one Sinkhorn over both views, no padded rows, KoLeo of each view, all pairs."""
    stored = golden("dinov2")
    case = {
        name.removeprefix(f"comb_{kind}_"): value.to(dtype)
        for name, value in stored.items()
        if name.startswith(f"comb_{kind}_")
    }
    names = ("student_global", "student_local", "student_patch")
    views, local, patches = (case[name].clone().requires_grad_() for name in names)
    is_masked = by_image(stored["masks"].bool())
    teacher, hidden = case["teacher_cls"], by_image(case["teacher_patch"])[is_masked]
    weights, temperature = axes(16, dtype), stored["temp"].item()

    def targets_of(rows: Tensor):
        if kind == "sk":
            return sinkhorn_targets(rows, weights, temperature)
        return centered_targets(rows, weights, PrototypeCenter(16).to(dtype), temperature)

    pairs = view_cross_entropies(
        torch.cat([views, local]).unflatten(0, (-1, 3)), weights, targets_of(teacher), 0.1
    )
    losses = row_cross_entropies(by_image(patches)[is_masked], weights, targets_of(hidden), 0.1)
    patch_loss = mean_over_masked_views(losses, is_masked)
    koleo = sum(koleo_loss(view) for view in views.chunk(2))
    total = mean_of_other_views(pairs) + patch_loss + 0.1 * koleo
    total.backward()
    near((pairs[0, 1] + pairs[1, 0]) / 10, case["loss_global"][0], tolerance)
    near(pairs[2:].sum() / 10, case["loss_local"][0], tolerance)
    near(patch_loss, case["loss_ibot"][0], tolerance)
    near(0.1 * koleo, case["loss_koleo"][0], tolerance)
    near(total, case["total"][0], tolerance)
    for value, name in ((views, "grad_global"), (local, "grad_local"), (patches, "grad_patch")):
        near(value.grad, case[name], 10 * tolerance)


def test_weights_of_hidden_patches_match_the_authors_collation(golden):
    """Mistake 27: one over the hidden patches of the view."""
    case = golden("dinov2")
    is_masked = case["masks"].bool()
    weights = (1 / is_masked.sum(1, keepdim=True).clamp_min(1)).expand_as(is_masked)[is_masked]
    near(weights, case["masks_weight"], 1e-6)
    values = torch.arange(len(weights), dtype=torch.float64)
    expected = (values * case["masks_weight"].double()).sum() / len(is_masked)
    near(mean_over_masked_views(values, is_masked[:, None]), expected, 1e-6)


# The model


def test_sinkhorn_covers_both_views_and_all_micro_batches():
    """Mistake 26: run per view or per micro-batch, its targets would be others."""
    model = SEPARATE.build().double()
    pixels = SEPARATE.images(6, dtype=torch.float64)
    batches = [
        {"pixel_values": piece, "row_index": torch.arange(2) + 2 * index}
        for index, piece in enumerate(pixels.chunk(3))
    ]
    model.begin_step(0, 10)
    model.prepare_step(batches)
    vectors = model.teacher.head(model.teacher.backbone(pixels.flatten(0, 1)).pooler_output)
    expected = sinkhorn_targets(vectors.detach(), model.teacher.head.prototypes.weights(), 0.04)
    near(model._class_targets.targets.bias, expected.bias)
    near(model._class_targets.targets.normalizer, expected.normalizer)


def test_centre_of_patches_is_that_of_the_hidden_ones():
    """Mistake 25, the other way round than iBOT."""
    model = TIED.build().double()
    pixels = TIED.images(6, dtype=torch.float64)
    hidden = model.draw_masks(torch.arange(6), 6, (4, 4), seed=(3, 0))
    tokens = model.teacher.backbone(pixels.flatten(0, 1)).last_hidden_state[:, 1:]
    rows = model.teacher.head(tokens.unflatten(0, (6, 2))[hidden])
    logits = torch.cat([part for _, part in model.teacher.head.prototypes.weights().scores(rows, 1.0)], 1)
    run_step(model, [pixels])
    near(model.patch_center.value, 0.1 * logits.mean(0))


def test_patches_have_a_head_of_their_own_only_when_separate():
    assert TIED.build().student.patch_head is None
    student = SEPARATE.build().student
    assert student.patch_head.prototypes.weight_v.shape == (12, 4)
    assert student.patch_head.prototypes.weight_g.eq(1).all()  # the length is trained


def test_registers_are_no_patches():
    """Mistake 36."""
    model = TIED.build(backbone_config={"num_register_tokens": 3})
    pixels = TIED.images(4)
    tokens = model.student.backbone(pixels.transpose(0, 1).flatten(0, 1)).last_hidden_state
    patches = model.student.patch_tokens(tokens)
    assert tokens.shape[1] == 20 and patches.shape == (4, 2, 16, 16)
    assert patches[1, 1].equal(tokens[4 + 1, 4:])
    run_step(model, [pixels])


def test_parts_of_the_student_are_clipped_apart():
    """`clip_mode: per_module` takes the children: backbone and heads."""
    assert [name for name, _ in SEPARATE.build().student.named_children()] == [
        "backbone",
        "head",
        "patch_head",
    ]
    assert [name for name, _ in TIED.build().student.named_children()] == ["backbone", "head"]


def test_published_backbone_starts_as_the_authors(tmp_path):
    backbone = TIED.build(backbone_config={"hidden_size": 64, "num_register_tokens": 4}).student.backbone
    embeddings = backbone.embeddings
    assert embeddings.cls_token.abs().max() < 1e-5 and embeddings.register_tokens.abs().max() < 1e-5
    assert not embeddings.mask_token.any()
    assert backbone.layers[0].layer_scale1.lambda1.eq(1e-5).all()
    assert embeddings.position_embeddings.std().item() == pytest.approx(0.02, rel=0.1)


# Masks


def test_strata_give_every_step_all_ratios_and_exactly_half_of_the_views_a_mask():
    counts = stratified_counts(64, 196, 0.5, (0.1, 0.5), torch.Generator().manual_seed(0))
    masked = counts[counts > 0].sort().values
    assert len(masked) == 32
    borders = 196 * torch.linspace(0.1, 0.5, 33, dtype=torch.float64)
    for count, low, high in zip(masked.tolist(), borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        assert int(low) <= count <= high
    assert counts[:32].count_nonzero() not in (0, 32)  # dealt at random


def test_blocks_hide_at_most_their_target_and_nearly_all_of_it():
    """Properties of the published generator: at least 0.9 of the target on average, never more."""
    shares = []
    for row in range(300):
        generator = generator_of_row(0, 0, row)
        target = generator.randint(20, 98)
        count = int(block_mask((14, 14), target, 4, 98, generator).sum())
        assert count <= target
        shares.append(count / target)
    assert sum(shares) / len(shares) > 0.9


def test_masks_of_a_step_do_not_depend_on_how_its_rows_are_dealt():
    """Mistake 45."""
    model = TIED.build()
    masks = model.draw_masks(torch.arange(12), 12, (4, 4), seed=(7, 4))
    assert int((masks.sum(2) > 0).sum()) == 12
    torch.manual_seed(1)
    assert model.draw_masks(torch.tensor([11, 2]), 12, (4, 4), seed=(7, 4)).equal(masks[[11, 2]])


def test_a_mask_is_drawn_for_two_views_apart():
    model = TIED.build(mask_probability=1.0, mask_ratio_min=0.5, mask_ratio_max=0.5)
    masks = model.draw_masks(torch.arange(20), 20, (4, 4), seed=(0, 0))
    assert not masks[:, 0].equal(masks[:, 1])


# The anchor


def test_gram_weight_matches_the_authors_schedule(golden):
    for step, expected in enumerate(golden("distill_schedules")["v3_gram_weight"].tolist()):
        assert gram_weight_at(step - 14, 7, 2.0) == pytest.approx(expected, abs=1e-12)
    assert [gram_weight_at(age, 0, 2.0) for age in (-1, 0, 1)] == [0.0, 2.0, 2.0]


def test_anchor_is_taken_stands_still_and_is_refreshed_as_often_as_configured():
    options = {"gram_snapshot": 2, "gram_start": 4, "gram_update_every": 2, "gram_max_updates": 1}
    model = ANCHORED.build(**options)
    name, taken, weights = "layernorm.bias", [], []
    for step in range(10):
        with torch.no_grad():
            dict(model.teacher.backbone.named_parameters())[name].fill_(step)
        model.begin_step(step, 10)
        taken.append(dict(model.anchor.backbone.named_parameters())[name][0].item())
        weights.append(model._gram_weight)
    assert taken == [0, 0, 2, 2, 2, 2, 6, 6, 6, 6]
    assert weights == [0.0] * 4 + [0.5] * 6


def test_loss_has_the_similarities_of_the_anchors_larger_views():
    """Mistake 31: the student's patches are those of its masked view."""
    model = ANCHORED.build(backbone_config={"num_register_tokens": 1}).double()
    pixels = ANCHORED.images(3, dtype=torch.float64)
    large = torch.nn.functional.interpolate(pixels.flatten(0, 1), scale_factor=2).unflatten(0, (3, 2))
    hidden = torch.rand(3, 2, 16, generator=torch.Generator().manual_seed(0)) < 0.4
    model.begin_step(0, 10)
    outputs = model(pixels, bool_masked_pos=hidden, anchor_pixel_values=large)
    expected = []
    for view in range(2):
        student = model.student.backbone(pixels[:, view], bool_masked_pos=hidden[:, view])
        anchor = model.anchor.backbone(large[:, view])
        patches = shrink_patches(anchor.last_hidden_state[:, 2:], (8, 8), (4, 4))
        expected.append(gram_loss(student.last_hidden_state[:, 2:], patches))
    near(outputs.parts["gram"], torch.stack(expected).mean())
    model._gram_weight = 0.0
    near(outputs.loss, model(pixels, bool_masked_pos=hidden).loss + 0.5 * outputs.parts["gram"])


def test_anchor_is_kept_in_a_checkpoint_and_supplied_by_the_teacher_where_it_is_not(tmp_path):
    model = ANCHORED.build()
    with torch.no_grad():
        model.anchor.backbone.layernorm.bias.fill_(3)
        model.teacher.backbone.layernorm.bias.fill_(4)
    model.save_pretrained(tmp_path / "with")
    loaded = type(model).from_pretrained(tmp_path / "with")
    assert loaded.anchor.backbone.layernorm.bias.eq(3).all()
    assert not any(parameter.requires_grad for parameter in loaded.anchor.parameters())
    plain = TIED.build(koleo_weight=0.0)
    plain.save_pretrained(tmp_path / "without")
    started = type(model).from_pretrained(tmp_path / "without", config=model.config)
    for name, value in started.anchor.state_dict().items():
        assert value.equal(plain.teacher.state_dict()[name])


def test_anchor_views_that_are_no_multiple_are_refused():
    model = ANCHORED.build()
    model.begin_step(0, 10)
    with pytest.raises(ValueError, match="anchor views have 5 x 5 patches, the student's 16"):
        model(ANCHORED.images(2), anchor_pixel_values=torch.randn(2, 2, 3, 20, 20))


# Configuration and views


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"centering": "swav"}, "centering must be"),
        ({"num_patch_prototypes": 8}, "needs separate_patch_head=True"),
        ({"patch_bottleneck_size": 8}, "needs separate_patch_head=True"),
        ({"separate_patch_head": True, "normalize_head": True}, "normalize_head needs the tied head"),
        ({"mask_ratio_min": 0.6}, "mask_ratio_min <= mask_ratio_max"),
        ({"mask_probability": 1.5}, r"must be in \[0, 1\]"),
        ({"gram_start": 0.05}, "is before gram_snapshot 0.1"),
        ({"gram_weight": -1.0}, "gram_weight must be >= 0"),
        ({"backbone_config": {"model_type": "hf_ssl_timm"}}, "needs a ViT backbone"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(Exception, match=message):
        DINOv2Config(**options)


def test_views_are_blurred_as_the_released_weights_were_trained():
    """Mistake 40: the published code hands 1 - p to a function that wants p."""
    first, second, local = DINOv2ImageProcessor.default_views(224)
    chances = [
        [step["probability"] for step in view["transforms"] if step["type"] == "gaussian_blur"]
        for view in (first, second, local)
    ]
    assert chances == [[0.0], [0.9], [0.5]] and local["count"] == 8
    assert first["crop"]["scale"] == [0.32, 1.0] and local["crop"]["scale"] == [0.05, 0.32]
