"""Starts the suites that can crash a process, each in a process of its own, and counts what passed."""
import importlib.util
import os
import re
import subprocess
import sys

import pytest
from conftest import REPO

SUITES = {"interpreter": 27, "compile": 1, "inductor": 2}


@pytest.mark.skipif(sys.platform != "linux", reason="triton runs on Linux only; inductor wants a C++ compiler")
@pytest.mark.parametrize("suite, count", SUITES.items())
def test_suite(suite, count):
    assert importlib.util.find_spec("triton"), "pip install -r requirements-dev.txt brings triton"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "pytest", "-s", "--disable-warnings", f"tests/kernels/{suite}.py"], cwd=REPO, env=env,
                          capture_output=True, text=True, timeout=1200)
    print(done.stdout[-30000:], done.stderr[-5000:])            # the register table: pytest -rP shows it
    assert done.returncode == 0 and re.search(rf"= {count} passed(, \d+ warnings)? in", done.stdout)
