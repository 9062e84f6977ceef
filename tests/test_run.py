"""Whole runs on real simulators, tiny and short: what a run writes, what it repeats, which environments it plays."""

import json
import math
import re

import numpy as np
import pytest
import runs
import torch
from conftest import FakeEnvs, run_loop, same, small_args, start

import bmpc

TAGS = set(  # what a run promises to log
    "charts/episodic_return charts/episodic_length charts/SPS charts/updates charts/training_seconds "
    "losses/consistency losses/reward losses/value "
    "losses/policy losses/total losses/td_target losses/kl losses/kl_scale losses/entropy losses/grad_norm "
    "losses/policy_grad_norm planner/elite_std planner/value eval/episodic_return "
    "eval/policy_episodic_return".split()
)
CARTPOLE = "--action-repeat 50 --learning-starts 30 --steps 110 --eval-freq 65 --log-freq 25 --checkpoint-freq 40"


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    """A run of 110 decisions as a process of its own: its directory, itself, what it logged."""
    cwd = tmp_path_factory.mktemp("cartpole")
    run = runs.finish(cwd, *CARTPOLE.split(), "--seed", 2)  # episodes of 1000 simulator steps are 20 decisions
    assert run.code == 0, run
    return cwd / "runs" / "cartpole-swingup__bmpc__2", run, runs.numbers(cwd, speeds=True)


# --- dm_control, from end to end


def test_a_run_logs_every_promised_number_finite_where_it_is_due(cartpole):
    """Two decisions at a time: evaluation every 65, losses every 25, and both at the end; an episode is 20 long."""
    _, _, rows = cartpole
    assert {tag for _, _, tag, _ in rows} == TAGS
    assert all(math.isfinite(value) for *_, value in rows)
    assert all(env_steps == 50 * step for step, env_steps, _, _ in rows)
    steps = lambda tag: [step for step, _, name, _ in rows if name == tag]
    assert steps("eval/episodic_return") == steps("eval/policy_episodic_return") == [66, 110]
    assert steps("charts/SPS") == [26, 50, 76, 100, 110]
    assert steps("losses/policy") == steps("charts/SPS")[1:] == steps("planner/value")
    assert steps("charts/episodic_return") == [step for step in range(40, 111, 40) for _ in range(2)]
    assert {value for _, _, tag, value in rows if tag == "charts/episodic_length"} == {20.0}


def test_a_run_reaches_its_updates_and_its_checkpoints_and_says_what_it_is(cartpole):
    directory, run, _ = cartpole
    state = bmpc.read_checkpoint(directory)
    assert [state[name] for name in ("global_step", "pretraining_updates", "updates")] == [110, 30, 80]
    assert json.loads((directory / "finished.json").read_text()) == {"total_timesteps": 110}
    assert re.findall(r"checkpoint at (\d+)", run.said()) == ["0", "40", "80", "110"]
    assert not re.search("^warning|error|Traceback", run.warned(), re.MULTILINE)  # of its own; dm_control has some
    told = ("dm_control/cartpole-swingup-v0", "cpu", "episode 0: return", "step 110: evaluation: planner")
    assert all(words in run.said() for words in told)
    (versions,) = json.loads((directory / "versions.json").read_text())
    assert {"git_commit", "python", "command", "time"} <= set(versions)
    assert json.loads((directory / "args.json").read_text())["discount"] == 0.95
    assert {path.name for path in run.cwd.iterdir()} - {file.name for file in run.files.values()} == {"runs"}


# --- episodes and their seeds


def test_a_run_stores_true_last_observations_and_only_real_terminations(tmp_path):
    """Environment 0 is truncated, environment 1 terminates; no window holds a transition that never happened."""
    envs = FakeEnvs([5, 4], terminal=(1,))
    args = small_args(episodic=True, total_timesteps=60, learning_starts=60, batch_size=4)
    buffer = run_loop(args, envs, tmp_path).buffer
    n = len(buffer.start_indices)
    assert n == 6 * 3 + 7 * 2  # of 30 decisions each: 6 episodes of 5; 7 of 4 and an unfinished one of 2
    batch = buffer.sample((np.arange(n) + 0.5) / n)
    obs = torch.cat([batch.obs[:1], batch.next_obs])
    env, step = obs[..., 0], obs[..., 1]
    assert (env == env[0]).all() and (step == step[0] + torch.arange(4)[:, None]).all()
    assert (obs[..., 2] == obs[0, :, 2]).all()  # one seed, so one episode
    assert step[-1][env[-1] == 0].max() == 5 and step[-1][env[-1] == 1].max() == 4  # the last observations are there
    assert torch.equal(batch.terminated, ((env[1:] == 1) & (step[1:] == 4)) * 1.0)
    torch.testing.assert_close(batch.reward, env[1:] + 0.125 * step[1:])
    sent = torch.tensor([a.tolist() for a in envs.sent])  # (step, E, A): a row's action is the one sent from its obs
    assert torch.equal(batch.action.flatten(0, 1), sent.flatten(0, 1)[batch.index.flatten()])


def test_an_episodes_seed_is_made_from_seed_environment_and_episode_alone(tmp_path):
    """The episodes begun by environments of different lengths, beside others, and whatever the agent did."""
    begun = {}
    for k, lengths in enumerate(([5, 7], [3, 7], [9, 4, 2])):
        envs = FakeEnvs(lengths, seed=9)
        run_loop(small_args(num_envs=len(lengths), seed=9, batch_size=6 + k), envs, tmp_path / str(k))
        for i in range(len(lengths)):
            seeds = [seed for j, seed in envs.begun if j == i]
            assert len(seeds) == len(set(seeds)) and len(seeds) >= 2
            for episode, seed in enumerate(seeds):
                assert begun.setdefault((i, episode), seed) == seed == bmpc.derive_seed(9, i, episode)
    others = [bmpc.derive_seed(9, 2, 1), bmpc.derive_seed(8, 1, 2), bmpc.derive_seed(9, "eval", 2)]
    assert len(set(begun.values())) == len(begun) and bmpc.derive_seed(9, 1, 2) not in others


@pytest.mark.parametrize("task, repeat", [("cartpole-swingup", 2), ("Pendulum-v1", 1)])
def test_environment_i_episode_k_is_the_same_whoever_ran_before(task, repeat):
    """Bit for bit, in a fresh process and after another episode, alone and beside others."""
    args = small_args(env_id=bmpc.resolve_env_id(task), action_repeat=repeat)
    actions = np.random.default_rng(0).uniform(-1, 1, (8, 3, 1)).astype(np.float32)
    seen = []
    for num_envs, place, history in ((1, 0, 0), (3, 1, 5), (2, 1, 2)):
        envs = bmpc.Envs(args, num_envs)
        obs = envs.start_episodes(np.ones(num_envs, bool), [(i, 3) for i in range(num_envs)], np.zeros((num_envs, 1)))
        for k in range(history):
            envs.step_async(-actions[k, :num_envs])
            envs.step_wait()
        obs = envs.start_episodes(np.arange(num_envs) == place, [(1, 4)] * num_envs, obs)
        trajectory = [obs[place].copy()]
        for k in range(8):
            sent = np.array(actions[k, :num_envs])
            sent[place] = actions[k, 0]
            envs.step_async(sent)
            obs, reward, _, _, _ = envs.step_wait()
            trajectory.append(np.append(obs[place], reward[place]))
        envs.close()
        seen.append(trajectory)
    assert all(map(np.array_equal, seen[0], seen[1])) and all(map(np.array_equal, seen[0], seen[2]))


def test_metrics_are_means_over_an_interval_and_what_is_not_finite_is_neither_told_nor_kept(tmp_path):
    """Pretraining, with fewer names, and learning fall into one interval where the warm-up ends."""
    run = start(small_args(), FakeEnvs([5, 7]))
    for values in ({"model": 1.0}, {"model": 3.0}, {"policy": 5.0, "kl": 7.0}, {"policy": 7.0, "kl": 7.0}):
        run.accumulate_metrics({name: torch.tensor(value) for name, value in values.items()})
    assert run.mean_metrics() == {"model": 2.0, "policy": 6.0, "kl": 7.0}
    run.accumulate_metrics({"kl_scale": torch.tensor(math.nan)})
    with pytest.raises(bmpc.RunError, match="kl_scale is not finite"):
        run.mean_metrics()
    run.model.policy.layers[-1].bias.data[0, 0] = math.nan
    with pytest.raises(bmpc.RunError, match="a weight is not finite"):
        bmpc.save_checkpoint(run, tmp_path)
    assert not list(tmp_path.iterdir())


def test_where_there_is_no_terminal_a_bar_is_a_plain_line_every_half_minute(capsys):
    bar = bmpc.ProgressBar("pretraining", 500)
    now = [bar.start_t]
    bar._time = lambda: now[0]
    for _ in range(400):  # a minute and a third
        now[0] += 0.2
        bar.update()
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert [re.search(r"(\d+)/500", line)[1] for line in lines] == ["0", "150", "300"], lines


class Late(list):
    """A signal that comes between the n-th look at it and the next."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def __bool__(self):
        self.left -= 1
        return self.left < 0


def test_whenever_a_signal_comes_exit_code_75_says_that_the_checkpoint_is_of_this_step(tmp_path):
    args, codes = small_args(total_timesteps=14, learning_starts=6, eval_freq=8, eval_episodes=1), []
    while not codes or codes[-1] == bmpc.EXIT_RESUMABLE:
        envs, eval_envs, directory = FakeEnvs([5, 7]), FakeEnvs([3]), tmp_path / str(len(codes))
        run, _ = start(args, envs), directory.mkdir()
        log, stop_signals = bmpc.MetricsLogger(directory, args, 0), Late(len(codes))
        codes += [bmpc.train(run, envs, bmpc.RunController(run, eval_envs, log, stop_signals, directory))]
        assert same(bmpc.read_checkpoint(directory), bmpc.checkpoint_contents(run))
    assert codes[-1] == 0 and len(codes) > 14 // 2 + 6
