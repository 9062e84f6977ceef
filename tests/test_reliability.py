"""Runs that survive: killed, asked to stop, out of disk, with broken simulators, and watched; as whole processes."""

import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from functorch.compile import make_boxed_func
from runs import checkpoint, differences, directory, finish, gone, lost, numbers, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.backends.common import aot_autograd

import bmpc

pytestmark = pytest.mark.filterwarnings("ignore")

# Episodes of 20 decisions in 2 environments, 10 iterations of warm-up, 20 pretraining updates, 3 updates an iteration, a
# ring of 30 rows an environment that wraps around, and every generator in use.
RUN = "--action-repeat 50 --learning-starts 20 --steps 90 --utd-ratio 1.5 --buffer-size 60 --reanalyze-interval 4".split()
RUN += "--eval-freq 50 --log-freq 10 --checkpoint-freq 20 --no-initial-expert-from-behavior --td-target-use-ema-policy".split()


def together(*calls):
    """Results of calls made at the same time, in pairs."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """A run that nothing happens to."""
    cwd = tmp_path_factory.mktemp("reference")
    run = finish(cwd, *RUN)
    assert run.code == 0 and gone(run), run
    return cwd


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that was asked to stop at its 60th update, with two checkpoints."""
    cwd = tmp_path_factory.mktemp("stopped")
    run = finish(cwd, *RUN, moments=[("strike", "SIGTERM", "update", 20 + 60)])
    assert run.code == bmpc.TRY_AGAIN and gone(run), run
    return cwd


@pytest.fixture
def resumable(stopped, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(stopped, tmp_path / "copy"))


def killed_at(cwd: Path, moments, **options):
    """Kills the run once at each of these moments, each time resuming it, and lets it end."""
    for moment in moments:
        run = finish(cwd, *RUN, **options, moments=[moment])
        assert run.code == -signal.SIGKILL, (moment, run)
        assert gone(run), moment
    run = finish(cwd, *RUN, **options)
    assert run.code == 0 and gone(run), run


def events(path: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run."""
    accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def in_one_line(cwd: Path) -> bool:
    """Whether metrics.csv and TensorBoard's events hold the same numbers, each once and in order."""
    told: dict[str, list] = {}
    for line in (directory(cwd) / "metrics.csv").read_text().splitlines()[1:]:
        step, _, tag, value = line.split(",")
        told.setdefault(tag, []).append((int(step), float(np.float32(value))))
    shown = events(directory(cwd))
    assert shown.keys() == told.keys()
    for tag, line in told.items():
        assert [step for step, _ in line] == sorted(step for step, _ in line), tag
        np.testing.assert_array_equal(np.array(shown[tag]), np.array(line), err_msg=tag)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Exact resume


EARLY = [
    ("strike", "SIGKILL", "act_randomly", 4),  # warm-up, before there is a checkpoint
    ("strike", "SIGKILL", "Log.flush", 1),  # the first evaluation's numbers
    ("strike_half_saved", "SIGKILL", 1, 0.5),  # the first checkpoint
    ("strike_between_renames", "SIGKILL", 1),
    ("strike", "SIGKILL", "learn", 7),  # pretraining
    ("strike", "SIGKILL", "Envs.step_wait", 3),  # the middle of an episode
    ("strike", "SIGKILL", "update", 30),  # with an environment step pending
    ("strike_half_saved", "SIGKILL", 1, 0.99),  # a later checkpoint
]
LATE = [
    ("strike", "SIGKILL", "begin_next", 1),  # between an episode and the next
    ("strike", "SIGKILL", "make_expert", 6, "reanalyze"),
    ("strike", "SIGKILL", "plan_in_chunks", 9, "evaluate"),
    ("strike", "SIGKILL", "write_checkpoint", 2),
    ("strike_between_renames", "SIGKILL", 2),  # the last checkpoint is not yet in the place of the one before
    ("strike", "SIGKILL", "begin_episodes", 1),  # while it resumes
    ("strike", "SIGKILL", "policy_gaussian", 65, "evaluate"),  # with the policy alone
    ("strike", "SIGKILL", "Log.close", 1),  # all is done but finished.json
]


def test_a_run_killed_at_chosen_moments_ends_as_if_it_had_not_been(reference, tmp_path):
    together(lambda: killed_at(tmp_path / "early", EARLY), lambda: killed_at(tmp_path / "late", LATE))
    for name in ("early", "late"):
        assert lost(reference, tmp_path / name) == []
        assert in_one_line(tmp_path / name)


SCRIPTS = sorted(path.stem for path in runs.ROOT.glob("bmpc_*.py"))
SIBLINGS = [
    ("strike", "SIGKILL", "update", 26),
    ("strike_half_saved", "SIGKILL", 1, 0.7),
    ("strike", "SIGKILL", "make_expert", 9, "reanalyze"),
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_beside_it_survive_too(tmp_path, script):
    whole, _ = together(
        lambda: finish(tmp_path / "whole", *RUN, script=script),
        lambda: killed_at(tmp_path / "killed", SIBLINGS, script=script),
    )
    assert whole.code == 0, whole
    assert lost(tmp_path / "whole", tmp_path / "killed") == [] and in_one_line(tmp_path / "killed")


def kill_at_random(cwd: Path, seed: int, span: int, kills: int):
    """Kills the run that often, each time within so many calls and returns from its start, and lets it end."""
    rng = random.Random(seed)
    for _ in range(kills):
        run = finish(cwd, *RUN, moments=[("strike_anywhere", "SIGKILL", rng.randrange(1, span))])
        assert gone(run)
        if run.code == 0:
            return
        assert run.code == -signal.SIGKILL, run
    assert finish(cwd, *RUN).code == 0


def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(reference, tmp_path):
    together(*(lambda seed=seed: kill_at_random(tmp_path / str(seed), seed, 250_000, 4) for seed in (1, 2)))
    for seed in ("1", "2"):
        assert lost(reference, tmp_path / seed) == []
        assert in_one_line(tmp_path / seed)


ASKED = [
    ("SIGUSR1", "act_randomly", 3, ""),
    ("SIGTERM", "update", 9, ""),  # pretraining
    ("SIGINT", "update", 20, ""),  # in the middle of an iteration's updates
    ("SIGTERM", "Envs.step_wait", 5, "evaluate"),
    ("SIGINT", "Envs.step_wait", 25, "evaluate"),  # with the policy alone
    ("SIGTERM", "reanalyze", 2, ""),
    ("SIGUSR1", "snapshot", 1, ""),
    ("SIGTERM", "begin_episodes", 1, ""),
]


def test_a_run_asked_to_stop_writes_a_checkpoint_exits_75_and_goes_on(reference, tmp_path):
    for moment in ASKED:
        run = finish(tmp_path, *RUN, moments=[("strike", *moment)])
        assert run.code == bmpc.TRY_AGAIN and gone(run), (moment, run)
        assert f"{moment[0]}: writing a checkpoint" in run.warned() and "checkpoint at" in run.said().splitlines()[-1]
    assert finish(tmp_path, *RUN).code == 0
    assert lost(reference, tmp_path) == []
    assert in_one_line(tmp_path)


COMPILER = """#!{python}
import os, pathlib, signal, sys
if not pathlib.Path("{asked}").exists() and any(x.endswith(".main.cpp") for x in sys.argv):
    pathlib.Path("{asked}").touch()
    os.kill(0, signal.SIGTERM)
os.execvp("g++", ["g++", *sys.argv[1:]])
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_a_request_to_the_whole_process_group_spares_the_compiler(tmp_path):
    (tmp_path / "compiler").write_text(COMPILER.format(python=sys.executable, asked=tmp_path / "asked"))
    (tmp_path / "compiler").chmod(0o755)
    environ = {"CXX": str(tmp_path / "compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    run = finish(tmp_path, *TOY, "--compile", "--steps", "20", task="toy:Toy-v0", environ=environ, fresh=True)
    assert (tmp_path / "asked").exists() and run.code == bmpc.TRY_AGAIN and gone(run), run
    assert ", compiled" in run.said() and "no working compiler" not in run.warned(), run


def test_signals_wait_for_every_compilation_and_for_nothing_else(monkeypatch):
    handler = torch._dynamo.callback_handler
    monkeypatch.setattr(handler, "start_callbacks", [])
    monkeypatch.setattr(handler, "end_callbacks", [])
    bmpc.Stop.spare_compilers()
    held = lambda: set(bmpc.SIGNALS) <= signal.pthread_sigmask(signal.SIG_BLOCK, [])
    seen = []

    def compiler(graph, example_inputs):
        seen.append(held())
        return make_boxed_func(graph.forward)

    function = torch.compile(lambda x: (x * x).sum(), backend=aot_autograd(fw_compiler=compiler, bw_compiler=compiler))
    value = function(torch.ones(3, requires_grad=True))
    assert seen == [True] and not held()
    value.backward()  # is compiled only now
    assert seen == [True, True] and not held()

    def broken(graph, example_inputs):
        seen.append(held())
        raise ValueError("no compiler")

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        torch.compile(lambda x: x + 1, backend=broken)(torch.ones(3))
    assert seen == [True] * 3 and not held()


def test_a_request_to_stop_waits_for_no_more_than_the_update_under_way(stopped):
    progress = checkpoint(stopped)["progress"]
    assert (progress["pretrained"], progress["updates"], progress["acted"] is None) == (20, 60, False)


def test_the_command_line_is_killed_asked_and_continued_from_outside(reference, tmp_path):
    command = [sys.executable, str(runs.ROOT / "bmpc.py"), "--task", "cartpole-swingup", *runs.TINY, *RUN]
    path = tmp_path / "runs" / "cartpole-swingup__bmpc__1"
    for number, (name, code) in enumerate([("SIGKILL", -signal.SIGKILL), ("SIGTERM", bmpc.TRY_AGAIN), ("", 0)]):
        with open(tmp_path / f"out.{number}", "w") as out:
            process = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT)
            while name and not (process.poll() is None and "checkpoint at" in (tmp_path / f"out.{number}").read_text()):
                assert process.poll() is None, (tmp_path / f"out.{number}").read_text()
                time.sleep(0.05)
            if name:
                process.send_signal(getattr(signal, name))
            assert process.wait(runs.PATIENCE) == code, (tmp_path / f"out.{number}").read_text()
    assert path.is_dir() and lost(reference, tmp_path) == []


def test_compiled_too_a_killed_run_ends_as_if_it_had_not_been(tmp_path):
    flags = "--compile --steps 34 --eval-freq 0 --checkpoint-freq 8 --iterations 1 --learning-starts 12 --horizon 1".split()
    options, some = {"task": "toy:Toy-v0", "fresh": True}, ("compile_only", "plan")
    flags += ["--reanalyze-batch-size", "2"]  # as many states as environments: one graph serves both
    assert finish(tmp_path / "whole", *flags, **options, moments=[some]).code == 0
    struck = finish(tmp_path / "killed", *flags, **options, moments=[some, ("strike", "SIGKILL", "reanalyze", 3)])
    assert struck.code == -signal.SIGKILL and gone(struck) and ", compiled" in struck.said(), struck
    resumed = finish(tmp_path / "killed", *flags, **options, moments=[some])
    assert resumed.code == 0 and "continuing at step 24" in resumed.said(), resumed
    assert lost(tmp_path / "whole", tmp_path / "killed") == []


# ---------------------------------------------------------------------------------------------------------------------
# One directory, one run


def test_a_second_process_on_the_directory_refuses(tmp_path):
    first = start(tmp_path, *RUN, moments=[("strike", "SIGSTOP", "act_randomly", 3)])
    runs.until(lambda: stopped_by_signal(first.pid), first)
    second = finish(tmp_path, *RUN)
    third = finish(tmp_path, "--resume", directory(tmp_path))
    os.kill(first.pid, signal.SIGKILL)
    for refused in (second, third):
        assert refused.code == 2 and "in use by another process" in refused.warned(), refused
    assert first.wait().code == -signal.SIGKILL and gone(first)


def stopped_by_signal(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_a_finished_run_says_how_to_go_on_and_more_steps_continue_it(reference, tmp_path):
    assert finish(tmp_path, *RUN, "--steps", 50).code == 0
    again = finish(tmp_path, *RUN, "--steps", 50)
    last = again.warned().splitlines()[-1]
    assert again.code == 2 and all(x in last for x in ("finished", "--steps", "--run-name", "--evaluate")), again
    more = finish(tmp_path, *RUN, "--steps", 90)
    assert more.code == 0 and "total_timesteps 50 -> 90" in more.said(), more
    a, b = checkpoint(reference), checkpoint(tmp_path)
    for part in ("model", "optimizers", "buffer", "draws"):  # the log has the evaluation at step 50 too
        assert differences(a[part], b[part], part) == []
    assert in_one_line(tmp_path)


def test_fewer_steps_than_are_made_are_refused(resumable):
    run = finish(resumable, *RUN, "--steps", 30)
    assert run.code == 2 and "--steps" in run.warned().splitlines()[-1], run


def opened(cwd: Path, monkeypatch, *flags, task: str = "cartpole-swingup"):
    """What a start with these flags decides about the run under `cwd`."""
    monkeypatch.chdir(cwd)
    return bmpc.open_directory(bmpc.fill_in(bmpc.parse_args(["--task", task, *runs.TINY, *RUN, *map(str, flags)]))[0])


@pytest.mark.parametrize("flag", ["--lr=1e-4", "--batch-size=17", "--reanalyze-interval=0", "--tau=0.5", "--mlp-dim=64"])
def test_the_same_command_with_another_argument_is_another_run(resumable, monkeypatch, flag):
    with pytest.raises(bmpc.Failure, match=flag.split("=")[0].strip("-").replace("-", "_")) as failure:
        opened(resumable, monkeypatch, flag)
    assert failure.value.code == 2 and "--run-name" in str(failure.value) and "--resume" in str(failure.value)


@pytest.mark.parametrize("flag", "--mlp-dim=64 --seed=2 --num-envs=3 --horizon=2 --action-repeat=10 --buffer-size=99 --num-q=3 "
                         "--utd-ratio=2 --learning-starts=30 --model-size=1 --num-bins=7 --no-td-target-use-ema-policy".split())  # fmt: skip
def test_what_shapes_network_or_data_cannot_change(resumable, monkeypatch, flag):
    with pytest.raises(bmpc.Failure) as failure:
        opened(resumable, monkeypatch, flag, "--resume", directory(resumable))
    assert failure.value.code == 2 and flag.split("=")[0].removeprefix("--no-").strip("-").replace("-", "_") in str(failure.value)


def test_what_is_harmless_may_change_and_is_told(resumable, monkeypatch, capsys):
    state = opened(resumable, monkeypatch, "--steps", 200, "--log-freq", 7, "--eval-freq", 0, "--checkpoint-freq", 3)[1]
    assert state["progress"]["updates"] == 60
    said = capsys.readouterr().out
    for change in ("total_timesteps 90 -> 200", "log_freq 10 -> 7", "eval_freq 50 -> 0", "checkpoint_freq 20 -> 3"):
        assert change in said


@pytest.mark.parametrize("spelling", ["{}", "{}/", "./{}"])
def test_resume_by_directory_takes_its_arguments_and_what_is_changed(resumable, monkeypatch, capsys, spelling):
    monkeypatch.chdir(resumable)
    given = spelling.format(directory(resumable).relative_to(resumable))
    args, _ = bmpc.fill_in(bmpc.parse_args(["--resume", given, "--lr", "1e-4"]))
    assert args.batch_size == 16 and args.env_id == "dm_control/cartpole-swingup-v0"
    assert bmpc.open_directory(args)[1]["progress"]["updates"] == 60
    assert "lr 0.0003 -> 0.0001" in capsys.readouterr().out


def test_resume_never_refuses_a_run_that_is_there(resumable):
    run = finish(resumable, *RUN, "--resume", "never")
    assert run.code == 2 and "--run-name" in run.warned().splitlines()[-1], run


def test_resuming_what_is_no_run_is_one_line(tmp_path):
    run = finish(tmp_path, "--resume", "nowhere")
    assert run.code == 2 and len(run.warned().splitlines()) == 1 and not (tmp_path / "nowhere").exists(), run


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints are whole or absent


class Command:
    """Unpickled by the trusting, it runs a command."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def truncate(path: Path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path):
    os.truncate(path, 0)


def flip_a_bit(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4  # within the weights or the buffer
    path.write_bytes(data)


def write_text(path: Path):
    path.write_text("These are not the weights you are looking for.")


def write_another_zip(path: Path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "nothing")


def write_other_tensors(path: Path):
    torch.save({"state_dict": {"weight": torch.zeros(3)}}, path)


def write_the_checkpoint_of_another_run(path: Path):
    state = checkpoint(path)
    state["args"] = dict(state["args"], seed=17)
    torch.save(state, path)


def write_the_checkpoint_of_another_script(path: Path):
    torch.save(checkpoint(path) | {"script": "other.py"}, path)


def write_a_command(path: Path):
    torch.save(checkpoint(path) | {"format": Command(path.parent / "ran")}, path)


def write_a_pickled_command(path: Path):
    path.write_bytes(pickle.dumps(Command(path.parent / "ran")))


DAMAGES = [truncate, empty, flip_a_bit, write_text, write_another_zip, write_other_tensors, write_a_command,
           write_a_pickled_command, write_the_checkpoint_of_another_run, write_the_checkpoint_of_another_script]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_the_checkpoint_before_stands_in_for_a_damaged_one(resumable, capfd, damage):
    path = directory(resumable)
    before = checkpoint(path / "checkpoint.previous.pt")
    damage(path / "checkpoint.pt")
    state = bmpc.read_checkpoint(path)
    assert differences(before, state) == []
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "checkpoint.pt is not usable" in line
    assert not (path / "ran").exists()


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, write_a_command], ids=lambda damage: damage.__name__)
def test_without_a_good_checkpoint_a_run_says_so_and_does_not_begin_anew(resumable, damage):
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        damage(directory(resumable) / name)
    run = finish(resumable, *RUN)
    assert run.code == 1 and "no usable checkpoint" in run.warned().splitlines()[-1], run
    assert not (directory(resumable) / "ran").exists() and "Traceback" not in run.warned()


def test_a_run_continued_from_the_checkpoint_before_ends_as_if_nothing_had_been(reference, resumable):
    flip_a_bit(directory(resumable) / "checkpoint.pt")
    assert finish(resumable, *RUN).code == 0
    assert lost(reference, resumable) == [] and in_one_line(resumable)


def test_a_checkpoint_is_not_changed_by_the_training_that_goes_on_while_it_is_written(tmp_path):
    t, p, log = toy_training(tmp_path)
    t.metrics.add({"loss": torch.ones(())}, 1)
    state = bmpc.snapshot(t, p, log)
    before = pickle.dumps(state)
    t.metrics.add({"loss": torch.ones(())}, 2)
    t.buffer.begin(torch.ones(2, dtype=torch.bool), torch.ones(2, 3))
    p.episode += 1
    p.digest += 1
    with torch.no_grad():
        for x in (*t.model.parameters(), *t.optimizers[0].exp_avg, *t.optimizers[0].steps, t.model.kl_scale, p.mean):
            x.add_(1)
    for generator in t.draws.values():
        torch.rand(3, generator=generator)
    log.add(1, {"x": 2.0})
    assert pickle.dumps(state) == before


def toy_training(tmp_path, *flags):
    args, task = toy_args(*flags)
    t, p = bmpc.set_up(args, task, torch.device("cpu"))
    return t, p, bmpc.Log(tmp_path, 1)


def toy_args(*flags, task: str = "toy:Toy-v0"):
    return bmpc.fill_in(bmpc.parse_args(["--task", task, *runs.TINY, *map(str, flags)]))


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    t, p, log = toy_training(tmp_path)
    with torch.no_grad():
        t.model.policy.last.bias[0, 0, 0] = torch.nan
    with pytest.raises(bmpc.Failure, match="weight is not finite") as failure:
        bmpc.Checkpointer(tmp_path).save(t, p, log)
    assert failure.value.code == 1 and not list(tmp_path.glob("checkpoint*"))


# ---------------------------------------------------------------------------------------------------------------------
# Full disks


def test_on_a_full_disk_a_run_says_so_goes_on_and_loses_no_line(reference, tmp_path):
    moments = [("full_disk", "log_interval", 3, 7, 600)]  # from step 30 to step 70, the output's file included
    run = finish(tmp_path, *RUN, moments=moments)
    assert run.code == 0 and gone(run), run
    assert lost(reference, tmp_path) == [] and in_one_line(tmp_path)


def test_a_full_disk_leaves_the_last_good_checkpoint_to_resume_from(reference, tmp_path):
    struck = ("strike", "SIGKILL", "log_interval", 7)
    run = finish(tmp_path, *RUN, moments=[("full_disk", "log_interval", 5, 99, 2000), struck])
    assert run.code == -signal.SIGKILL, run
    assert checkpoint(tmp_path)["progress"]["global_step"] == 40 and not list(directory(tmp_path).glob("*.tmp"))
    assert finish(tmp_path, *RUN).code == 0
    assert lost(reference, tmp_path) == [] and in_one_line(tmp_path)


def test_a_disk_that_stays_full_is_told_and_the_run_is_not_finished(tmp_path):
    run = finish(tmp_path, *RUN, "--eval-freq", 0, moments=[("full_disk", "log_interval", 5, 99, 2000)])
    assert run.code == 1 and not (directory(tmp_path) / "finished.json").exists(), run


# ---------------------------------------------------------------------------------------------------------------------
# Broken simulators and numbers


@pytest.mark.parametrize("path, inside", [("Envs.step_async", ""), ("Envs.step_wait", "evaluate")])
def test_a_dead_worker_ends_the_run_which_can_be_resumed(reference, resumable, path, inside):
    run = finish(resumable, *RUN, moments=[("kill_worker", 1, path, 6)])
    last = run.warned().splitlines()[-1]
    assert run.code == 1 and gone(run) and "worker 1 (exit code -9) died" in last and "step" in last, run
    assert finish(resumable, *RUN).code == 0
    assert lost(reference, resumable) == []


TOY = "--learning-starts 12 --steps 80 --eval-freq 0 --log-freq 10 --checkpoint-freq 20 --iterations 1".split()
FAILURES = {
    "ToyReward": "step 48: environment 0 returned a reward that is not finite",
    "ToyObservation": "step 48: environment 0 returned an observation that is not finite",
    "ToyError": "step 48: an environment failed: RuntimeError: this simulator fails",
    "ToyExit": "step 48: environment worker 0 (exit code 3)",
    "ToyTerminates": "add --episodic",
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_broken_simulator_is_named_with_its_step(tmp_path, name):
    run = finish(tmp_path, *TOY, task=f"toy:{name}-v0")
    last = run.warned().splitlines()[-1]
    assert run.code == (2 if name == "ToyTerminates" else 1) and FAILURES[name] in last and gone(run), run
    assert "Traceback" not in last


def test_a_loss_that_is_not_finite_is_named_with_its_update(tmp_path):
    run = finish(tmp_path, *TOY, "--lr", "1e30", "--log-freq", "0", task="toy:Toy-v0")
    last = run.warned().splitlines()[-1]
    assert run.code == 1 and "losses/" in last and "not finite at update 2" in last and gone(run), run
    assert not list(directory(tmp_path).glob("checkpoint*"))


def test_a_simulator_that_cannot_be_made_in_its_worker_leaves_nothing_hanging(tmp_path):
    run = finish(tmp_path, *TOY, task="toy:ToyUnmade-v0")
    assert run.code == 1 and gone(run), run


def test_a_simulator_that_does_not_repeat_itself_begins_new_episodes(tmp_path):
    options = {"task": "toy:ToyNoise-v0"}  # 10 decisions an episode
    stopped = finish(tmp_path, *TOY, **options, moments=[("strike", "SIGTERM", "Envs.step_wait", 16)])
    before = checkpoint(tmp_path)["progress"]
    assert stopped.code == 75 and before["episode"].tolist() == [1, 1]
    run = finish(tmp_path, *TOY, **options)
    assert run.code == 0 and "environments [0, 1] do not repeat their episodes; they begin new ones" in run.warned(), run
    after = checkpoint(tmp_path)
    played = 40 - before["global_step"] // 2  # by each environment, in episodes 2, 3, ...
    assert after["progress"]["episode"].tolist() == [2 + played // 10] * 2
    rows, windows = 40 + 1 + after["progress"]["episode"][0], 40 - 2 * (after["progress"]["episode"][0] + 1)
    if played % 10 == 0:
        windows += 2  # the last episode has only begun
    assert after["buffer"]["row"].tolist() == [rows - 1] * 2
    assert (after["buffer"]["tail"] - after["buffer"]["head"]).tolist() == [windows] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Observers


def trained(cwd: Path) -> dict:
    """What training made: everything but the log's own state."""
    state = checkpoint(cwd)
    progress = {k: v for k, v in state["progress"].items() if k != "events_done"}
    return {k: state[k] for k in ("model", "optimizers", "buffer", "draws")} | progress


OBSERVERS = {
    "none": "--eval-freq 0 --log-freq 0 --checkpoint-freq 0",
    "many": "--eval-freq 30 --eval-episodes 3 --log-freq 1 --checkpoint-freq 2 --track --capture-video",
}


def test_observers_change_nothing(reference, tmp_path):
    many = {"fresh": True, "moments": [("hide", "wandb")]}
    none, all_ = together(
        lambda: finish(tmp_path / "none", *RUN, *OBSERVERS["none"].split()),
        lambda: finish(tmp_path / "many", *RUN, *OBSERVERS["many"].split(), **many),
    )
    assert none.code == all_.code == 0, (none, all_)
    assert "going on without Weights & Biases" in all_.warned()
    for name in OBSERVERS:
        assert differences(trained(reference), trained(tmp_path / name)) == []
        returns = [[x for x in numbers(cwd) if "charts/episodic" in x[2]] for cwd in (reference, tmp_path / name)]
        assert returns[0] == returns[1] and len(returns[0]) == 8


@pytest.mark.parametrize("environ", [{"CXX": "nonexistent"}, {"CXX": "false"}], ids=["missing", "broken"])
def test_without_a_compiler_a_run_goes_on_in_eager_mode(tmp_path, environ):
    environ = environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    run = finish(tmp_path, *TOY, "--compile", "--steps", "20", task="toy:Toy-v0", environ=environ, fresh=True)
    assert run.code == 0 and ", eager" in run.said(), run
    assert "no working compiler, going on in eager mode" in run.warned()


def test_without_a_renderer_a_run_goes_on_without_video(tmp_path):
    flags = [*TOY, "--steps", "20", "--eval-freq", "20", "--capture-video"]
    run = finish(tmp_path, *flags, task="toy:Toy-v0")
    assert run.code == 0 and run.warned().count("warning: no video") == 1 and not list(tmp_path.rglob("*.mp4")), run


def test_without_a_graphics_library_a_simulator_is_not_asked_to_render_twice(tmp_path):
    flags = ["--action-repeat", "50", "--steps", "20", "--eval-freq", "10", "--capture-video"]
    run = finish(tmp_path, *flags, environ={"MUJOCO_GL": "glfw", "DISPLAY": ":99"}, fresh=True)
    assert run.code == 0 and run.warned().count("warning: no video") == 1, run
