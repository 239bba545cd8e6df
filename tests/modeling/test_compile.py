"""torch.compile: the same losses and gradients, and graphs without a break where nothing forces one.

`aot_eager` traces forward and backward as a compiler does and runs them without generated code.
"""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.testing import assert_close

from tests.modeling.tiny import BY_NAME, gradients

# Graph breaks of a forward, and why they stay; docs/speed.md tells users.
BREAKS = {
    "moco-v2-splits": "the shuffle of ShuffleBN is drawn from a generator of its own",
    "dino-vit": "statistics of the targets go through prototypes in chunks",
    "dino-cnn": "statistics of the targets go through prototypes in chunks",
    "beit": "masks are drawn in Python, and as many patches are hidden as they say",
    "ibot": "as many hidden patches as the masks have",
    "ibot-unshared": "as many hidden patches as the masks have",
    "dinov2": "as many hidden patches as the masks have",
    "dinov2-anchored": "as many hidden patches as the masks have",
    "dinov2-sinkhorn": "as many hidden patches as the masks have",
    "dinov2-distilled": "as many hidden patches as the masks have",
    "ijepa": "as many context patches as the masks have",
    "vjepa": "as many context patches as the masks have",
    "ijepa-random-l2": "as many context patches as the masks have",
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def loss_and_gradients(model, forward, batch):
    model.zero_grad()
    torch.manual_seed(1)
    loss = forward(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_a_compiled_forward_has_the_loss_and_gradients_of_the_plain_one(name):
    row = BY_NAME[name]
    model = row.build().train()
    batch = {**row.batch(4), "row_index": torch.arange(4)}
    model.begin_step(0, 10)
    model.prepare_step([batch])
    expected = loss_and_gradients(model, model.forward, batch)
    compiled = torch.compile(model.forward, backend="aot_eager")
    assert_close(loss_and_gradients(model, compiled, batch), expected, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] >= 1
    assert bool(counters["graph_break"]) == (name in BREAKS), dict(counters["graph_break"])


@pytest.mark.parametrize("name", ["simclr-vit", "simclr-cnn"])
def test_an_encoder_is_one_graph(name):
    """As with all methods, whose encoders are these two: blocks have no break at any size of crop."""
    model = BY_NAME[name].build().train()
    backbone = torch.compile(model.student.backbone, backend="aot_eager", fullgraph=True)
    for side in (16, 32):
        backbone(torch.randn(2, 3, side, side)).last_hidden_state.sum().backward()


def test_only_methods_that_exist_are_excused():
    assert set(BREAKS) <= set(BY_NAME)
