"""Whole runs on real simulators, tiny and short: what a run writes, what it repeats, which environments it plays."""

import csv
import json
import math
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT, FakeEnvs, flags, run_loop, small_args, start
from runs import differences

import bmpc

TAGS = set(  # what a run promises to log
    "charts/episodic_return charts/episodic_length charts/SPS "
    "losses/consistency losses/reward losses/value losses/policy losses/total losses/kl losses/kl_scale losses/entropy "
    "losses/grad_norm losses/policy_grad_norm planner/elite_std planner/value planner/executed_minus_mean "
    "eval/episodic_return eval/policy_episodic_return".split()
)
CARTPOLE = flags(  # episodes of 1000 simulator steps are 20 decisions
    task="cartpole-swingup", action_repeat=50, num_envs=2, learning_starts=60, total_timesteps=260, eval_freq=151,
    eval_episodes=2, log_freq=45, checkpoint_freq=100, reanalyze_interval=5, seed=2,
)  # fmt: skip


def command(words, directory):
    return subprocess.run(
        [sys.executable, str(ROOT / "bmpc.py"), *words], cwd=directory, capture_output=True, text=True
    )


def metrics(directory):
    with open(directory / "metrics.csv") as file:
        return [(int(r["global_step"]), int(r["env_steps"]), r["tag"], float(r["value"])) for r in csv.DictReader(file)]


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    """A run of 260 decisions as a process of its own."""
    directory = tmp_path_factory.mktemp("cartpole")
    done = command(CARTPOLE, directory)
    assert done.returncode == 0, done.stderr
    return directory / "runs" / "cartpole-swingup__bmpc__2", done


@pytest.fixture
def main(tmp_path, monkeypatch):
    """bmpc.main in this process, in a directory of its own; gives back the signal handlers that a run takes."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield lambda **changes: bmpc.main(flags(**changes))
    for number, handler in handlers.items():
        signal.signal(number, handler)


# --- dm_control, from end to end


def test_a_run_logs_every_promised_number_finite_and_nothing_else_it_did_not(cartpole):
    directory, _ = cartpole
    rows = metrics(directory)
    assert {tag for _, _, tag, _ in rows} == TAGS | {"losses/td_target"}
    assert all(math.isfinite(value) for *_, value in rows)
    assert all(env_steps == 50 * step for step, env_steps, _, _ in rows)


def test_events_fall_on_the_first_decision_that_reaches_a_multiple(cartpole):
    """Two decisions at a time: evaluation every 151, losses every 45, and both at the end; an episode is 20 long."""
    rows = metrics(cartpole[0])
    steps = lambda tag: [step for step, _, name, _ in rows if name == tag]
    assert steps("eval/episodic_return") == steps("eval/policy_episodic_return") == [152, 260]
    assert steps("charts/SPS") == [46, 90, 136, 180, 226, 260]
    assert steps("losses/policy") == steps("charts/SPS")[1:] == steps("planner/value")
    assert steps("charts/episodic_return") == [step for step in range(40, 260, 40) for _ in range(2)]
    assert {value for _, _, tag, value in rows if tag == "charts/episodic_length"} == {20.0}


def test_a_run_reaches_its_updates_its_reanalyses_and_its_checkpoint(cartpole):
    directory, done = cartpole
    state = bmpc.read_checkpoint(directory)
    progress = state["progress"]
    assert (progress["global_step"], progress["pretrained"], progress["updates"]) == (260, 60, 200)
    assert json.loads((directory / "finished.json").read_text())["global_step"] == 260
    assert re.findall(r"checkpoint at (\d+)", done.stdout) == ["0", "100", "200", "260"]
    expert = state["buffer"]["expert"]  # (steps, E, 2, A)
    assert (expert[:30, :, 0] == 0).float().mean() < 0.9  # reanalyze gave warm-up rows, N(0, 1) at first, other experts


def test_a_run_says_what_it_is(cartpole):
    directory, done = cartpole
    assert not re.search("^warning|error|Traceback", done.stderr, re.MULTILINE)  # none of its own; dm_control has some
    for words in (
        "cartpole-swingup__bmpc__2",
        "observation 5",
        "cpu",
        "eager",
        "episode 0: return",
        "evaluation: planner",
    ):
        assert words in done.stdout, words
    versions = json.loads((directory / "versions.json").read_text())[0]
    assert versions["torch"] == torch.__version__.split("+")[0] or versions["torch"] == torch.__version__
    assert {"git_commit", "mujoco", "dm_control", "gymnasium", "command"} <= set(versions)
    assert json.loads((directory / "args.json").read_text())["discount"] == 0.95
    assert list(directory.glob("events.out.tfevents*"))
    assert [path.name for path in directory.parent.parent.iterdir()] == ["runs"]  # nothing beside the run's directory


def test_tensorboard_shows_what_the_csv_holds(cartpole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(cartpole[0]), size_guidance={"scalars": 0})
    events.Reload()
    shown = {(s.step, tag, np.float32(s.value)) for tag in events.Tags()["scalars"] for s in events.Scalars(tag)}
    assert shown == {(step, tag, np.float32(value)) for step, _, tag, value in metrics(cartpole[0])}


def test_evaluate_prints_the_numbers_of_the_runs_last_evaluation(cartpole):
    directory, done = cartpole
    again = command(["--evaluate", str(directory)], directory.parent.parent)
    assert again.returncode == 0, again.stderr
    told = [re.findall("evaluation: (.*)", text)[-1] for text in (done.stdout, again.stdout)]
    assert told[0] == told[1]


# --- other environments


def test_pendulum_trains_and_the_same_seed_gives_the_same_bits(main, tmp_path):
    """Two runs of one seed and a third of another, through simulators in processes of their own."""
    ends = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        sizes = dict(
            learning_starts=20, total_timesteps=60, log_freq=20, action_repeat=20, eval_freq=40, eval_episodes=1
        )
        assert main(task="Pendulum-v1", seed=seed, exp_name=name, **sizes) == 0
        directory = tmp_path / "runs" / f"Pendulum-v1__{name}__{seed}"
        state = bmpc.read_checkpoint(directory)
        rows = [row for row in metrics(directory) if row[2] != "charts/SPS"]
        ends.append((rows, [state[part] for part in ("model", "optimizers", "buffer", "draws")]))
    assert ends[0][0] == ends[1][0] and differences(ends[0][1], ends[1][1]) == []
    assert ends[0][0] != ends[2][0] and differences(ends[0][1][0], ends[2][1][0])
    assert {"losses/policy", "eval/episodic_return", "charts/episodic_return"} <= {row[2] for row in ends[0][0]}


def test_half_cheetah_trains(main, tmp_path):
    assert main(task="HalfCheetah-v5", learning_starts=20, total_timesteps=40, log_freq=20) == 0
    assert "losses/policy" in {tag for _, _, tag, _ in metrics(tmp_path / "runs" / "HalfCheetah-v5__bmpc__1")}


def test_hopper_trains_with_episodic_and_learns_from_its_terminations(main, tmp_path):
    assert main(task="Hopper-v5", episodic=True, learning_starts=60, total_timesteps=120, log_freq=20) == 0
    directory = tmp_path / "runs" / "Hopper-v5__bmpc__1"
    rows = metrics(directory)
    assert {"losses/termination", "losses/policy", "charts/episodic_return"} <= {tag for _, _, tag, _ in rows}
    state = bmpc.read_checkpoint(directory)
    lengths = [value for _, _, tag, value in rows if tag == "charts/episodic_length"]
    assert state["buffer"]["terminated"].sum() == len(lengths) and max(lengths) < 1000  # every episode ended by falling
    assert any(name.startswith("termination.") for name in state["model"])


def test_hopper_without_episodic_stops_at_the_first_termination_with_the_flag_to_add(main, tmp_path, capsys):
    assert main(task="Hopper-v5", learning_starts=200, total_timesteps=400) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "--episodic" in last and "Hopper-v5" in last and "step " in last
    assert not (tmp_path / "runs" / "Hopper-v5__bmpc__1" / "finished.json").exists()


# --- episodes and their seeds


def test_an_episodes_seed_is_made_from_seed_environment_and_episode_alone(tmp_path):
    """The episodes begun by environments of different lengths, beside others, and whatever the agent did."""
    begun = {}
    for k, lengths in enumerate(([5, 7], [3, 7], [9, 4, 2])):
        envs = FakeEnvs(lengths)
        args = small_args(num_envs=len(lengths), seed=9, batch_size=6 + k)
        run_loop(args, envs, tmp_path / str(k))
        for i in range(len(lengths)):
            seeds = [seed for j, seed in envs.begun if j == i]
            assert len(seeds) == len(set(seeds)) and len(seeds) >= 2
            for episode, seed in enumerate(seeds):
                assert begun.setdefault((i, episode), seed) == seed == bmpc.make_seed(9, i, episode)
    assert len(set(begun.values())) == len(begun)
    others = [bmpc.make_seed(9, 2, 1), bmpc.make_seed(8, 1, 2), bmpc.make_seed(9, "eval", 2)]
    assert bmpc.make_seed(9, 1, 2) not in others


@pytest.mark.parametrize("task, repeat", [("cartpole-swingup", 2), ("Pendulum-v1", 1)])
def test_environment_i_episode_k_is_the_same_whoever_ran_before(task, repeat):
    """Bit for bit, in a fresh process and after another episode, alone and beside others."""
    args = small_args(env_id=bmpc.resolve_env_id(task), action_repeat=repeat)
    info = bmpc.inspect_task(args)
    actions = np.random.default_rng(0).uniform(-1, 1, (8, 3, info.action_dim)).astype(np.float32)
    seed, seen = bmpc.make_seed(1, 1, 4), []
    for num_envs, place, history in ((1, 0, 0), (3, 1, 5), (2, 1, 2)):
        envs = bmpc.Envs(args, num_envs)
        try:
            everyone, other = np.ones(num_envs, bool), [bmpc.make_seed(1, i, 3) for i in range(num_envs)]
            if history:
                envs.reset(everyone, other)
                for k in range(history):
                    envs.step_async(-actions[k, :num_envs])
                    envs.step_wait()
            mask = np.arange(num_envs) == place if history else everyone
            obs = envs.reset(mask, [seed if mask[i] else 0 for i in range(num_envs)])
            trajectory = [obs[place]]
            for k in range(8):
                sent = np.array(actions[k, :num_envs])
                sent[place] = actions[k, 0]
                envs.step_async(sent)
                obs, reward, _, _ = envs.step_wait()
                trajectory += [obs[place].copy(), np.float64(reward[place])]
            seen.append(np.concatenate([np.ravel(x) for x in trajectory]))
        finally:
            envs.vector.close(terminate=True)
    assert np.array_equal(seen[0], seen[1]) and np.array_equal(seen[0], seen[2])


def test_evaluation_does_not_touch_the_training_environments(tmp_path):
    """Its episodes are begun with seeds of its own, in environments of its own."""
    args = small_args(eval_freq=10, eval_episodes=3)
    envs, eval_envs = FakeEnvs([5, 7]), FakeEnvs([4, 6])
    run = start(args, envs)
    log = bmpc.Log(tmp_path, 1, 0)
    assert bmpc.train(run, envs, eval_envs, log, threading.Event(), tmp_path) == 0
    training = {seed for _, seed in envs.begun}
    evaluated = [seed for _, seed in eval_envs.begun]
    assert training.isdisjoint(evaluated)
    assert set(evaluated[:3]) == {bmpc.make_seed(1, "eval", j) for j in range(3)}
    assert evaluated.count(bmpc.make_seed(1, "eval", 0)) == 2 * 4  # at 10, 20, 30 and 40, planner and policy

    other = run_loop(small_args(), FakeEnvs([5, 7]), tmp_path / "again")  # without evaluation
    assert differences(run.model.state_dict(), other.model.state_dict()) == []
    assert differences(run.buffer.state_dict(), other.buffer.state_dict()) == []
