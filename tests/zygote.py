"""Starts runs as processes of their own without importing torch and the simulators anew for each.

Reads one JSON request a line from stdin and forks; the child runs the `main()` of the script as `python bmpc.py ARGV`,
in a session of its own, with its own directory, output files, environment variables and, if asked, a moment at which
something happens to it (moments.py). Writes the child's process id and at its end its exit code, minus the number of
a signal that ended it, to a file. With --fresh it imports nothing beforehand, for what depends on how a process begins.
"""

import importlib
import json
import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]


def become(request):
    """Turns this freshly forked process into the run that `request` describes. Returns its exit code."""
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
    import gymnasium
    import shimmy
    import torch

    importlib.import_module("bmpc")
    torch.use_deterministic_algorithms(True)  # imports what takes long
    gymnasium.register_envs(shimmy)
    gymnasium.make("dm_control/cartpole-swingup-v0", disable_env_checker=True).close()  # imports dm_control


def main():
    if "--fresh" not in sys.argv:
        preload()
    for line in sys.stdin:
        if os.fork():
            continue
        request = json.loads(line)  # in a process that waits for the run
        pid = os.fork()
        if pid == 0:
            sys.exit(become(request))
        with open(request["status"], "a") as file:
            print(pid, file=file, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=file, flush=True)
        os._exit(0)


if __name__ == "__main__":
    main()
