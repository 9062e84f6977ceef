"""Whole runs of the scripts as processes: tests start them, wait for them and compare them."""

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
PATIENCE = 300  # seconds after which a wait fails: the process hangs

NETWORK = "--device cpu --no-compile --enc-dim 32 --mlp-dim 32 --latent-dim 32 --num-q 2 --num-bins 21".split()
PLANNER = "--horizon 2 --iterations 1 --num-samples 16 --num-elites 4 --num-pi-trajs 4".split()
LENGTHS = "--learning-starts 24 --batch-size 16 --num-envs 2 --eval-episodes 1".split()
REANALYZE = "--reanalyze-interval 5 --reanalyze-batch-size 4".split()  # unknown to tdmpc2.py
TINY = NETWORK + PLANNER + LENGTHS + REANALYZE


def words(flags):
    """Turn a dict such as {"num_q": 2, "compile": False} into a command line."""
    argv = []
    for name, value in flags.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        else:
            argv.append(f"--{name}={value}")
    return argv


@functools.cache
def zygote(*flags, environ=()):
    """Start the process that runs are forked from (zygote.py).

    There is one for all tests of a session, and one for each set of flags and environment variables.
    """
    command = [sys.executable, str(TESTS / "zygote.py"), *flags]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | dict(environ), bufsize=0)
    atexit.register(process.wait)
    atexit.register(process.stdin.close)  # runs before the wait: it ends the process
    return process


def patiently(condition, run):
    """Wait until condition() is true. Fails after PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"hangs: {run}"
        time.sleep(0.01)


class Run:
    """A run that was started. With `fresh`, it imports everything itself instead of being forked after the imports."""

    def __init__(self, cwd, argv, moments=(), environ=None, script="bmpc", fresh=False):
        environ = environ or {}
        number = len(list(cwd.glob("stdout.*")))
        self.cwd = cwd
        self.files = {name: cwd / f"{name}.{number}" for name in ("stdout", "stderr", "status")}
        for file in self.files.values():
            file.touch()
        request = {"cwd": str(cwd), "argv": argv, "script": script, "environ": environ, "moments": list(moments)}
        request |= {name: str(file) for name, file in self.files.items()}
        process = zygote("--fresh", environ=tuple(environ.items())) if fresh else zygote()
        process.stdin.write(json.dumps(request).encode() + b"\n")
        patiently(lambda: self.output("status"), self)

    def output(self, name):
        """Return the text so far of "stdout", "stderr", or "status": the process id and, at the end, the exit code."""
        return self.files[name].read_text()

    @property
    def pid(self):
        return int(self.output("status").split()[0])

    @property
    def code(self):
        """The exit code, or minus the number of the signal that ended the run. None while it runs."""
        exit_code = self.output("status").split()[1:]
        return int(exit_code[0]) if exit_code else None

    def wait(self):
        """Wait until the run ends. Returns the run."""
        patiently(lambda: self.code is not None, self)
        return self

    said = functools.partialmethod(output, "stdout")
    warned = functools.partialmethod(output, "stderr")

    def __repr__(self):
        return f"<run {self.pid}, code {self.code}\n{self.said()[-2000:]}\n{self.warned()[-3000:]}>"

    def processes(self):
        """Return the ids of the running processes of its session, including workers."""
        pids = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # the process has ended in the meantime
                state, _, _, session = status.read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.pid and state not in "ZX":
                    pids.append(int(status.parent.name))
        return pids


def start(cwd, *flags, task="cartpole-swingup", **options):
    """Start a run with tiny sizes. `flags` override those in TINY."""
    cwd.mkdir(parents=True, exist_ok=True)
    tiny = NETWORK + PLANNER + LENGTHS if options.get("script") == "tdmpc2" else TINY
    return Run(cwd, ["--task", task, *tiny, *map(str, flags)], **options)


def finish(cwd, *flags, **options):
    """Start a run with tiny sizes and wait until it ends."""
    return start(cwd, *flags, **options).wait()


def gone(run):
    """Wait until all processes of a run that ended are gone. Fails if they stay; otherwise returns True."""
    patiently(lambda: not run.processes(), run)
    return True


def directory(cwd):
    """Return the directory of the only run below `cwd`."""
    (path,) = (cwd / "runs").iterdir()
    return path


def checkpoint(path):
    """Load a checkpoint: a file, or that of the only run below a directory."""
    return torch.load(path if path.is_file() else directory(path) / "checkpoint.pt", weights_only=True)


def numbers(cwd, speeds=False):
    """Return the rows (global_step, env_steps, tag, value) of the only metrics.csv below `cwd`.

    Tags that depend on wall time are included only with `speeds`.
    """
    (path,) = Path(cwd).rglob("metrics.csv")
    with open(path) as file:
        rows = [(int(r["global_step"]), int(r["env_steps"]), r["tag"], float(r["value"])) for r in csv.DictReader(file)]
    return [row for row in rows if speeds or row[2] not in ("charts/SPS", "charts/training_seconds")]


def leaves(tree, path=""):
    """Yield pairs of a path in a tree and the exact value there: of a leaf, or type and size of a container."""
    if isinstance(tree, torch.Tensor):
        yield path, (tree.dtype, tree.shape, tree.numpy().tobytes())
    elif isinstance(tree, (dict, list, tuple)):
        yield path, (type(tree), len(tree))
        for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(part, f"{path}/{key}")
    else:
        yield path, repr(tree)


def differences(a, b):
    """Return the paths where two trees of tensors, numbers and strings differ."""
    a, b = dict(leaves(a)), dict(leaves(b))
    return sorted(path for path in a.keys() | b.keys() if a.get(path) != b.get(path))


def lost(reference, other):
    """Return what differs between the logs and the last checkpoints of two runs that should be equal."""
    a, b = (checkpoint(cwd) | {"log": numbers(cwd)} for cwd in (reference, other))
    for state in (a, b):  # ignore arguments that may differ, and wall time
        state["args"] |= {"total_timesteps": 0, "resume": ""}
        state["training_seconds"] = 0.0
    return differences(a, b)
