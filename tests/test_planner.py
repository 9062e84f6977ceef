"""MPPI: against toy problems with known answers, a plain version, and itself one state at a time."""

import types

import numpy as np
import plain
import pytest
import torch
from conftest import FakeEnvs, FakePlanner, generator, make_model, run_loop, same, small_args, start

import bmpc
import bmpc_dual_policy
import bmpc_multihead


def test_mppi_finds_the_cheapest_way_to_a_point(double):
    """Effort 3 a^2 a step and 10 d^2 for the distance d that is left after three: each step is 10 / 33 of the way."""
    args = small_args(discount=1.0, iterations=15, num_samples=512, num_elites=32, num_pi_trajs=8, min_std=0.01)
    goal, square = torch.tensor([1.2, -0.9]), lambda x: (x**2).sum(-1)
    scalar = lambda x: bmpc.two_hot(x, args).log()  # logits that stand for exactly x
    model = types.SimpleNamespace(
        encoder=lambda obs: obs,
        dynamics=lambda z, a: z + a,
        reward=lambda z, a: scalar(-3 * square(a) + 0 * z[..., 0]),
        value=lambda z: scalar(-10 * square(z - goal)),
    )
    z = torch.tensor([[0.0, 0.0], [0.6, -0.3], [1.2, -0.9]])
    policy = lambda z: torch.zeros(*z.shape[:-1], 4)  # around standing still
    found = bmpc.plan(model, policy, z, torch.zeros(3, 3, 2), bmpc.sample_plan_noise(3, 3, 2, args, generator()), args)
    way = ((goal - z) * 10 / 33)[:, None].expand(-1, 3, -1)
    torch.testing.assert_close(found.mean, way, rtol=0, atol=0.01)
    torch.testing.assert_close(found.best_action, way[:, 0], rtol=0, atol=0.05)
    best = -3 * 3 * square(way[:, 0]) - 10 * square(goal - z - 3 * way[:, 0])
    torch.testing.assert_close(found.value, best, rtol=0, atol=0.02)


# --- against the plain one


HEADS = dict(planner_num_dynamics_heads=2)
CASES = {  # script, horizon, coefficient of the spread, other numbers
    "defaults": (bmpc, 3, [], dict()),
    "narrow": (bmpc, 3, [], dict(temperature=50.0, min_std=0.3, num_pi_trajs=1, num_elites=3)),  # a bound binds
    "wide": (bmpc, 3, [], dict(temperature=0.01, max_std=0.3, num_elites=20)),  # and the other one
    "no policy": (bmpc, 3, [], dict(num_pi_trajs=0, min_std=0.001, discount=0.5)),
    "episodic": (bmpc, 3, [], dict(episodic=True, num_q=1, log_std_min=-2.0, max_std=0.4)),  # no two end in a corner
    "as reanalyze": (bmpc, 5, [], dict(log_std_min=-2.0, log_std_max=0.0)),  # a horizon that is not the model's
    "indifferent": (bmpc_multihead, 3, [0.0], HEADS),
    "seeking": (bmpc_multihead, 3, [0.8], HEADS | dict(planner_num_dynamics_heads=3, episodic=True, max_std=0.4)),
    "avoiding": (bmpc_dual_policy, 2, [-1.5], HEADS),
}


@pytest.mark.parametrize("name", CASES)
def test_a_plan_equals_the_plain_one(double, name):
    """Elites, weights, mean, std, the drawn elite, the noise on it, its return, the heads' spread."""
    script, horizon, coef, changes = CASES[name]
    args = small_args(script, **changes)
    model = make_model(args, script=script)
    obs = torch.randn(8, 4, generator=generator(1))
    previous = 0.5 * torch.randn(8, horizon, 2, generator=generator(2))
    given = model, model.policy, obs, previous, bmpc.sample_plan_noise(8, horizon, 2, args, generator(3)), args, *coef
    for field, x, y in zip(script.Plan._fields, script.plan(*given), plain.plan(*given), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9, msg=field)


def test_twenty_actions_get_two_more_iterations():
    for actions, changes, iterations in ((19, {}, 6), (20, {}, 8), (38, {}, 8), (38, dict(extra_iterations=0), 6)):
        draws = bmpc.sample_plan_noise(2, 3, actions, small_args(iterations=6, **changes), generator())
        assert draws.candidates.shape == (2, iterations, 16, 3, actions)  # N - P sequences


# --- one plan of many


def test_plans_in_chunks_equal_plans_at_once_under_the_same_draws(double):
    args, seen = small_args(num_samples=600, num_elites=40), []  # 2048 // 600 = 3 states a chunk
    model = make_model(args)
    z = torch.randn(7, 4, generator=generator(1))
    previous = 0.5 * torch.randn(7, 3, 2, generator=generator(2))
    whole = bmpc.plan(model, model.policy, z, previous, bmpc.sample_plan_noise(7, 3, 2, args, generator(3)), args)
    spy = lambda *given: seen.append(len(given[2])) or bmpc.plan(*given)
    chunked = bmpc.run_planner(
        bmpc.plan_in_chunks(spy, lambda num_states: 3), model, model.policy, z, previous, generator(3), args
    )
    assert seen == [3, 3, 3]  # two states of the last chunk are padding
    for name, a, b in zip(bmpc.Plan._fields, whole, chunked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


# --- warm start


def check_warm_start(planner, envs, first):
    """Each plan starts from the one before it, a step on, or from nothing where an episode begins."""
    for k in range(1, len(planner.previous)):
        for i, length in enumerate(envs.lengths):
            expected = planner.answers[k - 1].mean[i, 1:]
            begins = (first + k) % length == 0
            assert torch.equal(planner.previous[k][i, :-1], torch.zeros_like(expected) if begins else expected)
            assert (planner.previous[k][i, -1] == 0).all()
    assert (planner.previous[0] == 0).all()


def test_the_warm_start_shifts_by_one_and_is_cleared_exactly_where_an_episode_began(tmp_path):
    """Episodes of 5 and 7 decisions, so that the two begin apart and, at last, together."""
    planner, envs = FakePlanner(), FakeEnvs([5, 7])
    args = small_args(total_timesteps=12 + 2 * 40, reanalyze_interval=0, utd_ratio=0.001)
    run_loop(args, envs, tmp_path, bmpc.Functions(plan=planner))
    check_warm_start(planner, envs, first=6)  # decisions of each environment, that were random
    assert len(planner.previous) == 40


# --- evaluation


def play(args, envs, planner, step=0):
    """The returns of an evaluation with the planner."""
    run = start(args, FakeEnvs([9] * args.num_envs), bmpc.Functions(plan=planner))
    run.model, run.global_step = make_model(args), step
    return bmpc.run_episodes(run, envs, True, [])[0]


@pytest.mark.parametrize("drawn, part", [(False, "best_action"), (True, "elite_action")])
def test_evaluation_plays_the_best_elite_or_a_drawn_one_and_keeps_episodes_apart(drawn, part):
    """In warm starts and returns. Workers of 5 and 7 decisions share 5 episodes: 0 and 1 first, then whoever is free.

    The rest is not counted.
    """
    envs, planner = FakeEnvs([5, 7]), FakePlanner()
    returns = play(small_args(eval_episodes=5, eval_sample_elite=drawn), envs, planner)
    played = zip(envs.sent, planner.answers, strict=True)
    assert all((sent == getattr(answer, part).numpy()).all() for sent, answer in played) and len(envs.sent) == 15
    check_warm_start(planner, envs, first=0)
    total = lambda i, n: sum(i + 0.125 * k for k in range(1, n + 1))
    assert returns.tolist() == [total(0, 5), total(1, 7), total(0, 5), total(1, 7), total(0, 5)]
    assert [seed for _, seed in envs.begun[:5]] == [bmpc.derive_seed(1, "eval", j) for j in range(5)]


def test_an_evaluation_is_a_function_of_the_seed_and_the_step():
    args, results = small_args(eval_episodes=2), []
    for step in (0, 0, 10):
        envs = FakeEnvs([4, 4])
        play(args, envs, bmpc.plan, step=step)
        results.append(torch.tensor(np.array(envs.sent)))
    assert same(results[0], results[1]) and not same(results[0], results[2])


def test_an_evaluation_that_is_asked_to_stop_is_abandoned_and_its_film_is_episode_0s(tmp_path):
    args, stop = small_args(eval_episodes=3, capture_video=True), []
    run = start(args, FakeEnvs([9, 9]), bmpc.Functions(plan=FakePlanner()))
    returns, frames = bmpc.run_episodes(run, FakeEnvs([5, 7]), True, stop)
    assert len(returns) == 3 and len(frames) == 5
    stop.append(15)
    assert bmpc.run_episodes(run, FakeEnvs([5, 7]), True, stop) is None
    assert bmpc.evaluate(run, FakeEnvs([5, 7]), stop, tmp_path / "video.mp4") is None and not list(tmp_path.iterdir())
