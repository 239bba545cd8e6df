"""Training steps on one GPU beside lightly's, and beside the bare backbone's forward and backward.

    python benchmarks/speed_gpu.py [--rounds 5] [--only "MAE ViT-B/16" ...]

All in bfloat16 autocast on random images of 224 pixels, no data path. "bare backbone" is our backbone's
forward on the crops that the student sees, and backward from the sum of its pooled features; no teacher, no
heads, no optimizer. A figure is the time of several steps between two waits for the device, in turn with the
others; memory is the peak of a step above weights and optimizer state.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from interleaved import Part, interleave, peak_memory, timing_rows
from speed_steps import LIGHTLY, Run, lightly_loop, protocol_step
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hf_ssl.modeling import METHODS  # noqa: E402

RESNET = {"model_type": "hf_ssl_timm", "architecture": "resnet50"}
VIT_S = {"model_type": "hf_ssl_vit", "hidden_size": 384, "num_attention_heads": 6}
SETTINGS: dict[str, dict[str, Any]] = {
    "SimCLR ResNet-50": {"method": "simclr", "batch": 128, "backbone_config": RESNET},
    "MoCo v2 ResNet-50, K = 65536": {"method": "moco", "batch": 128, "backbone_config": RESNET},
    "MAE ViT-B/16": {"method": "mae", "batch": 256, "backbone_config": None},
    "DINO ViT-S/16, K = 65536": {"method": "dino", "batch": 64, "backbone_config": VIT_S},
}
STEPS = 3  # of one measurement
NUM_LOCAL_VIEWS = 8


def config_of(name: str) -> Any:
    """Our configuration of a setting: the method's defaults, with its backbone."""
    setting = SETTINGS[name]
    return METHODS[setting["method"]].config_class(backbone_config=setting["backbone_config"])


def views_of(name: str) -> dict[str, Tensor]:
    """Random images as the trainer hands them over."""
    method, batch = SETTINGS[name]["method"], SETTINGS[name]["batch"]
    images = torch.randn(2, batch, 3, 224, 224, device="cuda").transpose(0, 1)
    if method == "mae":
        return {"pixel_values": images[:, 0].contiguous()}
    if method != "dino":
        return {"pixel_values": images}
    local = torch.randn(NUM_LOCAL_VIEWS, batch, 3, 96, 96, device="cuda").transpose(0, 1)
    return {"pixel_values": images, "local_pixel_values": local}


def our_model(name: str, compiled: bool = False) -> Any:
    """Our pre-training model on the GPU."""
    model = METHODS[SETTINGS[name]["method"]].pretraining_class(config_of(name)).train().cuda()
    if SETTINGS[name]["backbone_config"] is RESNET:
        model.to(memory_format=torch.channels_last)
    if compiled:
        for branch in [model.student, model.teacher] if model.has_teacher else [model.student]:
            branch.backbone.compile()
    return model


def our_step(name: str, compiled: bool = False) -> Run:
    """The step protocol, as `SSLTrainer` drives it."""
    return protocol_step(our_model(name, compiled), "adamw", views_of(name), bf16=True, device="cuda")


def bare_backbone(name: str) -> Run:
    """Forward and backward of the student's backbone alone, on all crops of one size together."""
    backbone = our_model(name).student.backbone
    crops = [v.transpose(0, 1).flatten(0, 1) if v.ndim == 5 else v for v in views_of(name).values()]

    def run() -> None:
        for images in crops:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                features = backbone(images).pooler_output
            features.float().sum().backward()
        backbone.zero_grad()

    return run


def lightly_step(name: str) -> Run:
    """lightly's parts in the order of its examples, with torch's default AdamW."""
    method = SETTINGS[name]["method"]
    model = LIGHTLY[method](config_of(name)).train().cuda()
    if SETTINGS[name]["backbone_config"] is RESNET:
        model.to(memory_format=torch.channels_last)
    views = [
        v for batch in views_of(name).values() for v in (batch.unbind(1) if batch.ndim == 5 else [batch])
    ]
    return lightly_loop(model, "adamw", views, bf16=True, device="cuda")


def timed(run: Run) -> Run:
    """Several steps, and the wait for the device."""

    def repeat() -> None:
        for _ in range(STEPS):
            run()
        torch.cuda.synchronize()

    return repeat


def candidates_of(name: str, compiled: bool) -> dict[str, Callable[[], Run]]:
    """What makes each candidate; MAE's backbone sees a quarter of the image only inside its own step."""
    sides = {"lightly": partial(lightly_step, name), "ours": partial(our_step, name)}
    if compiled:
        sides["ours, compiled"] = partial(our_step, name, compiled=True)
    if SETTINGS[name]["method"] != "mae":
        sides["bare backbone"] = partial(bare_backbone, name)
    return sides


def measure(name: str, rounds: int, compiled: bool) -> tuple[list[str], dict[str, Any]]:
    """Table and raw figures of one setting."""
    runs = {candidate: timed(make()) for candidate, make in candidates_of(name, compiled).items()}
    timings = interleave(runs, reference="lightly", rounds=rounds, clock=time.perf_counter, warm_up=2)
    memory = {candidate: peak_memory(run) for candidate, run in runs.items()}
    rows = timing_rows(timings, STEPS * SETTINGS[name]["batch"], "images")
    cells = ["MiB", "---", *(f"{memory[candidate]:,.0f}" for candidate in timings)]
    data = {"seconds": {c: timing.seconds for c, timing in timings.items()}, "memory": memory}
    del runs
    gc.collect()
    torch.cuda.empty_cache()
    return [f"{row} {cell} |" for row, cell in zip(rows, cells, strict=True)], data


def main() -> None:
    """Time all settings and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--compile", action="store_true", help="also with compiled backbones; takes minutes")
    parser.add_argument("--output", type=Path, help="instead of benchmarks/results/speed_gpu.md")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("speed_gpu.py needs an NVIDIA GPU; speed_steps.py is its counterpart for CPUs")
    body = [f"{torch.cuda.get_device_name()}. " + " ".join((__doc__ or "").split("\n\n")[2].split())]
    data: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    part = Part("speed_gpu", "Training steps on a GPU", "speed_gpu.py", body, [], {"settings": data})
    for name in options.only:
        torch.manual_seed(0)
        rows, data[name] = measure(name, options.rounds, options.compile)
        body += ["", f"## {name}, batch {SETTINGS[name]['batch']}", "", *rows]
        part.write(options.output)  # after each, so that a machine lent for minutes leaves what it did


if __name__ == "__main__":
    main()
