"""Faults that are injected into a run at a chosen moment, which is counted in calls instead of seconds.

Each function takes the module of the script, in the process that is about to run it, and patches it so that one event
happens later: a signal, a killed worker, a full disk, a missing package.
"""

import functools
import io
import os
import resource
import signal
import sys


def before(script, path, happen, inside=""):
    """Call happen(number of the call, its arguments) before every call of `path`, such as "Envs.step_wait".

    With `inside`, only the calls made while that function runs are counted.
    """
    active_calls = []  # of `inside`
    calls = 0

    def patch(path, on_entry, on_exit):
        *owner, name = path.split(".")
        owner = functools.reduce(getattr, owner, script)
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*args, **kwargs):
            on_entry(args)
            try:
                return original(*args, **kwargs)
            finally:
                on_exit()

        setattr(owner, name, wrapper)

    def count(args):
        nonlocal calls
        if active_calls or not inside:
            calls += 1
            happen(calls, args)

    patch(path, count, lambda: None)
    if inside:
        patch(inside, active_calls.append, active_calls.pop)


def send(name):
    """Send a signal: SIGKILL and SIGSTOP to this process, others to its process group, as Ctrl-C and SLURM do."""
    if name in ("SIGKILL", "SIGSTOP"):
        os.kill(os.getpid(), getattr(signal, name))
    else:
        os.killpg(os.getpgrp(), getattr(signal, name))


def inherit(script, name, handler):
    """Start with this handler of the signal `name`: SIG_IGN as under nohup, SIG_DFL even if the tests run under it."""
    signal.signal(signal.Signals[name], signal.Handlers[handler])


def strike(script, name, path, number, inside=""):
    """Send the signal `name` before the `number`-th call of `path`, of those made while the function `inside` runs."""
    before(script, path, lambda call, _: call == number and send(name), inside)


def strike_half_saved(script, name, number, share):
    """Send the signal `name` when a fraction `share` of the bytes of the `number`-th checkpoint is written."""

    def happen(call, args):
        if call == number:
            state, file = args
            complete = io.BytesIO()
            original(state, complete)
            file.write(complete.getvalue()[: int(share * complete.tell())])
            file.flush()
            send(name)

    original = script.torch.save
    before(script, "torch.save", happen)


def strike_anywhere(script, name, number):
    """Send the signal `name` at the `number`-th profiling event (a call or return) in the script's main thread."""
    events = 0

    def profile(frame, event, arg):
        nonlocal events
        if frame.f_code.co_filename == script.__file__:
            events += 1
            if events == number:
                send(name)

    sys.setprofile(profile)


def kill_worker(script, path, number, inside=""):
    """Kill the process of the last environment before the `number`-th call of `path`, a method of Envs."""

    def happen(call, args):
        if call == number:
            worker = args[0].processes[-1]
            worker.kill()
            worker.join()

    before(script, path, happen, inside)


def full_disk(script, path, number, size):
    """Limit the size of files to `size` bytes, from the `number`-th call of `path` on."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def happen(call, args):
        if call == number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard_limit))

    before(script, path, happen)


def hide(script, module, path="main", number=1):
    """Make `import module` fail, as if it were not installed, from the `number`-th call of `path` on."""

    def happen(call, args):
        if call == number:
            sys.modules[module] = None

    before(script, path, happen)


def compile_only(script, name):
    """Make --compile compile only one of the fields of Functions, and leave the others eager."""
    compile_functions = script.compile_functions
    script.compile_functions = lambda *args: script.Functions(**{name: getattr(compile_functions(*args), name)})


def instead(script, code):
    """Run this code, with the names of the script, instead of the script."""
    script.main = lambda: exec(code, vars(script))
