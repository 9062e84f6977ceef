"""Runs that survive: killed, asked to stop, out of disk, with broken simulators, and watched; as whole processes."""

import ctypes.util
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from runs import checkpoint, differences, directory, finish, gone, lost, numbers, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import bmpc

pytestmark = pytest.mark.filterwarnings("ignore")

# Episodes of 20 decisions in 2 environments, 10 iterations of warm-up, 20 pretraining updates, 3 updates an iteration,
# a ring of 30 steps that wraps around, an evaluation and a line of losses at one step, every kind of draw in use.
RUN = "--action-repeat 10 --learning-starts 20 --steps 90 --utd-ratio 1.5 --buffer-size 60".split()
RUN += ["--env-kwargs", '{"task_kwargs": {"time_limit": 2}}']
RUN += "--eval-freq 50 --log-freq 10 --checkpoint-freq 20".split()
RUN_TDMPC2 = list(RUN)
RUN += "--reanalyze-interval 4 --no-initial-expert-from-behavior --td-target-use-ema-policy".split()
TOY = "--learning-starts 12 --steps 80 --eval-freq 0 --log-freq 10 --checkpoint-freq 20 --iterations 1".split()


def together(call, *arguments):
    """`map`, two calls at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(call, *arguments))


def struck(cwd, moments, *flags, code=-signal.SIGKILL, **options):
    """The run, struck once at each of these moments and each time continued, until it ends."""
    for moment in moments:
        run = finish(cwd, *flags, **options, moments=[moment])
        assert run.code == code and gone(run), (moment, run)
        if code == bmpc.EXIT_RESUMABLE:
            assert run.said().splitlines()[-1].startswith("checkpoint at"), (moment, run)
    run = finish(cwd, *flags, **options)
    assert run.code == 0 and gone(run), run
    return run


def failed(run, code=1):
    """The line with which a run failed, all of its processes being gone; simulators may add tracebacks of their own."""
    assert run.wait().code == code and gone(run), run
    (line,) = [line for line in run.warned().splitlines() if line.startswith("bmpc.py: error: ")]
    return line


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run that nothing happens to."""
    cwd = tmp_path_factory.mktemp("reference")
    struck(cwd, [], *RUN)
    return cwd


@pytest.fixture
def resumable(reference, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(reference, tmp_path / "copy"))


def in_one_line(cwd):
    """Whether metrics.csv and TensorBoard's events hold the same numbers, each once and in order."""
    told = {}
    for step, _, tag, value in numbers(cwd, speeds=True):
        told.setdefault(tag, []).append((step, float(np.float32(value))))
    events = EventAccumulator(str(directory(cwd)), size_guidance={"scalars": 0}).Reload()
    assert set(events.Tags()["scalars"]) == told.keys()
    for tag, line in told.items():
        assert [step for step, _ in line] == sorted(step for step, _ in line), tag
        np.testing.assert_array_equal([(e.step, e.value) for e in events.Scalars(tag)], line, err_msg=tag)
    return True


# --- exact resume

EARLY = [
    ("strike_half_saved", "SIGKILL", 1, 0.5),  # the first checkpoint
    ("strike", "SIGKILL", "random_action", 4),  # warm-up
    ("strike", "SIGKILL", "os.replace", 2, "save_checkpoint"),  # the second one, at step 20, about to take its place
    ("strike", "SIGKILL", "train_step", 7),  # pretraining
    ("strike_half_saved", "SIGKILL", 3, 0.99),
    ("strike", "SIGKILL", "update", 10),  # while the simulators run
    ("strike", "SIGKILL", "Envs.step_wait", 13, "store_step"),  # the middle of an episode
    ("strike", "SIGKILL", "derive_seed", 1, "store_step"),  # between an episode and the next
]
LATE = [
    ("strike", "SIGKILL", "make_expert", 6, "reanalyze"),
    ("strike", "SIGKILL", "run_planner", 9, "evaluate"),
    ("strike", "SIGKILL", "policy_gaussian", 65, "evaluate"),  # with the policy alone
    ("strike", "SIGKILL", "os.replace", 3, "save_checkpoint"),  # episodes are half played in the checkpoint before
    ("strike", "SIGKILL", "Envs.step_wait", 3, "start_run_episodes"),  # while it resumes
    ("strike", "SIGKILL", "write_json", 3),  # all is done but finished.json
]
SIBLINGS = [("strike", "SIGKILL", "update", 26), ("strike", "SIGKILL", "make_expert", 9, "reanalyze")]


def anywhere(seed):
    """Counted in calls and returns, of which a run makes more than 240 000."""
    return [("strike_anywhere", "SIGKILL", n) for n in random.Random(seed).sample(range(1, 150_000), 3)]


@pytest.mark.parametrize("first, second", [(EARLY, LATE), (anywhere(1), anywhere(2))], ids=["chosen", "random"])
def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(reference, tmp_path, first, second):
    together(lambda name, moments: struck(tmp_path / name, moments, *RUN), "ab", (first, second))
    for cwd in tmp_path.iterdir():
        assert lost(reference, cwd) == [] and in_one_line(cwd)


def whole_and_struck(cwd, moments, *flags, **options):
    """Two runs beside each other, one of them struck, that end with the same numbers."""
    together(lambda name, m: struck(cwd / name, m, *flags, **options), ("whole", "killed"), ([], moments))
    assert lost(cwd / "whole", cwd / "killed") == [] and in_one_line(cwd / "killed")


@pytest.mark.parametrize("script", sorted(path.stem for path in runs.ROOT.glob("bmpc_*.py")))
def test_the_scripts_beside_it_survive_too(tmp_path, script):
    whole_and_struck(tmp_path, SIBLINGS, *RUN, script=script)


def test_td_mpc2_survives_too(tmp_path):
    kills = [("strike", "SIGKILL", "update", 26), ("strike", "SIGKILL", "run_planner", 30, "evaluate")]
    whole_and_struck(tmp_path, kills, *RUN_TDMPC2, script="tdmpc2")


ASKED = [
    ("SIGUSR1", "random_action", 3),
    ("SIGTERM", "update", 9),  # pretraining
    ("SIGINT", "update", 20),  # in the middle of an iteration's updates
    ("SIGTERM", "Envs.step_wait", 5, "evaluate"),
    ("SIGINT", "Envs.step_wait", 25, "evaluate"),  # with the policy alone
    ("SIGUSR1", "save_checkpoint", 1),
    ("SIGTERM", "derive_seed", 1, "start_run_episodes"),
]


def test_a_run_asked_to_stop_writes_a_checkpoint_exits_75_and_goes_on(reference, tmp_path):
    struck(tmp_path, [("strike", *moment) for moment in ASKED], *RUN, code=bmpc.EXIT_RESUMABLE)
    assert lost(reference, tmp_path) == [] and in_one_line(tmp_path)


def test_a_second_ctrl_c_waits_for_nothing(tmp_path):
    run = finish(tmp_path, *RUN, moments=[("strike", "SIGINT", "train_step", n) for n in (21, 22)])
    assert run.code == -signal.SIGINT and gone(run), run
    assert checkpoint(tmp_path)["global_step"] == 20


def test_episodes_of_any_length_are_found_again(tmp_path):
    """Of 2 to 10 decisions. With this seed one ends by a termination, and one by time, while it waits for the other."""
    kills = [("strike", "SIGKILL", "Envs.step_wait", 22), ("strike", "SIGKILL", "update", 25)]
    flags = [*TOY, "--seed", 11, "--buffer-size", 40, "--episodic"]
    whole_and_struck(tmp_path, kills, *flags, task="toy:ToyTerminates-v0")
    tags = [tag for _, _, tag, _ in numbers(tmp_path / "whole")]
    terminated = checkpoint(tmp_path / "whole")["buffer"]["rows"][..., -4].sum()  # in the ring's 20 steps of 40
    assert "losses/termination" in tags and 0 < terminated < tags.count("charts/episodic_length")


CUT_SHORT = [  # the windows of each environment: episodes of 10, 7; 10, 10, 3. Of the one under way 12 are left
    ("ToyNoise", [], 10, 8 + 5 + 8 + 8 + 1),
    ("ToyLong", ["--buffer-size", 24], 100, 10),
]


@pytest.mark.parametrize("task, flags, length, windows", CUT_SHORT)
def test_where_an_episode_cannot_be_repeated_the_next_one_begins(tmp_path, task, flags, length, windows):
    """The simulator strays, or the ring no longer holds the episode."""
    options = {"task": f"toy:{task}-v0"}
    asked = finish(tmp_path, *TOY, *flags, **options, moments=[("strike", "SIGTERM", "Envs.step_wait", 17)])
    before = checkpoint(tmp_path)
    assert asked.code == bmpc.EXIT_RESUMABLE and before["buffer"]["episode_step"].tolist() == [17 % length] * 2
    run = finish(tmp_path, *TOY, *flags, **options)
    assert run.code == 0 and "[0, 1] do not reproduce their unfinished episodes; new ones start" in run.warned(), run
    after = checkpoint(tmp_path)
    assert after["episode"].tolist() == (before["episode"] + 1 + 23 // length).tolist()
    assert after["buffer"]["episode_step"].tolist() == [23 % length] * 2
    assert after["buffer"]["valid_start"].sum() == 2 * windows


def test_the_command_line_is_killed_asked_and_continued_from_outside(reference, tmp_path):
    command = [sys.executable, str(runs.ROOT / "bmpc.py"), "--task", "cartpole-swingup", *runs.TINY, *RUN]
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    options = {"cwd": tmp_path, "env": buffered, "stdout": subprocess.PIPE, "text": True}
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, bmpc.EXIT_RESUMABLE), (0, 0)):
        process = subprocess.Popen(command, **options)
        assert any("checkpoint at" in line for line in process.stdout)
        process.send_signal(number)
        assert process.wait(runs.PATIENCE) == code
    assert directory(tmp_path).name == "cartpole-swingup__bmpc__1" and lost(reference, tmp_path) == []


COMPILED = [*TOY, *"--compile --steps 34 --checkpoint-freq 8 --horizon 1 --reanalyze-batch-size 2".split()]  # one graph
COMPILER = """#!/bin/sh
case "$*" in *.main.cpp*) touch {asked}; kill -TERM 0;; esac
exec {compiler} "$@"
"""


@pytest.mark.skipif(not (GXX := shutil.which("g++")), reason="needs g++")
def test_compiled_too_a_run_that_is_killed_or_whose_compiler_is_ends_as_if_it_had_not_been(tmp_path):
    """One after the other: what the first run compiled the next ones find in the compiler's cache."""
    whole, killed, asked, compiler = (tmp_path / name for name in ("whole", "killed", "asked", "g++"))
    compiler.write_text(COMPILER.format(asked=asked, compiler=GXX))
    compiler.chmod(0o755)

    def compiled(cwd, *moments, what="plan", **environ):
        moments = [("compile_only", what), *moments]
        return finish(cwd, *COMPILED, task="toy:Toy-v0", moments=moments, environ=environ)

    end, run = compiled(whole), compiled(killed, ("strike", "SIGKILL", "reanalyze", 3))
    assert end.code == 0 and run.code == -signal.SIGKILL and gone(run), run
    told = [line for line in run.said().splitlines() if line.startswith("compil")]
    assert told and told == ["compiling ...", "compiled"] * (len(told) // 2)
    run = compiled(killed, what="policy_loss", PATH=f"{tmp_path}:{os.environ['PATH']}")  # not in the cache
    assert run.code == bmpc.EXIT_RESUMABLE and gone(run) and asked.exists(), run
    run = compiled(killed)
    assert run.code == 0 and "resuming at step 24" in run.said() and lost(whole, killed) == [], run


# --- one directory, one run


def test_a_second_process_on_the_directory_refuses(tmp_path):
    first = start(tmp_path, *RUN, moments=[("strike", "SIGSTOP", "random_action", 3)])
    runs.patiently(lambda: "checkpoint at" in first.said(), first)
    second = finish(tmp_path, *RUN)
    os.kill(first.pid, signal.SIGKILL)
    assert "in use by another process" in failed(second, 2)
    assert first.wait().code == -signal.SIGKILL and gone(first)


def test_a_finished_run_says_how_to_go_on_and_more_steps_continue_it(reference, tmp_path):
    assert finish(tmp_path, *RUN, "--steps", 50).code == 0
    line = failed(finish(tmp_path, *RUN, "--steps", 50), 2)
    assert all(hint in line for hint in ("finished", "--steps", "--run-name", "--evaluate")), line
    assert finish(tmp_path, *RUN, "--steps", 90).code == 0
    assert lost(reference, tmp_path) == [] and in_one_line(tmp_path)
    for _ in range(2):  # also one that was on its way to more steps
        assert "a finished run of 90" in failed(finish(tmp_path, *RUN, "--steps", 30), 2)
        (directory(tmp_path) / "finished.json").unlink(missing_ok=True)


def opened(cwd, monkeypatch, *flags):
    """The arguments of a start with these flags, and the state that it would continue."""
    monkeypatch.chdir(cwd)
    args, _ = bmpc.resolve_args(bmpc.parse_args(list(map(str, flags))))
    return args, bmpc.open_run_directory(args)[1]


SAME = ["--task", "cartpole-swingup", *runs.TINY, *RUN]
OTHER = {"lr": "--lr=1e-4", "preset": "--preset=small", "td_target_use_ema_policy": "--no-td-target-use-ema-policy"}
FREE = "--steps=200 --log-freq=7 --eval-freq=0 --eval-episodes=3 --checkpoint-freq=3 --compile --no-cudagraphs --track"
FREE += " --capture-video --profile --matmul-precision=highest --no-torch-deterministic --wandb-entity=me"


def test_another_argument_is_another_run_but_of_what_shapes_nothing(resumable, monkeypatch):
    path, before = directory(resumable).relative_to(resumable), checkpoint(resumable)
    for given in (SAME, ["--resume", path]):
        for name, flag in OTHER.items():
            with pytest.raises(bmpc.UsageError, match=rf"other arguments .*{name} .*--run-name"):
                opened(resumable, monkeypatch, *given, flag)
    del before["args"]["preset"]  # as if there had not been this flag
    torch.save(before, path / "checkpoint.pt")
    for given in (SAME, ["--resume", path], ["--resume", f"./{path}/"]):
        args, state = opened(resumable, monkeypatch, *given, *FREE.split())
        assert (args.batch_size, args.env_id, args.log_freq) == (16, "dm_control/cartpole-swingup-v0", 7)
        assert args.preset == "full" and state["global_step"] == 90


# --- checkpoints are whole or absent


class Command:
    """Unpickled by the trusting, it runs a command."""

    def __reduce__(self):
        return os.system, ("cd runs/* && touch ran",)


DAMAGES = {  # of single bits, and of what is cut off, test_fuzz.py knows
    "empty": lambda path: os.truncate(path, 0),
    "text": lambda path: path.write_text("These are not the weights you are looking for."),
    "another zip": lambda path: zipfile.ZipFile(path, "w").writestr("readme", "nothing"),
    "other tensors": lambda path: torch.save({"state_dict": {"weight": torch.zeros(3)}}, path),
    "another script": lambda path: torch.save(checkpoint(path) | {"format": 0}, path),
    "an older format": lambda path: torch.save(checkpoint(path) | {"script": "bmpc.py, format 2"}, path),
    "a command": lambda path: torch.save(checkpoint(path) | {"format": Command()}, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_is_not_usable_is_named_and_nothing_changes(resumable, monkeypatch, damage):
    path = directory(resumable)
    DAMAGES[damage](path / "checkpoint.pt")
    before = {file: file.read_bytes() for file in path.iterdir()}
    for flags in (SAME, ["--resume", path], ["--evaluate", path]):
        with pytest.raises(bmpc.RunError, match=r"^\S*checkpoint.pt cannot be used: "):
            opened(resumable, monkeypatch, *flags)
    assert {file: file.read_bytes() for file in path.iterdir()} == before


# --- failures


FAULTS = {  # and the last checkpoint
    ("kill_worker", "Envs.step_async", 16): (20, r"step \d+: the process of an environment died"),
    ("full_disk", "save_checkpoint", 3, 9_000): (40, "step 60: the checkpoint cannot be written"),
    ("kill_worker", "Envs.step_wait", 16, "evaluate"): (40, "step 50: the process of an environment died"),
    ("full_disk", "MetricsLogger.add", 7, 2_500): (60, r"step 70: .*File too large"),
}


def test_a_full_disk_and_a_dead_worker_are_told_and_leave_a_good_checkpoint(reference, tmp_path):
    for moment, (step, told) in FAULTS.items():
        line = failed(finish(tmp_path, *RUN, moments=[moment]))
        assert re.search(told, line), line
        assert checkpoint(tmp_path)["global_step"] == step
    assert finish(tmp_path, *RUN).code == 0
    assert lost(reference, tmp_path) == [] and in_one_line(tmp_path)


FAILURES = {
    "ToyBroken": "10 episodes in a row failed, the last one by RuntimeError: this simulator fails",
    "ToyUnmade": "the process of an environment died",
    "ToyRender --eval-freq 20 --capture-video": "step 20: the process of an environment died",
    "ToyTerminates --no-episodic": "ended an episode by termination; start a new run without --no-episodic",
    "Toy --lr 1e30": r"step \d+: losses/\S+ is not finite",
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_broken_simulator_and_a_broken_model_are_named_with_their_step(tmp_path, what):
    name, *flags = what.split()
    line = failed(finish(tmp_path, *TOY, *flags, task=f"toy:{name}-v0"), 2 if name == "ToyTerminates" else 1)
    assert re.search(FAILURES[what], line), line
    for path in tmp_path.rglob("checkpoint.pt"):
        assert all(x.isfinite().all() for x in checkpoint(path)["model"].values())


# --- observers


OBSERVERS = {
    "none": "--eval-freq 0 --log-freq 0 --checkpoint-freq 0",
    "many": "--eval-freq 60 --eval-episodes 3 --log-freq 1 --checkpoint-freq 2 --capture-video --profile",
}


PROGRESS = "global_step pretraining_updates updates obs prev_mean episode episode_return finished_episodes".split()


def test_observers_change_nothing(reference, tmp_path):
    trained = lambda cwd: [checkpoint(cwd)[part] for part in ("model", "optimizers", "buffer", *PROGRESS)]
    returns = lambda cwd: [row for row in numbers(cwd) if "charts/episodic" in row[2]]
    watch = lambda name: finish(tmp_path / name, *RUN, *OBSERVERS[name].split(), fresh=name == "many")
    for run in together(watch, OBSERVERS):
        assert run.code == 0 and differences(trained(reference), trained(run.cwd)) == [], run
        assert returns(reference) == returns(run.cwd) and len(returns(run.cwd)) == 8
    assert list(tmp_path.rglob("trace.json"))
    if ctypes.util.find_library("EGL") or ctypes.util.find_library("OSMesa"):
        assert {path.name for path in tmp_path.rglob("*.mp4")} == {"60.mp4", "90.mp4"}


def test_a_checkpoint_is_evaluated_as_the_run_did_it_and_stays_as_it_is(reference):
    path = directory(reference)
    before = {file: file.read_bytes() for file in path.iterdir()}
    run = start(reference, "--evaluate", path).wait()
    assert run.code == 0 and {file: file.read_bytes() for file in path.iterdir()} == before, run
    told = [line for line in (reference / "stdout.0").read_text().splitlines() if "step 90: evaluation" in line]
    assert len(told) == 1 and told[0] in run.said()
    others = start(reference, "--evaluate", path, "--num-envs", 1), start(reference, "--evaluate", path, "--num-q", 5)
    assert others[0].wait().code == 0, others[0]  # of what it was trained with only the model counts
    assert "does not fit the model: target_value.layers.0.bias" in failed(others[1], 2)


def test_without_compiler_wandb_renderer_and_imageio_a_run_goes_on(tmp_path):
    environ = {"CXX": "false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    options = {"environ": environ, "moments": [("hide", "wandb"), ("hide", "imageio.v2", "evaluate", 2)]}
    flags = "--compile --steps 20 --eval-freq 10 --capture-video --track".split()
    run = finish(tmp_path, *TOY, *flags, task="toy:Toy-v0", fresh=True, **options)
    assert run.code == 0 and "compiled" not in run.said(), run
    told = re.findall("^warning: (no working compiler|going on without|rendering|no video)", run.warned(), re.M)
    assert told == ["no working compiler", "going on without", "rendering", "no video", "no video"], run
    assert run.warned().count("arning") == len(told) and run.warned().count("ModuleNotFound") == 2, run
