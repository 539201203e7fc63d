"""A micro-world of a few scenes and a stage 0 of a few steps, made once: enough for every promise but quality."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from warm import Warm

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO))
# A wild head (--noise 1), with which the tolerances of the tests were found.
TINY = ["--corpus", "60", "--ego", "30", "--pairs", "30", "--instruct", "30", "--val", "20", "--test", "20",
        "--exo-test", "20", "--noise", "1"]
os.environ["CUDA_VISIBLE_DEVICES"] = ""     # what is promised to the bit is promised on a CPU; a GPU has tests/gpu.py
os.environ["OMP_NUM_THREADS"] = "1"     # bit-equality holds for one number of threads; also for commands we start
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)       # a shell's background job ignores it, and so would what it starts


warm = Warm()
# Two ranks: as a user starts them, and as forks, for tests that ask what ranks compute.
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
RANKS = [REPO / "tests/ranks.py", 2]


def run(*args, cwd=None, check=True, env=None, timeout=300, input=None, fork=True):
    """A command of the repository, as a user types it: (exit code, stdout, stderr).

    One of warm.FILES runs in a fork of one warm process: it is a process of its own in all but its start.
    With an environment of its own, under torchrun, after a change of what processes inherit (environment, limits, umask)
    and with fork=False, which is for questions about memory and signals, a command is a process from its start.
    """
    words, folder = [str(word) for word in args], cwd or REPO
    if fork and env is None and warm.takes(words, folder):
        done = warm.run(words, folder, timeout, input)
    else:
        done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=timeout,
                              env=os.environ | (env or {}), input=input)
    if check:
        assert done.returncode == 0, f"{args}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Folder with a tiny micro-world in toy/ and stages 0 to 3 in stage0/ ... stage3/, three steps each."""
    out = tmp_path_factory.mktemp("out")
    run(REPO / "data.py", "toy", "--out", out / "toy", *TINY)
    for stage in range(4):
        run(REPO / "train.py", *flags(out, stage), "--steps", 3)
    return out


def flags(out, stage, name=None):
    """Command line of a stage that reads and writes under `out`."""
    start = ["--base", out / "stage0", "--init", out / f"stage{stage - 1}"] if stage else []
    return ["--stage", stage, "--data", out / "toy", "--out", out / (name or f"stage{stage}"), *start]


def pytest_addoption(parser):
    parser.addoption("--kernels", action="store_true", help="run the suites of tests/test_kernels.py that have passed as they are, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "upstream: what holds in this repository alone: line budgets, README's counts (forks: -m 'not upstream')")


# Files that take long, longest first: of two workers none is left alone with one of them at the end.
LONG = ["test_train.py", "test_large.py", "test_rehearsal.py", "test_gpu.py", "test_bench.py", "test_study.py"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`pytest -n 2`: the tests of a file stay together, since they share what is dear to make; files in the order above."""
    from xdist.scheduler import LoadFileScheduling
    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)
