"""A stand-in for the training scripts in the tests of the sweeps: the same files, signals and exit codes, no learning.

It writes ten checkpoints, one after the other. Each start appends a line to `starts` in the run directory, each signal
appends its name to `signals`. Environment variables:

    FAKE_GATE       halfway through, wait until this file exists
    FAKE_STOP_GATE  after a signal, wait until this file exists
    FAKE_FAIL       if the name of the run directory contains this, end halfway with the exit code FAKE_CODE
    FAKE_ERROR      end before anything else, with the exit code FAKE_CODE and this message
"""

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

STOP_SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
    STOP_SIGNALS.append(signal.SIGHUP)

script = Path(sys.argv[0])
flags = dict(zip(sys.argv[1:], sys.argv[2:], strict=False))
total_timesteps, seed = int(flags["--steps"]), flags["--seed"]
run_dir = Path("runs") / f"{flags['--task']}__{script.stem}__{seed}__{flags['--run-name']}"
run_dir.mkdir(parents=True, exist_ok=True)
received_signals = []
deadline = time.monotonic() + 120


def append_line(file: str, text: str) -> None:
    with open(run_dir / file, "a") as out:
        out.write(text + "\n")


def receive(number: int, _frame: object) -> None:
    received_signals.append(number)
    append_line("signals", signal.Signals(number).name)


def is_shut(gate: str) -> bool:
    """Whether the run has to wait; not for ever, so that a failed test leaves no process."""
    return gate in os.environ and not Path(os.environ[gate]).exists() and time.monotonic() < deadline


def exit_with(code: int, text: str) -> None:
    print(f"{script.name}: error: {text}", file=sys.stderr)
    sys.exit(code)


if "FAKE_ERROR" in os.environ:
    exit_with(int(os.environ["FAKE_CODE"]), os.environ["FAKE_ERROR"].replace("RUN_DIR", str(run_dir)))
lock = open(run_dir / "lock", "a")
try:
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    exit_with(2, f"{run_dir} is in use by another process")
finished, checkpoint = run_dir / "finished.json", run_dir / "checkpoint.pt"
if finished.exists() and json.loads(finished.read_text())["total_timesteps"] >= total_timesteps:
    exit_with(2, f"{run_dir} holds a finished run of {total_timesteps} decisions; continue it with more --steps")
finished.unlink(missing_ok=True)
for number in STOP_SIGNALS:
    signal.signal(number, receive)

first_tenth = json.loads(checkpoint.read_text())["tenth"] % 10 if checkpoint.exists() else 0
print(f"continuing at step {total_timesteps * first_tenth // 10}", flush=True)
variables = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
append_line("starts", json.dumps({"tenth": first_tenth, "pid": os.getpid(), "parent": os.getppid()} | variables))
(run_dir / "args.json").write_text(json.dumps({"action_repeat": 2}))
(run_dir / "versions.json").write_text(json.dumps([{"command": sys.argv, "torch": "2"}]))
if first_tenth == 0:
    (run_dir / "metrics.csv").write_text("global_step,env_steps,tag,value\n")

for tenth in range(first_tenth + 1, 11):
    step = total_timesteps * tenth // 10
    for tag, value in (("eval/episodic_return", step * int(seed)), ("charts/SPS", 0.5)):
        append_line("metrics.csv", f"{step},{2 * step},{tag},{value}")
    checkpoint.write_text(json.dumps({"tenth": tenth}))
    while tenth == 5 and is_shut("FAKE_GATE") and not received_signals:
        time.sleep(0.02)
    if received_signals:
        while is_shut("FAKE_STOP_GATE"):
            time.sleep(0.02)
        print("checkpoint written, stopped", file=sys.stderr)
        sys.exit(75)
    if tenth == 5 and os.environ.get("FAKE_FAIL", "no run") in run_dir.name:
        exit_with(int(os.environ["FAKE_CODE"]), "a loss is not finite")

finished.write_text(json.dumps({"global_step": total_timesteps, "total_timesteps": total_timesteps}))
