"""transformers' `torch_compile` with our trainer: the same steps, and checkpoints without traces of it."""

import pytest
import torch
from safetensors.torch import load_file

from tests.modeling.tiny import BY_NAME

NAMES = ("simclr-vit", "moco-v2", "mocov3-vit", "mae", "dino-vit", "ibot", "dinov2", "ijepa")
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["simclr-vit", "moco-v2", "mocov3-vit", "mae", "dino-vit", "ibot", "dinov2", "ijepa"]
)
def test_compiled_steps_are_the_plain_ones(make_trainer, name):
    torch._dynamo.reset()
    losses, weights = [], []
    for folder, options in (("plain", {}), ("compiled", COMPILED)):
        trainer = make_trainer(name, folder, max_steps=3, logging_steps=1, **options)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        weights.append({key: value.clone() for key, value in trainer.model.state_dict().items()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert not any("_orig_mod" in key for key in weights[1])
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_a_compiled_run_saves_plain_names_and_resumes(make_trainer):
    torch._dynamo.reset()
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **COMPILED}
    whole = make_trainer("moco-v2", "run", **options)
    whole.train()
    saved = load_file(whole.args.output_dir + "/checkpoint-2/model.safetensors")
    assert set(saved) <= set(BY_NAME["moco-v2"].build().state_dict())
    resumed = make_trainer("moco-v2", "run", **options)
    resumed.train(resume_from_checkpoint=whole.args.output_dir + "/checkpoint-2")
    for key, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value), key
