"""Robustness of whole runs: kills, stop signals, full disks, damaged checkpoints, broken simulators, evaluation."""

import ctypes.util
import os
import random
import re
import shutil
import signal
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import runs
import torch
from runs import checkpoint, differences, directory, finish, gone, lost, numbers, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import bmpc
import bmpc_dual_policy
import tdmpc2

pytestmark = pytest.mark.filterwarnings("ignore")

# Episodes of 20 decisions in 2 environments, 10 steps of warm-up, 20 pretraining updates, 3 updates per step, a replay
# buffer of 30 steps that wraps around, evaluation and log entries at the same step, random numbers for every purpose.
RUN = "--action-repeat 10 --learning-starts 20 --steps 90 --utd-ratio 1.5 --buffer-size 60".split()
RUN += ["--env-kwargs", '{"task_kwargs": {"time_limit": 2}}']
RUN += "--eval-freq 50 --log-freq 10 --checkpoint-freq 20".split()
RUN += "--reanalyze-interval 4 --no-initial-expert-from-behavior --td-target-use-ema-policy".split()
TOY = "--learning-starts 12 --steps 80 --eval-freq 0 --log-freq 10 --checkpoint-freq 20".split()


def parallel_map(function, *iterables):
    """Map a function over iterables, two calls at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, *iterables))


def run_with_interruptions(cwd, moments, *flags, code=-signal.SIGKILL, **options):
    """Make a run that is interrupted once at each of these moments, and resumed each time, until it ends."""
    for moment in moments:
        run = finish(cwd, *flags, **options, moments=[moment])
        assert run.code == code and gone(run), (moment, run)
        if code == bmpc.EXIT_RESUMABLE:
            assert run.said().splitlines()[-1].startswith("checkpoint at"), (moment, run)
    run = finish(cwd, *flags, **options)
    assert run.code == 0 and gone(run), run
    return run


def error_line(run, code=1):
    """Wait for a run that fails with this exit code. Returns its error message, a single line.

    Simulators may print tracebacks in addition.
    """
    assert run.wait().code == code and gone(run), run
    (line,) = [line for line in run.warned().splitlines() if line.startswith("bmpc.py: error: ")]
    return line


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Make a run without interruptions. Returns its working directory."""
    cwd = tmp_path_factory.mktemp("reference")
    run_with_interruptions(cwd, [], *RUN)
    return cwd


@pytest.fixture
def resumable(reference, tmp_path):
    """Copy the reference run."""
    return Path(shutil.copytree(reference, tmp_path / "copy"))


def check_log(cwd):
    """Check that metrics.csv and the events of TensorBoard hold the same numbers, each once and in order.

    The seconds of training add up over the starts of a run.
    """
    rows_by_tag = {}
    for step, _, tag, value in numbers(cwd, speeds=True):
        rows_by_tag.setdefault(tag, []).append((step, float(np.float32(value))))
    events = EventAccumulator(str(directory(cwd)), size_guidance={"scalars": 0}).Reload()
    assert set(events.Tags()["scalars"]) == rows_by_tag.keys()
    for tag, rows in rows_by_tag.items():
        assert [step for step, _ in rows] == sorted(step for step, _ in rows), tag
        np.testing.assert_array_equal([(e.step, e.value) for e in events.Scalars(tag)], rows, err_msg=tag)
    seconds = [value for _, value in rows_by_tag["charts/training_seconds"]]
    assert seconds == sorted(seconds)


# --- exact resume

EARLY = [
    ("strike_half_saved", "SIGKILL", 1, 0.5),  # the first checkpoint
    ("strike", "SIGKILL", "random_action", 4),  # warm-up
    ("strike", "SIGKILL", "os.replace", 2, "save_checkpoint"),  # the second one, at step 20
    ("strike", "SIGKILL", "train_step", 7),  # pretraining
    ("strike_half_saved", "SIGKILL", 3, 0.99),
    ("strike", "SIGKILL", "update", 10),  # while the simulators run
    ("strike", "SIGKILL", "Envs.step_wait", 13, "store_step"),  # the middle of an episode
    ("strike", "SIGKILL", "derive_seed", 1, "store_step"),  # between two episodes
]
LATE = [
    ("strike", "SIGKILL", "make_expert", 6, "reanalyze"),
    ("strike", "SIGKILL", "run_planner", 9, "evaluate"),
    ("strike", "SIGKILL", "policy_gaussian", 45, "evaluate"),  # with the policy alone
    ("strike", "SIGKILL", "os.replace", 3, "save_checkpoint"),  # the previous checkpoint has unfinished episodes
    ("strike", "SIGKILL", "Envs.step_wait", 3, "start_run_episodes"),  # while the run is resumed
    ("strike", "SIGKILL", "write_json", 3),  # only finished.json is missing
]


# Moments among the calls and returns of a run, which are more than 240 000
RANDOM = [("strike_anywhere", "SIGKILL", n) for n in random.Random(1).sample(range(1, 150_000), 4)]


@pytest.mark.parametrize("kills", [[EARLY, LATE], [RANDOM]], ids=["chosen", "random"])
def test_killed_runs_resume_exactly(reference, tmp_path, kills):
    names = map(str, range(len(kills)))
    parallel_map(lambda name, moments: run_with_interruptions(tmp_path / name, moments, *RUN), names, kills)
    for cwd in tmp_path.iterdir():
        assert lost(reference, cwd) == []
        check_log(cwd)


def check_exact_resume(cwd, moments, *flags, **options):
    """Check that two runs end with the same numbers, of which one is interrupted."""
    make_run = lambda name, moments: run_with_interruptions(cwd / name, moments, *flags, **options)
    parallel_map(make_run, ("uninterrupted", "killed"), ([], moments))
    assert lost(cwd / "uninterrupted", cwd / "killed") == []
    check_log(cwd / "killed")


SIBLINGS = {  # flags, and the second kill; bmpc_dual_policy.py contains all of bmpc_multihead.py
    "bmpc_dual_policy": (
        "--planner-num-dynamics-heads 2 --local-td-bootstrap --dual-policy-enabled --td-target-use-ema-policy "
        "--no-initial-expert-from-behavior",
        ("make_expert", 2, "reanalyze"),
    ),
    "tdmpc2": ("", ("run_planner", 3, "evaluate")),
}


@pytest.mark.parametrize("script", SIBLINGS)
def test_killed_runs_of_siblings_resume_exactly(tmp_path, script):
    """The replay buffer is full after half of the run."""
    flags, second = SIBLINGS[script]
    moments = [("strike", "SIGKILL", "update", 45), ("strike", "SIGKILL", *second)]
    flags = [*TOY, "--eval-freq", 40, "--buffer-size", 40, *flags.split()]
    check_exact_resume(tmp_path, moments, *flags, task="toy:Toy-v0", script=script)


STOP_MOMENTS = [
    ("SIGUSR1", "random_action", 3),
    ("SIGTERM", "update", 9),  # pretraining
    ("SIGINT", "update", 20),  # between the updates of one step
    ("SIGINT", "Envs.step_wait", 25, "evaluate"),  # with the policy alone
    ("SIGUSR1", "save_checkpoint", 1),
    ("SIGTERM", "derive_seed", 1, "start_run_episodes"),
]


def test_stopped_runs_resume_exactly(reference, tmp_path):
    """They write a checkpoint and exit with 75."""
    moments = [("strike", *moment) for moment in STOP_MOMENTS]
    run_with_interruptions(tmp_path, moments, *RUN, code=bmpc.EXIT_RESUMABLE)
    assert lost(reference, tmp_path) == []
    check_log(tmp_path)


def test_second_ctrl_c_ends_the_process_at_once(tmp_path):
    run = finish(tmp_path, *RUN, moments=[("strike", "SIGINT", "train_step", n) for n in (21, 22)])
    assert run.code == -signal.SIGINT and gone(run), run
    assert checkpoint(tmp_path)["global_step"] == 20


def test_exact_resume_with_episodes_of_different_lengths(tmp_path):
    """They have 2 to 10 decisions. When the run is resumed, the environment with the shorter unfinished episode steps
    until its own decisions are repeated; with this seed, it is terminated once and truncated once meanwhile.
    """
    kills = [("strike", "SIGKILL", "Envs.step_wait", 22), ("strike", "SIGKILL", "update", 25)]
    flags = [*TOY, "--seed", 11, "--buffer-size", 40, "--episodic"]
    check_exact_resume(tmp_path, kills, *flags, task="toy:ToyTerminates-v0")
    cwd = tmp_path / "uninterrupted"
    tags = [tag for _, _, tag, _ in numbers(cwd)]
    terminated = checkpoint(cwd)["buffer"]["rows"][..., -4].sum()  # the buffer holds the last 20 of 40 steps
    assert "losses/termination" in tags and 0 < terminated < tags.count("charts/episodic_length")


NOT_REPRODUCIBLE = [  # task, flags, length of an episode, valid windows of each environment
    ("ToyNoise", [], 10, 9 + 6 + 9 + 9 + 2),  # episodes of 10 and 7 decisions; then of 10, 10 and 3
    ("ToyLong", ["--buffer-size", 24], 100, 11),  # the buffer holds the last 12 steps
]


@pytest.mark.parametrize("task, flags, length, windows", NOT_REPRODUCIBLE)
def test_new_episodes_if_the_old_ones_are_not_reproducible(tmp_path, task, flags, length, windows):
    """The simulator is not deterministic, or the replay buffer no longer holds the whole episode."""
    options = {"task": f"toy:{task}-v0"}
    stopped = finish(tmp_path, *TOY, *flags, **options, moments=[("strike", "SIGTERM", "Envs.step_wait", 17)])
    before = checkpoint(tmp_path)
    assert stopped.code == bmpc.EXIT_RESUMABLE and before["buffer"]["episode_step"].tolist() == [17 % length] * 2
    run = finish(tmp_path, *TOY, *flags, **options)
    assert run.code == 0 and "of environments [0, 1] cannot be continued" in run.warned(), run
    after = checkpoint(tmp_path)
    assert after["episode"].tolist() == (before["episode"] + 1 + 23 // length).tolist()
    assert after["buffer"]["episode_step"].tolist() == [23 % length] * 2
    assert after["buffer"]["valid_start"].sum() == 2 * windows


COMPILED = [*TOY, *"--compile --steps 34 --checkpoint-freq 8 --horizon 1".split()]  # a small graph
# A g++ that, at its first call for a model, sends SIGTERM to its process group
COMPILER = """#!/bin/sh
PATH='{path}'  # without the directory of this file, so that torch's cache takes it for the same compiler
case "$*" in *.main.cpp*) touch {stopped}; kill -TERM 0;; esac
exec g++ "$@"
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_compiled_runs_resume_exactly(tmp_path):
    """A run is killed, then stopped while it compiles. Later runs find compiled functions in the compiler's cache."""
    uninterrupted, killed, stopped, compiler = (
        tmp_path / name for name in ("uninterrupted", "killed", "stopped", "g++")
    )
    compiler.write_text(COMPILER.format(stopped=stopped, path=os.environ["PATH"]))
    compiler.chmod(0o755)

    def compiled_run(cwd, *moments, function="policy_loss", **environ):
        moments = [("compile_only", function), *moments]
        return finish(cwd, *COMPILED, task="toy:Toy-v0", moments=moments, environ=environ)

    reference_run = compiled_run(uninterrupted)
    run = compiled_run(killed, ("strike", "SIGKILL", "reanalyze", 3))
    assert reference_run.code == 0 and run.code == -signal.SIGKILL and gone(run), run
    parts = re.findall(r"^(compiling|compiled) part (\d+)(?: \.\.\.| in \d+ s)$", run.said(), re.M)
    numbers_of_parts = range(1, len(parts) // 2 + 1)
    assert parts and parts == [(word, str(n)) for n in numbers_of_parts for word in ("compiling", "compiled")]
    run = compiled_run(killed, function="plan", PATH=f"{tmp_path}:{os.environ['PATH']}")  # the plan is not in it
    assert run.code == bmpc.EXIT_RESUMABLE and gone(run) and stopped.exists(), run
    assert "compiling part 1 ..." in run.said(), run  # the compiler was found in the cache
    run = compiled_run(killed)
    assert run.code == 0 and "resuming at step 24" in run.said() and lost(uninterrupted, killed) == [], run


# --- run directories


def test_second_process_in_the_same_directory_is_rejected(tmp_path):
    first = start(tmp_path, *RUN, moments=[("strike", "SIGSTOP", "random_action", 3)])
    runs.patiently(lambda: "checkpoint at" in first.said(), first)
    second = finish(tmp_path, *RUN)
    os.kill(first.pid, signal.SIGKILL)
    assert "in use by another process" in error_line(second, 2)
    assert first.wait().code == -signal.SIGKILL and gone(first)


def resolved_args(*flags):
    """Return the arguments of a run with these flags, as the run itself uses them."""
    return bmpc.resolve_args(bmpc.parse_args(list(map(str, flags))))[0]


def open_run(cwd, monkeypatch, *flags):
    """Open a run directory with these flags. Returns the arguments and the checkpoint to resume from."""
    monkeypatch.chdir(cwd)
    args = resolved_args(*flags)
    return args, bmpc.open_run_directory(args)[1]


SAME_FLAGS = ["--task", "cartpole-swingup", *runs.TINY, *RUN]


def refusal(cwd, *flags):
    """Return the message with which the run in this directory is not resumed with these flags."""
    path = directory(cwd)
    with pytest.raises(bmpc.UsageError) as error:
        bmpc.check_resumable(path, bmpc.read_checkpoint(path), resolved_args(*SAME_FLAGS, *flags))
    return str(error.value)


def test_finished_runs(reference, tmp_path):
    """The same command is rejected with advice. With more steps, the run goes on; with fewer, it is rejected."""
    assert finish(tmp_path, *RUN, "--steps", 50).code == 0
    message = refusal(tmp_path, "--steps", 50)
    assert all(hint in message for hint in ("finished", "--steps", "--run-name", "--evaluate")), message
    assert finish(tmp_path, *RUN, "--steps", 90).code == 0
    assert lost(reference, tmp_path) == []
    check_log(tmp_path)
    for _ in range(2):  # the second time, without finished.json
        assert "a finished run of 90" in refusal(tmp_path, "--steps", 30)
        (directory(tmp_path) / "finished.json").unlink(missing_ok=True)


OTHER_FLAGS = {
    "lr": "--lr=1e-4",
    "preset": "--preset=small",
    "td_target_use_ema_policy": "--no-td-target-use-ema-policy",
}
RESUMABLE_FLAGS = (
    "--steps=200 --log-freq=7 --eval-freq=0 --eval-episodes=3 --checkpoint-freq=3 --compile --no-cudagraphs --track"
)
RESUMABLE_FLAGS += " --capture-video --profile --matmul-precision=highest --no-torch-deterministic --wandb-entity=me"


def test_only_arguments_that_leave_learning_as_it_is_may_change_in_a_resumed_run(resumable, monkeypatch):
    known = "device torch_deterministic track wandb_project_name wandb_entity capture_video profile eval_freq "
    known += "eval_episodes log_freq checkpoint_freq keep_replay resume evaluate total_timesteps compile cudagraphs "
    known += "matmul_precision"
    for script in (bmpc, bmpc_dual_policy, tdmpc2):
        metadata = script.field_metadata()
        assert {name for name in metadata if script.RESUMABLE in metadata[name]} == set(known.split())
    path = directory(resumable).relative_to(resumable)
    state = checkpoint(resumable)
    for flags in (SAME_FLAGS, ["--resume", path]):
        for name, flag in OTHER_FLAGS.items():
            with pytest.raises(bmpc.UsageError, match=rf"different arguments .*{name} .*--run-name"):
                open_run(resumable, monkeypatch, *flags, flag)
    del state["args"]["preset"]  # as if the flag did not exist when the run was started
    torch.save(state, path / "checkpoint.pt")
    for flags in (SAME_FLAGS, ["--resume", path], ["--resume", f"./{path}/"]):
        args, state = open_run(resumable, monkeypatch, *flags, *RESUMABLE_FLAGS.split())
        assert (args.batch_size, args.env_id, args.log_freq) == (16, "dm_control/cartpole-swingup-v0", 7)
        assert args.preset == "full" and state["global_step"] == 90


@pytest.mark.parametrize("removed", ["checkpoint.pt", "checkpoint.pt finished.json"])
def test_the_log_of_a_run_without_its_checkpoint_is_not_overwritten(resumable, monkeypatch, removed):
    for name in removed.split():
        (directory(resumable) / name).unlink()
    before = {file: file.read_bytes() for file in directory(resumable).iterdir()}
    with pytest.raises(bmpc.UsageError, match="holds the log of a run without its checkpoint; move it, or use --run-"):
        open_run(resumable, monkeypatch, *SAME_FLAGS)
    assert {file: file.read_bytes() for file in directory(resumable).iterdir()} == before


# --- damaged checkpoints


class Command:
    """An object that runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("cd runs/* && touch ran",)


DAMAGES = {  # test_fuzz.py tests flipped bits and truncated files
    "empty": lambda path: os.truncate(path, 0),
    "text": lambda path: path.write_text("These are not the weights you are looking for."),
    "another zip": lambda path: zipfile.ZipFile(path, "w").writestr("readme", "nothing"),
    "other tensors": lambda path: torch.save({"state_dict": {"weight": torch.zeros(3)}}, path),
    "an unknown format": lambda path: torch.save(checkpoint(path) | {"format": 0}, path),
    "an older format": lambda path: torch.save(checkpoint(path) | {"script": "bmpc.py, format 2"}, path),
    "a command": lambda path: torch.save(checkpoint(path) | {"format": Command()}, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_rejected_and_left_unchanged(resumable, monkeypatch, damage):
    path = directory(resumable)
    DAMAGES[damage](path / "checkpoint.pt")
    before = {file: file.read_bytes() for file in path.iterdir()}
    ways = [["--resume", path], ["--evaluate", path], SAME_FLAGS]
    for flags in ways if damage == "text" else ways[:1]:
        with pytest.raises(bmpc.RunError, match=r"^\S*checkpoint.pt cannot be used: "):
            open_run(resumable, monkeypatch, *flags)
    assert {file: file.read_bytes() for file in path.iterdir()} == before


# --- failures


FAULTS = {  # fault: step of the last checkpoint, error message
    ("kill_worker", "Envs.step_async", 16): (20, r"step \d+: the process of an environment died"),
    # torch.save itself would report an unexpected position
    ("full_disk", "save_checkpoint", 3, 9_000): (40, "step 60: the checkpoint cannot be written: OSError: .*too large"),
    ("kill_worker", "Envs.step_wait", 16, "evaluate"): (40, "step 50: the process of an environment died"),
    ("full_disk", "MetricsLogger.add", 8, 2_500): (60, r"step 60: .*File too large"),
}


def test_runs_resume_after_full_disks_and_killed_workers(reference, tmp_path):
    for moment, (step, message) in FAULTS.items():
        line = error_line(finish(tmp_path, *RUN, moments=[moment]))
        assert re.search(message, line), line
        assert checkpoint(tmp_path)["global_step"] == step
        assert not list(tmp_path.rglob("*.tmp"))
    assert finish(tmp_path, *RUN).code == 0
    assert lost(reference, tmp_path) == []
    check_log(tmp_path)


FAILURES = {
    "ToyBroken": "10 episodes in a row failed, the last one with RuntimeError: this simulator fails",
    "ToyUnmade": "the process of an environment died",
    "ToyRender --eval-freq 20 --capture-video": "step 20: the process of an environment died",
    "Toy --lr 1e30": r"step \d+: losses/\S+ is not finite",
}


@pytest.mark.parametrize("command", FAILURES)
def test_error_messages_of_simulators_and_models(tmp_path, command):
    name, *flags = command.split()
    line = error_line(finish(tmp_path, *TOY, *flags, task=f"toy:{name}-v0"))
    assert re.search(FAILURES[command], line), line
    for path in tmp_path.rglob("checkpoint.pt"):
        assert all(x.isfinite().all() for x in checkpoint(path)["model"].values())


# --- logging, evaluation and video


HAS_RENDERER = ctypes.util.find_library("EGL") or ctypes.util.find_library("OSMesa")
FILM = {"task": "toy:ToyFilm-v0", "environ": {"MUJOCO_GL": "disable"}}  # frame t of an episode has the brightness 20 t
OUTPUT_FLAGS = {
    "default": "",
    "none": "--log-freq 0 --checkpoint-freq 0",
    "frequent": "--eval-freq 30 --eval-episodes 3 --log-freq 1 --checkpoint-freq 6 --capture-video",
}


COUNTERS = "global_step pretraining_updates updates obs prev_mean episode episode_return finished_episodes".split()


def state(cwd):
    return [checkpoint(cwd)[name] for name in ("model", "optimizers", "buffer", *COUNTERS)]


def frames(path):
    """Read a video: (frames, height, width, 3)."""
    return np.stack(imageio.mimread(path))


def check_film(path):
    """Check that a film shows one episode of the toy: its 10 decisions, in order."""
    assert (abs(frames(path).mean((1, 2, 3)) - 20 * np.arange(10)) < 5).all()


def test_output_flags_do_not_change_training(tmp_path):
    """Evaluations film their first episode."""
    returns = lambda cwd: [row for row in numbers(cwd) if "charts/episodic" in row[2]]
    make_run = lambda name: finish(tmp_path / name, *TOY, *OUTPUT_FLAGS[name].split(), **FILM)
    for run in parallel_map(make_run, OUTPUT_FLAGS):
        assert run.code == 0 and differences(state(tmp_path / "default"), state(run.cwd)) == [], run
        assert returns(tmp_path / "default") == returns(run.cwd) and len(returns(run.cwd)) == 2 * 8
    films = sorted(tmp_path.rglob("*.mp4"))
    assert [path.name for path in films] == ["30.mp4", "60.mp4", "80.mp4"]
    for path in films:
        check_film(path)


def test_evaluating_a_checkpoint(reference, resumable):
    """It repeats the last evaluation of the run and changes no file. A video is an additional file."""
    path = directory(reference)
    before = {file: file.read_bytes() for file in path.iterdir()}
    run = start(reference, "--evaluate", path).wait()
    assert run.code == 0 and {file: file.read_bytes() for file in path.iterdir()} == before, run
    lines = [line for line in (reference / "stdout.0").read_text().splitlines() if "step 90: evaluation" in line]
    assert len(lines) == 1 and lines[0] in run.said()
    others = start(reference, "--evaluate", path, "--num-envs", 1), start(reference, "--evaluate", path, "--num-q", 5)
    assert others[0].wait().code == 0, others[0]  # only arguments of the model have to match
    assert "does not fit the model: target_value.layers.0.bias" in error_line(others[1], 2)
    if not HAS_RENDERER:
        pytest.skip("no renderer: only the video is not tested")
    run = start(resumable, "--evaluate", directory(resumable), "--capture-video", fresh=True).wait()
    assert run.code == 0, run
    film = frames(directory(resumable) / "videos" / "evaluate-90.mp4")
    assert film.shape == (20, 480, 640, 3)
    assert film[0].std() > 10 and abs(film[-1].astype(int) - film[0]).max() > 100  # neither one color nor one picture


def test_missing_optional_dependencies(tmp_path):
    """Without a compiler, wandb, a renderer and imageio, a run warns and continues.

    With the flags that need them, and with --profile, it learns exactly what it learns without these flags.
    """
    environ = {"CXX": "false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    options = {"environ": environ, "moments": [("hide", "wandb"), ("hide", "imageio.v2", "evaluate", 2)]}
    flags = "--compile --eval-freq 10 --capture-video --track --profile".split()
    toy = [*TOY, "--steps", 20]
    run = finish(tmp_path / "warned", *toy, *flags, task="toy:Toy-v0", fresh=True, **options)
    assert run.code == 0 and "compiled" not in run.said(), run
    warnings = re.findall("^warning: (no working compiler|continuing without|rendering|no video)", run.warned(), re.M)
    assert warnings == ["no working compiler", "continuing without", "rendering", "no video", "no video"], run
    assert run.warned().count("arning") == len(warnings) and run.warned().count("ModuleNotFound") == 2, run
    trace = (directory(run.cwd) / "trace-0.json").read_text()
    assert all(f'"name": "{part}"' in trace for part in ("act", "environment", "reanalyze", "update"))
    plain = finish(tmp_path / "plain", *toy, task="toy:Toy-v0")
    assert plain.code == 0 and differences(state(plain.cwd), state(run.cwd)) == [], plain
