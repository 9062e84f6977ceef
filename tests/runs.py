"""Whole runs of the scripts as processes, for tests: started, struck, waited for and compared."""

import atexit
import contextlib
import csv
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PATIENCE = 300  # seconds until a process that should have ended counts as hanging

NETWORK = "--device cpu --no-compile --enc-dim 32 --mlp-dim 32 --latent-dim 32 --num-q 2 --num-bins 21".split()
PLANNER = "--iterations 2 --num-samples 16 --num-elites 4 --num-pi-trajs 4".split()
LENGTHS = "--learning-starts 24 --batch-size 16 --num-envs 2 --eval-episodes 1".split()
REANALYZE = "--reanalyze-interval 5 --reanalyze-batch-size 4".split()  # unknown to tdmpc2.py
TINY = NETWORK + PLANNER + LENGTHS + REANALYZE


def words(flags):
    """{"num_q": 2, "compile": False} as a command line."""
    options = {name.replace("_", "-"): value for name, value in flags.items()}
    return [f"--{'no-' * (x is False)}{name}" + f"={x}" * (not isinstance(x, bool)) for name, x in options.items()]


@functools.cache
def zygote(*flags, environ=()):
    """The process that runs are forked from; one for all tests of a session, or one with variables of its own."""
    command = [sys.executable, str(TESTS / "zygote.py"), *flags]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | dict(environ), bufsize=0)
    atexit.register(process.wait)
    atexit.register(process.stdin.close)  # before that
    return process


def patiently(condition, run):
    """Waits for `condition()`."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"hangs: {run}"
        time.sleep(0.01)


class Run:
    """A started run; a `fresh` one imports all by itself."""

    def __init__(self, cwd, argv, moments=(), environ=None, script="bmpc", fresh=False):
        number, environ = len(list(cwd.glob("stdout.*"))), environ or {}
        self.cwd, self.files = cwd, {name: cwd / f"{name}.{number}" for name in ("stdout", "stderr", "status")}
        for file in self.files.values():
            file.touch()
        request = {"cwd": str(cwd), "argv": argv, "script": script, "environ": environ, "moments": list(moments)}
        request |= {name: str(file) for name, file in self.files.items()}
        process = zygote("--fresh", environ=tuple(environ.items())) if fresh else zygote()
        process.stdin.write(json.dumps(request).encode() + b"\n")
        patiently(lambda: self.told("status"), self)

    def told(self, name):
        """What it wrote so far: to stdout, stderr, or of its status: its process id and exit code."""
        return self.files[name].read_text()

    @property
    def pid(self):
        return int(self.told("status").split()[0])

    @property
    def code(self):
        """Once it ended: its exit code, or minus the number of the signal that ended it."""
        return next((int(word) for word in self.told("status").split()[1:]), None)

    def wait(self):
        patiently(lambda: self.code is not None, self)
        return self

    said = functools.partialmethod(told, "stdout")
    warned = functools.partialmethod(told, "stderr")

    def __repr__(self):
        return f"<run {self.pid}, code {self.code}\n{self.said()[-2000:]}\n{self.warned()[-3000:]}>"

    def processes(self):
        """The living processes of its session, workers included."""
        found = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                state, _, _, session = status.read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.pid and state not in "ZX":
                    found.append(int(status.parent.name))
        return found


def start(cwd, *flags, task="cartpole-swingup", **options):
    """A run with tiny sizes: `flags` follow, and override, those of TINY."""
    cwd.mkdir(parents=True, exist_ok=True)
    tiny = NETWORK + PLANNER + LENGTHS if options.get("script") == "tdmpc2" else TINY
    return Run(cwd, ["--task", task, *tiny, *map(str, flags)], **options)


def finish(cwd, *flags, **options):
    return start(cwd, *flags, **options).wait()


def gone(run):
    """Whether every process of an ended run is gone, after a while if need be."""
    patiently(lambda: not run.processes(), run)
    return True


def directory(cwd):
    """The directory of the one run under `cwd`."""
    (found,) = (cwd / "runs").iterdir()
    return found


def checkpoint(path):
    return torch.load(path if path.is_file() else directory(path) / "checkpoint.pt", weights_only=True)


def numbers(cwd, speeds=False):
    """The rows (global_step, env_steps, tag, value) of the only metrics.csv below `cwd`, with or without wall times."""
    (path,) = Path(cwd).rglob("metrics.csv")
    with open(path) as file:
        rows = [(int(r["global_step"]), int(r["env_steps"]), r["tag"], float(r["value"])) for r in csv.DictReader(file)]
    return [row for row in rows if speeds or row[2] not in ("charts/SPS", "charts/training_seconds")]


def leaves(tree, path=""):
    """Pairs of a path and what is there to the bit: a tensor, number or string, or the size of what holds them."""
    if isinstance(tree, torch.Tensor):
        yield path, (tree.dtype, tree.shape, tree.numpy().tobytes())
    elif isinstance(tree, (dict, list, tuple)):
        yield path, (type(tree), len(tree))
        for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(part, f"{path}/{key}")
    else:
        yield path, repr(tree)


def differences(a, b):
    """Where two trees of tensors, numbers and strings are not the same."""
    a, b = dict(leaves(a)), dict(leaves(b))
    return sorted(path for path in a.keys() | b.keys() if a.get(path) != b.get(path))


def lost(reference, other):
    """What differs between two runs that should be the same: log, and everything that their last checkpoints hold."""
    a, b = (checkpoint(cwd) | {"log": numbers(cwd)} for cwd in (reference, other))
    for state in (a, b):  # arguments that may differ, and wall time
        state["args"] |= {"total_timesteps": 0, "resume": ""}
        state["training_seconds"] = 0.0
    return differences(a, b)
