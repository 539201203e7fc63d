"""One attention, five backends, one contract: each against the float64 formula, outputs and gradients."""
import itertools
import subprocess
import sys

import pytest
import torch
from conftest import REPO, run

import model
from model import PRESETS, Segments, attention, choose_attention

CASES = {"self": ((5, 1, 0, 9), (5, 1, 0, 9)), "cached": ((1, 3, 2), (6, 3, 7)), "one": ((1, 1), (4, 9)),
         "one, equal": ((1, 1), (7, 7)), "more queries": ((4, 2, 3), (2, 2, 0)), "uniform": ((7, 7), (7, 7)),
         "uniform, cached": ((3, 3), (8, 8)), "tiny": ((6, 5, 6, 7), (6, 5, 6, 7)), "ragged": ((3, 60), (3, 60)),
         "nothing": ((0,), (0,))}
MASKS = ((False, None), (True, None), (True, 1), (True, 3))


def tensors(seg, heads, kv_heads, head_dim, dtype=torch.float32):
    torch.manual_seed(0)
    q = torch.randn(sum(seg.q_lens), heads, head_dim, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(sum(seg.k_lens), kv_heads, head_dim, dtype=dtype, requires_grad=True) for _ in range(2))
    return q, k, v


def check(case, mask, kv_heads, head_dim, backend):
    causal, window = mask
    seg = Segments.cached(*CASES[case])
    q, k, v = tensors(seg, 4, kv_heads, head_dim)
    out = attention(q, k, v, seg, causal=causal, window=window, backend=backend)
    exact = attention(*(t.double() for t in (q, k, v)), seg, causal=causal, window=window, backend="reference")
    assert out.dtype == torch.float32 and torch.allclose(out.double(), exact, atol=1e-5)
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), upstream, allow_unused=True, materialize_grads=True)
    truth = torch.autograd.grad(exact, (q, k, v), upstream.double())
    for a, b in zip(ours, truth):
        assert torch.isfinite(a).all() and torch.allclose(a.double(), b.double(), atol=1e-5)


@pytest.mark.parametrize("backend", ("reference", "tiled", "sdpa"))
@pytest.mark.parametrize("case, mask, kv_heads", list(itertools.product(CASES, MASKS, (1, 4))))
def test_backend_equals_the_formula(case, mask, kv_heads, backend, monkeypatch):
    monkeypatch.setattr(model.Tiled, "tile", 4)                 # a few tokens span several tiles
    check(case, mask, kv_heads, 32, backend)


@pytest.mark.parametrize("backend", ("tiled", "sdpa"))
@pytest.mark.parametrize("head_dim, mask", list(itertools.product((64, 128), MASKS)))
def test_other_head_dims(head_dim, mask, backend):
    for case in ("self", "cached"):
        check(case, mask, 2, head_dim, backend)


def test_reference_is_the_formula_written_out():
    """The oracle itself, element by element: softmax over what a query may see."""
    q, k, v = (t.detach() for t in tensors(Segments.cached((3,), (5,)), 2, 1, 4, torch.float64))
    out = attention(q, k, v, Segments.cached((3,), (5,)), causal=True, window=2, scale=0.7, backend="reference")
    for i, h in itertools.product(range(3), range(2)):
        seen = [j for j in range(5) if i + 2 - 2 < j <= i + 2]  # queries stand at the end: query i is key i + 2
        weight = torch.tensor([0.7 * float(q[i, h] @ k[j, 0]) for j in seen], dtype=torch.float64).exp()
        assert torch.allclose(out[i, h], sum(w * v[j, 0] for w, j in zip(weight / weight.sum(), seen)))


@pytest.mark.parametrize("backend", ("reference", "tiled"))
@pytest.mark.parametrize("mask", MASKS)
def test_gradcheck(mask, backend, monkeypatch):
    monkeypatch.setattr(model.Tiled, "tile", 3)
    seg = Segments.cached((4, 2, 5), (7, 2, 3))
    qkv = tensors(seg, 2, 1, 3, torch.float64)
    function = lambda *t: attention(*t, seg, causal=mask[0], window=mask[1], scale=0.6, backend=backend)
    assert torch.autograd.gradcheck(function, qkv)


@pytest.mark.parametrize("backend, dtype, head_dim", list(itertools.product(
    ("tiled", "sdpa"), model.TOLERANCE, (32, 64, 128))))
def test_self_check_passes_here(backend, dtype, head_dim):
    assert model.attention_error(backend, "cpu", dtype, head_dim) <= 1


@pytest.mark.parametrize("backend", ("reference", "tiled", "sdpa"))
def test_a_row_without_keys_gives_zeros_and_finite_gradients(backend):
    seg = Segments.cached((4, 3), (2, 0))
    q, k, v = tensors(seg, 2, 2, 8)
    out = attention(q, k, v, seg, causal=True, backend=backend)
    assert (out[:2] == 0).all() and (out[2:4] != 0).all() and (out[4:] == 0).all()
    for grad in torch.autograd.grad(out, (q, k, v), torch.ones_like(out)):
        assert torch.isfinite(grad).all()
    seg = Segments.cached((2,), (0,))                           # nothing to see at all
    q, k, v = tensors(seg, 2, 2, 8)
    out = attention(q, k, v, seg, causal=False, backend=backend)
    assert (out == 0).all() and (torch.autograd.grad(out.sum(), q)[0] == 0).all()


@pytest.mark.parametrize("backend", ("tiled", "sdpa"))
def test_packing_changes_nothing(backend):
    lens = (3, 50, 1, 17)
    seg = Segments.packed(lens)
    q, k, v = tensors(seg, 4, 2, 16)
    packed = attention(q, k, v, seg, causal=True, backend=backend).split(lens)
    for one, *part in zip(packed, *(t.split(lens) for t in (q, k, v))):
        alone = attention(*part, Segments.packed((len(one),)), causal=True, backend=backend)
        assert torch.allclose(one, alone, atol=1e-6)
    other = [torch.where((torch.arange(71) < 53)[:, None, None], t, torch.randn_like(t)) for t in (q, k, v)]
    again = attention(*other, seg, causal=True, backend=backend)
    assert torch.equal(again[:53], torch.cat(packed)[:53])      # what a neighbour says does not matter, bit for bit


@pytest.mark.parametrize("backend", ("tiled", "sdpa"))
@pytest.mark.parametrize("window", (None, 4))
def test_prefix_cache_and_chunk_equal_the_full_forward(backend, window):
    q, k, v = tensors(Segments.packed((12,)), 4, 2, 16)
    full = attention(q, k, v, Segments.packed((12,)), causal=True, window=window, backend=backend)
    for first, last in ((0, 7), (7, 8), (8, 12)):
        seg = Segments.cached((last - first,), (last,))
        part = attention(q[first:last], k[:last], v[:last], seg, causal=True, window=window, backend=backend)
        assert torch.allclose(part, full[first:last], atol=1e-6)


def test_autocast_does_not_reach_inside():
    seg = Segments.packed((9, 30))
    q, k, v = tensors(seg, 4, 2, 16)
    plain = attention(q, k, v, seg, causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(q, k, v, seg, causal=True), plain)


def test_tiled_holds_one_tile_of_scores(monkeypatch):
    sizes, original = [], model.Tiled.scores
    monkeypatch.setattr(model.Tiled, "scores", lambda *args: sizes.append(original(*args)) or sizes[-1])
    seg = Segments.packed((700,))
    attention(*tensors(seg, 2, 1, 8), seg, causal=True, backend="tiled")
    assert max(s.shape[1] * s.shape[2] for s in sizes) <= 2 * 256 * 256
    assert len(sizes) == 1 + 2 + 3                              # tiles above the diagonal are never computed


@pytest.mark.parametrize("change, words", [
    (dict(q=(4, 3, 8)), "q has 3 heads, k has 2"), (dict(k=(4, 2, 4), v=(4, 2, 4)), "head_dim"),
    (dict(v=(4, 1, 8)), "k and v one shape"), (dict(q=(5, 4, 8)), "seg has 4 queries, 4 keys; q 5, k 4"),
    (dict(window=0), "window is 0"), (dict(window=2, causal=False), "needs causal"),
    (dict(backend="fast"), "'fast': choose one of"), (dict(backend="triton"), "one GPU: q is on cpu"),
    (dict(dtype=torch.int64), "floating dtype"),
    (dict(mixed=torch.bfloat16), "one floating dtype and one device"), (dict(mixed="meta"), "one device")])
def test_bad_input_is_named(change, words):
    shapes = dict(q=(4, 4, 8), k=(4, 2, 8), v=(4, 2, 8)) | {n: s for n, s in change.items() if n in "qkv"}
    options = dict(causal=True) | {n: s for n, s in change.items() if n in ("causal", "window", "backend")}
    q, k, v = (torch.zeros(shapes[n], dtype=change.get("dtype")) for n in "qkv")
    with pytest.raises(ValueError, match=words):
        attention(q, k.to(change.get("mixed")) if "mixed" in change else k, v, Segments.packed((4,)), **options)


def test_kernels_name_what_they_do_not_take(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")                 # the one way to reach them on a CPU
    q = torch.zeros(4, 2, 48)
    with pytest.raises(ValueError, match="head_dim 32, 64 and 128, q has 48"):
        attention(q, q, q, Segments.packed((4,)), causal=True, backend="triton")
    q = torch.zeros(4, 2, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match="does not take q in torch.float64"):
        attention(q, q, q, Segments.packed((4,)), causal=True, backend="triton")


def test_segments_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="as many key as query lengths"):
        Segments.cached((1, 2), (3,))


def test_environment_variable_replaces_auto(monkeypatch):
    calls, original = [], model._tiled
    monkeypatch.setattr(model, "_tiled", lambda *args: calls.append(1) or original(*args))
    q, seg = torch.randn(4, 2, 8), Segments.packed((4,))
    attention(q, q, q, seg, causal=True)
    assert not calls
    monkeypatch.setenv("EXO2EGO_ATTENTION", "tiled")
    attention(q, q, q, seg, causal=True)
    attention(q, q, q, seg, causal=True, backend="sdpa")        # a backend asked for by name stays
    assert len(calls) == 1
    monkeypatch.setenv("EXO2EGO_ATTENTION", "fast")
    with pytest.raises(ValueError, match="EXO2EGO_ATTENTION.*'fast'"):
        attention(q, q, q, seg, causal=True)


# what auto takes on a GPU, when the self-check says what it says
CHOICES = [({"triton": 0.3}, (9, 0), "triton", "after a self-check"), ({"triton": 7.0}, (8, 0), "sdpa", "7.0"),
           ({"triton": float("nan")}, (8, 0), "sdpa", "nan"),
           ({"triton": ImportError("no triton here")}, (8, 6), "sdpa", "no triton here"),
           ({"triton": 0.1}, (7, 5), "sdpa", "sm_80")]


@pytest.mark.parametrize("found, capability, backend, words", CHOICES)
def test_auto_is_what_passes_its_self_check(found, capability, backend, words, monkeypatch):
    def error(name, *_):
        if isinstance(found[name], Exception):
            raise found[name]
        return found[name]
    monkeypatch.setattr(model, "attention_error", error)
    monkeypatch.setattr(model, "half_gpu_backend", "sdpa")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    line = choose_attention(torch.device("cuda"), torch.bfloat16, PRESETS["7b"])
    assert model.half_gpu_backend == backend and line.startswith(f"attention: {backend}") and words in line and "\n" not in line


def test_auto_without_a_choice_is_sdpa(monkeypatch):
    monkeypatch.setattr(model, "half_gpu_backend", "triton")
    assert "float32 on cuda" in choose_attention(torch.device("cuda"), torch.float32, PRESETS["7b"])
    assert model.half_gpu_backend == "sdpa"
    assert "bfloat16 on cpu" in choose_attention(torch.device("cpu"), torch.bfloat16, PRESETS["7b"])
    monkeypatch.setenv("EXO2EGO_ATTENTION", "tiled")
    assert "tiled, by EXO2EGO_ATTENTION" in choose_attention(torch.device("cpu"), torch.bfloat16, PRESETS["7b"])
    monkeypatch.setenv("EXO2EGO_ATTENTION", "flash")
    with pytest.raises(ValueError, match="EXO2EGO_ATTENTION is 'flash': choose one of"):
        choose_attention(torch.device("cpu"), torch.float32, PRESETS["7b"])


def test_a_dead_gpu_is_not_papered_over(monkeypatch):
    def dead(*_):
        raise RuntimeError("an illegal memory access was encountered")
    monkeypatch.setattr(model, "attention_error", dead)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        choose_attention(torch.device("cuda"), torch.bfloat16, PRESETS["7b"])


RANKS = """
import os, time, torch, torch.distributed as dist
import model, train
dist.init_process_group("gloo")
rank = dist.get_rank()
calls = []
def error(backend, *_):
    calls.append((backend, time.monotonic()))
    time.sleep(0.3 if rank == 0 else 0)
    return 9.0 if (backend, rank) == ("triton", 1) else 0.1     # one GPU of the world fails
model.attention_error = error
torch.cuda.get_device_capability = lambda device: (9, 0)
line = model.choose_attention(torch.device("cuda"), torch.bfloat16, model.PRESETS["toy"], train.first_problem_of_any_rank)
starts = [None, None]
dist.all_gather_object(starts, calls[0][1])
assert starts[1] >= starts[0] + 0.3, "local rank 0 goes first"
print(f"rank {rank}: {model.half_gpu_backend}: {line}", flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def test_the_world_takes_a_kernel_only_if_it_passed_everywhere(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    _, out, _ = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, tmp_path / "ranks.py",
                    env={"PYTHONPATH": str(REPO)})
    assert out.count("sdpa: attention: sdpa; not triton: error") == 2


NO_TRITON = """
import os, sys
sys.modules["triton"] = None
import torch, model
q, seg = torch.randn(4, 2, 32), model.Segments.packed((4,))
model.attention(q, q, q, seg, causal=True)
os.environ["TRITON_INTERPRET"] = "1"
try:
    model.attention(q, q, q, seg, causal=True, backend="triton")
except ImportError as error:
    assert "needs the package triton" in str(error) and "use sdpa" in str(error)
else:
    raise AssertionError("no triton, no error")
"""


def test_without_triton_the_model_imports_and_says_what_to_do():
    done = subprocess.run([sys.executable, "-c", NO_TRITON], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_model_does_not_import_triton():
    program = "import sys, model; assert 'triton' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_check_attention_command(monkeypatch, capsys):
    _, out, _ = run(REPO / "model.py", "--check-attention")
    assert out.count("ok  ") == 18 and "FAIL" not in out and "it needs a GPU: triton" in out
    monkeypatch.setattr(model, "attention_error", lambda *_: float("nan"))
    assert model.check_attention() == 18 and "FAIL" in capsys.readouterr().out


def test_check_attention_on_a_gpu_up_to_the_gpu(monkeypatch, capsys):
    """The branch that only a GPU takes, with the GPU's part replaced: which backends, and counting."""
    monkeypatch.setattr(model, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(model, "attention_error", lambda backend, *_: 0.5 if backend != "tiled" else 3.0)
    assert model.check_attention() == 9
    out = capsys.readouterr().out
    assert out.count("ok   triton") == out.count("ok   sdpa") == out.count("FAIL tiled") == 9
