"""Record what VideoLLaMA2's connector computes, composed from timm's own RegStage: tests/golden/stc.safetensors.

    pip install --no-deps --target DIR timm==1.0.31 && PYTHONPATH=DIR python tests/golden/make.py

timm stays out of requirements-dev.txt: it pulls a torchvision that does not match the pinned torch. It imports
torchvision for image transforms only, so mocks stand in for it here.
"""
import importlib.machinery
import sys
from pathlib import Path
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file
from torch import nn


for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.ops",
             "torchvision.ops.misc", "torchvision.datasets", "torchvision.models", "torchvision.models.feature_extraction"):
    sys.modules[name] = MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None))

from timm.layers import LayerNorm2d
from timm.models.regnet import RegStage


class STC(nn.Module):
    """As published: VideoLLaMA2's names, timm's blocks, torch's Conv3d."""

    def __init__(self, c_in: int, width: int, depth: int):
        super().__init__()
        options = dict(stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)
        self.s1 = RegStage(depth=depth, in_chs=c_in, out_chs=width, **options)
        self.sampler = nn.Sequential(nn.Conv3d(width, width, 2, stride=2, padding=1, bias=True), nn.SiLU())
        self.s2 = RegStage(depth=depth, in_chs=width, out_chs=width, **options)
        self.readout = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x):                                       # (B, T, h, w, D)
        b, t = x.shape[:2]
        x = self.s1(x.flatten(0, 1).permute(0, 3, 1, 2)).unflatten(0, (b, t)).transpose(1, 2)
        x = self.sampler(x)
        t = x.shape[2]
        x = self.s2(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (b, t))
        return self.readout(x.permute(0, 1, 3, 4, 2).flatten(1, 3))


def main():
    torch.manual_seed(0)
    stc = STC(24, 32, 2)
    for p in stc.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 4, 5, 6, 24)
    with torch.no_grad():
        y = stc(x)
    tensors = {f"model.mm_projector.{n}": t for n, t in stc.state_dict().items()} | {"input": x, "output": y}
    path = Path(__file__).with_name("stc.safetensors")
    save_file({n: t.contiguous() for n, t in tensors.items()}, path)
    print(f"{path}: {len(tensors)} tensors, {path.stat().st_size / 1000:.0f} kB, output {tuple(y.shape)}, std {float(y.std()):.2f}")


if __name__ == "__main__":
    main()
