"""What holds for every method: a row of `tests/modeling/tiny.py` gives a method all of it."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining

from hf_ssl.modeling import METHODS
from hf_ssl.modeling.shared.outputs import SSLOutput
from hf_ssl.modeling.shared.pretraining import SSLForPreTraining
from tests.closeness import near
from tests.modeling.tiny import (
    ONE_OF_EACH,
    TINY_METHODS,
    TinyMethod,
    companions,
    gradients,
    run_step,
    training_state,
)


def rows(chosen: list[TinyMethod]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", chosen, ids=lambda row: row.name)


every_row = rows(TINY_METHODS)
every_method = rows(ONE_OF_EACH)
vit_rows = rows([row for row in TINY_METHODS if row.has_vit])
cnn_rows = rows([row for row in TINY_METHODS if not row.has_vit])
teacher_rows = rows([row for row in TINY_METHODS if row.has_teacher])
headed_teacher_rows = rows([row for row in TINY_METHODS if row.teacher_has_head])
queue_rows = rows([row for row in TINY_METHODS if row.method == "moco"])


def fixed_forward(model: SSLForPreTraining, pixels: Tensor) -> SSLOutput:
    """A forward whose masks depend on the rows alone."""
    model.begin_step(0, 10, seed=3)
    batch = {
        model.main_input_name: pixels,
        "row_index": torch.arange(len(pixels)),
        **companions(model, pixels),
    }
    with torch.no_grad():
        model.prepare_step([batch])
    return model(**batch)


def is_batch_norm_state(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def saved_without(model: SSLForPreTraining, folder, is_dropped) -> None:
    """A checkpoint in which tensors are missing."""
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in state.items() if not is_dropped(name)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def assert_same_state(model: torch.nn.Module, other: torch.nn.Module) -> None:
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert_close(value, expected[name], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def undecayed(model: SSLForPreTraining, group: dict) -> set[bool]:
    """For each parameter of a group, whether it is a vector or named as what has no decay."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    group = group["params"]
    return {value.ndim <= 1 or names[id(value)].endswith(model.undecayed) for value in group}


# Construction and gradients


def test_every_method_of_the_table_has_a_row():
    assert {row.method for row in TINY_METHODS} == set(METHODS)


@every_row
def test_trains_every_parameter_but_the_frozen_ones_and_the_teacher(row):
    model = row.build()
    outputs = model(**row.batch(8))
    assert outputs.loss.shape == () and outputs.loss.isfinite() and outputs.loss.dtype == torch.float32
    outputs.loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if name.startswith("teacher."):
            assert not parameter.requires_grad, name
    silent = [name for name, gradient in gradients(model).items() if not gradient.any()]
    # A residual scale that starts at zero silences its block; softmax does not see a constant on all keys.
    assert all(".bn" in name or ".conv" in name or "k_proj.bias" in name for name in silent), silent


@every_row
def test_everything_but_the_loss_is_detached(row):
    outputs = row.build()(**row.batch(8))
    tensors = [outputs.features, outputs.projections, outputs.predictions, outputs.is_masked]
    tensors += [*(outputs.parts or {}).values(), *(outputs.updates or {}).values()]
    assert not any(tensor.requires_grad for tensor in tensors if tensor is not None)


@every_row
def test_every_trainable_parameter_is_in_exactly_one_optimizer_group(row):
    model = row.build()
    groups = model.parameter_groups(weight_decay=0.1)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trainable)
    for group in groups:
        assert undecayed(model, group) == {group["weight_decay"] == 0} == {group["exclude_from_adaptation"]}


@every_row
def test_rates_by_layer_are_those_of_the_backbone_and_heads_keep_theirs(row):
    model = row.build()
    if not row.has_vit:
        with pytest.raises(ValueError, match="need a ViT backbone"):
            model.parameter_groups(0.1, layer_decay=0.5)
        return
    rates = {}
    for group in model.parameter_groups(0.1, layer_decay=0.5, patch_embedding_multiplier=0.1):
        assert undecayed(model, group) == {group["weight_decay"] == 0}
        rates |= {id(parameter): group["lr_multiplier"] for parameter in group["params"]}
    trainable = dict(model.trainable_parameters())
    assert rates.keys() == {id(parameter) for parameter in trainable.values()}
    for name, parameter in trainable.items():
        within = name.removeprefix("student.backbone.")
        power = 0 if within == name or within.startswith(("layernorm.", "shared_")) else 3  # two blocks
        if within.startswith("layers."):
            power = 2 - int(within.split(".")[1])
        factor = 0.1 if within.startswith("embeddings.patch_embeddings.") else 1
        assert rates[id(parameter)] == pytest.approx(factor * 0.5**power), name


@teacher_rows
def test_teacher_starts_equal_to_the_student_but_shares_no_memory_with_it(row):
    model = row.build()
    student = model.student.state_dict()
    for name, value in model.teacher.state_dict().items():
        assert_close(value, student[name], rtol=0, atol=0)
        assert value.data_ptr() != student[name].data_ptr(), name


@every_row
def test_expectations_are_numbers(row):
    assert all(isinstance(value, float) and value >= 0 for value in row.build().expectations().values())


# Purity


@every_row
def test_forward_changes_no_state_and_repeats_itself(row):
    model = row.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = fixed_forward(model, row.images(8)).loss
    between = {name: value.clone() for name, value in model.state_dict().items()}
    assert_close(fixed_forward(model, row.images(8)).loss, first, rtol=0, atol=1e-6)
    # begin_step moved the teacher by a rounding error at most, since it equals the student.
    for name, value in between.items():
        if not is_batch_norm_state(name):
            assert_close(
                value, before[name], rtol=0, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
            )


@every_row
def test_forward_in_eval_mode_changes_nothing_at_all(row):
    model = row.build().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model(**row.batch(8))
    for name, value in model.state_dict().items():
        assert_close(value, before[name], rtol=0, atol=0)


# Saving and loading


@every_row
def test_a_saved_run_loads_to_the_same_state_outputs_and_frozen_parameters(row, tmp_path):
    model = row.build()
    optimizer = torch.optim.SGD([value for _, value in model.trainable_parameters()], lr=0.1)
    for step in range(2):
        run_step(model, [row.images(8, seed=step)], step, optimize=optimizer.step)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path, device_map="cpu")
    assert type(loaded) is type(model) and not loaded.training
    assert_same_state(loaded, model)
    for (name, mine), (_, theirs) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert mine.requires_grad == theirs.requires_grad, name
    model.eval()
    batch = row.batch(8, seed=5)
    torch.manual_seed(0)
    expected = model(**batch)
    torch.manual_seed(0)
    assert_close(loaded(**batch).loss, expected.loss, rtol=0, atol=0)


@every_method
def test_a_run_resumed_from_disk_continues_bit_for_bit(row, tmp_path):
    """Teacher, queue and pointer are in the checkpoint; nothing that matters is kept elsewhere."""

    def train(model: SSLForPreTraining, steps: range) -> None:
        model.train()
        for step in steps:
            for parameter in model.parameters():
                parameter.grad = None
            optimizer = torch.optim.SGD([value for _, value in model.trainable_parameters()], lr=0.1)
            run_step(model, [row.images(8, seed=step)], step, optimize=optimizer.step)

    model = row.build()
    train(model, range(2))
    model.save_pretrained(tmp_path)
    train(model, range(2, 4))
    resumed = type(model).from_pretrained(tmp_path)
    train(resumed, range(2, 4))
    assert_same_state(resumed, model)


@teacher_rows
def test_teacher_and_queue_stay_float32_when_loaded_in_half_precision(row, tmp_path):
    model = row.build()
    run_step(model, [row.images(8)])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert next(loaded.student.parameters()).dtype == torch.bfloat16
    kept = training_state(loaded)
    assert all(value.dtype in (torch.float32, torch.int64) for value in kept.values())
    for name, value in training_state(model).items():
        assert_close(kept[name], value, rtol=0, atol=0)


@teacher_rows
def test_a_teacher_copied_while_loading_in_half_precision_is_float32(row, tmp_path):
    saved_without(row.build(), tmp_path, lambda name: name.startswith("teacher."))
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    assert {parameter.dtype for parameter in loaded.teacher.parameters()} == {torch.float32}
    run_step(loaded, [row.images(8)])


@every_row
def test_a_model_loaded_in_half_precision_runs(row, tmp_path):
    model = row.build()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    half, full = fixed_forward(loaded, row.images(8)).loss, fixed_forward(model, row.images(8)).loss
    assert half.dtype == torch.float32
    assert_close(half, full, rtol=0.1, atol=0.1)


@every_row
def test_auto_model_reads_the_published_branch_from_a_run_without_a_warning(row, tmp_path, caplog):
    model = row.build()
    run_step(model, [row.images(8)])
    model.save_pretrained(tmp_path)
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    try:
        encoder, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert type(encoder) is METHODS[row.method].model_class
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert_same_state(encoder.backbone, model.published_branch().backbone)


@every_row
def test_an_encoder_alone_is_refused_because_heads_are_missing_and_names_one(row, tmp_path):
    row.build_encoder().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"lacks .*(head|predictor|queue|center|decoder|similarity).*allow_new_heads=True"
    ):
        AutoModelForPreTraining.from_pretrained(tmp_path)


@every_row
def test_an_encoder_alone_starts_both_branches_and_says_so(row, tmp_path, caplog):
    encoder = row.build_encoder(seed=7)
    encoder.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="hf_ssl"):
        model = METHODS[row.method].pretraining_class.from_pretrained(tmp_path, allow_new_heads=True)
    assert_same_state(model.student.backbone, encoder.backbone)
    assert "started fresh" in caplog.text
    assert model.has_teacher == row.has_teacher
    if model.has_teacher:
        other = {"student": "teacher", "teacher": "student"}[row.published]
        text = f"the checkpoint has no {other}; it starts as a copy of the {row.published}"
        assert text in caplog.text
        student = model.student.state_dict()
        for name, value in model.teacher.state_dict().items():  # heads too: a foreign key head never aligns
            assert_close(value, student[name], rtol=0, atol=0)
            assert value.data_ptr() != student[name].data_ptr()
    assert fixed_forward(model.train(), row.images(8)).loss.isfinite()


@teacher_rows
def test_a_checkpoint_with_a_student_alone_needs_no_permission(row, tmp_path, caplog):
    model = row.build()
    run_step(model, [row.images(8)])
    saved_without(model, tmp_path, lambda name: name.startswith("teacher."))
    with caplog.at_level(logging.WARNING, logger="hf_ssl"):
        loaded = type(model).from_pretrained(tmp_path)
    assert "no teacher" in caplog.text
    assert_same_state(loaded.student, model.student)
    student = model.student.state_dict()
    for name, value in loaded.teacher.state_dict().items():
        assert_close(value, student[name], rtol=0, atol=0)


@headed_teacher_rows
@pytest.mark.parametrize("lost", ["teacher.head.", "student.head."])
def test_a_lost_head_is_refused_and_with_permission_copied_from_the_other_branch(row, lost, tmp_path):
    model = row.build()
    run_step(model, [row.images(8)])
    saved_without(model, tmp_path, lambda name: name.startswith(lost))
    with pytest.raises(ValueError, match=lost.replace(".", r"\.")):
        type(model).from_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, allow_new_heads=True)
    assert_same_state(loaded.student.head, loaded.teacher.head)
    assert_same_state(loaded.teacher.backbone, model.teacher.backbone)


@queue_rows
def test_a_lost_queue_is_refused_and_with_permission_starts_with_random_unit_keys(row, tmp_path):
    model = row.build()
    saved_without(model, tmp_path, lambda name: name.startswith("queue."))
    with pytest.raises(ValueError, match="queue"):
        type(model).from_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, allow_new_heads=True)
    near(loaded.queue.keys.norm(dim=1), torch.ones(64), 1e-5)
    assert loaded.queue.position.tolist() == [0]


# Initialisation


def has_fixed_positions(model: SSLForPreTraining, name: str) -> bool:
    module = model.get_submodule(name.rpartition(".")[0])
    return any(parameter is module.position_embeddings for parameter in module.frozen_parameters)


@every_row
def test_tensors_missing_from_a_checkpoint_start_as_in_a_fresh_model(row, tmp_path):
    """`from_pretrained` builds on the meta device: nothing of `__init__` survives, raw memory would."""
    fresh = row.build(seed=1)
    saved_without(fresh, tmp_path, lambda name: name != "student.backbone.embeddings.cls_token")
    torch.manual_seed(2)
    loaded = type(fresh).from_pretrained(tmp_path, allow_new_heads=True)
    state = loaded.state_dict()
    for name, expected in fresh.state_dict().items():
        value = state[name]
        assert value.isfinite().all(), name
        if expected.numel() < 2 or expected.double().std() == 0 or is_batch_norm_state(name):
            assert_close(value, expected, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
        elif name.endswith("position_embeddings") and has_fixed_positions(fresh, name):
            assert_close(value, expected, rtol=0, atol=0)
        else:
            ratio = (value.double().square().mean() / expected.double().square().mean()).sqrt().item()
            assert ratio == pytest.approx(1, abs=5 / expected.numel() ** 0.5), name
    if loaded.has_teacher:
        student = loaded.student.state_dict()
        assert all(value.equal(student[name]) for name, value in loaded.teacher.state_dict().items())


@every_row
def test_only_the_missing_tensors_are_started_anew(row, tmp_path):
    model = row.build()
    run_step(model, [row.images(8)])
    dropped = [name for name in model.state_dict() if name.endswith(("bias", "cls_token", "conv1.weight"))]
    saved_without(model, tmp_path, lambda name: name in dropped)
    loaded = type(model).from_pretrained(tmp_path, allow_new_heads=True)
    state = loaded.state_dict()
    for name, value in model.state_dict().items():
        if name not in dropped:
            assert_close(state[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


# Learning


@every_row
def test_twenty_steps_on_32_fixed_images_lower_the_loss(row):
    model = row.build()
    pixels = row.images(32)
    # Until the queue of 64 holds real keys, or the centre is one, the loss of a fresh model is too low.
    for step in range(20 if hasattr(model, "center") else 2):
        run_step(model, [pixels], step)
    optimizer = torch.optim.AdamW(model.parameter_groups(weight_decay=0.05), lr=3e-3)
    losses = []
    for step in range(20):
        optimizer.zero_grad()
        losses.append(run_step(model, [pixels], step, total_steps=20, optimize=optimizer.step))
    assert sum(losses[-3:]) / 3 < 0.97 * sum(losses[:3]) / 3, losses


# Precision, checkpointing, attention


@every_row
def test_loss_under_bfloat16_autocast_is_float32_and_close(row):
    model = row.build()
    pixels = row.images(8)
    full = fixed_forward(model, pixels).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = fixed_forward(model, pixels).loss
    assert half.dtype == torch.float32
    assert_close(half, full, rtol=0.05, atol=0.05)
    half.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def compare_results(one: tuple, other: tuple, tolerance: float = 1e-9) -> None:
    near(torch.tensor(one[0], dtype=torch.float64), torch.tensor(other[0], dtype=torch.float64), tolerance)
    for mine, theirs in zip(one[1:], other[1:], strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert_close(
                value,
                theirs[name],
                rtol=tolerance,
                atol=tolerance,
                msg=lambda text, name=name: f"{name}: {text}",
            )


@vit_rows
def test_activation_checkpointing_gives_equal_gradients(row):
    results = []
    for enabled in (False, True):
        model = row.build().double()
        if enabled:
            model.activation_checkpointing_enable()
        loss = run_step(model, [row.images(8, dtype=torch.float64)])
        results.append(([loss], gradients(model), training_state(model)))
    compare_results(*results, tolerance=1e-12)


@rows([row for row in ONE_OF_EACH])
def test_eager_and_sdpa_attention_agree_in_all_branches(row):
    losses = []
    for implementation in ("eager", "sdpa"):
        model = row.build().double()
        model.set_attn_implementation(implementation)
        used = {layer.config._attn_implementation for layer in model.modules() if hasattr(layer, "is_causal")}
        assert used == {implementation}
        losses.append(fixed_forward(model, row.images(8, dtype=torch.float64)).loss)
    # transformers' text towers take the softmax of eager attention in float32.
    near(losses[0], losses[1], 1e-6 if hasattr(model, "text_tower") else 1e-12)


# The encoder


@vit_rows
@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24), (32, 20)])
def test_encoder_takes_any_height_and_width_that_are_multiples_of_the_patch(row, height, width):
    encoder = row.build_encoder()
    outputs = encoder(torch.randn(2, 3, height, width))
    num_tokens = encoder.config.backbone_config.num_prefix_tokens + height * width // 16
    assert outputs.last_hidden_state.shape == (2, num_tokens, 16) and outputs.pooler_output.shape == (2, 16)


@cnn_rows
def test_cnn_encoder_returns_a_map_and_its_mean(row):
    outputs = row.build_encoder()(torch.randn(2, 3, 24, 16))
    assert outputs.last_hidden_state.shape == (2, 16, 3, 2)
    near(outputs.pooler_output, outputs.last_hidden_state.mean(dim=(2, 3)), 1e-6)


@every_row
@pytest.mark.parametrize("num_channels", [1, 5])
def test_other_channel_counts_train_and_encode(row, num_channels):
    model = row.build(backbone_config={"num_channels": num_channels})
    shape = list(row.images(4).shape)
    shape[-3] = num_channels
    pixels = torch.randn(shape)
    assert model(pixels, **companions(model, pixels)).loss.isfinite()
    encoder = row.build_encoder(backbone_config={"num_channels": num_channels})
    assert encoder(torch.randn(2, num_channels, 16, 16)).pooler_output.shape == (2, 16)


@every_row
def test_encoder_returns_a_tuple_on_request(row):
    encoder, pixels = row.build_encoder(), torch.randn(2, 3, 16, 16)
    outputs = encoder(pixels)
    features, pooled = encoder(pixels, return_dict=False)
    assert features.equal(outputs.last_hidden_state) and pooled.equal(outputs.pooler_output)


@every_row
def test_encoder_returns_hidden_states(row):
    encoder, pixels = row.build_encoder(), torch.randn(2, 3, 16, 16)
    outputs = encoder(pixels, output_hidden_states=True)
    plain = encoder(pixels)
    assert_close(outputs.last_hidden_state, plain.last_hidden_state)
    if row.has_vit:
        num_tokens = encoder.config.backbone_config.num_prefix_tokens + 16
        assert [state.shape for state in outputs.hidden_states] == [
            (2, num_tokens, 16)
        ] * 3  # input, two blocks
        assert_close(encoder.backbone.layernorm(outputs.hidden_states[-1]), plain.last_hidden_state)
    else:
        assert_close(outputs.hidden_states[-1], plain.last_hidden_state)
    assert plain.hidden_states is None


@vit_rows
def test_encoder_returns_attention_weights_when_eager_and_refuses_otherwise(row):
    encoder, pixels = row.build_encoder(), torch.randn(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r'set_attn_implementation\("eager"\)'):
        encoder(pixels, output_attentions=True)
    encoder.set_attn_implementation("eager")
    weights = encoder(pixels, output_attentions=True).attentions
    num_tokens = encoder.config.backbone_config.num_prefix_tokens + 16
    assert [weight.shape for weight in weights] == [(2, 2, num_tokens, num_tokens)] * 2
    for weight in weights:
        near(weight.sum(dim=-1), torch.ones(2, 2, num_tokens), 1e-5)


# The processor


@every_method
def test_processor_travels_with_its_views(row, tmp_path):
    processor = METHODS[row.method].processor_class.for_image_size(32)
    assert processor.views
    processor.save_pretrained(tmp_path)
    row.config().save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(processor)
    assert loaded.views == processor.views and loaded.size == processor.size


@every_method
def test_views_are_what_the_view_maker_takes_and_as_many_as_the_method_wants(row):
    from hf_ssl.data.clips import make_view_maker

    for image_size in (32, 96):
        maker = make_view_maker(METHODS[row.method].processor_class.default_views(image_size))
        wanted = ("global", "clip")
        sizes = [size for size, kind in zip(maker.sizes, maker.kinds, strict=True) if kind in wanted]
        assert sizes == [image_size] * max(row.num_views, 1)
