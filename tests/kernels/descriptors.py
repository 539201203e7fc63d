"""The second form of the kernels of model.py: tiles come through tensor descriptors, the scale goes into the exponent.

`python tests/gpu.py --out DIR --parts tiles` times both forms beside each other; a card decides which one stays. Read the
first form before: names and walk are its own, and only what differs is said here.

- A descriptor knows the shape of its tensor and loads (rows, D) at [first row, first column] by one instruction (TMA on
  sm_90), without an address per element in registers. Rows past a segment's end are the next segment's: finite numbers,
  whose p is 0. Rows past the tensor's end read as 0.
- With c = scale log2(e), p = exp2(s c - m) costs one multiplication and addition per score, where the first form multiplies
  each score by c before. The largest score times c is the largest s c where the scale is above 0, so it must be.
"""
from functools import cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

import model

model.triton_kernels()
segment_of, head_start, tile_offsets = model.segment_of, model.head_start, model.tile_offsets
load, key_range, hide = model.load, model.key_range, model.hide
VARYING = ["total", "heads", "kv_heads", "window"]
# Of each kernel: tensors that come as descriptors, and whether their tiles have BM or BN rows.
DESCRIBED = {"forward": ({"k", "v"}, "BN"), "dq": ({"k", "v"}, "BN"), "dkdv": ({"q", "do"}, "BM")}


@triton.jit(do_not_specialize=VARYING)
def forward(q, k, v, o, lse, cu_q, cu_k, total, heads, kv_heads, window, scale, D: tl.constexpr,
            CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    q0, lq = segment_of(cu_q)
    k0, lk = segment_of(cu_k)
    if tile * BM >= lq:
        return
    rows = tile * BM + tl.arange(0, BM)
    in_q = rows < lq
    at_q = head_start(q0, head, heads, D) + tile_offsets(rows, heads, D)
    at_row = tl.cast(head, tl.int64) * total + q0 + rows
    qi = tl.load(q + at_q, mask=in_q[:, None], other=0.0)
    column = head // (heads // kv_heads) * D                    # of the head's keys in (Tk, heads x D)
    c = scale * 1.4426950408889634                              # log2(e)

    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    position = tile * BM + lk - lq                              # of the first query among the keys
    start, masked_from, stop = key_range(position, lk, window, CAUSAL, WINDOW, BM, BN)
    for masked in tl.static_range(1 if WINDOW else 0, 2):
        for j in range(masked_from if masked else start, stop if masked else masked_from, BN):
            kj = k.load([k0 + j, column])                       # (BN, D)
            vj = v.load([k0 + j, column])
            s = tl.dot(qi, tl.trans(kj), input_precision="ieee")
            if masked:
                keys = j + tl.arange(0, BN)
                s = hide(s, (rows + lk - lq)[:, None], keys[None, :], lk, window, CAUSAL, WINDOW)
            m_new = tl.maximum(m, tl.max(s, 1) * c)
            finite = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s * c - finite[:, None])
            alpha = tl.exp2(m - finite)
            l = l * alpha + tl.sum(p, 1)
            acc = tl.dot(p.to(vj.dtype), vj, acc * alpha[:, None], input_precision="ieee")
            m = m_new

    some = tl.where(l == 0.0, 1.0, l)
    o_i = acc / some[:, None]
    lse_i = tl.where(l == 0.0, float("inf"), m + tl.log2(some))
    tl.store(o + at_q, o_i.to(o.dtype.element_ty), mask=in_q[:, None])
    tl.store(lse + at_row, lse_i, mask=in_q)


@triton.jit(do_not_specialize=VARYING)
def dq(q, k, v, o, do, lse, dq, delta, cu_q, cu_k, total, heads, kv_heads, window, scale, D: tl.constexpr,
       CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    q0, lq = segment_of(cu_q)
    k0, lk = segment_of(cu_k)
    if tile * BM >= lq:
        return
    rows = tile * BM + tl.arange(0, BM)
    in_q = rows < lq
    at_q = head_start(q0, head, heads, D) + tile_offsets(rows, heads, D)
    at_row = tl.cast(head, tl.int64) * total + q0 + rows
    column = head // (heads // kv_heads) * D
    c = scale * 1.4426950408889634
    qi = tl.load(q + at_q, mask=in_q[:, None], other=0.0)
    do_i = tl.load(do + at_q, mask=in_q[:, None], other=0.0)
    o_i = tl.load(o + at_q, mask=in_q[:, None], other=0.0)
    lse_i = tl.load(lse + at_row, mask=in_q, other=float("inf"))
    delta_i = tl.sum(do_i.to(tl.float32) * o_i.to(tl.float32), 1)
    tl.store(delta + at_row, delta_i, mask=in_q)

    dq_i = tl.zeros([BM, D], tl.float32)
    position = tile * BM + lk - lq                              # of the first query among the keys
    start, masked_from, stop = key_range(position, lk, window, CAUSAL, WINDOW, BM, BN)
    for masked in tl.static_range(1 if WINDOW else 0, 2):
        for j in range(masked_from if masked else start, stop if masked else masked_from, BN):
            kj = k.load([k0 + j, column])                       # (BN, D)
            vj = v.load([k0 + j, column])
            s = tl.dot(qi, tl.trans(kj), input_precision="ieee")
            if masked:
                keys = j + tl.arange(0, BN)
                s = hide(s, (rows + lk - lq)[:, None], keys[None, :], lk, window, CAUSAL, WINDOW)
            p = tl.exp2(s * c - lse_i[:, None])
            dp = tl.dot(do_i, tl.trans(vj), input_precision="ieee")
            ds = p * (dp - delta_i[:, None])
            dq_i = tl.dot(ds.to(kj.dtype), kj, dq_i, input_precision="ieee")
    dq_i = dq_i * scale
    tl.store(dq + at_q, dq_i.to(dq.dtype.element_ty), mask=in_q[:, None])


@triton.jit(do_not_specialize=VARYING)
def dkdv(q, k, v, do, lse, delta, dk, dv, cu_q, cu_k, total, heads, kv_heads, window, scale,
         D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    q0, lq = segment_of(cu_q)
    k0, lk = segment_of(cu_k)
    if tile * BN >= lk:
        return
    keys = tile * BN + tl.arange(0, BN)
    in_k = keys < lk
    at_k = head_start(k0, kv_head, kv_heads, D) + tile_offsets(keys, kv_heads, D)
    kj = tl.load(k + at_k, mask=in_k[:, None], other=0.0)
    vj = tl.load(v + at_k, mask=in_k[:, None], other=0.0)
    dk_j = tl.zeros([BN, D], tl.float32)
    dv_j = tl.zeros([BN, D], tl.float32)
    c = scale * 1.4426950408889634

    first = tile * BN + lq - lk                                 # the query at the tile's first key
    start, whole_from, stop = 0, 0, lq
    if CAUSAL:
        start = tl.maximum(first, 0) // BM * BM
        last = tl.maximum(first + BN - 1, 0)
        whole_from = tl.minimum((last + BM - 1) // BM * BM, lq)
    whole_to = tl.maximum(whole_from, stop // BM * BM)
    if WINDOW:
        stop = tl.minimum(lq, first + BN - 1 + window)
        whole_from = stop
    group = heads // kv_heads
    for head in range(kv_head * group, (kv_head + 1) * group):
        for part in tl.static_range(0 if CAUSAL else 1, 1 if WINDOW else 3):
            begin, end = start, whole_from
            if part == 1:
                begin, end = whole_from, whole_to
            if part == 2:
                begin, end = whole_to, stop
            for i in range(begin, end, BM):
                rows = i + tl.arange(0, BM)
                in_q = rows < lq
                at_row = tl.cast(head, tl.int64) * total + q0 + rows
                qi = q.load([q0 + i, head * D])                 # (BM, D)
                do_i = do.load([q0 + i, head * D])
                delta_i = load(delta + at_row, in_q, part != 1)
                lse_i = tl.load(lse + at_row, mask=in_q, other=float("inf"))
                # Transposed: keys are rows, (BN, BM).
                s = tl.dot(kj, tl.trans(qi), input_precision="ieee")
                if part != 1:
                    s = hide(s, (rows + lk - lq)[None, :], keys[:, None], lk, window, CAUSAL, WINDOW)
                p = tl.exp2(s * c - lse_i[None, :])
                dv_j = tl.dot(p.to(do_i.dtype), do_i, dv_j, input_precision="ieee")
                dp = tl.dot(vj, tl.trans(do_i), input_precision="ieee")
                ds = p * (dp - delta_i[None, :])
                dk_j = tl.dot(ds.to(qi.dtype), qi, dk_j, input_precision="ieee")
    dk_j = dk_j * scale
    tl.store(dk + at_k, dk_j.to(dk.dtype.element_ty), mask=in_k[:, None])
    tl.store(dv + at_k, dv_j.to(dv.dtype.element_ty), mask=in_k[:, None])


class Described:
    """A kernel that is launched as model.launch does it, with plain tensors: makes the descriptors on the way."""

    def __init__(self, name, kernel):
        self.kernel, (self.tensors, self.rows) = kernel, DESCRIBED[name]

    def __getitem__(self, grid):
        def start(*arguments, **options):
            named = dict(zip(self.kernel.arg_names, arguments))
            assert named["scale"] > 0, "the second form needs a scale above 0"
            for name in self.tensors:
                tensor = named[name].flatten(1)                 # (tokens, heads x D)
                if len(tensor) == 0:                            # a descriptor of nothing is refused
                    tensor = tensor.new_zeros(1, tensor.shape[1])
                named[name] = TensorDescriptor.from_tensor(tensor, [named[self.rows], named["D"]])
            self.kernel[grid](*named.values(), **options)
        return start


@cache
def triton_kernels():
    """The three kernels by name, to stand for model.triton_kernels."""
    return {name: Described(name, kernel) for name, kernel in dict(forward=forward, dq=dq, dkdv=dkdv).items()}
