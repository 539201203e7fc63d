"""Kinds of attention case that a kernel must get right: tests/kernels/interpreter.py and tests/gpu.py run them all."""
import torch

from model import Segments, attention

# queries and keys of each segment, heads, kv_heads, causal, window
CASES = {
    "ragged, grouped, causal": ((150, 5, 64), (150, 5, 64), 6, 2, True, None),
    "new queries on a cache, window": ((8, 1, 140), (170, 3, 175), 2, 2, True, 16),
    "more queries than keys": ((140, 7), (17, 0), 2, 1, True, None),
    "ragged, bidirectional": ((137, 5, 64, 0), (137, 50, 70, 3), 2, 2, False, None),
    "long, causal": ((1000, 700), (1000, 700), 6, 2, True, None),
    "long, bidirectional": ((577, 577), (577, 577), 2, 2, False, None)}


def run_case(case, backend, device, dtype, head_dim):
    """Output and the three gradients of one of CASES, on inputs rounded to dtype; "reference" computes in float64 on the CPU."""
    q_lens, k_lens, heads, kv_heads, causal, window = CASES[case]
    rng, shapes = torch.Generator().manual_seed(0), [(sum(q_lens), heads)] + [(sum(k_lens), kv_heads)] * 2
    q, k, v = (torch.randn(*shape, head_dim, generator=rng).to(dtype) for shape in shapes)
    do = torch.randn(q.shape, generator=rng).to(dtype)
    if backend == "reference":
        device, (q, k, v, do) = "cpu", (t.double() for t in (q, k, v, do))
    leaves = [t.to(device).requires_grad_() for t in (q, k, v)]
    out = attention(*leaves, Segments.cached(q_lens, k_lens, device), causal=causal, window=window, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, do.to(device))]
