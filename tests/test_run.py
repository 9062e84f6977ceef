"""Short runs: what a run logs and writes, episodes and their seeds, metrics, progress bars, stop signals."""

import json
import math
import re
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch
from conftest import CPU, TASK, FakeEnvs, run_loop, same, small_args, start

import bmpc

TAGS = set(  # of metrics.csv
    "charts/episodic_return charts/episodic_length charts/SPS charts/updates charts/training_seconds "
    "losses/consistency losses/reward losses/value "
    "losses/policy losses/total losses/td_target losses/kl losses/kl_scale losses/entropy losses/grad_norm "
    "losses/policy_grad_norm planner/plan_std planner/value eval/episodic_return "
    "eval/policy_episodic_return".split()
)
CARTPOLE = "--action-repeat 50 --learning-starts 30 --steps 110 --eval-freq 65 --log-freq 25 --checkpoint-freq 40"


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    """Run 110 decisions in a separate process. Returns the run directory, the run and the rows it logged."""
    cwd = tmp_path_factory.mktemp("cartpole")
    run = runs.finish(cwd, *CARTPOLE.split(), "--seed", 2)  # episodes of 1000 simulator steps are 20 decisions
    assert run.code == 0, run
    return cwd / "runs" / "cartpole-swingup__bmpc__2", run, runs.numbers(cwd, speeds=True)


# --- a whole run on dm_control


def test_a_run_logs_all_tags_at_the_right_steps(cartpole):
    """Steps are even, with 2 environments. Evaluations are due every 65 steps and losses every 25, both at the end."""
    _, _, rows = cartpole
    assert {tag for _, _, tag, _ in rows} == TAGS
    assert all(math.isfinite(value) for *_, value in rows)
    assert all(env_steps == 50 * step for step, env_steps, _, _ in rows)
    steps = lambda tag: [step for step, _, name, _ in rows if name == tag]
    assert steps("eval/episodic_return") == steps("eval/policy_episodic_return") == [66, 110]
    assert steps("charts/SPS") == [26, 50, 76, 100, 110]
    assert steps("losses/policy") == steps("charts/SPS")[1:] == steps("planner/value")
    assert steps("losses/value") == [30, *steps("losses/policy")]  # pretraining has an entry of its own
    assert steps("charts/episodic_return") == [step for step in range(40, 111, 40) for _ in range(2)]
    assert {value for _, _, tag, value in rows if tag == "charts/episodic_length"} == {20.0}


def test_counters_files_and_output_of_a_run(cartpole):
    directory, run, _ = cartpole
    state = bmpc.read_checkpoint(directory)
    assert [state[name] for name in ("global_step", "pretraining_updates", "updates")] == [110, 30, 80]
    assert json.loads((directory / "finished.json").read_text()) == {"total_timesteps": 110}
    assert re.findall(r"checkpoint at (\d+)", run.said()) == ["0", "40", "80", "110"]
    assert not re.search("^warning|error|Traceback", run.warned(), re.MULTILINE)  # dm_control has warnings of its own
    messages = ("dm_control/cartpole-swingup-v0", "cpu", "episode 0: return", "step 110: evaluation: planner")
    assert all(message in run.said() for message in messages)
    (versions,) = json.loads((directory / "versions.json").read_text())
    assert {"git_commit", "python", "command", "time"} <= set(versions)
    assert versions["numpy"] == np.__version__ and versions["torch"] == torch.__version__
    assert json.loads((directory / "args.json").read_text())["discount"] == 0.95
    assert {path.name for path in run.cwd.iterdir()} - {file.name for file in run.files.values()} == {"runs"}


# --- episodes and their seeds


def test_stored_windows_are_those_of_the_environments(tmp_path):
    """They include the last observation of an episode. Environment 0 is truncated and environment 1 terminates."""
    envs = FakeEnvs([5, 4], terminal=(1,))
    args = small_args(episodic=True, total_timesteps=60, learning_starts=60, batch_size=4)
    buffer = run_loop(args, envs, tmp_path).buffer
    n = len(buffer.start_indices)
    assert n == 6 * 3 + 7 * 2  # 30 decisions each: 6 episodes of 5 decisions; 7 of 4 and an unfinished one
    batch = buffer.sample((np.arange(n) + 0.5) / n)
    obs = torch.cat([batch.obs[:1], batch.next_obs])
    env, step = obs[..., 0], obs[..., 1]
    assert (env == env[0]).all() and (step == step[0] + torch.arange(4)[:, None]).all()
    assert (obs[..., 2] == obs[0, :, 2]).all()  # the seed identifies the episode
    assert step[-1][env[-1] == 0].max() == 5 and step[-1][env[-1] == 1].max() == 4  # last observations
    assert torch.equal(batch.terminated, ((env[1:] == 1) & (step[1:] == 4)) * 1.0)
    torch.testing.assert_close(batch.reward, env[1:] + 0.125 * step[1:])
    returns = [value for _, _, tag, value in runs.numbers(tmp_path) if tag == "charts/episodic_return"]
    assert sorted(returns) == [0.125 * 15] * 6 + [4 + 0.125 * 10] * 7  # each is the return of one episode
    sent = torch.tensor([a.tolist() for a in envs.sent])  # (step, E, A)
    assert torch.equal(batch.action.flatten(0, 1), sent.flatten(0, 1)[batch.index.flatten()])


def test_episode_seeds_depend_only_on_seed_environment_and_episode(tmp_path):
    """They do not depend on the lengths of episodes, the number of environments or the actions."""
    seeds_by_episode = {}
    for k, lengths in enumerate(([5, 7], [3, 7], [9, 4, 2])):
        envs = FakeEnvs(lengths, seed=9)
        run_loop(small_args(num_envs=len(lengths), seed=9, batch_size=6 + k), envs, tmp_path / str(k))
        for i in range(len(lengths)):
            seeds = [seed for j, seed in envs.episode_starts if j == i]
            assert len(seeds) == len(set(seeds)) and len(seeds) >= 2
            for episode, seed in enumerate(seeds):
                assert seeds_by_episode.setdefault((i, episode), seed) == seed == bmpc.derive_seed(9, i, episode)
    others = [bmpc.derive_seed(9, 2, 1), bmpc.derive_seed(8, 1, 2), bmpc.derive_seed(9, "eval", 2)]
    assert len(set(seeds_by_episode.values())) == len(seeds_by_episode)
    assert bmpc.derive_seed(9, 1, 2) not in others


@pytest.mark.parametrize("task, repeat", [("cartpole-swingup", 2), ("Pendulum-v1", 1)])
def test_episodes_are_reproducible(task, repeat):
    """Equal bit for bit in a new process and after another episode, alone and with other environments."""
    args = small_args(env_id=bmpc.resolve_env_id(task), action_repeat=repeat)
    actions = np.random.default_rng(0).uniform(-1, 1, (8, 3, 1)).astype(np.float32)
    trajectories = []
    for num_envs, env_id, previous_steps in ((1, 0, 0), (3, 1, 5), (2, 1, 2)):
        envs = bmpc.Envs(args, num_envs)
        obs = envs.start_episodes(np.ones(num_envs, bool), [(i, 3) for i in range(num_envs)], np.zeros((num_envs, 1)))
        for k in range(previous_steps):
            envs.step_async(-actions[k, :num_envs])
            envs.step_wait()
        obs = envs.start_episodes(np.arange(num_envs) == env_id, [(1, 4)] * num_envs, obs)
        trajectory = [obs[env_id].copy()]
        for k in range(8):
            sent = np.array(actions[k, :num_envs])
            sent[env_id] = actions[k, 0]
            envs.step_async(sent)
            obs, reward, _, _, _ = envs.step_wait()
            trajectory.append(np.append(obs[env_id], reward[env_id]))
        envs.close()
        trajectories.append(trajectory)
    for other in trajectories[1:]:
        assert all(map(np.array_equal, trajectories[0], other))


def test_seeds_have_their_own_weights_and_episodes():
    first_weights, first_obs = [], []
    for seed in (1, 2):
        args = small_args(env_id="Pendulum-v1", seed=seed)
        model = bmpc.Run(args, TASK, CPU).model
        networks = (model.encoder, model.dynamics, model.reward, model.value, model.policy)
        first_weights.append([network.layers[0].weight for network in networks])
        with bmpc.Envs(args, 1) as envs:
            first_obs.append(envs.start_episodes(np.ones(1, bool), [(0, 0)], np.zeros((1, 3))))
    assert not any(map(torch.equal, *first_weights))
    assert not np.array_equal(*first_obs)


def test_an_episode_that_cannot_be_continued_is_replaced(tmp_path):
    """Environment 0 does not reproduce its last observation; environment 1 does."""
    run = run_loop(small_args(total_timesteps=28), FakeEnvs([5, 9]), tmp_path)
    assert run.episode.tolist() == [2, 1] and run.buffer.episode_step.tolist() == [4, 5]
    assert run.episode_return.all() and run.prev_mean.any(2).any(1).all()
    run.obs[0] += 1
    episode_return, prev_mean = run.episode_return.clone(), run.prev_mean.clone()
    bmpc.start_run_episodes(run, FakeEnvs([5, 9]))
    assert run.episode.tolist() == [3, 1] and run.buffer.episode_step.tolist() == [0, 5]
    assert run.episode_return.tolist() == [0, episode_return[1]]
    assert torch.equal(run.prev_mean, prev_mean * torch.tensor([0.0, 1.0])[:, None, None])


def test_an_evaluation_returns_the_means_of_planner_and_policy(tmp_path, monkeypatch, capsys):
    returns = {True: np.array([3.0, 5.0]), False: np.array([7.0, 11.0])}
    monkeypatch.setattr(bmpc, "run_episodes", lambda *_, use_planner, stop_signals: (returns[use_planner], []))
    result = bmpc.evaluate(SimpleNamespace(global_step=8), None, [], tmp_path / "film.mp4")
    assert result == {"eval/episodic_return": 4.0, "eval/policy_episodic_return": 9.0}
    summary = "planner 4.0 +- 1.0 (3.0 to 5.0), policy alone 9.0 +- 2.0 (7.0 to 11.0)"
    assert capsys.readouterr().out == f"step 8: evaluation: {summary}\n"


def test_mean_metrics_and_values_that_are_not_finite(tmp_path):
    """NaN is never saved."""
    run = start(small_args(), FakeEnvs([5, 7]))
    for values in ({"model": 1.0}, {"model": 3.0}, {"policy": 5.0, "kl": 7.0}, {"policy": 7.0, "kl": 7.0}):
        run.accumulate_metrics({name: torch.tensor(value) for name, value in values.items()})
    assert run.mean_metrics() == {"model": 2.0, "policy": 6.0, "kl": 7.0}
    run.accumulate_metrics({"kl_scale": torch.tensor(math.nan)})
    for function in (run.mean_metrics, lambda: bmpc.save_checkpoint(run, tmp_path)):
        with pytest.raises(bmpc.RunError, match="kl_scale is not finite"):
            function()
    run.metrics.clear()
    run.model.policy.layers[-1].bias.data[0, 0] = math.nan
    with pytest.raises(bmpc.RunError, match="a weight is not finite"):
        bmpc.save_checkpoint(run, tmp_path)
    assert not list(tmp_path.iterdir())


def test_training_seconds_are_those_of_acting_and_learning(tmp_path, monkeypatch):
    """On a clock that a step, a checkpoint, an evaluation, a pretraining update and a compilation advance by 1, 10,
    100, 1 000 and 10 000 seconds. The speed is that of steps alone.
    """
    clock = SimpleNamespace(**vars(time) | {"now": 0.0, "perf_counter": lambda: clock.now})

    def takes(seconds, function):
        def timed(*args, **kwargs):
            clock.now += seconds(**kwargs) if callable(seconds) else seconds
            return function(*args, **kwargs)

        return timed

    def compile_while_acting(*args):
        clock.now += 10_000
        bmpc.CompileTimer.seconds += 10_000
        return act(*args)

    act = bmpc.act
    monkeypatch.setattr(bmpc, "time", clock)
    monkeypatch.setattr(bmpc.CompileTimer, "seconds", 0.0)
    monkeypatch.setattr(bmpc, "act", compile_while_acting)
    monkeypatch.setattr(bmpc, "train_step", takes(lambda pretraining: 1000 * pretraining, bmpc.train_step))
    monkeypatch.setattr(bmpc, "save_checkpoint", takes(10, lambda *args: None))
    monkeypatch.setattr(bmpc, "evaluate", takes(100, lambda *args: {"eval/episodic_return": 0.0}))
    monkeypatch.setattr(FakeEnvs, "step_wait", takes(1, FakeEnvs.step_wait))
    args = small_args(total_timesteps=60, eval_freq=20, log_freq=10, checkpoint_freq=20)
    run_loop(args, FakeEnvs([20] * args.num_envs), tmp_path)
    rows = runs.numbers(tmp_path, speeds=True)
    seconds = {step: value for step, _, tag, value in rows if tag == "charts/training_seconds"}
    pretraining = 1000 * args.learning_starts
    expected = {step: step / args.num_envs + pretraining * (step >= args.learning_starts) for step in seconds}
    assert len(seconds) >= 6 and seconds == expected
    assert {value for _, _, tag, value in rows if tag == "charts/SPS"} == {args.num_envs}
    updates = {step: value for step, _, tag, value in rows if tag == "charts/updates"}
    pretraining = {step: args.learning_starts * (step >= args.learning_starts) for step in seconds}
    assert updates == {step: pretraining[step] + bmpc.updates_due(args, step) for step in seconds}


def test_progress_bar_without_a_terminal(capsys):
    """It prints a line about every ten seconds."""
    bar = bmpc.ProgressBar("pretraining", 500)
    now = [bar.start_t]
    bar._time = lambda: now[0]
    for _ in range(160):  # 32 seconds
        now[0] += 0.2
        bar.update()
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert [int(re.search(r"(\d+)/500", line)[1]) // 10 for line in lines] == [0, 4, 9, 13], lines


def test_what_takes_long_reports_its_seconds(capsys, monkeypatch):
    """Every ten seconds, until it ends."""
    clock = iter((100.0, 110.2, 120.4))
    waits = iter((False, False, True))
    monkeypatch.setattr(bmpc.time, "perf_counter", lambda: next(clock))
    reported = threading.Event()

    class Finished:
        def wait(self, seconds):
            assert seconds == 10
            ends = next(waits)
            if ends:
                reported.set()
            return ends

        def set(self):
            pass

    monkeypatch.setattr(bmpc, "threading", SimpleNamespace(Event=Finished, Thread=threading.Thread))
    with bmpc.announce("compiling"):
        assert reported.wait(30)
    assert capsys.readouterr().out.splitlines() == ["compiling ...", "compiling: 10 s", "compiling: 20 s"]


class DelayedSignals(list):
    """A list of stop signals that is empty for the first n checks."""

    def __init__(self, n):
        super().__init__()
        self.checks_left = n

    def __bool__(self):
        self.checks_left -= 1
        return self.checks_left < 0


def test_stop_signal_at_every_check(tmp_path):
    """With the exit code for runs that can be resumed, the checkpoint is that of the last step."""
    args = small_args(total_timesteps=14, learning_starts=6, eval_freq=8, eval_episodes=1)
    codes = []
    while not codes or codes[-1] == bmpc.EXIT_RESUMABLE:
        envs = FakeEnvs([5, 7])
        eval_envs = FakeEnvs([3])
        directory = tmp_path / str(len(codes))
        directory.mkdir()
        run = start(args, envs)
        log = bmpc.MetricsLogger(directory, args, 0)
        stop_signals = DelayedSignals(len(codes))
        codes.append(bmpc.train(run, envs, bmpc.RunController(run, eval_envs, log, stop_signals, directory)))
        assert same(bmpc.read_checkpoint(directory), bmpc.checkpoint_contents(run))
    assert codes[-1] == 0 and len(codes) > 14 // 2 + 6
