"""Starts runs as processes of their own without importing torch and the simulators anew for each.

Reads one JSON request a line from stdin and forks; the child runs the `main()` of the script as `python bmpc.py ARGV`,
in a session of its own, with its own directory, output files, environment variables and, if asked, a moment at which
something happens to it (moments.py). Answers on stdout: {"started": pid}, and {"ended": pid, "code": ...} at its end.
With a request as its argument it becomes that run itself, for what depends on how a process begins.
"""

import importlib
import json
import os
import selectors
import signal
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
ANSWERS = os.dup(1)


def answer(**message):
    os.write(ANSWERS, (json.dumps(message) + "\n").encode())


def become(request):
    """Turns this freshly forked process into the run that `request` describes. Returns its exit code."""
    if os.getsid(0) != os.getpid():
        os.setsid()
    os.chdir(request["cwd"])
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for fd, name in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        target = os.open(name, os.O_RDONLY if fd == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(target, fd)
        os.close(target)
    os.environ.update(request["environ"])
    script = importlib.import_module(request["script"])
    sys.argv = [script.__file__, *request["argv"]]
    for name, *arguments in request["moments"]:
        getattr(importlib.import_module("moments"), name)(script, *arguments)
    return script.main()


def main():
    import gymnasium
    import shimmy
    import torch

    importlib.import_module("bmpc")
    torch.use_deterministic_algorithms(True)  # imports what takes long
    gymnasium.register_envs(shimmy)
    gymnasium.make("dm_control/cartpole-swingup-v0", disable_env_checker=True).close()  # imports dm_control
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    answer(ready=True)
    children = set()
    while True:
        for key, _ in selector.select():
            if key.fd == woken:
                os.read(woken, 1024)
                continue
            line = b""
            while not line.endswith(b"\n"):
                part = os.read(0, 1 << 16)
                if not part:
                    return
                line += part
            pid = os.fork()
            if pid == 0:
                for fd in (ANSWERS, woken, wake, selector.fileno()):
                    os.close(fd)
                sys.exit(become(json.loads(line)))
            children.add(pid)
            answer(started=pid)
        for pid in list(children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                children.discard(pid)
                answer(ended=pid, code=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    sys.exit(become(json.loads(sys.argv[1])) if len(sys.argv) > 1 else main())
