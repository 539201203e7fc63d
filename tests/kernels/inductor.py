"""`--compile`: torch.compile of the blocks gives the same losses and gradients, and does not compile anew for every batch.

    pytest tests/kernels/inductor.py

Not collected by name: it needs a C++ compiler, and generated code can end the process it runs in.
"""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

import bench
from model import PRESETS, autocast


def objective(stage, *more):
    result, _, run = bench.our_objective(stage, "toy", *more)
    torch.manual_seed(1)
    for name, p in result.named_parameters():                   # no layer may start as the identity
        if "bn.weight" in name or "lora_b" in name:
            torch.nn.init.normal_(p, 0.1, 0.1)
    return result, run


def gradients(stage, batch, *more, made=None):
    result, run = made or objective(stage, *more)
    result.zero_grad()
    with autocast(run.device, run.bf16):
        loss = result(batch, float(batch.weights.sum()), batch.samples)["loss"]
    loss.backward()
    return torch.cat([loss.detach().float()[None], *(p.grad.flatten() for p in result.parameters() if p.grad is not None)])


def worst(stage, batch, more, fast):
    """Distance of compiled losses and gradients to float32's, over what is allowed: 1e-4 of them, or in bfloat16 half more
    than the eager blocks are away."""
    exact, plain = gradients(stage, batch), gradients(stage, batch, *more)
    assert len(exact) == len(plain) == len(fast)
    return (fast - exact).norm() / max(1e-4 * exact.norm(), 1.5 * (plain - exact).norm())


@pytest.mark.parametrize("stage, more", [(2, ()), (3, ("--recompute", "blocks", "--dtype", "bfloat16"))])
def test_compiled_blocks_equal_eager_ones(stage, more):
    torch.compiler.reset()
    first, second, third = (bench.make_batch(stage, PRESETS["toy"], clips=4, text=text) for text in ((8, 30), (11, 47), (20, 60)))
    made = objective(stage, "--compile", *more)
    assert worst(stage, first, more, gradients(stage, first, made=made)) < 1
    gradients(stage, second, made=made)                         # lengths are symbols from here on
    with torch.compiler.set_stance("fail_on_recompile"):        # other lengths, the same code
        fast = gradients(stage, third, made=made)
    assert worst(stage, third, more, fast) < 1
