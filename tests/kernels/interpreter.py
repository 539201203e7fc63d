"""The Triton kernels run on the CPU by Triton's interpreter and compared with the float64 formula.

    pytest tests/kernels/interpreter.py

What this proves: the arithmetic, in float32 and float16. What it cannot: bfloat16 (the interpreter multiplies its bit
patterns), races, speed. Not collected by name: TRITON_INTERPRET must be set before the kernels are made, and a wrong
offset reads the memory of the process (tests/test_kernels.py starts it as a process of its own).
"""
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [str(Path(__file__).parents[level]) for level in (2, 1, 0)]

import pytest
import torch

import cases
import descriptors
import model

SMALL = dict.fromkeys(("forward", "dq", "dkdv"), (32, 32, 4, 1))
PLAIN_CASES = [case for case in cases.CASES if "long" not in case]          # those take minutes each
LIMIT = {torch.float32: 1e-5, torch.float16: 5e-3}      # of absolute error; inputs are N(0, 1)


def use_small_tiles(monkeypatch):
    """The few tokens that an interpreter can afford span many of them."""
    for table in ("TILES", "FLOAT32_TILES"):
        monkeypatch.setattr(model, table, dict.fromkeys(model.TILES, SMALL))


@pytest.fixture(params=["small tiles", "shipped tiles"])
def tiles(request, monkeypatch):
    if request.param == "small tiles":
        use_small_tiles(monkeypatch)
    return request.param


def errors(case, dtype, head_dim):
    ours, truth = (cases.run_case(case, backend, "cpu", dtype, head_dim) for backend in ("triton", "reference"))
    assert all(t.dtype == dtype for t in ours)
    return {name: float((a.double() - b).abs().max())
            for name, a, b in zip(("o", "dq", "dk", "dv"), ours, truth) if len(b)}


@pytest.mark.parametrize("dtype, head_dim", [(torch.float32, 32), (torch.float16, 64)])
@pytest.mark.parametrize("case", PLAIN_CASES)
def test_kernels_equal_the_formula(case, dtype, head_dim, tiles):
    found = errors(case, dtype, head_dim)
    print(case, dtype, head_dim, tiles, found)
    assert all(error <= LIMIT[dtype] for error in found.values()), found


@pytest.mark.parametrize("dtype", LIMIT)
def test_head_dim_128(dtype):
    found = errors("ragged, grouped, causal", dtype, 128)
    assert all(error <= LIMIT[dtype] for error in found.values()), found


def test_one_query_and_no_keys(monkeypatch):
    """Decoding on caches of 70, 1 and 0 keys; the last answers zero and learns nothing."""
    monkeypatch.setitem(cases.CASES, "decode", ((1, 1, 1), (70, 1, 0), 4, 2, True, None))
    found = errors("decode", torch.float32, 32)
    assert all(error <= 1e-5 for error in found.values()), found
    out, dq, dk, dv = cases.run_case("decode", "triton", "cpu", torch.float32, 32)
    assert (out[2] == 0).all() and (dq[2] == 0).all()


@pytest.mark.parametrize("dtype, head_dim", [(torch.float32, 32), (torch.float16, 64), (torch.float16, 128)])
@pytest.mark.parametrize("case", [*PLAIN_CASES, "nothing to see"])
def test_the_second_form_equals_the_formula(case, dtype, head_dim, monkeypatch):
    """With descriptors and the scale in the exponent (descriptors.py); a case takes one tile size, in turn."""
    monkeypatch.setitem(cases.CASES, "nothing to see", ((3, 40), (0, 0), 2, 1, True, None))
    monkeypatch.setattr(model, "triton_kernels", descriptors.triton_kernels)
    if head_dim != 64:
        use_small_tiles(monkeypatch)
    found = errors(case, dtype, head_dim)
    print("second form:", case, dtype, head_dim, found)
    assert all(error <= LIMIT[dtype] for error in found.values()), found


@pytest.mark.parametrize("window", [None, 1, 31, 32, 33, 200])
def test_tile_edges(window, monkeypatch):
    """Diagonal and window cross tiles of 32 in all phases: keys ahead of the queries by 0, 1, 31 and 61."""
    use_small_tiles(monkeypatch)
    monkeypatch.setitem(cases.CASES, "edges", ((70, 66, 33, 40), (70, 67, 64, 101), 2, 1, True, window))
    found = errors("edges", torch.float32, 32)
    assert all(error <= 1e-5 for error in found.values()), found


def test_a_scale_of_our_own_reaches_all_gradients():
    q, k, v, do = (torch.randn(20, 2, 32) for _ in range(4))
    seg, results = model.Segments.packed((20,)), []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = model.attention(*leaves, seg, causal=True, scale=0.31, backend=backend)
        results.append((out, *torch.autograd.grad(out, leaves, do)))
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-5)


def test_reruns_are_bit_equal_and_strides_do_not_matter():
    one, two = (cases.run_case("new queries on a cache, window", "triton", "cpu", torch.float32, 32) for _ in range(2))
    assert all(map(torch.equal, one, two))
    packed = torch.randn(30, 3, 2, 32)                          # q, k, v as slices of one tensor
    seg, qkv = model.Segments.packed((11, 19)), packed.unbind(1)
    sliced = model.attention(*qkv, seg, causal=True, backend="triton")
    assert torch.equal(sliced, model.attention(*(t.contiguous() for t in qkv), seg, causal=True, backend="triton"))


def test_the_kernels_are_one_operator_to_what_computes_again(monkeypatch):
    """`cheap` keeps the kernel's result, so its forward runs once; `blocks` runs it again. The gradients are the same bits."""
    import bench
    toy = replace(model.PRESETS["toy"], frames=2, vit_layers=2, layers=1)
    monkeypatch.setitem(model.PRESETS, "toy", toy)
    monkeypatch.setenv("EXO2EGO_ATTENTION", "triton")
    launched, launch = [], model.launch
    monkeypatch.setattr(model, "launch", lambda kernel, *rest: launched.append(kernel) or launch(kernel, *rest))
    batch, results = bench.make_batch(1, toy, clips=1, text=(8, 9)), []
    for recompute, forwards in (("none", 1), ("cheap", 1), ("blocks", 2)):
        launched.clear()
        objective, trained, _ = bench.our_objective(1, "toy", "--recompute", recompute)
        loss = objective(batch, float(batch.weights.sum()), batch.samples)["loss"]
        results.append(torch.autograd.grad(loss, list(trained.values())))
        layers = len(objective.model.exo_vit.blocks) + len(objective.model.decoder.blocks)
        assert launched.count("forward") == layers * forwards
        assert launched.count("dq") == launched.count("dkdv") == layers
    for kept, *again in zip(*results, strict=True):
        assert all(torch.equal(kept, other) for other in again)
