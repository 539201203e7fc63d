"""The suites that can crash a process, each in a process of its own. They take minutes, so they begin when pytest begins,
beside the other tests (conftest.py), and here only their results are awaited and what passed is counted."""
import importlib.util
import re
import sys

import pytest
from conftest import begin

SUITES = {"interpreter": 29, "compile": 1, "inductor": 2}


def start(suite):
    return begin(suite, "-m", "pytest", "-s", "--disable-warnings", f"tests/kernels/{suite}.py")


def begin_early(item):
    start(item.callspec.params["suite"])


@pytest.mark.skipif(sys.platform != "linux", reason="triton runs on Linux only; inductor wants a C++ compiler")
@pytest.mark.parametrize("suite, count", SUITES.items())
def test_suite(suite, count):
    assert importlib.util.find_spec("triton"), "pip install -r requirements-dev.txt brings triton"
    process, said = start(suite)
    code = process.wait(timeout=1200)
    said.seek(0)
    text = said.read()
    print(text[-30000:])                                        # the register table: pytest -rP shows it
    assert code == 0 and re.search(rf"= {count} passed(, \d+ warnings)? in", text)
