"""Methods that are timed against each other take turns, one step at a time, each in a process of its own.

So all of them see the same machine, whose speed drifts by a third within minutes.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

READY = "ready"


def answer_turns(step: Callable[[], Any]) -> list[float]:
    """In a worker that is warm: makes and times one ``step`` for every line on the standard input; returns the seconds."""
    print(READY, flush=True)
    seconds = []
    for _ in sys.stdin:
        began = time.perf_counter()
        step()
        seconds.append(round(time.perf_counter() - began, 3))
        print(seconds[-1], flush=True)
    return seconds


def take_turns(commands: Mapping[str, Sequence[str]], rounds: int) -> list[dict[str, Any]]:
    """Starts a worker for every command, gives each one turn a round, and returns the JSON that each prints last."""
    workers = {name: _start(name, command) for name, command in commands.items()}
    for number in range(rounds):
        print(number, {name: _turn(name, worker) for name, worker in workers.items()}, flush=True)
    records = []
    for worker in workers.values():
        printed, _ = worker.communicate()
        records.append(json.loads(printed.splitlines()[-1]))
    return records


def _start(name: str, command: Sequence[str]) -> subprocess.Popen[str]:
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    while worker.stdout.readline() != f"{READY}\n":
        if worker.poll() is not None:
            raise SystemExit(f"{name} failed")
    return worker


def _turn(name: str, worker: subprocess.Popen[str]) -> float:
    assert worker.stdin is not None
    assert worker.stdout is not None
    with suppress(BrokenPipeError):
        worker.stdin.write("step\n")
        worker.stdin.flush()
    seconds = worker.stdout.readline()
    if not seconds:
        code = worker.wait()
        raise SystemExit(f"{name} ended with {code}{' (most likely memory ran out)' if code == -signal.SIGKILL else ''}")
    return float(seconds)
