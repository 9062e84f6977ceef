"""Faults that users report: each kind has the right effect, and advice in a message works when it is followed."""

import errno
import importlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings

import fault_envs
import mujoco
import numpy as np
import pytest
import runs
import torch
from conftest import CPU, ROOT, TASK, FakeEnvs, same, small_args, start
from runs import checkpoint, directory, finish, gone, lost, numbers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import bmpc
import bmpc_multihead

pytestmark = pytest.mark.filterwarnings("ignore")

SHORT = "--learning-starts 12 --steps 30 --eval-freq 0 --log-freq 10 --checkpoint-freq 10".split()


def error_of(run, code):
    """Return the single error line of a run that ended with this exit code."""
    assert run.wait().code == code and gone(run), run
    (line,) = [line for line in run.warned().splitlines() if line.startswith("bmpc.py: error: ")]
    assert "Traceback" not in run.warned(), run
    return line


def run_task(cwd, name, *flags, **options):
    return finish(cwd, *SHORT, *flags, task=f"fault_envs:{name}-v0", **options)


# --- environments


def test_a_constant_action_dimension_gets_its_constant(tmp_path):
    run = run_task(tmp_path, "Constant")
    assert run.code == 0 and "warning" not in run.warned(), run
    args = small_args(env_id="fault_envs:Constant-v0")
    assert bmpc.inspect_task(args).action_dim == 2
    env = bmpc.make_env(args)
    env.reset(seed=0)
    start = env.unwrapped.x[:2].copy()
    env.step(np.float32([0.5, -1.0]))
    np.testing.assert_allclose(env.unwrapped.x[:2], start + 0.1 * np.array([1.0, 0.25]), rtol=1e-6)


def test_bounds_that_float32_cannot_represent_are_refused(tmp_path):
    assert "Huge-v0 has the action space Box" in error_of(run_task(tmp_path, "Huge"), 2)


def test_arrays_of_one_element_are_accepted_as_rewards_and_terminations(tmp_path):
    run = run_task(tmp_path, "Arrays")
    assert run.code == 0 and "warning" not in run.warned(), run
    lengths = [value for _, _, tag, value in numbers(tmp_path) if tag == "charts/episodic_length"]
    assert lengths and set(lengths) == {7.0}


DIVERGES = ["--seed", "6", "--steps", "80", "--eval-freq", "40", "--eval-episodes", "6"]


def test_an_episode_in_which_the_simulator_diverges_is_truncated_and_counted(tmp_path):
    """All three kinds of failure occur: the exception, NaN in an observation, an infinite reward.

    A run that is killed in between resumes exactly.
    """
    killed = tmp_path / "killed"
    for call in (9, 17):
        moment = ("strike", "SIGKILL", "Envs.step_wait", call, "store_step")
        assert run_task(killed, "Diverges", *DIVERGES, moments=[moment]).code == -signal.SIGKILL
    assert run_task(killed, "Diverges", *DIVERGES).code == 0
    tmp_path /= "whole"
    run = run_task(tmp_path, "Diverges", *DIVERGES)
    assert run.code == 0 and lost(tmp_path, killed) == [], run
    for reason in ("FloatingPointError: the simulation diverged", "an observation is not", "a reward is not finite"):
        assert re.search(rf"warning: .*because the simulator failed \(.*{reason}", run.warned()), (reason, run)
    assert "evaluation episode" in run.warned()
    rows = numbers(tmp_path)
    counts = [value for _, _, tag, value in rows if tag == "charts/env_errors"]
    assert counts == [float(n + 1) for n in range(len(counts))] and len(counts) >= 3
    lengths = [value for _, _, tag, value in rows if tag == "charts/episodic_length"]
    assert lengths.count(3.0) == len(counts)  # the fourth step is not part of the episode
    assert lengths.count(10.0) == len(lengths) - len(counts)
    state = checkpoint(tmp_path)
    assert state["env_errors"] == len(counts) and state["buffer"]["rows"].isfinite().all()


def test_the_failed_step_is_in_no_window():
    """Environment 0 fails at its third step, environment 1 never."""

    class Failing(FakeEnvs):
        def step_wait(self):
            obs, reward, terminated, truncated, errors = super().step_wait()
            if len(self.sent) == 3:
                truncated[0], errors[0], self.step[0] = True, "ValueError: NaN", 99
            return obs, reward, terminated, truncated, errors

    args, envs = small_args(horizon=2), Failing([20, 20])
    run = start(args, envs)
    for _ in range(7):
        action, expert = bmpc.random_action(args, 2, run.make_generator("act"))
        envs.step_async(action.numpy())
        bmpc.store_step(run, envs, action, expert, run.prev_mean)
    starts = [divmod(int(i), 2) for i in run.buffer.start_indices]
    assert [step for step, env in starts if env == 0] == [0, 3, 4, 5]  # step 2 failed
    assert [step for step, env in starts if env == 1] == [0, 1, 2, 3, 4, 5]


ERRORS = ["ValueError: NaN"] * 9 + [None] + ["ValueError: NaN"] * 10  # of consecutive episodes


def test_ten_failed_training_episodes_in_a_row_end_a_run():
    run = types.SimpleNamespace(env_errors=0, env_errors_in_a_row=0)
    with pytest.raises(bmpc.RunError, match="^10 episodes in a row failed, the last one with ValueError: NaN"):
        for error in ERRORS:
            run.finished_episodes = [bmpc.FinishedEpisode(0, 0, 1.0, 5, error)]
            bmpc.count_env_errors(run)
    assert run.env_errors == 19


def test_ten_failed_evaluation_episodes_in_a_row_end_a_run():
    class Failing(FakeEnvs):
        def step_wait(self):
            *step, _ = super().step_wait()
            return *step, [ERRORS[len(self.sent) - 1]]

    evaluate = lambda n: bmpc.run_episodes(
        start(small_args(eval_episodes=n), FakeEnvs([5, 5])), Failing([1]), False, []
    )
    assert evaluate(19)[0].tolist() == [0.125] * 19
    with pytest.raises(bmpc.RunError, match="^10 episodes in a row failed"):
        evaluate(20)


def test_a_reset_that_fails_is_tried_with_other_seeds(monkeypatch, capsys):
    seeds = []

    class Failing(fault_envs.Base):
        failures = 9

        def reset(self, *, seed=None, options=None):
            seeds.append(seed)
            obs, info = super().reset(seed=seed)
            if len(seeds) % 2 and len(seeds) <= self.failures:
                raise ValueError("the simulation diverged")
            return obs * (np.nan if len(seeds) <= self.failures else 1), info

    monkeypatch.setattr(bmpc, "make_env", lambda *args: bmpc.TruncateOnError(Failing()))
    with bmpc.Envs(small_args(env_id="fault_envs:Short-v0"), 2) as envs:
        envs.start_episodes(np.array([False, True]), [(0, 0), (1, 0)], np.zeros((2, 3)))
    warning = (
        "warning: environment 1 starts its episode with another seed, because its reset failed (ValueError: the sim"
    )
    assert capsys.readouterr().err.startswith(warning)
    env = bmpc.TruncateOnError(Failing())
    obs, _ = env.reset(seed=7)
    assert np.isfinite(obs).all() and seeds == [7, *(bmpc.derive_seed(7, n) for n in range(1, 10))]
    assert len(set(seeds)) == 10
    Failing.failures = 1
    seeds.clear()
    _, info = env.reset(seed=7)
    assert info == {"env_error": "ValueError: the simulation diverged"} and env.reset(seed=7)[1] == {}
    seeds.clear()
    Failing.failures = 10
    with pytest.raises(RuntimeError, match="^10 resets in a row failed, the last with .*first observation is not fin"):
        env.reset(seed=7)


WORKER_ERRORS = {
    "Unsendable": "step 0: an environment failed: RuntimeError: 10 resets in a row failed, the last with Local: no s",
    "Misshaped": "step 6: an environment failed: ValueError: could not broadcast input array from shape (4,)",
}


@pytest.mark.parametrize("name", WORKER_ERRORS)
def test_an_error_that_a_worker_passes_on_is_named(tmp_path, name):
    """The worker may not be able to send the exception; afterwards, its pipe no longer exists."""
    line = error_of(run_task(tmp_path, name), 1)
    assert WORKER_ERRORS[name] in line


def test_environments_are_closed(tmp_path):
    """Those of the main process, which only inspects them, two for training and one for evaluation."""
    file = tmp_path / "closed"
    flags = ["--eval-freq", "20", "--eval-episodes", "1"]
    run = run_task(tmp_path / "run", "Closes", *flags, environ={"CLOSED_FILE": str(file)})
    assert run.code == 0 and gone(run), run
    pids = file.read_text().split()
    assert len(set(pids)) == 4 and str(run.pid) in pids


def test_a_worker_that_does_not_close_is_killed(monkeypatch):
    monkeypatch.setattr(bmpc, "CLOSE_SECONDS", 0.1)
    hang = lambda self: signal.pause() if multiprocessing.parent_process() else None
    monkeypatch.setattr(fault_envs.Base, "close", hang)
    with bmpc.Envs(small_args(env_id="fault_envs:Short-v0"), 2) as envs:
        processes = envs.processes
    for process in processes:
        process.join(30)
        assert process.exitcode == -signal.SIGKILL


def test_a_full_shared_memory_is_named(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bmpc.AsyncVectorEnv, "__init__", fail)
    with pytest.raises(bmpc.RunError, match="cannot start the processes .*No space left.*/dev/shm"):
        bmpc.Envs(small_args(env_id="fault_envs:Short-v0"), 2)


# --- advice, each followed


def test_episodes_that_terminate_need_no_flag_and_the_advice_without_it_works(tmp_path):
    line = error_of(run_task(tmp_path, "Short", "--horizon", 1, "--no-episodic"), 2)
    assert "start a new run with --episodic and --run-name NAME" in line
    run = run_task(tmp_path, "Short", "--horizon", 1, "--episodic", "--run-name", "mine")
    assert run.code == 0, run
    assert "losses/termination" in {tag for _, _, tag, _ in numbers(tmp_path / "runs" / "Short-v0__bmpc__1__mine")}


def test_episodic_is_off_for_dm_control_and_on_elsewhere_unless_it_is_given():
    def resolve(*flags):
        return bmpc.resolve_args(bmpc.parse_args([*flags, "--device", "cpu"]))[0].episodic

    assert [resolve("--task", "cartpole-swingup", *flag) for flag in ([], ["--episodic"])] == [False, True]
    assert [resolve("--task", "Pendulum-v1", *flag) for flag in ([], ["--no-episodic"])] == [True, False]


def test_episodes_shorter_than_the_horizon_advise_a_smaller_horizon(tmp_path):
    line = error_of(run_task(tmp_path, "Short", "--horizon", 3), 2)
    assert "start a new run with a smaller --horizon and with --run-name NAME" in line
    run = run_task(tmp_path, "Short", "--horizon", 2, "--run-name", "mine")
    assert run.code == 0, run


def test_other_arguments_advise_a_new_run_with_and_without_resume(tmp_path):
    assert run_task(tmp_path, "Arrays").code == 0
    path = directory(tmp_path).relative_to(tmp_path)
    for given in ((), ("--resume", path), ("--resume", path / "checkpoint.pt")):
        line = error_of(run_task(tmp_path, "Arrays", *given, "--utd-ratio", 2), 2)
        without = "without --resume and " if given else ""
        assert f"utd_ratio 1.0 -> 2.0); start a new run {without}with --run-name NAME" in line
    assert run_task(tmp_path, "Arrays", "--utd-ratio", 2, "--run-name", "mine").code == 0


def test_a_run_is_resumed_and_evaluated_by_its_checkpoint_too(tmp_path):
    assert run_task(tmp_path, "Arrays").code == 0
    file = directory(tmp_path).relative_to(tmp_path) / "checkpoint.pt"
    assert runs.start(tmp_path, "--evaluate", file, task="fault_envs:Arrays-v0").wait().code == 0
    assert run_task(tmp_path, "Arrays", "--resume", file, "--steps", 50).code == 0
    assert checkpoint(tmp_path)["global_step"] == 50


def test_a_run_without_replay_can_be_evaluated_but_not_continued(tmp_path):
    assert run_task(tmp_path, "Arrays", "--no-keep-replay").code == 0
    path = directory(tmp_path)
    assert checkpoint(tmp_path)["buffer"] is None
    assert runs.start(tmp_path, "--evaluate", path, task="fault_envs:Arrays-v0").wait().code == 0
    for flags in (["--steps", 80], []):
        line = error_of(run_task(tmp_path, "Arrays", *flags), 2)
        assert "finished with --no-keep-replay, so it cannot be continued" in line and "with --run-name NAME" in line
    assert run_task(tmp_path, "Arrays", "--run-name", "mine").code == 0


def test_a_run_without_replay_that_is_interrupted_keeps_it(tmp_path):
    moment = ("strike", "SIGTERM", "Envs.step_wait", 15)
    run = run_task(tmp_path, "Arrays", "--no-keep-replay", moments=[moment])
    assert run.code == bmpc.EXIT_RESUMABLE and checkpoint(tmp_path)["buffer"] is not None
    assert run_task(tmp_path, "Arrays", "--no-keep-replay").code == 0


def test_a_copy_of_a_script_under_another_name_reads_its_checkpoints(tmp_path, monkeypatch):
    run = start(small_args(), FakeEnvs([5, 7]))
    bmpc.save_checkpoint(run, tmp_path)
    shutil.copy(runs.ROOT / "bmpc.py", tmp_path / "my_idea.py")
    monkeypatch.syspath_prepend(tmp_path)
    my_idea = importlib.import_module("my_idea")
    other = my_idea.Run(small_args(my_idea, seed=2), TASK, CPU)
    my_idea.load_model(other.model, my_idea.read_checkpoint(tmp_path)["model"])
    assert same(other.model.state_dict(), run.model.state_dict())


def test_a_run_of_another_script_is_not_resumed(tmp_path, monkeypatch):
    """bmpc_multihead.py has all arguments of bmpc.py, but not the other way round."""
    monkeypatch.chdir(tmp_path)
    assert run_task(tmp_path, "Arrays").code == 0
    path = directory(tmp_path)
    before = {file: file.read_bytes() for file in path.iterdir()}
    args, _ = bmpc_multihead.resolve_args(bmpc_multihead.parse_args(["--resume", str(path), "--steps", "90"]))
    with pytest.raises(bmpc_multihead.UsageError, match="holds a run of bmpc.py; resume it with that script"):
        bmpc_multihead.open_run_directory(args)
    assert {file: file.read_bytes() for file in path.iterdir()} == before
    bmpc_multihead.save_checkpoint(start(small_args(bmpc_multihead), FakeEnvs([5, 7]), script=bmpc_multihead), tmp_path)
    names = "arguments that this one does not have: ensemble_lr_scaling, local_td_bootstrap, planner_num"
    with pytest.raises(bmpc.RunError, match=names):
        bmpc.read_checkpoint(tmp_path)


def test_weights_that_do_not_fit_are_named():
    model = bmpc.WorldModel(bmpc.TaskInfo(3, 2, None), small_args(), torch.Generator())
    other = bmpc.WorldModel(bmpc.TaskInfo(3, 2, None), small_args(mlp_dim=20), torch.Generator())
    with pytest.raises(bmpc.UsageError, match=r"dynamics.layers.0.bias is \(1, 20\) there and \(1, 12\) here"):
        bmpc.load_model(model, other.state_dict())


# --- the cause of an error


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES, errno.EAGAIN])
def test_only_a_lock_that_is_held_means_in_use(tmp_path, monkeypatch, number):
    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(bmpc.fcntl, "lockf", fail)
    in_use = number in (errno.EACCES, errno.EAGAIN)
    message = "is in use by another process" if in_use else rf"cannot be locked: .*{os.strerror(number)}"
    with pytest.raises(bmpc.UsageError if in_use else bmpc.RunError, match=message):
        bmpc.lock_directory(tmp_path)


def raise_in_train(monkeypatch, tmp_path, error):
    """Run a command line in which training raises an error. Returns the exit code."""

    def fail(*args):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bmpc, "train", fail)
    monkeypatch.setattr(bmpc.signal, "signal", lambda *args: None)
    return bmpc.main(["--task", "fault_envs:Arrays-v0", *runs.TINY, *SHORT])


ALLOCATION = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
COMPILER = "InductorError: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"


@pytest.mark.parametrize(
    "error",
    [RuntimeError(ALLOCATION), RuntimeError(CUBLAS), RuntimeError(COMPILER), MemoryError(), torch.OutOfMemoryError()],
    ids=["cpu", "cublas", "compiler", "python", "cuda"],
)
def test_full_memory_is_named_whoever_reports_it(monkeypatch, tmp_path, capsys, error):
    assert raise_in_train(monkeypatch, tmp_path, error) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(
        "bmpc.py: error: out of memory; try a smaller --buffer-size, --num-samples or --batch-size; if"
    )
    assert not list(tmp_path.rglob("error.txt"))


def test_the_reason_for_not_using_a_gpu_is_printed(monkeypatch, capsys):
    """torch warns if the driver of a GPU is too old, for example; warnings are off in a run."""

    def is_available():
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old.\nUpdate it", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    with warnings.catch_warnings(action="ignore"):
        assert bmpc.setup_torch(bmpc.Args()).type == "cpu"
        reason = "UserWarning: CUDA initialization: The NVIDIA driver on your system is too old."
        assert capsys.readouterr().err == f"warning: no GPU is used: {reason}\n"
        bmpc.setup_torch(bmpc.Args(device="cpu"))
    assert not capsys.readouterr().err


def test_an_unexpected_error_is_one_line_and_its_traceback_a_file(monkeypatch, tmp_path, capsys):
    assert raise_in_train(monkeypatch, tmp_path, KeyError("surprise")) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert re.search(r"step 0: KeyError: 'surprise' \(in fail, test_faults.py, line \d+\); .*error.txt$", line), line
    text = next(tmp_path.rglob("error.txt")).read_text()
    assert text.startswith("Traceback") and "in run_training" in text


# --- streams, signals and encodings


def command(*flags):
    """A command line of the script as a user would type it."""
    task = ["--task", "fault_envs:Arrays-v0"]
    return [sys.executable, str(runs.ROOT / "bmpc.py"), *task, *runs.TINY, *SHORT, *map(str, flags)]


ENVIRON = os.environ | {"PYTHONPATH": str(runs.TESTS), "OMP_NUM_THREADS": "1"}


def test_output_that_nobody_reads_ends_nothing(tmp_path):
    """As with `2>&1 | tee log` and Ctrl-C, where tee ends first. Each line is written at once.

    Then the run is resumed without any stream, where messages must not be written to other files.
    """
    options = {"cwd": tmp_path, "env": ENVIRON | {"PYTHONUNBUFFERED": ""}, "text": True, "start_new_session": True}
    words = command("--steps", 4000)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    assert any("checkpoint at" in line for line in process.stdout)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(runs.PATIENCE) == bmpc.EXIT_RESUMABLE
    step = checkpoint(tmp_path)["global_step"]
    assert step > 0

    process = subprocess.Popen(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words], **options)
    runs.patiently(lambda: any(row[0] > step for row in numbers(tmp_path)), process)
    assert {os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)} == {"/dev/null"}
    process.send_signal(signal.SIGTERM)
    assert process.wait(runs.PATIENCE) == bmpc.EXIT_RESUMABLE
    state = checkpoint(tmp_path)
    assert state["global_step"] > step
    assert state["obs"].abs().max() < 100 and state["buffer"]["rows"].abs().max() < 100
    step = state["global_step"]
    assert subprocess.run(command("--steps", step + 20), capture_output=True, **options).returncode == 0


def test_a_disk_that_was_full_does_not_silence_what_follows(tmp_path):
    class Log(io.FileIO):
        error = OSError(errno.ENOSPC, "No space left on device")

        def write(self, text):
            if self.error:
                raise self.error
            super().write(text)

    stream = bmpc.OutputStream(Log(tmp_path / "log", "w"))
    stream.write(b"this line is lost\n")
    stream.stream.error = None
    stream.write(b"error\n")
    assert (tmp_path / "log").read_text() == "error\n"


@pytest.mark.parametrize("handler, code", [("SIG_DFL", bmpc.EXIT_RESUMABLE), ("SIG_IGN", 0)])
def test_a_closed_terminal_stops_a_run_unless_nohup_ignores_it(tmp_path, handler, code):
    moments = [("inherit", "SIGHUP", handler), ("strike", "SIGHUP", "train_step", 20)]
    run = run_task(tmp_path, "Arrays", moments=moments)
    assert run.code == code and gone(run), run


def test_triton_is_loaded_before_mujoco(tmp_path):
    """Otherwise Mesa's LLVM, which MuJoCo may load, and Triton's crash the process."""
    package = tmp_path / "triton"
    package.mkdir()
    check = "import sys\nopen(__file__ + '.log', 'a').write(f'{\"mujoco\" in sys.modules} ')\nraise ImportError\n"
    (package / "__init__.py").write_text(check)
    words = [sys.executable, str(runs.ROOT / "bmpc.py"), "--task", "cartpole-swingup", "--vmin", "20"]
    ran = subprocess.run(words, cwd=tmp_path, env=ENVIRON | {"PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert ran.returncode == 2 and (package / "__init__.py.log").read_text().startswith("False "), ran


def test_output_is_utf_8_in_any_locale(tmp_path):
    environ = ENVIRON | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ran = subprocess.run(command("--task", "größe"), cwd=tmp_path, env=environ, capture_output=True)
    assert ran.returncode == 2 and "größe".encode() in ran.stderr, ran


def test_what_a_killed_compilation_left_is_deleted(tmp_path, monkeypatch):
    """A complete library is kept, and so is one that another process is just writing."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    contents = {"complete": b"\x7fELF...", "empty": b"", "partial": b"\0" * 99, "young": b""}
    paths = {name: tmp_path / "ab" / f"{name}.main.so" for name in contents}
    paths["empty"].parent.mkdir()
    for name, path in paths.items():
        path.write_bytes(contents[name])
        os.utime(path, (time.time(), time.time() - (0 if name == "young" else 100)))
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        assert len(waits) < 10, "waits forever"
        paths["young"].write_bytes(contents["complete"])

    monkeypatch.setattr(time, "sleep", sleep)
    bmpc.delete_incomplete_libraries()
    assert [name for name, path in paths.items() if path.exists()] == ["complete", "young"]


# --- files of a run


def test_a_damaged_metrics_file_is_named(tmp_path):
    path = tmp_path / "metrics.csv"
    for text in ("global_step,env_steps,tag,value\n1,1,a,1.0\n\0\0\0\n", "global_step\nhalf,a line\n"):
        path.write_text(text)
        with pytest.raises(bmpc.RunError, match="metrics.csv is damaged: .*repair or move it"):
            bmpc.MetricsLogger(tmp_path, small_args(), 5)
        assert path.read_text() == text
    path.rename(tmp_path / "moved.csv")
    bmpc.MetricsLogger(tmp_path, small_args(), 5)


def test_a_damaged_versions_file_is_kept_under_another_name(tmp_path, capsys):
    path = tmp_path / "versions.json"
    path.write_text("")
    bmpc.record_start(path)
    (renamed,) = tmp_path.glob("versions.damaged.*")
    assert renamed.read_text() == "" and len(json.loads(path.read_text())) == 1
    assert "versions.json is damaged; it was renamed" in capsys.readouterr().err


GIT_MESSAGES = {
    "fatal: detected dubious ownership": "fatal: detected dubious ownership",
    "fatal: not a git repository (or any of the parent directories): .git": None,
    "": "git ended with 128",  # it is silent if a signal ends it
}
GIT = """\
#!/bin/sh
[ "$LC_ALL" = C ] || echo "in another language" >&2
[ -z "$MESSAGE" ] || echo "$MESSAGE" >&2
exit 128
"""


@pytest.mark.parametrize("message", GIT_MESSAGES)
def test_an_unknown_commit_is_explained_unless_there_is_no_checkout(tmp_path, monkeypatch, capsys, message):
    git = tmp_path / "git"
    git.write_text(GIT)
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("MESSAGE", message)
    assert bmpc.git_commit(tmp_path) is None
    reason = GIT_MESSAGES[message]
    assert capsys.readouterr().err == (f"warning: the git commit is unknown: {reason}\n" if reason else "")
    git.unlink()
    assert bmpc.git_commit(tmp_path) is None


def test_the_commit_of_a_checkout_tells_whether_files_were_changed(tmp_path):
    git = lambda *words: subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True, text=True)
    git("init")
    (tmp_path / "bmpc.py").write_text("1\n")
    git("add", "bmpc.py")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--message", "first")
    commit = git("rev-parse", "HEAD").stdout.strip()
    assert bmpc.git_commit(tmp_path) == commit and len(commit) == 40
    (tmp_path / "bmpc.py").write_text("2\n")
    assert bmpc.git_commit(tmp_path) == f"{commit}+changes"


def test_the_log_is_complete_although_the_clock_was_set_back(tmp_path, monkeypatch):
    times = iter((2_000_000_000, 1_900_000_000, 1_800_000_000))
    for step in (0, 10, 20):
        now = next(times)
        monkeypatch.setattr(bmpc.time, "time", lambda now=now: now)
        logger = bmpc.MetricsLogger(tmp_path, small_args(), step)
        logger.add(step, {"a": step})
        logger.flush()
        logger.tensorboard.close()
    monkeypatch.undo()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("a")] == [(0, 0.0), (10, 10.0), (20, 20.0)]


def test_the_wandb_id_belongs_to_the_run(tmp_path, monkeypatch):
    """The same after a resume; another for a run in another directory, or begun again after it was deleted."""
    calls = []
    wandb = types.SimpleNamespace(init=lambda **options: calls.append(options["id"]))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for name in ("a", "a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
        bmpc.MetricsLogger(tmp_path / name, small_args(track=True), 0)
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a").mkdir()
    bmpc.MetricsLogger(tmp_path / "a", small_args(track=True), 0)
    assert calls[0] == calls[1] and len(set(calls)) == 3


# --- videos


@pytest.mark.parametrize("task", ["dog-run", "cheetah-run", "quadruped-walk", "fish-swim"])
def test_videos_of_dm_control_use_a_camera_that_follows_the_agent(task):
    env = bmpc.make_env(small_args(env_id=bmpc.resolve_env_id(task), action_repeat=2), render=True)
    options = env.unwrapped.render_kwargs
    mode = env.unwrapped._env.physics.model.cam_mode[options["camera_id"]]
    assert mode in map(int, (mujoco.mjtCamLight.mjCAMLIGHT_TRACK, mujoco.mjtCamLight.mjCAMLIGHT_TRACKCOM))
    assert options["height"] >= 480


def test_videos_of_gymnasium_are_rendered_as_arrays():
    assert bmpc.make_env(small_args(env_id="Pendulum-v1"), render=True).unwrapped.render_mode == "rgb_array"


RENDERERS = [  # environment variables, renderers that work, the one selected, those tried
    ({"DISPLAY": ":99"}, ["egl", "osmesa"], "egl", ["glfw", "egl"]),
    ({"DISPLAY": ":0"}, ["glfw", "egl"], "glfw", ["glfw"]),
    ({}, ["osmesa"], "osmesa", ["egl", "osmesa"]),
    ({}, [], "disable", ["egl", "osmesa"]),
    ({"MUJOCO_GL": "osmesa"}, [], "osmesa", []),
]


@pytest.mark.parametrize("variables, working, selected, tried", RENDERERS)
def test_the_first_renderer_that_works_is_used(monkeypatch, variables, working, selected, tried):
    names = []

    def run(command, env, **options):
        names.append(env["MUJOCO_GL"])
        return types.SimpleNamespace(returncode=0 if names[-1] in working else 1)

    monkeypatch.setattr(bmpc.os, "environ", dict(variables))
    monkeypatch.setattr(bmpc.subprocess, "run", run)
    assert bmpc.select_renderer() == selected and names == tried


SHOW_RENDERER = """
import os, sys, bmpc
bmpc.run_training = lambda *args: print(os.environ["MUJOCO_GL"], "OpenGL" in sys.modules)
bmpc.main(["--task", "cartpole-swingup", *sys.argv[1:]])
"""


@pytest.mark.parametrize("flags, printed", [(["--capture-video"], "osmesa False"), ([], "disable False")])
def test_the_main_process_loads_no_renderer(flags, printed):
    """EGL that is initialized there does not work in the workers."""
    command = [sys.executable, "-c", SHOW_RENDERER, *flags]
    environ = os.environ | {"MUJOCO_GL": "osmesa", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert result.stdout.splitlines()[-1] == printed, result
