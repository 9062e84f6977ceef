"""A benchmark of a run on a machine that is not quiet.

    python tests/busy.py

Times four decisions of `--preset small` with their four updates and their share of reanalyze, in eager mode: alone
("quiet"), and beside a process that keeps one core busy ("busy"). Three settings of the OpenMP threads take turns, each
measurement in a process of its own: the default, in which bmpc.py sets GOMP_SPINCOUNT; libgomp's own spin count; and a
single thread. Prints the median and the range of the rounds, in milliseconds.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SETTINGS = {
    "default": {},
    "libgomp's spin count": {"GOMP_SPINCOUNT": "300000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
LOOP = "while True: pass"
MEASURE = """
import dataclasses, statistics, sys, time
import bmpc  # before torch, so that it can set environment variables
import numpy as np
import torch

args = bmpc.parse_args(["--preset", "small", "--device", "cpu", "--no-compile", "--reanalyze-interval", "4"])
args = dataclasses.replace(args, action_repeat=2, discount=0.99, episodic=False, reanalyze_batch_size=4)
args = bmpc.resolve_algorithm_args(args)
run = bmpc.Run(args, bmpc.TaskInfo(5, 1, 500), bmpc.setup_torch(args))
zeros = np.zeros(4, bool)
for _ in range(50):
    action, expert = bmpc.random_action(args, 1, run.make_generator("act"))
    obs = torch.rand(4, 5)
    run.buffer.add(obs, action, expert, torch.rand(4), torch.zeros(4), obs, zeros, zeros)
times = []
end = time.perf_counter() + float(sys.argv[1])
while time.perf_counter() < end or len(times) < 4:
    start = time.perf_counter()
    bmpc.act(run.functions.plan, run.model, run.obs, run.prev_mean, args, run.make_generator)
    for _ in range(4):
        bmpc.train_step(run, pretraining=False)
    times.append(time.perf_counter() - start)
print(1e3 * statistics.median(times[2:]))
"""


def measure(variables: dict[str, str], seconds: float) -> float:
    """Return the median milliseconds of four decisions in a new process with these environment variables."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))} | variables
    command = [sys.executable, "-c", MEASURE, str(seconds)]
    return float(subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="length of a measurement")
    options = parser.parse_args()
    results = {(load, name): [] for load in ("quiet", "busy") for name in SETTINGS}
    for _ in range(options.rounds):
        for load in ("quiet", "busy"):
            other = subprocess.Popen([sys.executable, "-c", LOOP]) if load == "busy" else None
            try:
                for name, variables in SETTINGS.items():
                    results[load, name].append(measure(variables, options.seconds))
            finally:
                if other:
                    other.kill()
                    other.wait()
    for (load, name), times in results.items():
        print(f"{load:6s} {name:22s} {statistics.median(times):8.0f} ms  [{min(times):.0f}, {max(times):.0f}]")


if __name__ == "__main__":
    main()
