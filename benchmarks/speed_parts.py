"""Parts of a step beside lightly's and torch's: teacher, optimizer, losses, drop path; one thread, float32.

python benchmarks/speed_parts.py [--rounds 7]
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from interleaved import Part, interleave, speedup_gate
from lightly.loss import DINOLoss, NTXentLoss
from lightly.models import utils
from prototypes import TEACHER_TEMPERATURE, chunked
from report_files import table
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hf_ssl.modeling.shared.backbone import build_backbone
from hf_ssl.modeling.shared.centering import PrototypeCenter
from hf_ssl.modeling.shared.configuration import SSLViTConfig
from hf_ssl.modeling.shared.losses import queue_contrastive_loss
from hf_ssl.modeling.shared.teacher import update_teacher
from hf_ssl.training.optimizers import build_optimizer

Runs = dict[str, Callable[[], Any]]
VIT_SMALL = {"hidden_size": 384, "num_attention_heads": 6}
VIT_TINY = {"hidden_size": 192, "num_attention_heads": 3}
NUM_PROTOTYPES, NUM_VIEWS, NUM_IMAGES, WIDTH = 65536, 10, 16, 256


def teacher() -> Runs:
    """Momentum update of a ViT-S."""
    student = build_backbone(SSLViTConfig(**VIT_SMALL))
    teachers = [copy.deepcopy(student) for _ in range(3)]

    @torch.no_grad()
    def loop() -> None:
        for own, other in zip(teachers[2].parameters(), student.parameters(), strict=True):
            own.data = own.data * 0.99 + other.data * 0.01

    return {
        "lightly": lambda: utils.update_momentum(student, teachers[0], m=0.99),
        "ours": lambda: update_teacher(teachers[1], student, 0.99),
        "a loop": loop,
    }


def optimizer() -> Runs:
    """AdamW on a ViT-S."""
    models = [build_backbone(SSLViTConfig(**VIT_SMALL)) for _ in range(2)]
    for model in models:
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
    default = torch.optim.AdamW(models[0].parameters(), lr=1e-4, foreach=False, fused=False)
    ours = build_optimizer("adamw", [{"params": list(models[1].parameters())}], 1e-4)
    return {"torch's loop": default.step, "ours": ours.step}


def queue() -> Runs:
    """Loss and gradient among a queue of 65,536 keys, 256 queries."""
    query, key = (F.normalize(torch.randn(256, 128), dim=1) for _ in range(2))
    keys = F.normalize(torch.randn(NUM_PROTOTYPES, 128), dim=1)
    bank = NTXentLoss(temperature=0.2, memory_bank_size=(NUM_PROTOTYPES, 128))
    bank(query, key)  # makes the bank
    bank.memory_bank.bank = keys.T.contiguous() if bank.memory_bank.bank.shape[0] == 128 else keys

    def lightly() -> Tensor:
        own = query.clone().requires_grad_()
        loss = bank(own, key)
        loss.backward()
        return loss.detach()

    def ours() -> Tensor:
        own = query.clone().requires_grad_()
        loss = queue_contrastive_loss(own, key, keys, 0.2)
        loss.backward()
        return loss.detach()

    return {"lightly": lightly, "ours": ours}


def prototypes() -> Runs:
    """Last layer and loss of DINO, 65,536 prototypes, ten views of 16 images, from bottleneck vectors on."""
    student = F.normalize(torch.randn(NUM_VIEWS, NUM_IMAGES, WIDTH), dim=-1)
    teacher_ = F.normalize(torch.randn(2, NUM_IMAGES, WIDTH), dim=-1)
    layers = [nn.utils.weight_norm(nn.Linear(WIDTH, NUM_PROTOTYPES, bias=False)) for _ in range(2)]
    for layer in layers:
        layer.weight_g.data.fill_(1)
        layer.weight_g.requires_grad = False
    criterion = DINOLoss(NUM_PROTOTYPES, student_temp=0.1)
    center = PrototypeCenter(NUM_PROTOTYPES)
    weight, other = (layer.weight_v.detach() for layer in layers)

    def lightly() -> Tensor:
        rows = student.clone().requires_grad_()
        layers[0].weight_v.grad = None
        criterion.center.zero_()
        with torch.no_grad():
            targets = [layers[1](view) for view in teacher_]
        loss = criterion(targets, [layers[0](view) for view in rows], teacher_temp=TEACHER_TEMPERATURE)
        loss.backward()
        return loss.detach()

    def ours() -> Tensor:
        rows, own = student.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = chunked(rows, teacher_, own, other, center)
        loss.backward()
        return loss.detach()

    return {"lightly": lightly, "ours": ours}


def drop_path() -> Runs:
    """Forward and backward of a ViT-Ti/16 with a drop path of 0.3 in every block, batch 8."""
    images = torch.randn(8, 3, 224, 224)
    ours = build_backbone(
        SSLViTConfig(**VIT_TINY, drop_path_rate=0.3, drop_path_uniform=True, image_size=224)
    ).train()
    timm = VisionTransformer(embed_dim=192, num_heads=3, drop_path_rate=0.3, num_classes=0).train()
    for block in timm.blocks:  # its rates rise from 0
        for path in (block.drop_path1, block.drop_path2):
            if hasattr(path, "drop_prob"):
                path.drop_prob = 0.3
    return {
        "timm": lambda: timm.forward_features(images).sum().backward(),
        "ours": lambda: ours(images).last_hidden_state.sum().backward(),
    }


PARTS: dict[str, tuple[Callable[[], Runs], dict[str, float]]] = {
    "momentum teacher, ViT-S": (teacher, {"lightly": 1.5, "a loop": 3.0}),
    "AdamW, ViT-S": (optimizer, {"torch's loop": 4.0}),
    "queue loss, K = 65,536": (queue, {"lightly": 1.8}),
    "prototypes and loss, K = 65,536": (prototypes, {"lightly": 1.5}),
    "drop path 0.3, ViT-Ti": (drop_path, {"timm": 1.4}),
}


def main() -> None:
    """Time all parts and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, gates, data = [], [], {}
    for name, (build, aims) in PARTS.items():
        torch.manual_seed(0)
        runs = build()
        values = [run() for run in runs.values()]
        if isinstance(values[0], Tensor):
            torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-4)
        timings = interleave(runs, reference=next(iter(runs)), rounds=options.rounds)
        data[name] = {side: timing.seconds for side, timing in timings.items()}
        for side, timing in timings.items():
            rows.append([name, side, f"{1000 * timing.median:.1f}", f"{timing.speedup:.2f}"])
        gates += [speedup_gate(name, timings, peer, aim) for peer, aim in aims.items()]
    body = ["One thread, float32; forward and backward.", "", *table(["part", "", "ms", "ratio"], rows)]
    Part("speed_parts", "Parts of a step", "speed_parts.py", body, gates, {"seconds": data}).write()


if __name__ == "__main__":
    main()
