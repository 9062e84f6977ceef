"""Whole runs of the scripts as processes, for tests: started, struck, waited for and compared."""

import atexit
import csv
import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PATIENCE = 300  # seconds until a process that should have ended counts as hanging

NETWORK = "--device cpu --no-compile --enc-dim 32 --mlp-dim 32 --latent-dim 32 --num-q 2 --num-bins 21".split()
PLANNER = "--iterations 2 --num-samples 16 --num-elites 4 --num-pi-trajs 4 --reanalyze-interval 5".split()
LENGTHS = "--learning-starts 24 --batch-size 16 --reanalyze-batch-size 4 --num-envs 2 --eval-episodes 1".split()
TINY = NETWORK + PLANNER + LENGTHS


def words(flags):
    """{"num_q": 2, "compile": False} as a command line."""
    options = {name.replace("_", "-"): value for name, value in flags.items()}
    return [f"--{'no-' * (x is False)}{name}" + f"={x}" * (not isinstance(x, bool)) for name, x in options.items()]


class Zygote:
    """The process that the runs are forked from; one for all tests of a session."""

    started = None

    def __init__(self):
        command = [sys.executable, str(TESTS / "zygote.py")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.lock, self.answers, self.runs = threading.Lock(), queue.Queue(), {}
        threading.Thread(target=self.listen, daemon=True).start()
        atexit.register(self.end)
        self.answers.get(timeout=PATIENCE)  # ready

    def listen(self):
        for line in self.process.stdout:
            answer = json.loads(line)
            if "ended" not in answer:
                self.answers.put(answer)
                continue
            while (pid := answer["ended"]) not in self.runs:  # its start is still being noted down
                time.sleep(0.001)
            self.runs.pop(pid).codes.put(answer["code"])

    def end(self):
        self.process.stdin.close()
        self.process.wait()

    def start(self, run, request):
        with self.lock:
            self.process.stdin.write((json.dumps(request) + "\n").encode())
            self.process.stdin.flush()
            pid = self.answers.get(timeout=PATIENCE)["started"]
            self.runs[pid] = run
            return pid


class Run:
    """A started run; a `fresh` one imports all by itself."""

    def __init__(self, cwd, argv, moments=(), environ=None, script="bmpc", fresh=False):
        number = len(list(cwd.glob("stdout.*")))
        self.cwd, self.codes, self.code = cwd, queue.Queue(), None
        self.stdout, self.stderr = cwd / f"stdout.{number}", cwd / f"stderr.{number}"
        self.stdout.touch()
        request = {"cwd": str(cwd), "argv": argv, "script": script, "environ": environ or {}, "moments": list(moments)}
        request |= {"stdout": str(self.stdout), "stderr": str(self.stderr)}
        if fresh:
            command = [sys.executable, str(TESTS / "zygote.py"), json.dumps(request)]
            process = subprocess.Popen(command, env=os.environ | request["environ"], start_new_session=True)
            self.pid = process.pid
            threading.Thread(target=lambda: self.codes.put(process.wait()), daemon=True).start()
        else:
            Zygote.started = Zygote.started or Zygote()
            self.pid = Zygote.started.start(self, request)

    def wait(self):
        """Until it ended; `code` is its exit code, or minus the number of the signal that ended it."""
        if self.code is None:
            self.code = self.codes.get(timeout=PATIENCE)
        return self

    def said(self):
        return self.stdout.read_text()

    def warned(self):
        return self.stderr.read_text()

    def __repr__(self):
        return f"<run {self.pid}, code {self.code}\n{self.said()[-2000:]}\n{self.warned()[-3000:]}>"

    def processes(self):
        """The living processes of its session, workers included."""
        found = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = status.read_text().rpartition(")")[2].split()[:4]
            except OSError:  # it ended meanwhile
                continue
            if int(session) == self.pid and state not in "ZX":
                found.append(int(status.parent.name))
        return found


def start(cwd, *flags, task="cartpole-swingup", **options):
    """A run with tiny sizes: `flags` follow, and override, those of TINY."""
    cwd.mkdir(parents=True, exist_ok=True)
    return Run(cwd, ["--task", task, *TINY, *map(str, flags)], **options)


def finish(cwd, *flags, **options):
    return start(cwd, *flags, **options).wait()


def until(condition, run):
    """Waits for `condition()`; fails if the run ends first."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert run.codes.empty(), f"ended early: {run.wait()}"
        assert time.monotonic() < deadline, f"hangs: {run}"
        time.sleep(0.01)


def gone(run):
    """Whether every process of an ended run is gone, after a while if need be."""
    deadline = time.monotonic() + PATIENCE
    while run.processes():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def directory(cwd):
    """The directory of the one run under `cwd`."""
    (found,) = (cwd / "runs").iterdir()
    return found


def checkpoint(path):
    return torch.load(path if path.is_file() else directory(path) / "checkpoint.pt", weights_only=True)


def column(state, k):
    """Column k of the rows of a checkpoint's buffer, in the order of bmpc.Batch: (steps, E, ...)."""
    obs, A = (state["progress"][name].shape[-1] for name in ("obs", "mean"))
    return state["buffer"]["rows"].split([obs, A, 2 * A, 1, 1, obs], -1)[k]


def numbers(cwd, speeds=False):
    """The lines (global_step, env_steps, tag, value) of the one metrics.csv below `cwd`, with or without speeds."""
    (path,) = Path(cwd).rglob("metrics.csv")
    with open(path) as file:
        rows = [(int(r["global_step"]), int(r["env_steps"]), r["tag"], float(r["value"])) for r in csv.DictReader(file)]
    return [row for row in rows if speeds or row[2] != "charts/SPS"]


def differences(a, b, path=""):
    """Where two trees of tensors, numbers and strings are not the same, to the bit."""
    if type(a) is not type(b):
        return [f"{path}: {type(a).__name__} and {type(b).__name__}"]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{path}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [d for key in a for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{path}: lengths {len(a)} and {len(b)}"]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}/{i}")]
    if isinstance(a, torch.Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()
    else:
        same = a == b or (a != a and b != b)
    return [] if same else [f"{path}: {a if not isinstance(a, torch.Tensor) else ''} differs"]


def lost(reference, other):
    """What differs between two runs that should be the same: log, and everything that their last checkpoints hold."""
    a, b = checkpoint(reference), checkpoint(other)
    for state in (a, b):  # how long the run is to be, and how it was begun
        state["args"] |= {"total_timesteps": 0, "resume": ""}
    found = differences(a, b)
    ours, theirs = numbers(reference), numbers(other)
    if ours != theirs:
        found += [f"log: {len(ours)} and {len(theirs)} lines"]
        found += [f"log: {x} and {y}" for x, y in zip(ours, theirs, strict=False) if x != y][:3]
    return found
