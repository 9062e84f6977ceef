"""Stands in for the three scripts where the sweeps are tested: the same files, signals and exit codes, no learning.

It goes from checkpoint to checkpoint, ten of them. FAKE_GATE: a file it waits for in the middle. FAKE_FAIL: runs whose
directory contains this end with exit code FAKE_CODE (1) in the middle. `starts` in the run's directory gets a line for
each start, `signals` one for each signal that reaches the run or its worker.
"""

import fcntl
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

flags = dict(zip(sys.argv[1:], sys.argv[2:]))
task = flags.get("--task", "dog-run")
total, seed = int(flags.get("--steps", 200000)), int(flags.get("--seed", 1))
run_dir = Path("runs") / f"{task}__{Path(sys.argv[0]).stem}__{seed}__{flags['--run-name']}"
run_dir.mkdir(parents=True, exist_ok=True)
asked_to_stop = []


def note(file: str, text: str) -> None:
    with open(run_dir / file, "a") as out:
        out.write(text + "\n")


def on_signal(number: int, _frame: object) -> None:
    note("signals", signal.Signals(number).name)
    asked_to_stop.append(number)


lock = open(run_dir / "lock", "a")
try:
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    print("another process holds the lock of this run", file=sys.stderr)
    sys.exit(2)
finished = run_dir / "finished.json"
if finished.exists() and json.loads(finished.read_text())["total_timesteps"] >= total:
    print("this run is finished", file=sys.stderr)
    sys.exit(2)

for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, on_signal)
worker = os.fork()  # as an environment's worker process: a signal must not come to it
if worker == 0:
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.05)
    os._exit(0)

checkpoint = run_dir / "checkpoint.pt"
begin = json.loads(checkpoint.read_text())["tenth"] % 10 if checkpoint.exists() else 0
if begin:
    print(f"continuing at step {total * begin // 10}", flush=True)
names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
note("starts", json.dumps({"tenth": begin, "argv": sys.argv} | {name: os.environ.get(name) for name in names}))
(run_dir / "args.json").write_text(json.dumps({"env_id": task, "seed": seed, "total_timesteps": total, "action_repeat": 2}))
if begin == 0:
    (run_dir / "metrics.csv").write_text("global_step,env_steps,tag,value\n")

for tenth in range(begin + 1, 11):
    step = total * tenth // 10
    with open(run_dir / "metrics.csv", "a") as out:
        height = 100 * seed + len(flags["--run-name"])
        for tag, share in (("eval/episodic_return", 1), ("eval/policy_episodic_return", 0.9)):
            out.write(f"{step},{2 * step},{tag},{share * height * (1 - math.exp(-tenth / 3)):.1f}\n")
        out.write(f"{step},{2 * step},charts/SPS,{50 + seed}\n")
    checkpoint.write_text(json.dumps({"tenth": tenth}))
    gate = os.environ.get("FAKE_GATE")
    begun = time.monotonic()
    while tenth == 5 and gate and not Path(gate).exists() and not asked_to_stop and time.monotonic() < begun + 120:
        time.sleep(0.02)  # not for ever: a test that fails leaves nothing behind
    if asked_to_stop:
        time.sleep(0.3)  # a second signal would be seen
        print("checkpoint written, stopped", file=sys.stderr)
        os.kill(worker, signal.SIGKILL)
        sys.exit(75)
    if tenth == 5 and os.environ.get("FAKE_FAIL") and os.environ["FAKE_FAIL"] in run_dir.name:
        print("a loss is not finite", file=sys.stderr)
        os.kill(worker, signal.SIGKILL)
        sys.exit(int(os.environ.get("FAKE_CODE", "1")))

finished.write_text(json.dumps({"global_step": total, "total_timesteps": total}))
os.kill(worker, signal.SIGKILL)
