"""What happens to a run at a chosen moment of it, counted in calls and not in seconds.

Each function takes the script's module, in the process that is about to run it, and plants one event.
"""

import functools
import io
import os
import resource
import signal
import sys


def resolve(script, path: str):
    """The owner and name of `path`, as seen from the script: `learn`, `Envs.step_wait`, `torch.save`."""
    owner, names = script, path.split(".")
    for name in names[:-1]:
        owner = getattr(owner, name)
    return owner, names[-1]


def before(script, path: str, happen):
    """Calls happen(number of the call, its arguments) before every call of `path`."""
    owner, name = resolve(script, path)
    original, calls = getattr(owner, name), [0]

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        calls[0] += 1
        happen(calls[0], args)
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


def within(script, path: str) -> list:
    """A list that holds the number of the call of `path` that is under way, and is empty between calls."""
    owner, name = resolve(script, path)
    original, calls, under_way = getattr(owner, name), [0], []

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        calls[0] += 1
        under_way.append(calls[0])
        try:
            return original(*args, **kwargs)
        finally:
            under_way.pop()

    setattr(owner, name, wrapper)
    return under_way


def strike(script, name: str, path: str, number: int, inside: str = ""):
    """The signal `name` at the `number`-th call of `path`, counting only those made inside the function `inside`."""
    under_way, counted = within(script, inside) if inside else [0], [0]

    def happen(_, args):
        counted[0] += bool(under_way)
        if under_way and counted[0] == number:
            os.kill(os.getpid(), getattr(signal, name))

    before(script, path, happen)


def strike_half_saved(script, name: str, number: int, share: float):
    """The signal `name` when the `number`-th checkpoint's bytes are written to `share`."""

    def happen(call, args):
        if call == number:
            whole = io.BytesIO()
            original(args[0], whole)
            args[1].write(whole.getvalue()[: int(share * whole.tell())])
            args[1].flush()
            os.kill(os.getpid(), getattr(signal, name))

    original = script.torch.save
    before(script, "torch.save", happen)


def strike_between_renames(script, name: str, number: int):
    """The signal `name` when the `number`-th checkpoint is written and about to take its place."""
    seen = [0]

    def happen(_, args):
        seen[0] += str(args[1]).endswith("checkpoint.pt")
        if str(args[1]).endswith("checkpoint.pt") and seen[0] == number:
            os.kill(os.getpid(), getattr(signal, name))

    before(script, "os.replace", happen)


def strike_anywhere(script, name: str, number: int):
    """The signal `name` at the `number`-th call or return, of Python or C, seen from a line of the script's main thread."""
    seen = [0]

    def profile(frame, event, arg):
        if frame.f_code.co_filename == script.__file__:
            seen[0] += 1
            if seen[0] == number:
                os.kill(os.getpid(), getattr(signal, name))

    sys.setprofile(profile)


def count_events(script, path: str):
    """Writes to `path` how many calls and returns strike_anywhere can choose from."""
    import atexit

    seen = [0]

    def profile(frame, event, arg):
        seen[0] += frame.f_code.co_filename == script.__file__

    sys.setprofile(profile)
    atexit.register(lambda: (sys.setprofile(None), open(path, "w").write(str(seen[0]))))


def kill_worker(script, worker: int, path: str, number: int):
    """SIGKILL to an environment's process before the `number`-th call of `path`, a method of Envs."""

    def happen(call, args):
        if call == number:
            process = args[0].vector.processes[worker]
            process.kill()
            process.join()

    before(script, path, happen)


def full_disk(script, path: str, first: int, last: int, size: int):
    """From the `first` call of `path` to the `last`, no file can grow past `size` bytes."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def happen(call, args):
        if call in (first, last):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size if call == first else hard, hard))

    before(script, path, happen)


def hide(script, module: str):
    """Makes `import module` fail, as where it is not installed."""
    sys.modules[module] = None


def compile_only(script, *names: str):
    """With --compile, compiles these of the functions worth compiling and leaves the others as they are."""
    compiled = script.compiled

    def some(args, device):
        functions = compiled(args, device)
        return script.Functions(**{name: getattr(functions, name) for name in names})

    script.compiled = some
