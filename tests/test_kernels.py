"""The Triton kernels and `--compile`: suites that can crash a process, each in a process of its own.

They take minutes and what they test changes seldom, so a suite is skipped while tests/kernels/stamp.json holds the hash
of all that its result depends on: code, the suite itself, the versions of Python, torch and triton. A suite that passes
writes its hash there, and nothing else does. `pytest --kernels` skips none; a few small cases always run.
"""
import ast
import hashlib
import importlib.util
import json
import platform
import re
import sys
from importlib.metadata import version

import pytest
from conftest import REPO, run

sys.path.insert(0, str(REPO / "tests/kernels"))
import mutants

STAMP = REPO / "tests/kernels/stamp.json"
KERNELS = {"TILES", "TILES_90", "FLOAT32_TILES", "triton_kernels", "launch", "OPTIONS", "flash_attention",
           "flash_attention_backward", "_keep_for_backward", "_backward", "_triton"}
SUITES = {"interpreter": 43, "compile": 2, "mutants": 4, "inductor": 2}         # and how many tests each has
SMALL = "one_query or own_reaches or one_operator"             # of the interpreter's
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="triton runs on Linux only; inductor wants a C++ compiler")


def code_of(file, names=None):
    """A file's top-level definitions, or those of some names, without comments and docstrings."""
    kept = []
    for node in ast.parse((REPO / file).read_text()).body:
        bound = {target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)}
        if names is None or names & (bound | {getattr(node, "name", None)}):
            kept.append(node)
    for node in ast.walk(ast.Module(kept, [])):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return "\n".join(map(ast.unparse, kept))


def hash_of(suite):
    """Of all that the result of a suite depends on. What compiles whole blocks depends on more than the kernels."""
    parts = [platform.python_version(), version("torch"), version("triton"), code_of("tests/cases.py")]
    parts += [code_of(f"tests/kernels/{name}.py") for name in {suite, "interpreter", "descriptors"}]
    if suite == "inductor":
        parts += [code_of("model.py"), code_of("train.py")]
    else:
        parts += [code_of("model.py", KERNELS)]
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:16]


def stamped(suite, config):
    """Whether it has passed as it is."""
    return not config.option.kernels and STAMP.is_file() and json.loads(STAMP.read_text()).get(suite) == hash_of(suite)


def write_stamp(suite, passed):
    stamps = json.loads(STAMP.read_text()) if STAMP.is_file() else {}
    STAMP.write_text(json.dumps(stamps | {suite: passed}, indent=1, sort_keys=True) + "\n")


def passed_of(suite, *more):
    """How many tests of a suite pass; what it says is printed (pytest -rP shows it)."""
    words = ["-m", "pytest", "-s", "--disable-warnings", f"tests/kernels/{suite}.py", *more]
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("TRITON_INTERPRET", raising=False)       # interpreter.py alone sets it
        code, said, _ = run(*words, check=False, timeout=1200)
    print(said[-30000:])
    assert code == 0
    return int(re.search(r"= (\d+) passed", said)[1])


@on_linux
@pytest.mark.parametrize("suite", SUITES)
def test_suite(suite, pytestconfig):
    assert importlib.util.find_spec("triton"), "pip install -r requirements-dev.txt brings triton"
    if stamped(suite, pytestconfig):
        pytest.skip("has passed as it is (tests/kernels/stamp.json); --kernels runs it again")
    tested = hash_of(suite)
    assert passed_of(suite) == SUITES[suite]
    assert hash_of(suite) == tested, "the code has changed while it was tested"
    write_stamp(suite, tested)


@on_linux
def test_small_cases():
    assert passed_of("interpreter", "-k", SMALL) == 3


def test_a_stamp_knows_what_it_stands_for(tmp_path, monkeypatch):
    """Comments, docstrings and other code of model.py change no hash; a tile, a kernel or another triton does."""
    source, before = (REPO / "model.py").read_text(), {suite: hash_of(suite) for suite in SUITES}
    for name in ("tests", "train.py"):
        (tmp_path / name).symlink_to(REPO / name)
    monkeypatch.setattr(sys.modules[__name__], "REPO", tmp_path)

    def changed(old, new):
        assert old in source
        (tmp_path / "model.py").write_text(source.replace(old, new))
        return {suite for suite in SUITES if hash_of(suite) != before[suite]}
    assert changed("        # This program's queries.\n", "") == set()
    assert changed('    """The three kernels by name.', '    """Three kernels.') == set()
    assert changed("class Mapping(nn.Module):", "class Mapping(nn.Module):\n    ours = 1") == {"inductor"}
    for old, new in (("dq=(128, 64, 8, 3)", "dq=(128, 64, 8, 4)"), ("dq_i = dq_i * scale", "dq_i = dq_i"),
                     ("tl.where(seen, s,", "tl.where(seen, 2 * s,"), ("delta = torch.empty_like(lse)", "delta = lse")):
        assert changed(old, new) == {*SUITES}
    monkeypatch.setattr(sys.modules[__name__], "version", lambda package: "1.0")
    assert changed("", "") == {*SUITES}


def test_every_planted_bug_has_its_place():
    """A bug whose line has changed would end tests/kernels/mutants.py."""
    source = (REPO / "model.py").read_text()
    for bug, (code, change, count) in mutants.MUTANTS.items():
        assert source.count(code) == count and code != change, bug
