"""Two ranks that are started once, since that takes longer than what they do, and train what they are told to."""

import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
Train = Callable[..., None]  # the arguments of `python -m fastpo.train`; returns when both ranks are done


@contextmanager
def pair() -> Iterator[Train]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=ENVIRONMENT | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip

    def train(*argv: str) -> None:
        for process in ranks:
            assert process.stdin is not None and process.poll() is None, "a rank has ended"
            print(json.dumps(argv), file=process.stdin, flush=True)
        for process in ranks:
            assert process.stdout is not None
            if answer := json.loads(process.stdout.readline() or '"it has ended"'):
                for other in ranks:
                    other.kill()  # it may wait for the one that has failed
                raise AssertionError(answer)

    try:
        yield train
    finally:
        for process in ranks:
            process.communicate()  # closes what it reads, which ends it


def main() -> None:
    """Runs each line of stdin, a JSON list of arguments; answers with an empty text or what went wrong."""
    answers, sys.stdout = sys.stdout, sys.stderr
    from fastpo import train

    for line in sys.stdin:
        try:
            train.main(json.loads(line))
            wrong = ""
        except BaseException:  # SystemExit too
            wrong = traceback.format_exc()
        print(json.dumps(wrong), file=answers, flush=True)


if __name__ == "__main__":
    main()
