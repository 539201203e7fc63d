"""Every configuration the Triton kernels can be launched with, compiled for sm_80 and sm_90 without a GPU.

    pytest tests/kernels/compile.py -s          # prints registers, stack, spills and shared memory of each

What a reader cannot see in the source a compiler can: one tile size too large and a kernel spills thousands of
registers. Not collected by name: it needs a process without TRITON_INTERPRET (tests/test_kernels.py starts it).
"""
import itertools
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
sys.path[:0] = [str(Path(__file__).parents[level]) for level in (2, 0)]

import torch

import model

SHARED_LIMIT = {80: 166912, 90: 232448}                 # bytes a block may use
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
MASKS = {"bidirectional": (False, False), "causal": (True, False), "window": (True, True)}
CONFIGURATIONS = list(itertools.product((80, 90), ("forward", "dq", "dkdv"), (32, 64, 128), POINTERS, MASKS))


def compile_one(arch, kernel, head_dim, dtype, mask, tile=None, second_form=False):
    """-> (registers, stack bytes, spill instructions, shared bytes, HGMMA, HMMA); tile None: the shipped one."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    function = model.triton_kernels()[kernel]
    if second_form:
        import descriptors
        function = descriptors.triton_kernels()[kernel].kernel
    table = model.FLOAT32_TILES if dtype == torch.float32 else model.TILES_90 if arch == 90 else model.TILES
    rows, keys, warps, stages = tile or table[head_dim][kernel]
    constants = dict(zip(("D", "CAUSAL", "WINDOW", "BM", "BN"), (head_dim, *MASKS[mask], rows, keys)))
    types = dict(lse="*fp32", delta="*fp32", cu_q="*i32", cu_k="*i32", scale="fp32", total="i32", heads="i32",
                 kv_heads="i32", window="i32") | dict.fromkeys(constants, "constexpr")
    if second_form:
        tensors, side = descriptors.DESCRIBED[kernel]
        types |= dict.fromkeys(tensors, f"tensordesc<{POINTERS[dtype][1:]}[{constants[side]}, {head_dim}]>")
    names = function.arg_names
    signature = {name: types.get(name, POINTERS[dtype]) for name in names}
    source = ASTSource(fn=function, signature=signature,
                       constexprs={(names.index(name),): value for name, value in constants.items()},
                       attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"})
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(num_warps=warps, num_stages=stages))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        usage, sass = (subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
                       for option in ("-res-usage", "-sass"))
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    spills, hgmma, hmma = (len(re.findall(rf"\b({word})\b", sass)) for word in ("STL|LDL", "HGMMA[.\\w]*", "HMMA[.\\w]*"))
    return registers, stack, spills, built.metadata.shared, hgmma, hmma


def test_every_configuration_compiles_without_spills():
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(compile_one, *zip(*CONFIGURATIONS)))
    bad = []
    print("\n arch kernel   dim dtype    mask           registers stack spills   shared HGMMA HMMA")
    for (arch, kernel, dim, dtype, mask), (registers, stack, spills, shared, hgmma, hmma) in zip(CONFIGURATIONS, results):
        line = (f"sm_{arch} {kernel:8} {dim:3} {str(dtype)[6:]:8} {mask:13} {registers:10} {stack:5} {spills:6} "
                f"{shared:8} {hgmma:5} {hmma:4}")
        tensor_cores = dtype == torch.float32 or (hgmma if arch == 90 else hmma) > 0    # float32 asks for exact products
        spilling = (stack > 16 or spills > 4) and (arch, kernel) != (90, "dkdv")        # there the fastest on an H100 do spill
        if spilling or stack > 512 or shared > SHARED_LIMIT[arch] or not tensor_cores:
            bad.append(line)
        print(line)
    assert not bad, "\n".join(bad)
    assert len(results) == 2 * 3 * 3 * 3 * 3


# kernel, head_dim, mask, tile: where the second form (descriptors.py) is to show what it saves on sm_90
BOTH_FORMS = [("forward", 64, "bidirectional", (64, 64, 4, 3)), ("forward", 128, "causal", (64, 64, 4, 3)),
              ("forward", 128, "causal", (128, 128, 8, 2)), ("dq", 128, "causal", (64, 64, 4, 2)),
              ("dkdv", 128, "causal", (32, 64, 4, 2))]


def test_the_second_form_needs_fewer_registers():
    print("\nsm_90, bfloat16; registers, stack and spills of the first form, of the second")
    for kernel, dim, mask, tile in BOTH_FORMS:
        first, second = (compile_one(90, kernel, dim, torch.bfloat16, mask, tile, second_form=form) for form in (False, True))
        print(f"{kernel:8} {dim:3} {mask:13} {str(tile):16}", *first[:3], "  ", *second[:3])
        assert second[0] < first[0] or second[0] == first[0] == 255 and second[2] < first[2]
        assert second[3] <= SHARED_LIMIT[90] and second[4] > 0
