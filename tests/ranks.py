"""torchrun in small, for tests that ask what ranks compute and not how they start.

    python tests/ranks.py 2 train.py --stage 1 ...      # two ranks, each a fork of this process

In a fork of the warm process (warm.py) a rank begins with all its imports done. As with torchrun, one rank that fails ends
the others. What torchrun itself does (restarts, orphans, signals, its report) is asked of torchrun.
"""
import os
import signal
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from warm import end, play


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def main():
    count, words = int(sys.argv[1]), sys.argv[2:]
    # The last of them is torchrun's sign: a rank that has it ends with the process that started it.
    given = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
                 TORCHELASTIC_RUN_ID="ranks.py")
    ranks, worst = set(), 0

    def end_all(number):
        for rank in ranks:
            os.kill(rank, number)
    # Whoever has not ended this long after another's failure is killed.
    signal.signal(signal.SIGALRM, lambda *_: end_all(signal.SIGKILL))
    # As where Python starts the program itself: what lies beside it is found first.
    sys.path[0] = str(Path(words[0]).resolve().parent)
    for rank in range(count):
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            os.environ.update(given, RANK=str(rank), LOCAL_RANK=str(rank))
            end(play(words, {}))
        ranks.add(child)
    while ranks:
        ended, status = os.wait()
        ranks.discard(ended)
        code = os.waitstatus_to_exitcode(status)
        if code and not worst:
            worst = code
            end_all(signal.SIGTERM)
            signal.alarm(30)
    sys.exit(worst)


if __name__ == "__main__":
    main()
