"""A fork of the warm process (warm.py) is a new process, seen from outside; each of the four files runs for real."""
import os
import re
import resource
import subprocess
import sys
import time

import pytest
from conftest import REPO, TINY, flags, run, warm

PROGRAMS = {
    "prints and ends": "import sys\nprint(sys.argv[1:], __name__)\nprint('said', file=sys.stderr)",
    "an exit status": "import sys\nsys.exit(3)",
    "a status below zero": "import sys\nsys.exit(-1)",
    "last words": "import sys\nprint('no line feed', end='')\nsys.exit('program: no such file')",
    "an error": "def inner():\n    return 1 / 0\ninner()",
    "an error inside another": "try:\n    {}[1]\nexcept KeyError as error:\n    raise ValueError('two') from error",
    "exit hooks and threads": "import atexit, threading, time\natexit.register(print, 'hook')\n"
                              "threading.Thread(target=lambda: time.sleep(0.2) or print('thread')).start()",
    "reads": "import sys\nprint(sys.stdin.read().split(), input and sys.stdin.isatty(), sys.stdout.isatty())",
    "a folder and a file of its own": "import os, sys\nprint(os.getcwd(), os.path.samefile(__file__, sys.argv[0]))",
    "killed": "import os\nprint('before', flush=True)\nos.kill(os.getpid(), 9)",
    "a child of its own": "import os\nif os.fork() == 0:\n    print('child', flush=True)\n    os._exit(0)\n"
                          "print(os.wait()[1])",
    "a class that says where it is from": "import sys\nclass A: pass\n"
                                          "print(A.__module__, sys.modules['__main__'].A is A)",
    "environment": "import os\nprint(sorted(os.environ.items()), os.umask(0))"}


@pytest.fixture(scope="module", autouse=True)
def started():
    assert warm.takes(["model.py"], REPO)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_fork_is_a_process(program, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)        # an earlier test's compiler has set it
    (tmp_path / "program.py").write_text(PROGRAMS[program])
    words = ["program.py", "one", "two words"]
    given = "given, line\nby line"
    real = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, input=given,
                          env=os.environ)
    fork = warm.run(words, tmp_path, 60, given)
    assert (fork.returncode, fork.stdout, fork.stderr) == (real.returncode, real.stdout, real.stderr)


def test_a_fork_ends_at_its_time_limit_and_the_next_one_begins(tmp_path):
    (tmp_path / "sleeps.py").write_text("import os, time\nopen('id', 'w').write(str(os.getpid()))\ntime.sleep(60)")
    (tmp_path / "goes_on.py").write_text("print('here')")
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        warm.run(["sleeps.py"], tmp_path, 1)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "id").read_text()), 0)
    assert warm.run(["goes_on.py"], tmp_path, 60).stdout == "here\n" and time.monotonic() - began < 20


def test_what_a_process_inherits_makes_a_command_a_process(monkeypatch):
    """An environment variable, a limit, a umask that a test has changed would not reach a fork."""
    assert warm.takes(["train.py"], REPO) and warm.takes([str(REPO / "data.py")], "/")
    for words, folder in ((["tests/bench.py"], REPO), (["-m", "train"], REPO), (["train.py"], "/")):
        assert not warm.takes(words, folder)
    with monkeypatch.context() as changed:
        changed.setenv("EXO2EGO_ATTENTION", "tiled")
        assert not warm.takes(["train.py"], REPO)
    umask = os.umask(0o027)
    assert not warm.takes(["train.py"], REPO)
    os.umask(umask)
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    other = 4096 if hard == resource.RLIM_INFINITY else hard
    if other != soft:
        resource.setrlimit(resource.RLIMIT_CORE, (other, hard))
        assert not warm.takes(["train.py"], REPO)
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
    assert warm.takes(["train.py"], REPO)


def test_ranks_know_their_numbers_and_one_that_fails_ends_the_others(tmp_path):
    """As torchrun does it; ranks.py starts the ranks of tests that do not ask about torchrun."""
    (tmp_path / "rank.py").write_text("import os, sys, time\nrank = int(os.environ['RANK'])\nprint(rank, os.environ['WORLD_SIZE'], flush=True)\n"
                                      "time.sleep(1 if rank else 60)\nsys.exit(3)")
    began = time.monotonic()
    code, out, _ = run("tests/ranks.py", 2, tmp_path / "rank.py", check=False)
    assert code == 3 and sorted(out.splitlines()) == ["0 2", "1 2"] and time.monotonic() - began < 30


def without_times(text):
    """What a command prints, but for seconds, rates and folders."""
    return re.sub(r"/\S+|[\d.,]+ (s|GB|MB|clips)\b\S*|\d+ a second", "#", text)


def test_each_file_does_in_a_process_what_it_does_in_a_fork(toy, tmp_path):
    """The four files, for real: the bytes and the words of the forks that made `toy`."""
    run("data.py", "toy", "--out", tmp_path / "toy", *TINY, fork=False)
    for file in (file for file in (tmp_path / "toy").rglob("*") if file.is_file() and not file.name.endswith(".lock")):
        assert file.read_bytes() == (toy / "toy" / file.relative_to(tmp_path / "toy")).read_bytes(), file
    words = ["train.py", *flags(toy, 1), "--steps", 3, "--out", tmp_path / "stage1"]
    run(*words, fork=False)
    for file in ("model.safetensors", "optim.safetensors"):
        made, known = (folder / "step_000003" / file for folder in (tmp_path / "stage1", toy / "stage1"))
        assert made.read_bytes() == known.read_bytes()
    score = ["eval.py", "--ckpt", tmp_path / "stage1", "--base", toy / "stage0", "--data", toy / "toy"]
    for words in (score, ["model.py", "--export-hf"]):
        real, fork = (run(*words, fork=fork, check=False) for fork in (False, True))
        assert [real[0], *map(without_times, real[1:])] == [fork[0], *map(without_times, fork[1:])]
