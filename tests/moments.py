"""What happens to a run at a chosen moment of it, counted in calls and not in seconds.

Each function takes the script's module, in the process that is about to run it, and plants one event.
"""

import functools
import io
import os
import resource
import signal
import sys


def before(script, path, happen, inside=""):
    """Calls happen(number of the call, its arguments) before every call of `path`: `learn`, `Envs.step_wait`.

    Counts only the calls made while the function `inside` is under way.
    """
    under_way, calls = [], [0]

    def wrapped(path, first, last):
        *owner, name = path.split(".")
        owner = functools.reduce(getattr, owner, script)
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*args, **kwargs):
            first(args)
            try:
                return original(*args, **kwargs)
            finally:
                last()

        setattr(owner, name, wrapper)

    def count(args):
        if under_way or not inside:
            calls[0] += 1
            happen(calls[0], args)

    wrapped(path, count, lambda: None)
    if inside:
        wrapped(inside, under_way.append, under_way.pop)


def send(name):
    """SIGKILL and SIGSTOP to the process; what asks it to stop to its process group, as Ctrl-C and SLURM do."""
    if name in ("SIGKILL", "SIGSTOP"):
        os.kill(os.getpid(), getattr(signal, name))
    else:
        os.killpg(os.getpgrp(), getattr(signal, name))


def strike(script, name, path, number, inside=""):
    """The signal `name` at the `number`-th call of `path`, counting only those made inside the function `inside`."""
    before(script, path, lambda call, _: call == number and send(name), inside)


def strike_half_saved(script, name, number, share):
    """The signal `name` when the `number`-th checkpoint's bytes are written to `share`."""

    def happen(call, args):
        if call == number:
            whole = io.BytesIO()
            original(args[0], whole)
            args[1].write(whole.getvalue()[: int(share * whole.tell())])
            args[1].flush()
            send(name)

    original = script.torch.save
    before(script, "torch.save", happen)


def strike_anywhere(script, name, number):
    """The signal `name` at the `number`-th call or return that a line of the script's main thread makes or sees."""
    seen = [0]

    def profile(frame, event, arg):
        if frame.f_code.co_filename == script.__file__:
            seen[0] += 1
            if seen[0] == number:
                send(name)

    sys.setprofile(profile)


def kill_worker(script, path, number, inside=""):
    """SIGKILL to the last environment's process before the `number`-th call of `path`, a method of Envs."""

    def happen(call, args):
        if call == number:
            args[0].processes[-1].kill()
            args[0].processes[-1].join()

    before(script, path, happen, inside)


def full_disk(script, path, number, size):
    """From the `number`-th call of `path` on, no file can grow past `size` bytes."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    limit = lambda call, _: call == number and resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    before(script, path, limit)


def hide(script, module, path="main", number=1):
    """From the `number`-th call of `path` on, `import module` fails, as where it is not installed."""
    before(script, path, lambda call, _: call == number and sys.modules.update({module: None}))


def compile_only(script, name):
    """With --compile, compiles this of the functions worth compiling and leaves the others as they are."""
    compile_functions = script.compile_functions
    script.compile_functions = lambda *given: script.Functions(**{name: getattr(compile_functions(*given), name)})
