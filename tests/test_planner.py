"""The planner: a problem with a known solution, comparison with plain.py, chunks, warm starts, evaluation."""

import types

import numpy as np
import plain
import pytest
import torch
from conftest import FakeEnvs, FakePlanner, generator, make_model, run_loop, same, small_args, start

import bmpc
import bmpc_dual_policy
import bmpc_multihead


def test_mppi_solves_a_quadratic_problem(double):
    """Each of three steps by a costs 3 a^2, and the final distance d to the goal costs 10 d^2.

    The optimal steps each cover 10 / 33 of the initial distance.
    """
    args = small_args(discount=1.0, iterations=15, num_samples=512, num_elites=32, num_pi_trajs=8, min_std=0.01)
    goal = torch.tensor([1.2, -0.9])
    square = lambda x: (x**2).sum(-1)
    logits = lambda x: bmpc.two_hot(x, args).log()  # two_hot_inv decodes them to x
    model = types.SimpleNamespace(
        encoder=lambda obs: obs,
        dynamics=lambda z, a: z + a,
        reward=lambda z, a: logits(-3 * square(a) + 0 * z[..., 0]),
        value=lambda z: logits(-10 * square(z - goal)),
    )
    z = torch.tensor([[0.0, 0.0], [0.6, -0.3], [1.2, -0.9]])
    policy = lambda z: torch.zeros(*z.shape[:-1], 4)  # mean 0
    noise = bmpc.sample_plan_noise(3, 3, 2, args, generator())
    planned = bmpc.plan(model, policy, z, torch.zeros(3, 3, 2), noise, args)
    optimal = ((goal - z) * 10 / 33)[:, None].expand(-1, 3, -1)
    torch.testing.assert_close(planned.mean, optimal, rtol=0, atol=0.01)
    torch.testing.assert_close(planned.best_action, optimal[:, 0], rtol=0, atol=0.05)
    optimal_return = -3 * 3 * square(optimal[:, 0]) - 10 * square(goal - z - 3 * optimal[:, 0])
    torch.testing.assert_close(planned.value, optimal_return, rtol=0, atol=0.02)


# --- comparison with plain.py


HEADS = dict(planner_num_dynamics_heads=2)
CASES = {  # script, horizon, std_coef if the script has one, other arguments
    "defaults": (bmpc, 3, [], dict()),
    "narrow": (bmpc, 3, [], dict(temperature=50.0, min_std=0.3, num_pi_trajs=1, num_elites=3)),  # reaches min_std
    "wide": (bmpc, 3, [], dict(temperature=0.01, max_std=0.3, num_elites=20)),  # reaches max_std
    "no policy": (bmpc, 3, [], dict(num_pi_trajs=0, min_std=0.001, discount=0.5)),
    "episodic": (bmpc, 3, [], dict(episodic=True, num_q=1, log_std_min=-2.0, max_std=0.4)),  # no equal candidates
    "other horizon": (bmpc, 5, [], dict(log_std_min=-2.0, log_std_max=0.0)),
    "heads": (bmpc_multihead, 3, [0.0], HEADS),
    "positive coef": (bmpc_multihead, 3, [0.8], dict(planner_num_dynamics_heads=3, episodic=True, max_std=0.4)),
    "negative coef": (bmpc_dual_policy, 2, [-1.5], HEADS),
}


@pytest.mark.parametrize("name", CASES)
def test_plans_match_the_plain_planner(double, name):
    script, horizon, std_coef, changes = CASES[name]
    args = small_args(script, **changes)
    model = make_model(args, script=script)
    obs = torch.randn(8, 4, generator=generator(1))
    prev_mean = 0.5 * torch.randn(8, horizon, 2, generator=generator(2))
    noise = bmpc.sample_plan_noise(8, horizon, 2, args, generator(3))
    actual = script.plan(model, model.policy, obs, prev_mean, noise, args, *std_coef)
    expected = plain.plan(model, model.policy, obs, prev_mean, noise, args, *std_coef)
    for field, x, y in zip(script.Plan._fields, actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9, msg=field)


def test_extra_iterations_from_20_action_dimensions():
    for actions, changes, iterations in ((19, {}, 6), (20, {}, 8), (38, {}, 8), (38, dict(extra_iterations=0), 6)):
        noise = bmpc.sample_plan_noise(2, 3, actions, small_args(iterations=6, **changes), generator())
        assert noise.samples.shape == (2, iterations, 16, 3, actions)  # N - P = 16


# --- chunks


def test_plans_in_chunks_equal_plans_at_once(double):
    args = small_args(num_samples=600, num_elites=40)
    chunk_sizes = []
    model = make_model(args)
    z = torch.randn(7, 4, generator=generator(1))
    prev_mean = 0.5 * torch.randn(7, 3, 2, generator=generator(2))
    noise = bmpc.sample_plan_noise(7, 3, 2, args, generator(3))
    at_once = bmpc.plan(model, model.policy, z, prev_mean, noise, args)

    def recorded_plan(model, policy, z, *more):
        chunk_sizes.append(len(z))
        return bmpc.plan(model, policy, z, *more)

    plan_fn = bmpc.plan_in_chunks(recorded_plan, lambda num_states: 3)
    chunked = bmpc.run_planner(plan_fn, model, model.policy, z, prev_mean, generator(3), args)
    assert chunk_sizes == [3, 3, 3]  # two states of the last chunk are padding
    for field, x, y in zip(bmpc.Plan._fields, at_once, chunked, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9, msg=field)


def test_chunk_sizes():
    """On a CPU 16 states of 128 candidates fit. Fewer states than environments are padded to have the same shape."""
    for num_envs, sizes in ((1, [1, 3, 4, 16, 9, 15]), (4, [4, 4, 4, 16, 9, 15]), (20, [10, 10, 10, 10, 10, 15])):
        args = small_args(num_samples=128, num_envs=num_envs)
        assert [bmpc.chunk_size(n, args, on_cpu=True) for n in (1, 3, 4, 16, 17, 30)] == sizes
    assert [bmpc.chunk_size(n, small_args(num_envs=4), on_cpu=False) for n in (2, 4, 60)] == [4, 4, 60]  # on a GPU


# --- warm start


def check_warm_start(planner, envs, first):
    """Check that each plan starts from the previous mean, shifted by one step, or from zeros in a new episode.

    `first` is the number of decisions before the first plan.
    """
    for k in range(1, len(planner.prev_means)):
        for i, length in enumerate(envs.lengths):
            expected = planner.plans[k - 1].mean[i, 1:]
            episode_starts = (first + k) % length == 0
            if episode_starts:
                expected = torch.zeros_like(expected)
            assert torch.equal(planner.prev_means[k][i, :-1], expected)
            assert (planner.prev_means[k][i, -1] == 0).all()
    assert (planner.prev_means[0] == 0).all()


def test_warm_start_in_training(tmp_path):
    """With 5 and 7 decisions, episodes start at different steps and, after 35 decisions, at the same step."""
    planner = FakePlanner()
    envs = FakeEnvs([5, 7])
    args = small_args(total_timesteps=12 + 2 * 40, reanalyze_interval=0, utd_ratio=0.001)
    run_loop(args, envs, tmp_path, bmpc.Functions(plan=planner))
    check_warm_start(planner, envs, first=6)  # random decisions of each environment
    assert len(planner.prev_means) == 40


# --- evaluation


def evaluation_returns(args, envs, planner, step=0):
    """Return the returns of an evaluation with the planner."""
    run = start(args, FakeEnvs([9] * args.num_envs), bmpc.Functions(plan=planner))
    run.model = make_model(args)
    run.global_step = step
    returns, _ = bmpc.run_episodes(run, envs, use_planner=True, stop_signals=[])
    return returns


@pytest.mark.parametrize("sample_elite, field", [(False, "best_action"), (True, "elite_action")])
def test_actions_returns_and_seeds_of_an_evaluation(sample_elite, field):
    """5 episodes run in 2 environments, whose episodes have 5 and 7 decisions.

    When an episode ends, its environment starts the next one. Episodes after the fifth do not count.
    """
    envs = FakeEnvs([5, 7])
    planner = FakePlanner()
    returns = evaluation_returns(small_args(eval_episodes=5, eval_sample_elite=sample_elite), envs, planner)
    for sent, planned in zip(envs.sent, planner.plans, strict=True):
        assert (sent == getattr(planned, field).numpy()).all()
    assert len(envs.sent) == 15
    check_warm_start(planner, envs, first=0)
    total = lambda i, n: sum(i + 0.125 * k for k in range(1, n + 1))  # of n decisions in environment i
    assert returns.tolist() == [total(0, 5), total(1, 7), total(0, 5), total(1, 7), total(0, 5)]
    assert [seed for _, seed in envs.episode_starts[:5]] == [bmpc.derive_seed(1, "eval", j) for j in range(5)]


def test_evaluation_depends_only_on_model_seed_and_step():
    args = small_args(eval_episodes=2)
    actions = []
    for step in (0, 0, 10):
        envs = FakeEnvs([4, 4])
        evaluation_returns(args, envs, bmpc.plan, step=step)
        actions.append(torch.tensor(np.array(envs.sent)))
    assert same(actions[0], actions[1]) and not same(actions[0], actions[2])


def test_video_and_interruption_of_an_evaluation(tmp_path):
    """The video shows episode 0. After a stop signal, there are no returns and there is no video."""
    args = small_args(eval_episodes=3, capture_video=True)
    stop_signals = []
    run = start(args, FakeEnvs([9, 9]), bmpc.Functions(plan=FakePlanner()))
    returns, frames = bmpc.run_episodes(run, FakeEnvs([5, 7]), True, stop_signals)
    assert len(returns) == 3 and len(frames) == 5
    stop_signals.append(15)
    assert bmpc.run_episodes(run, FakeEnvs([5, 7]), True, stop_signals) is None
    assert bmpc.evaluate(run, FakeEnvs([5, 7]), stop_signals, tmp_path / "video.mp4") is None
    assert not list(tmp_path.iterdir())
