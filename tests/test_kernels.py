"""The suites that can crash a process, each in a process of its own. They take minutes, so they begin when pytest begins,
beside the other tests (conftest.py), and here only their results are awaited and what passed is counted."""
import atexit
import importlib.util
import os
import re
import subprocess
import sys
import tempfile

import pytest
from conftest import REPO

SUITES = {"interpreter": 29, "compile": 1, "inductor": 2}
begun = {}


def begin(suite):
    """Start a suite at low priority, once: (process, file with what it prints)."""
    if suite not in begun:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        words = [sys.executable, "-m", "pytest", "-s", "--disable-warnings", f"tests/kernels/{suite}.py"]
        said = tempfile.TemporaryFile("w+")
        begun[suite] = subprocess.Popen(["nice", *words], cwd=REPO, env=env, stdout=said, stderr=subprocess.STDOUT), said
        atexit.register(begun[suite][0].kill)                   # an interrupted pytest leaves nothing behind
    return begun[suite]


@pytest.mark.skipif(sys.platform != "linux", reason="triton runs on Linux only; inductor wants a C++ compiler")
@pytest.mark.parametrize("suite, count", SUITES.items())
def test_suite(suite, count):
    assert importlib.util.find_spec("triton"), "pip install -r requirements-dev.txt brings triton"
    process, said = begin(suite)
    code = process.wait(timeout=1200)
    said.seek(0)
    text = said.read()
    print(text[-30000:])                                        # the register table: pytest -rP shows it
    assert code == 0 and re.search(rf"= {count} passed(, \d+ warnings)? in", text)
