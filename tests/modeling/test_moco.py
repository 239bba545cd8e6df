"""MoCo v1 and v2 against the authors' class, and the mistakes that its state invites."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_ssl.modeling.moco import MoCoConfig, MoCoForPreTraining, MoCoImageProcessor, MoCoModel
from hf_ssl.modeling.shared.distributed import convert_batchnorm
from hf_ssl.modeling.shared.heads import MLPHead
from hf_ssl.modeling.shared.pretraining import Branch
from hf_ssl.training.recipes import load_recipe
from tests.closeness import near
from tests.modeling.tiny import BY_NAME, TINY_VIT, gradients, run_step


class AuthorsBackbone(nn.Module):
    """`lin -> bn -> relu` of the tiny encoder that the golden values were written with."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 7, bias=False)
        self.bn = nn.BatchNorm1d(7)

    def forward(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=self.bn(self.lin(pixel_values)).relu())


def our_name(name: str, version: str) -> str:
    """Of a tensor of the authors' tiny encoder in our branch."""
    layers = {"fc.weight": "head.layers.0.weight", "fc.bias": "head.layers.0.bias"}
    if version == "v2":
        layers = {
            f"fc.{index}.{kind}": f"head.layers.{index}.{kind}"
            for index in (0, 2)
            for kind in ("weight", "bias")
        }
    return layers.get(name, f"backbone.{name}")


def tensors_under(case: dict[str, Tensor], prefix: str, version: str) -> dict[str, Tensor]:
    found = {name.removeprefix(prefix): value for name, value in case.items() if name.startswith(prefix)}
    return {our_name(name, version): value for name, value in found.items()}


def authors_model(case: dict[str, Tensor], version: str) -> MoCoForPreTraining:
    config = MoCoConfig(
        backbone_config=TINY_VIT,
        projection_head="linear" if version == "v1" else "mlp",
        projection_size=6,
        queue_length=8,
        temperature=0.07,
        teacher_momentum=0.9,
    )
    model = MoCoForPreTraining(config)
    for branch in ("student", "teacher"):
        head = MLPHead(7, 7, 6, 1 if version == "v1" else 2, hidden_norm=False, last_norm="none", bias=True)
        setattr(model, branch, Branch(AuthorsBackbone(), head).double())
        getattr(model, branch).load_state_dict(tensors_under(case, f"{version}_init.", version))
    model.freeze_targets()
    model.double().train()
    model.queue.keys.copy_(case[f"{version}_init_queue"].T)
    return model


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_three_steps_match_the_authors_class(golden, version):
    """Loss, queue, pointer, both encoders with BatchNorm buffers: the teacher moves before it makes keys, the
    queue after the loss, and BatchNorm statistics of the teacher are its own."""
    case = golden("moco")
    model = authors_model(case, version)
    optimizer = torch.optim.SGD(
        model.parameter_groups(1e-4, decay_norms_and_biases=True), lr=0.05, momentum=0.9
    )
    for step in range(3):
        prefix = f"{version}_step{step}."
        pixels = torch.stack([case[f"{prefix}im_q"], case[f"{prefix}im_k"]], dim=1)
        model.begin_step(step, 3)
        optimizer.zero_grad()
        outputs = model_forward(model, pixels)
        near(outputs.loss, case[f"{prefix}loss"])
        near(F.cross_entropy(case[f"{prefix}logits"], torch.zeros(4, dtype=torch.long)), outputs.loss)
        outputs.loss.backward()
        optimizer.step()
        model.end_step([outputs.updates])
        near(model.queue.keys, case[f"{prefix}queue"].T)
        assert model.queue.position.tolist() == case[f"{prefix}ptr"].tolist()
        for branch, encoder in (("student", "encoder_q"), ("teacher", "encoder_k")):
            expected = tensors_under(case, f"{prefix}{encoder}.", version)
            state = getattr(model, branch).state_dict()
            assert state.keys() == expected.keys()
            for name, value in expected.items():
                near(state[name], value)


def model_forward(model: MoCoForPreTraining, vectors: Tensor):
    # The authors' tiny encoder takes vectors; views of images have five dimensions.
    model.student.forward, model.teacher.forward = (flat_branch(model.student), flat_branch(model.teacher))
    return model(vectors[..., None, None])


def flat_branch(branch: Branch):
    return lambda pixel_values: Branch.forward(branch, pixel_values.flatten(1))


def test_split_norm_in_the_student_matches_the_authors_groups(golden):
    case = golden("moco")
    norm = convert_batchnorm(
        nn.BatchNorm1d(3, affine=False).double(), "split", num_splits=int(case["splitbn_splits"])
    )
    near(norm(case["shuffle_x"]), case["splitbn_out"])


# Mistakes


def test_positive_is_not_yet_in_the_queue_when_the_loss_reads_it():
    """Mistake 1: enqueued before the logits, the loss of a perfect match could not fall below ln 2."""
    model = BY_NAME["moco-v2"].build(temperature=0.01)
    images = BY_NAME["moco-v2"].images(8)
    same_view = images[:, :1].expand(-1, 2, -1, -1, -1)
    model.queue.keys.copy_(-model(same_view).updates["keys"][:1].expand(64, -1))  # no key resembles a query
    assert model(same_view).loss < 0.1 < math.log(2)


def test_teacher_moves_first_and_towards_the_student_with_momentum_as_the_old_share():
    """Mistake 3."""
    model = BY_NAME["moco-v2"].build(teacher_momentum=0.75)
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.add_(1.0)
    before = {name: value.clone() for name, value in model.teacher.named_parameters()}
    model.begin_step(1, 10)
    keys = model(BY_NAME["moco-v2"].images(4)).updates["keys"]
    for name, value in model.teacher.named_parameters():
        near(value, 0.75 * before[name] + 0.25 * (before[name] + 1), 1e-6)
    near(keys, model.make_keys(BY_NAME["moco-v2"].images(4)[:, 1]), 1e-6)


def test_the_teachers_head_moves_too():
    """Mistake 4: with a frozen key head the loss stalls near ln(K + 1)."""
    model = BY_NAME["moco-v2"].build()
    with torch.no_grad():
        model.student.head.layers[2].weight.add_(1.0)
    before = model.teacher.head.layers[2].weight.clone()
    model.begin_step(1, 10)
    near(model.teacher.head.layers[2].weight - before, torch.full_like(before, 0.001), 1e-6)


def test_teacher_moves_once_however_often_forward_runs():
    """Mistake 5."""
    model, images = BY_NAME["moco-v2"].build(), BY_NAME["moco-v2"].images(8)
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.add_(1.0)
    before = model.teacher.head.layers[0].bias.clone()
    run_step(model, images.chunk(4), step=1)
    near(model.teacher.head.layers[0].bias - before, torch.full_like(before, 0.001), 1e-6)


def test_teacher_normalises_by_batch_statistics_while_training():
    """Mistake 6: in eval mode it would use statistics that nothing has ever collected."""
    row = BY_NAME["moco-v2-splits"]
    model = row.build()
    assert all(module.training for module in model.teacher.modules())
    norm = model.teacher.backbone.network.bn1
    model(row.images(8))
    assert int(norm.num_batches_tracked) == 1 and norm.running_mean.abs().max() > 0


def test_batch_norm_statistics_of_the_teacher_are_not_copied_by_the_update():
    """Mistake 7."""
    model = BY_NAME["moco-v2-splits"].build()
    model.student.backbone.network.bn1.running_mean.fill_(5.0)
    model.begin_step(1, 10)
    assert not model.teacher.backbone.network.bn1.running_mean.any()


def test_splits_change_the_keys_and_one_split_is_plain_batch_norm():
    """Mistake 8: on one process a permutation alone does nothing; the option does something."""
    row = BY_NAME["moco-v2-splits"]
    keys = {
        splits: row.build(batch_norm_splits=splits)(row.images(8)).updates["keys"] for splits in (1, 2, 4)
    }
    assert (keys[1] - keys[2]).abs().max() > 1e-3 and (keys[2] - keys[4]).abs().max() > 1e-3
    plain = row.build(batch_norm_splits=1)
    assert {type(module) for module in plain.modules() if isinstance(module, nn.BatchNorm2d)} == {
        type(plain.student.backbone.network.bn1)
    }


def test_a_key_stays_with_its_query_after_the_shuffle():
    """Mistake 9: without BatchNorm in the network, shuffled and plain keys are the same (on two processes:
    `test_common.py`, where each has its own random state)."""
    shuffled, plain = (BY_NAME["moco-v2"].build(batch_norm_splits=splits) for splits in (2, 1))
    images = BY_NAME["moco-v2"].images(8)
    near(shuffled.make_keys(images[:, 1]), plain.make_keys(images[:, 1]), 1e-6)


def test_keys_and_queue_are_unit_vectors_along_the_embedding():
    """Mistake 11."""
    model = BY_NAME["moco-v2"].build()
    for step in range(3):
        run_step(model, [BY_NAME["moco-v2"].images(16, seed=step)], step)
    near(model.queue.keys.norm(dim=1), torch.ones(64), 1e-5)


def test_loss_of_a_fresh_queue_is_that_of_its_cosines():
    """Mistakes 16 and 17: cosines, divided by the temperature."""
    model = BY_NAME["moco-v2"].build().double()
    query_view, key_view = BY_NAME["moco-v2"].images(8, dtype=torch.float64).unbind(1)
    query = nn.functional.normalize(model.student(query_view)[1], dim=1)
    key = nn.functional.normalize(model.teacher(key_view)[1], dim=1)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ model.queue.keys.T], dim=1) / 0.2
    loss = model(torch.stack([query_view, key_view], dim=1)).loss
    near(loss, nn.functional.cross_entropy(logits, torch.zeros(8, dtype=torch.long)))


def test_only_the_student_receives_gradients():
    model = BY_NAME["moco-v1"].build()
    model(BY_NAME["moco-v1"].images(8)).loss.backward()
    assert gradients(model) and all(name.startswith("student.") for name in gradients(model))
    assert not model.queue.keys.requires_grad


def test_a_queue_that_the_batch_does_not_divide_is_refused_before_the_first_step():
    """Mistake 49: a shorter last batch would break the ring."""
    model = BY_NAME["moco-v2"].build()
    model.check_global_batch(32)
    with pytest.raises(
        ValueError, match="queue_length 64 is not a multiple of the global batch 24; use queue_length 48"
    ):
        model.check_global_batch(24)


def test_default_is_v2_and_v1_is_a_choice():
    config = MoCoConfig()
    values = (config.projection_head, config.projection_size, config.queue_length, config.temperature)
    assert values == ("mlp", 128, 65536, 0.2) and config.teacher_momentum == 0.999
    model = BY_NAME["moco-v1"].build()
    assert [type(layer) for layer in model.student.head.layers] == [nn.Linear]
    two_layers = BY_NAME["moco-v2"].build().student.head.layers
    assert [type(layer) for layer in two_layers] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(layer.bias is not None for layer in two_layers if isinstance(layer, nn.Linear))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("projection_head", "mpl", "projection_head must be 'linear' .* or 'mlp' .*, got 'mpl'"),
        ("temperature", 0, "temperature must be > 0, got 0"),
        ("teacher_momentum", 1.0, r"teacher_momentum must be in \[0, 1\), got 1.0"),
        ("queue_length", 0, "queue_length"),
    ],
)
def test_values_out_of_range_are_refused(field, value, message):
    with pytest.raises(Exception, match=message):
        MoCoConfig(**{field: value})


def test_a_single_view_is_refused():
    model = BY_NAME["moco-v2"].build()
    with pytest.raises(
        ValueError, match=r"must be \(batch, 2 views, channels, height, width\), got \(4, 3, 16, 16\)"
    ):
        model(torch.zeros(4, 3, 16, 16))


def test_chance_is_the_log_of_all_candidates():
    near(BY_NAME["moco-v2"].build().expectations()["loss_of_chance"], math.log(65), 1e-6)


def test_published_encoder_is_the_student(tmp_path):
    """Mistake 40: evaluating the key encoder by accident."""
    model = BY_NAME["moco-v2"].build()
    with torch.no_grad():
        model.student.backbone.layernorm.weight.fill_(3.0)
    model.save_pretrained(tmp_path)
    encoder = MoCoModel.from_pretrained(tmp_path)
    assert encoder.backbone.layernorm.weight.eq(3).all()


def test_v1_and_v2_views_differ_as_published():
    v1, v2 = load_recipe("moco_v1").processor["views"][0], MoCoImageProcessor.default_views(224)[0]
    assert [step["type"] for step in v1["transforms"]] == ["grayscale", "color_jitter", "horizontal_flip"]
    assert [step["type"] for step in v2["transforms"]] == [
        "color_jitter",
        "grayscale",
        "gaussian_blur",
        "horizontal_flip",
    ]
    assert v1["transforms"][1]["hue"] == 0.4 and v1["transforms"][1]["probability"] == 1.0
    assert v2["transforms"][0]["hue"] == 0.1 and v2["transforms"][0]["probability"] == 0.8


def test_hidden_layer_of_the_head_is_normalised_when_asked():
    for wanted in (False, True):
        model = BY_NAME["moco-v2"].build(normalize_projection=wanted)
        for branch in (model.student, model.teacher):
            assert any(isinstance(layer, nn.BatchNorm1d) for layer in branch.head.layers) == wanted
