"""Gradient caching gives the gradients of the whole batch at the memory of a micro-batch.

`tests/modeling/test_invariance.py` compares it with one large batch, in one process and in two; here is what
a large batch cannot be compared with: random layers, BatchNorm by micro-batches, precision, memory.
"""

import functools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from hf_ssl.modeling.shared.pretraining import SSLForPreTraining
from hf_ssl.training.gradient_caching import backward_through_cache, cut
from hf_ssl.training.recipes import known_keys
from hf_ssl.training.summary import describe_run
from hf_ssl.training.trainer import SSLTrainer
from tests.closeness import near
from tests.modeling.tiny import BY_NAME, ONE_OF_EACH, TINY_METHODS, TinyMethod, gradients

MakeTrainer = Callable[..., SSLTrainer]
VIT = BY_NAME["simclr-vit"]
DROP_PATH = {"backbone_config": {"drop_path_rate": 0.5}}
COUPLED = [row for row in TINY_METHODS if row.build().loss_couples_the_batch]


def with_whole_graph(model: SSLForPreTraining, pixels: Tensor, size: int) -> Tensor:
    """Loss and gradients of the same micro-batches, whose graphs are all kept until the loss."""
    pieces = [model(piece, embed_only=True).embeddings for piece in pixels.split(size)]
    joined = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    loss = model.loss_from_embeddings(joined).loss
    assert loss is not None
    loss.backward()
    return loss.detach()


def cached(model: SSLForPreTraining, pixels: Tensor, size: int, **options: Any) -> Tensor:
    outputs = backward_through_cache(model, model, cut({"pixel_values": pixels}, size), **options)
    assert outputs.loss is not None and not outputs.loss.requires_grad
    return outputs.loss


def assert_same_gradients(model: nn.Module, other: nn.Module, tolerance: float = 1e-9) -> None:
    mine, theirs = gradients(model), gradients(other)
    assert mine.keys() == theirs.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in mine.items():
        near(gradient, theirs[name], tolerance)


# Equality


@pytest.mark.parametrize("row", COUPLED, ids=lambda row: row.name)
def test_forward_of_a_coupled_loss_is_its_two_halves(row):
    model = row.build().double()
    batch = row.batch(8, dtype=torch.float64)
    embeddings = model(**batch, embed_only=True).embeddings
    assert all(len(value) == 8 and value.requires_grad for value in embeddings.values())
    assert_close(model.loss_from_embeddings(embeddings).loss, model(**batch).loss, rtol=0, atol=0)
    assert model(**batch).embeddings is None  # which would keep the graph of a step alive


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_gradients_are_those_of_the_whole_graph_with_random_layers(size: int):
    """Drop path draws anew in every forward; the second one of a micro-batch must draw the same."""
    pixels = VIT.images(16, dtype=torch.float64)
    losses, models, then = [], [], []
    for run in (with_whole_graph, cached):
        model = VIT.build(**DROP_PATH).double()
        torch.manual_seed(5)
        losses.append(run(model, pixels, size))
        models.append(model)
        then.append(torch.rand(1))
    near(losses[0], losses[1])
    assert_same_gradients(*models)
    assert torch.equal(*then)  # the next step draws on, not again


def test_one_micro_batch_is_the_plain_step_to_the_bit():
    pixels = VIT.images(8)
    plain, model = VIT.build(**DROP_PATH), VIT.build(**DROP_PATH)
    torch.manual_seed(5)
    expected = plain(pixels).loss
    expected.backward()
    torch.manual_seed(5)
    assert torch.equal(cached(model, pixels, 8), expected.detach())
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradient, gradients(model)[name]), name


def test_drop_path_of_the_second_forward_matters():
    """The test above would see a forgotten random state."""
    pixels = VIT.images(16, dtype=torch.float64)
    expected, model = VIT.build(**DROP_PATH).double(), VIT.build(**DROP_PATH).double()
    torch.manual_seed(5)
    with_whole_graph(expected, pixels, 4)
    torch.manual_seed(5)

    def draw(*args: Any) -> None:
        if torch.is_grad_enabled():
            torch.rand(1)

    model.register_forward_pre_hook(draw)
    cached(model, pixels, 4)
    with pytest.raises(AssertionError):
        assert_same_gradients(model, expected)


def test_loss_scale_reaches_every_gradient_once():
    pixels = VIT.images(8, dtype=torch.float64)
    model, scaled = VIT.build().double(), VIT.build().double()
    loss = cached(model, pixels, 4)
    near(cached(scaled, pixels, 4, scale=lambda loss: 1024 * loss), loss)
    for name, gradient in gradients(scaled).items():
        near(gradient / 1024, gradients(model)[name])


def test_only_the_last_backward_is_averaged():
    entered: list[str] = []

    class NoSync:
        def __enter__(self) -> None:
            entered.append("no_sync")

        def __exit__(self, *args: Any) -> None:
            entered.append("left")

    model = VIT.build()
    model.register_forward_hook(lambda *args: entered.append("graph") if torch.is_grad_enabled() else None)
    cached(model, VIT.images(6), 2, no_sync=NoSync)
    assert entered == ["no_sync", "graph", "left"] * 2 + ["graph"]


# BatchNorm


def batch_norm_state(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in model.state_dict().items()
        if name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }


def test_ghost_batch_norm_tracks_every_micro_batch_once():
    """Two forwards of a micro-batch, one update; the head's norms see the whole batch once."""
    row = BY_NAME["simclr-cnn"]
    pixels = row.images(16, dtype=torch.float64)
    expected, model = row.build().double(), row.build().double()
    near(cached(model, pixels, 4), with_whole_graph(expected, pixels, 4))
    assert_same_gradients(model, expected)
    state = batch_norm_state(model)
    for name, value in batch_norm_state(expected).items():
        near(state[name], value)
    counts = {name: int(value) for name, value in state.items() if name.endswith("tracked")}
    assert {count for name, count in counts.items() if ".backbone." in name} == {4}
    assert {count for name, count in counts.items() if ".head." in name} == {1}


def test_batch_norm_of_the_backbone_is_refused_or_said_aloud(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
):
    options = {"per_device_train_batch_size": 8, "cached_microbatch_size": 4}
    with pytest.raises(ValueError, match="normalises by 4 images instead of 8.*cached_batch_norm=ghost"):
        make_trainer("simclr-cnn", **options)
    trainer = make_trainer("simclr-cnn", cached_batch_norm="ghost", max_steps=2, **options)
    assert "ghost BatchNorm" in caplog.text and "4 images at a time, not by 8" in caplog.text
    trainer.train()
    assert int(trainer.model.state_dict()["student.backbone.network.bn1.num_batches_tracked"]) == 4


# Precision and compilation


def test_autocast_errs_no_more_than_in_the_plain_step():
    """Weights that autocast had kept from the first forward would have no graph in the second."""
    autocast = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    full, plain, model, pixels = VIT.build(), VIT.build(), VIT.build(), VIT.images(8)
    full(pixels).loss.backward()
    with autocast():
        expected = plain(pixels).loss
    expected.backward()
    assert cached(model, pixels, 2, autocast=autocast).dtype == torch.float32

    def all_gradients(of: nn.Module) -> Tensor:
        return torch.cat([gradient.flatten() for gradient in gradients(of).values()])

    error, usual = (
        (all_gradients(of) - all_gradients(full)).norm() / all_gradients(full).norm() for of in (model, plain)
    )
    assert 0 < error < 1.2 * usual


@pytest.mark.parametrize(
    "option",
    [
        {"bf16": True},
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, marks=pytest.mark.slow),
    ],
    ids=["bf16", "compiled"],
)
def test_training_with_one_cached_micro_batch_is_plain_training(make_trainer: MakeTrainer, option):
    states = []
    for folder, size in (("plain", None), ("cached", 4)):
        trainer = make_trainer("simclr-vit", folder, max_steps=2, cached_microbatch_size=size, **option)
        trainer.train()
        states.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
    assert_close(states[1], states[0], rtol=0, atol=0)


@pytest.mark.slow
def test_compiled_micro_batches_train_like_plain_ones(make_trainer: MakeTrainer):
    states = []
    for folder, option in (("plain", {}), ("compiled", {"torch_compile_backend": "aot_eager"})):
        trainer = make_trainer("simclr-vit", folder, max_steps=2, cached_microbatch_size=2, **option)
        trainer.train()
        assert hasattr(trainer.model_wrapped, "_orig_mod") == bool(option)
        states.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
    assert_close(states[1], states[0], rtol=0, atol=1e-6)


# The trainer


def test_resumed_run_with_random_layers_equals_the_uninterrupted_one_bit_for_bit(make_trainer: MakeTrainer):
    options = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 4,
        "per_device_train_batch_size": 8,
        "cached_microbatch_size": 2,
    }

    def make() -> SSLTrainer:
        trainer = make_trainer("simclr-vit", **options)
        for layer in trainer.model.student.backbone.layers:  # type: ignore
            layer.drop_path.rate = 0.3
        return trainer

    whole = make()
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(Path(str(whole.args.output_dir)) / "checkpoint-4"))
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


def test_log_and_description_are_those_of_the_whole_batch(make_trainer: MakeTrainer):
    options = {"max_steps": 1, "per_device_train_batch_size": 8, "logging_steps": 1}
    logs = []
    for size in (None, 2):
        trainer = make_trainer("simclr-vit", cached_microbatch_size=size, **options)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], abs=1e-3)
    assert logs[0]["projection_std"] == pytest.approx(logs[1]["projection_std"], abs=1e-3)

    class Recipe:
        method, name = "simclr", "tiny"

    assert "8 per device x 1, cached 2 at a time" in describe_run(Recipe(), trainer)  # type: ignore


@pytest.mark.parametrize("row", [row for row in ONE_OF_EACH if row not in COUPLED], ids=lambda row: row.name)
def test_methods_that_need_no_cache_refuse_it_in_one_line(make_trainer: MakeTrainer, row: TinyMethod):
    with pytest.raises(ValueError, match="has no use for cached_microbatch_size.*global_batch_size") as error:
        make_trainer(row.name, cached_microbatch_size=2)
    assert "\n" not in str(error.value)


def test_options_are_among_the_keys_that_the_command_line_lists():
    assert {"cached_microbatch_size", "cached_batch_norm"} <= set(known_keys("simclr")["training"])


def test_micro_batches_of_one_image_hold_no_negatives_or_statistics(make_trainer: MakeTrainer):
    with pytest.raises(ValueError, match="cached_microbatch_size must be at least 2, got 1"):
        make_trainer("simclr-vit", cached_microbatch_size=1)


# Memory


def peak_of_saved_bytes(run: Callable[[], object]) -> int:
    """Most bytes that autograd held at once."""
    held, peak = 0, 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def release(size: int) -> None:
        nonlocal held
        held -= size

    def pack(tensor: Tensor) -> Saved:
        nonlocal held, peak
        saved, size = Saved(tensor), tensor.numel() * tensor.element_size()
        held += size
        peak = max(peak, held)
        weakref.finalize(saved, release, size)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        run()
    return peak


def test_memory_of_the_graph_does_not_grow_with_the_batch():
    peaks: dict[tuple[int, bool], int] = {}
    for count in (16, 128):
        pixels = VIT.images(count)
        model = VIT.build()
        peaks[count, True] = peak_of_saved_bytes(functools.partial(cached, model, pixels, 8))
        peaks[count, False] = peak_of_saved_bytes(lambda: model(pixels).loss.backward())  # noqa: B023
    assert peaks[128, True] < 1.2 * peaks[16, True]
    assert peaks[128, False] > 7 * peaks[16, False] and peaks[128, False] > 7 * peaks[128, True]


def test_a_batch_is_cut_by_rows_and_every_input_with_it():
    batch = {"pixel_values": torch.arange(6), "row_index": torch.arange(6) + 10}
    pieces = cut(batch, 4)
    assert [piece["pixel_values"].tolist() for piece in pieces] == [[0, 1, 2, 3], [4, 5]]
    assert [piece["row_index"].tolist() for piece in pieces] == [[10, 11, 12, 13], [14, 15]]
