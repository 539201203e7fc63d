"""A micro-world of a few scenes and a stage 0 of a few steps, made once: enough for every promise but quality."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO))
# The study's world (--noise 1), in which the tolerances of the tests were found.
TINY = ["--corpus", "60", "--ego", "30", "--pairs", "30", "--instruct", "30", "--val", "20", "--test", "20",
        "--exo-test", "20", "--noise", "1"]
os.environ["OMP_NUM_THREADS"] = "1"     # bit-equality holds for one number of threads; also for commands we start
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)       # a shell's background job ignores it, and so would what it starts


def run(*args, cwd=None, check=True, env=None, timeout=300, input=None):
    """A command of the repository, as a user types it: (exit code, stdout, stderr)."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd or REPO, capture_output=True, text=True,
                          timeout=timeout, env=os.environ | (env or {}), input=input)
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
    return ["--stage", stage, "--data", out / "toy", "--out", out / (name or f"stage{stage}"), "--base", out / "stage0",
            "--init", out / f"stage{max(stage - 1, 0)}"]


def pytest_configure(config):
    config.addinivalue_line("markers", "upstream: what holds in this repository alone: line budgets, README's counts (forks: -m 'not upstream')")


def pytest_collection_finish(session):
    """The suites of test_kernels.py, if they are asked for, run beside the other tests from the start."""
    if sys.platform == "linux" and not session.config.option.collectonly:
        for item in session.items:
            if item.path.name == "test_kernels.py":
                item.module.begin(item.callspec.params["suite"])
