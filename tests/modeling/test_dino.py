"""DINO: one whole step against the authors' rules, and the mistakes of its section."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModel

from hf_ssl.modeling.dino import DINOConfig, DINOForPreTraining, DINOImageProcessor
from hf_ssl.modeling.shared.losses import koleo_loss
from hf_ssl.modeling.shared.teacher import linear_warmup, num_steps, update_teacher
from tests.closeness import near
from tests.distributed import run_processes
from tests.modeling.tiny import BY_NAME, companions, gradients, run_step

VIT, CNN = BY_NAME["dino-vit"], BY_NAME["dino-cnn"]


def moved(model: DINOForPreTraining) -> DINOForPreTraining:
    """Teacher and student apart, and a centre that is not 0."""
    generator = torch.Generator().manual_seed(9)
    for parameter in model.teacher.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.05 * noise.to(parameter.dtype)
    model.center.value.copy_(torch.linspace(-0.3, 0.3, len(model.center.value)))
    return model


def logits(model: DINOForPreTraining, branch: str, view: Tensor) -> Tensor:
    side = getattr(model, branch)
    return side(view)[1] @ F.normalize(side.head.prototypes.weight_v, dim=1).T


# The loss


def test_loss_is_that_of_algorithm_1_with_local_crops():
    """Mistakes 4, 5, 6, 33: every view against the teacher's other view, temperatures once each."""
    model = moved(VIT.build(koleo_weight=0.0).double())
    pixels = VIT.images(5, dtype=torch.float64)
    local = companions(model, pixels)["local_pixel_values"]
    views = [*pixels.unbind(1), *local.unbind(1)]
    targets = [
        ((logits(model, "teacher", view) - model.center.value) / 0.04).softmax(-1) for view in views[:2]
    ]
    terms = [
        -(target * (logits(model, "student", view) / 0.1).log_softmax(-1)).sum(-1).mean()
        for own, target in enumerate(targets)
        for place, view in enumerate(views)
        if place != own
    ]
    assert len(terms) == 6
    near(model(pixels, local).loss, torch.stack(terms).mean())


def test_view_order_pairs_views_of_one_image():
    """Mistake 33: with views that repeat one image each, a wrong pairing would mix the images."""
    model = moved(VIT.build(koleo_weight=0.0).double())
    image = VIT.images(4, dtype=torch.float64)[:, :1]
    together = model(image.expand(-1, 2, -1, -1, -1)).loss
    pairs = [model(image[index : index + 2].expand(-1, 2, -1, -1, -1)).loss for index in (0, 2)]
    near(together, torch.stack(pairs).mean())


def test_student_sees_local_crops_and_the_teacher_does_not():
    """Mistake 6."""
    model = VIT.build()
    seen: dict[str, list[Any]] = {"student": [], "teacher": []}
    for branch, shapes in seen.items():
        getattr(model, branch).backbone.register_forward_pre_hook(
            lambda _, inputs, shapes=shapes: shapes.append(tuple(inputs[0].shape))
        )
    pixels = VIT.images(4)
    model(pixels, **companions(model, pixels))
    assert seen == {"student": [(8, 3, 16, 16), (8, 3, 8, 8)], "teacher": [(8, 3, 16, 16)]}


def test_head_runs_once_on_all_views():
    """Its BatchNorm would otherwise have other statistics."""
    model = CNN.build()
    pixels = CNN.images(3)
    model(pixels, **companions(model, pixels))
    norm = next(module for module in model.student.head.modules() if hasattr(module, "running_mean"))
    assert int(norm.num_batches_tracked) == 1


def test_separate_batch_norm_treats_every_view_as_a_batch_of_its_own():
    """Loss and running statistics are those of passes view by view; joined views give others."""
    plain = {"koleo_weight": 0.0, "train_prototype_scale": False}
    model = moved(CNN.build(separate_batch_norm=True, **plain).double())
    pixels = CNN.images(4, dtype=torch.float64)
    local = companions(model, pixels)["local_pixel_values"]
    views = [*pixels.unbind(1), *local.unbind(1)]
    outputs = model(pixels, local)
    norm = next(module for module in model.student.modules() if hasattr(module, "running_mean"))
    assert int(norm.num_batches_tracked) == len(views)
    targets = [
        ((logits(model, "teacher", view) - model.center.value) / 0.04).softmax(-1) for view in views[:2]
    ]
    scores = [(logits(model, "student", view) / 0.1).log_softmax(-1) for view in views]
    terms = [
        -(target * score).sum(-1).mean()
        for own, target in enumerate(targets)
        for place, score in enumerate(scores)
        if place != own
    ]
    near(outputs.loss, torch.stack(terms).mean())
    joined = moved(CNN.build(**plain).double())(pixels, local)
    assert (joined.loss - outputs.loss).abs() > 1e-4


def test_koleo_spreads_each_global_view_of_the_backbone_on_its_own():
    """Mistake 28: of features before the head, never across views, where the other view is the neighbour."""
    pixels = VIT.images(4, dtype=torch.float64)
    outputs = VIT.build().double()(pixels)
    model = VIT.build().double()
    features = [model.student.backbone(view).pooler_output for view in pixels.unbind(1)]
    spread = sum(koleo_loss(view, group_size=2) for view in features)
    plain = VIT.build(koleo_weight=0.0).double()(pixels)
    near(outputs.loss, plain.loss + 0.1 * spread)
    near(outputs.parts["koleo"], spread)


# The step


def test_centre_and_teacher_move_after_the_loss_in_the_authors_order():
    """Mistakes 1, 2, 10: the centre by the teacher that made the targets, then the teacher by the student."""
    model = moved(VIT.build(teacher_momentum=0.9, teacher_momentum_end=0.9).double())
    pixels = VIT.images(4, dtype=torch.float64)
    center = model.center.value.clone()
    raw = torch.cat([logits(model, "teacher", view) for view in pixels.unbind(1)])
    teacher, student = (
        {name: value.clone() for name, value in branch.named_parameters()}
        for branch in (model.teacher, model.student)
    )

    def optimize() -> None:
        for value in model.student.parameters():
            value.data.add_(0.01)

    loss = run_step(model, [pixels], optimize=optimize)
    near(model.center.value, 0.9 * center + 0.1 * raw.mean(0))
    for name, value in model.teacher.named_parameters():
        near(value, 0.9 * teacher[name] + 0.1 * (student[name] + 0.01))
    other = moved(VIT.build().double())
    near(loss, other(pixels, **companions(other, pixels)).loss.item())


def test_teacher_follows_the_authors_over_three_steps(golden):
    """Mistake 10: the momentum is the share of the old teacher."""
    case = golden("dino")
    teacher, student = torch.nn.Linear(4, 5, bias=False), torch.nn.Linear(4, 5, bias=False)
    teacher.weight.data, student.weight.data = case["ema_teacher0"].clone(), case["ema_student"][0].clone()
    for step in range(3):
        student.weight.data = case["ema_student"][step]
        update_teacher(teacher, student, case["ema_momentum"][step].item())
        near(teacher.weight, case["ema_teacher"][step])


def test_schedules_match_the_authors(golden):
    """Temperature: both ends of the warm-up included; per epoch in DINO's code, per iteration in DINOv2's."""
    for step, expected in enumerate(golden("dino")["teacher_temp_schedule"].tolist()):
        assert linear_warmup(step, 2, 0.04, 0.07) == pytest.approx(expected, abs=1e-12)
    case = golden("distill_schedules")
    for step, expected in enumerate(case["v2_teacher_temp"].tolist()):
        assert linear_warmup(step, 21, 0.04, 0.07) == pytest.approx(expected, abs=1e-12)
    model = VIT.build(teacher_momentum=0.996)
    for step, expected in enumerate(case["dino_momentum"].tolist()):
        model.begin_step(step, 70)
        assert model._teacher_momentum == pytest.approx(expected, abs=1e-12)


def test_durations_below_one_are_shares_of_the_run():
    assert (num_steps(0.1, 500), num_steps(30, 500), num_steps(0, 500), num_steps(1, 500)) == (50, 30, 0, 1)


def test_temperature_of_a_step_is_the_schedules(golden):
    model = VIT.build(teacher_temperature=0.07, teacher_temperature_warmup=0.4)
    for step, expected in enumerate(golden("dino")["teacher_temp_schedule"].tolist()):
        model.begin_step(step, 5)
        model.prepare_step([{"pixel_values": VIT.images(2)}])
        assert model._class_targets.targets.temperature == pytest.approx(expected)


def test_gradients_are_clipped_tensor_by_tensor_as_the_authors(golden):
    """Mistake 12: a global norm gives other values."""
    case = golden("dino")
    for name in ("a", "b", "last"):
        parameter = torch.nn.Parameter(torch.zeros_like(case[f"clip_in_{name}"]))
        parameter.grad = case[f"clip_in_{name}"].clone()
        torch.nn.utils.clip_grad_norm_([parameter], 3.0)
        near(parameter.grad, case[f"clip_out_{name}"])
    assert not torch.equal(case["clip_out_b"], case["globalclip_out_b"])


def test_prototypes_stand_still_at_the_start_and_train_later():
    """Mistake 13: they are in the optimizer from the start and keep `requires_grad`."""
    model = VIT.build(freeze_prototypes=2)
    weight = model.student.head.prototypes.weight_v
    optimizer = torch.optim.AdamW(model.parameter_groups(0.5), lr=0.1)
    values = [weight.detach().clone()]
    for step in range(3):
        optimizer.zero_grad()
        run_step(model, [VIT.images(4, seed=step)], step, optimize=optimizer.step)
        values.append(weight.detach().clone())
    assert weight.requires_grad and values[1].equal(values[0]) and values[2].equal(values[0])
    assert not values[3].equal(values[2])


def test_teacher_is_never_trained_and_not_in_the_optimizer():
    """Mistake 7."""
    model = VIT.build()
    run_step(model, [VIT.images(4)])
    assert all(not name.startswith("teacher.") for name in gradients(model))
    grouped = {id(value) for group in model.parameter_groups(0.1) for value in group["params"]}
    assert not grouped & {id(value) for value in model.teacher.parameters()}


def test_groups_are_the_authors():
    """Mistakes 15 and 16: tokens, positions and g decay, vectors do not."""
    model = VIT.build(train_prototype_scale=True)
    decayed, plain = model.parameter_groups(0.1)
    names = {id(value): name.removeprefix("student.") for name, value in model.trainable_parameters()}
    with_decay = {names[id(value)] for value in decayed["params"]}
    assert {
        "backbone.embeddings.cls_token",
        "backbone.embeddings.position_embeddings",
        "head.prototypes.weight_g",
        "head.prototypes.weight_v",
    } <= with_decay
    assert all(
        name.endswith("bias") or "layernorm" in name for name in names.values() if name not in with_decay
    )


# The teacher


def test_teacher_has_no_drop_path_in_training():
    """Mistake 8."""
    model = VIT.build(backbone_config={"drop_path_rate": 0.5})
    pixels = VIT.images(8)
    assert model.class_vectors(pixels).equal(model.class_vectors(pixels))
    assert not model(pixels).loss.equal(model(pixels).loss)


def test_teachers_batch_norm_takes_the_statistics_of_the_batch_in_training_alone():
    model = CNN.build()
    norms = [module for module in model.teacher.modules() if hasattr(module, "running_mean")]
    assert all(norm.training for norm in norms) and not model.teacher.training
    assert not any(module.training for module in model.eval().teacher.modules())


def test_update_leaves_the_teachers_statistics_to_its_own_forwards():
    """Mistake 11."""
    model = CNN.build()
    run_step(model, [CNN.images(4)])
    norm = model.teacher.backbone.network.bn1
    assert int(norm.num_batches_tracked) == 1  # one pass over both views
    assert not norm.running_mean.equal(model.student.backbone.network.bn1.running_mean)


def test_published_encoder_is_the_teacher(tmp_path):
    """Mistake 39."""
    model = moved(VIT.build())
    model.save_pretrained(tmp_path)
    encoder = AutoModel.from_pretrained(tmp_path)
    pixels = VIT.images(2)[:, 0]
    assert_close(encoder(pixels).pooler_output, model.eval().teacher.backbone(pixels).pooler_output)
    assert not torch.allclose(encoder(pixels).pooler_output, model.student.backbone(pixels).pooler_output)


# Accumulation and processes


def test_centre_covers_all_micro_batches_once():
    """Mistake 3 within a process: four micro-batches move it as one batch does."""
    pixels = VIT.images(8, dtype=torch.float64)
    centers = []
    for pieces in ([pixels], list(pixels.chunk(4))):
        model = moved(VIT.build().double())
        run_step(model, pieces)
        centers.append(model.center.value)
    near(centers[0], centers[1])


def three_steps(num_micro_batches: int) -> tuple[list[float], dict[str, Tensor]]:
    """Steps with an optimizer on this process's rows; gradients are averaged as in data-parallel training."""
    import torch.distributed as dist

    started = dist.is_initialized()
    rank, count = (dist.get_rank(), dist.get_world_size()) if started else (0, 1)
    model = moved(VIT.build(freeze_prototypes=1, teacher_momentum=0.5).double())
    optimizer = torch.optim.SGD([value for _, value in model.trainable_parameters()], lr=0.1)
    losses = []
    for step in range(3):
        pixels = VIT.images(16, seed=step, dtype=torch.float64)
        blocks = pixels.chunk(num_micro_batches * count)[rank::count]

        def optimize() -> None:
            for value in model.student.parameters():
                if started and value.grad is not None:
                    dist.all_reduce(value.grad)
                    value.grad /= count
            optimizer.step()

        optimizer.zero_grad()
        loss = torch.tensor(
            run_step(model, blocks, step, optimize=optimize, rank=rank, num_processes=count),
            dtype=torch.float64,
        )
        if started:
            dist.all_reduce(loss)
        losses.append((loss / count).item())
    return losses, {name: value.clone() for name, value in model.state_dict().items()}


def test_training_is_the_same_on_two_processes_with_two_micro_batches_each():
    """Mistakes 3 and 41: loss, student, teacher and centre over three steps."""
    losses, state = three_steps(1)
    for other_losses, other in run_processes(three_steps, 2):
        near(torch.tensor(other_losses, dtype=torch.float64), torch.tensor(losses, dtype=torch.float64))
        for name, value in other.items():
            near(value, state[name])


# Configuration, views, expectations


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_temperature": 0.1}, "must be below student_temperature"),
        ({"teacher_temperature": 0.0}, "teacher_temperature must be > 0"),
        ({"num_prototypes": 0}, "num_prototypes must be at least 1"),
        ({"teacher_momentum": 1.1}, r"must be in \[0, 1\]"),
        ({"koleo_weight": -1.0}, "koleo_weight must be >= 0"),
        ({"separate_batch_norm": True}, "no effect on a ViT whose head has no BatchNorm; set normalize_head"),
        ({"freeze_prototype": 1}, "the nearest is 'freeze_prototypes'"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(Exception, match=message):
        DINOConfig(**options)


def test_groups_of_koleo_that_the_batch_does_not_have_are_refused_before_the_first_step():
    with pytest.raises(ValueError, match="koleo_group_size 2 does not divide the global batch 7"):
        VIT.build().check_global_batch(7)
    VIT.build().check_global_batch(8)
    with pytest.raises(Exception, match="koleo_group_size must be at least 2, got 1"):
        DINOConfig(koleo_group_size=1)


def test_default_is_the_authors_small_vit():
    backbone = DINOConfig().backbone_config
    assert (backbone.hidden_size, backbone.num_attention_heads, backbone.layer_norm_eps) == (384, 6, 1e-6)
    assert backbone.intermediate_size == 1536 and backbone.drop_path_rate == 0.1


def test_views_are_two_different_global_ones_and_small_local_ones():
    """The blur of the paper: always, rarely with solarisation, half of the local views."""
    first, second, local = DINOImageProcessor.default_views(224)
    chances = [
        {step["type"]: step["probability"] for step in view["transforms"]} for view in (first, second, local)
    ]
    assert [chance["gaussian_blur"] for chance in chances] == [1.0, 0.1, 0.5]
    assert ["solarize" in chance for chance in chances] == [False, True, False]
    assert [(view["size"], view["count"], view["kind"]) for view in (first, second, local)] == [
        (224, 1, "global"),
        (224, 1, "global"),
        (96, 8, "local"),
    ]
    assert first["crop"]["scale"] == [0.4, 1.0] and local["crop"]["scale"] == [0.05, 0.4]
    small = DINOImageProcessor.default_views(32)
    assert small[2]["size"] == 16
    assert not any(step["type"] == "gaussian_blur" for view in small for step in view["transforms"])


def test_loss_of_unrelated_branches_starts_near_its_expectation():
    """ln K + 1 / (2 d T^2): logits are cosines of random directions."""
    torch.manual_seed(0)
    model = VIT.build(num_prototypes=4096, head_bottleneck_size=256, koleo_weight=0.0)
    vectors = F.normalize(torch.randn(64, 256), dim=1)
    model.teacher.head.forward = lambda features: F.normalize(torch.randn(len(features), 256), dim=1)
    model.student.head.forward = lambda features: vectors[: len(features)]
    loss = model(VIT.images(16)).loss.item()
    expected = model.expectations()
    assert expected["loss_at_start"] == pytest.approx(math.log(4096) + 0.195, abs=1e-3)
    assert loss == pytest.approx(expected["loss_at_start"], abs=0.3)


def test_targets_of_an_earlier_step_are_forgotten():
    model = VIT.build()
    run_step(model, [VIT.images(8)])
    assert model._class_targets is None
    model.begin_step(1, 10)
    assert model(VIT.images(4), row_index=torch.arange(4)).loss.isfinite()
