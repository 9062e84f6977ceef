"""Stands in for the three scripts where the sweeps are tested: the same files, signals and exit codes, no learning.

It goes from checkpoint to checkpoint, ten of them. FAKE_GATE: a file it waits for in the middle. FAKE_FAIL: runs whose
directory contains this end there with exit code FAKE_CODE. In the run's directory `starts` gets a line for each start,
`signals` one for the signals that stopped it.
"""

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

flags = dict(zip(sys.argv[1:], sys.argv[2:], strict=False))
total, seed = int(flags["--steps"]), flags["--seed"]
run_dir = Path("runs") / f"{flags['--task']}__{Path(sys.argv[0]).stem}__{seed}__{flags['--run-name']}"
run_dir.mkdir(parents=True, exist_ok=True)
signals = []


def note(file: str, text: str) -> None:
    with open(run_dir / file, "a") as out:
        out.write(text + "\n")


def leave(code: int, text: str) -> None:
    print(text, file=sys.stderr)
    sys.exit(code)


lock = open(run_dir / "lock", "a")
try:
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    leave(2, f"{run_dir} is in use by another process")
finished, checkpoint = run_dir / "finished.json", run_dir / "checkpoint.pt"
if finished.exists() and json.loads(finished.read_text())["total_timesteps"] >= total:
    leave(2, f"{run_dir} holds a finished run")
finished.unlink(missing_ok=True)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, _frame: signals.append(signal.Signals(number).name))

begin = json.loads(checkpoint.read_text())["tenth"] % 10 if checkpoint.exists() else 0
print(f"continuing at step {total * begin // 10}", flush=True)
given = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
note("starts", json.dumps({"tenth": begin} | given))
(run_dir / "args.json").write_text(json.dumps({"action_repeat": 2}))
(run_dir / "versions.json").write_text(json.dumps([{"command": sys.argv, "torch": "2"}]))
if begin == 0:
    (run_dir / "metrics.csv").write_text("global_step,env_steps,tag,value\n")

for tenth in range(begin + 1, 11):
    step = total * tenth // 10
    for tag, value in (("eval/episodic_return", step * int(seed)), ("charts/SPS", 50)):
        note("metrics.csv", f"{step},{2 * step},{tag},{value}")
    checkpoint.write_text(json.dumps({"tenth": tenth}))
    gate, begun = os.environ.get("FAKE_GATE"), time.monotonic()
    while tenth == 5 and gate and not Path(gate).exists() and not signals and time.monotonic() < begun + 120:
        time.sleep(0.02)  # not for ever: a test that fails leaves nothing behind
    if signals:
        time.sleep(0.3)  # a second signal would be seen
        note("signals", " ".join(signals))
        leave(75, "checkpoint written, stopped")
    if tenth == 5 and os.environ.get("FAKE_FAIL", "no run") in run_dir.name:
        leave(int(os.environ["FAKE_CODE"]), "a loss is not finite")

finished.write_text(json.dumps({"global_step": total, "total_timesteps": total}))
