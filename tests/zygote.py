"""A fork server: starts runs as separate processes without importing torch and the simulators for each of them.

It reads one JSON request per line from stdin and forks. The child runs the `main()` of a script as `python bmpc.py
ARGV` would, in its own session, with its own directory, output files, environment variables and optional faults
(moments.py). The process id of the child and, when it ends, its exit code, or minus the number of the signal that ended
it, are written to a file. With --fresh, nothing is imported beforehand, for tests that depend on how a process starts.
"""

import gc
import importlib
import json
import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]


def run_request(request):
    """Run, in this newly forked process, the script that `request` describes. Returns the exit code."""
    os.setsid()
    os.chdir(request["cwd"])
    for fd, name in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        target = os.open(name, os.O_RDONLY if fd == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(target, fd)
        os.close(target)
    sys.stdout.reconfigure(line_buffering=True)  # as the script does to itself
    os.environ.update(request["environ"])
    script = importlib.import_module(request["script"])
    sys.argv = [script.__file__, *request["argv"]]
    for name, *arguments in request["moments"]:
        getattr(importlib.import_module("moments"), name)(script, *arguments)
    return script.main()


def preload():
    """Import everything that takes long."""
    import gymnasium
    import shimmy
    import torch

    importlib.import_module("bmpc")
    torch.use_deterministic_algorithms(True)  # imports further modules
    gymnasium.register_envs(shimmy)
    gymnasium.make("dm_control/cartpole-swingup-v0", disable_env_checker=True).close()  # imports dm_control
    gc.freeze()  # otherwise a child collects this garbage at its end, and copies all pages, which takes a second


def main():
    if "--fresh" not in sys.argv:
        preload()
    for line in sys.stdin:
        if os.fork():
            continue
        # This process starts the run and waits for it
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            sys.exit(run_request(request))
        with open(request["status"], "a") as file:
            print(pid, file=file, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=file, flush=True)
        os._exit(0)


if __name__ == "__main__":
    main()
