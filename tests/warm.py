"""A process that has imported torch and the four files; commands of tests run in forks of it (conftest.py: run).

A fork is a process of its own, with output, folder, time limit and exit status of its own, and does what
`python FILE ARGS` does. It saves what Python takes to start, to import and to end. The warm process itself computes
nothing: the threads of an OpenMP that has begun to work are missing in a fork, which would wait for them for ever.
"""
import atexit
import gc
import importlib.machinery
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from functools import partial
from pathlib import Path

REPO = Path(__file__).parent.parent
FILES = ("model.py", "data.py", "eval.py", "train.py", "tests/study/variants.py", "tests/ranks.py")
PROGRAMS = {str(REPO / file): Path(file).stem for file in FILES}


def circumstances():
    """What a new process inherits from the test, where a fork inherits it from the warm process."""
    import resource
    limits = {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")}
    umask = os.umask(0o077)
    os.umask(umask)
    # The first is pytest's. torch sets the second, when it compiles, to what a new process would set it to.
    others = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR")
    variables = {name: value for name, value in os.environ.items() if name not in others}
    return variables, limits, umask, os.nice(0), os.sched_getaffinity(0)


class Warm:
    """The tests' end: starts the warm process at the first command and asks it for forks, one at a time."""

    def __init__(self):
        self.requests = None

    def start(self):
        self.requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.started_in = circumstances()
        subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], env=self.started_in[0],
                         pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        theirs.close()

    def takes(self, words, folder):
        """Whether a fork does the same as a new process: one of FILES, nothing changed since the start."""
        if sys.platform != "linux" or str(Path(folder, words[0]).resolve()) not in PROGRAMS:
            return False
        if self.requests is None:
            self.start()
        return circumstances() == self.started_in

    def answer(self, timeout=None):
        self.requests.settimeout(timeout)
        said = self.requests.recv(100)
        assert said, "the warm process has ended (tests/warm.py)"
        return int(said)

    def run(self, words, folder, timeout=None, input=None):
        """As subprocess.run does it, with text and captured output."""
        text_file = partial(tempfile.TemporaryFile, "w+")
        with text_file() as given, text_file() as out, text_file() as err:
            given.write(input or "")
            given.seek(0)
            files = [given.fileno(), out.fileno(), err.fileno()]
            socket.send_fds(self.requests, [json.dumps([words, str(folder)]).encode()], files)
            child = self.answer()
            try:
                code = self.answer(timeout)
            except BaseException as error:
                os.kill(child, signal.SIGKILL)
                self.answer()
                if isinstance(error, TimeoutError):
                    raise subprocess.TimeoutExpired(words, timeout) from None
                raise
            for file in (out, err):
                file.seek(0)
            return subprocess.CompletedProcess(words, code, out.read(), err.read())


def serve(requests):
    """Fork for every request; answer with the fork's process id, then with its exit status. Returns in forks alone."""
    while True:
        message, files, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            os._exit(0)                                         # the tests are over
        words, folder = json.loads(message)
        child = os.fork()
        if child == 0:
            requests.close()
            for number, file in enumerate(files):
                os.dup2(file, number)
                os.close(file)
            os.chdir(folder)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            return words
        for file in files:
            os.close(file)
        requests.send(str(child).encode())
        status = os.waitpid(child, 0)[1]
        requests.send(str(os.waitstatus_to_exitcode(status)).encode())


def compiled(path):
    """A program's code as a main module."""
    return importlib.machinery.SourceFileLoader("__main__", path).get_code("__main__")


def play(words, programs):
    """Run a program as the main module: the exit status that Python would give it."""
    path = str(Path(words[0]).resolve())
    code = programs.get(path) or compiled(path)
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=path, __builtins__=__builtins__)
    # A new process would not have it under its own name, too.
    sys.modules.pop(PROGRAMS.get(path), None)
    sys.modules["__main__"] = main
    sys.argv = words
    try:
        exec(code, main.__dict__)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        below = error.__traceback__.tb_next                     # without the frame of this function
        sys.excepthook(type(error), error.with_traceback(below), below)
        return 1
    return 0


def end(status):
    """The end of a Python process, but for taking two thousand modules apart."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status & 0xFF)


def main():
    signal.signal(signal.SIGINT, signal.SIG_IGN)                # Ctrl-C is for the tests and for the forks
    sys.path[0] = str(REPO)
    variables = dict(os.environ)
    # train.py and eval.py set this before they import torch, whose OpenMP reads it then and never again.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    import train                                                # and with it torch and the three other files
    import torch._dynamo                                        # which torch imports when an optimiser is made
    # A file that is edited while the tests run changes none of its commands, nor some of its parts.
    programs = {path: compiled(path) for path in PROGRAMS}
    os.environ.clear()
    os.environ.update(variables)
    assert len(os.listdir("/proc/self/task")) == 1, "an import has started a thread, which forks would lack"
    # What the garbage collector leaves alone stays shared among all forks.
    gc.freeze()
    end(play(serve(socket.socket(fileno=int(sys.argv[1]))), programs))


if __name__ == "__main__":
    main()
