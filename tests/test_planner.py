"""MPPI: against toy problems with known answers, a plain version, and itself one state at a time."""

import math

import numpy as np
import plain
import pytest
import torch
from conftest import FakeEnvs, FakePlanner, generator, make_model, run_loop, same, small_args, start

import bmpc
import bmpc_dual_policy
import bmpc_multihead


def logits(x, args):
    """Logits that stand for exactly the scalar x (...): (..., K)."""
    return bmpc.two_hot(x, args).log()


class Toy:
    """A model with dynamics z + a, reward r(z, a), value v(z) and a policy that is N(0, 1); latents are points."""

    def __init__(self, args, reward, value):
        self.encoder = lambda obs: obs
        self.dynamics = lambda z, a: z + a
        self.reward = lambda z, a: logits(reward(z, a), args)
        self.value = lambda z: logits(torch.stack([value(z[0]) - 0.5, value(z[0]) + 0.5]), args)
        squash = math.atanh(-2 * args.log_std_min / (args.log_std_max - args.log_std_min) - 1)
        self.policy = lambda z: torch.cat([0 * z, torch.full_like(z, squash)], -1)


def toy_args(**changes):
    """Fine bins, so that the toy's scalars are what the planner sees, and enough samples to find the best."""
    return small_args(**(dict(num_samples=512, num_elites=32, num_pi_trajs=8, iterations=10, min_std=0.01) | changes))


def plan(model, obs, mean, draws, args):
    """bmpc.plan, all observations in one piece, by the model's own policy."""
    return bmpc.plan(model, model.policy, obs, mean, draws, args)


def toy_plan(model, z, args):
    S, A = z.shape
    draws = bmpc.draw_plan(args, S, A, args.horizon, generator())
    return plan(model, z, torch.zeros(S, args.horizon, A), draws, args)


def test_mppi_finds_the_cheapest_way_to_a_point(double):
    """Effort 3 a^2 a step and 10 d^2 for the distance d that is left after three: each step is 10 / 33 of the way."""
    args = toy_args(discount=1.0, iterations=15)
    goal = torch.tensor([1.2, -0.9])
    model = Toy(args, lambda z, a: -3 * (a**2).sum(-1) + 0 * z[..., 0], lambda z: -10 * ((z - goal) ** 2).sum(-1))
    z = torch.tensor([[0.0, 0.0], [0.6, -0.3], [1.2, -0.9]])
    found = toy_plan(model, z, args)
    way = ((goal - z) * 10 / 33)[:, None].expand(-1, 3, -1)
    torch.testing.assert_close(found.mean, way, rtol=0, atol=0.01)
    torch.testing.assert_close(found.best, way[:, 0], rtol=0, atol=0.05)
    best = -3 * 3 * (way[:, 0] ** 2).sum(-1) - 10 * ((goal - z - 3 * way[:, 0]) ** 2).sum(-1)
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
    given = model, model.policy, obs, previous, bmpc.draw_plan(args, 8, 2, horizon, generator(3)), args, *coef
    for field, x, y in zip(script.Plan._fields, script.plan(*given), plain.plan(*given), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9, msg=field)


def test_twenty_actions_get_two_more_iterations():
    for actions, changes, iterations in ((19, {}, 6), (20, {}, 8), (38, {}, 8), (38, dict(extra_iterations=0), 6)):
        draws = bmpc.draw_plan(small_args(iterations=6, **changes), 2, actions, 3, generator())
        assert draws.samples.shape == (2, iterations, 16, 3, actions)  # N - P sequences


# --- one plan of many


def test_plans_in_chunks_equal_plans_at_once_under_the_same_draws(double):
    args, seen = small_args(num_samples=600, num_elites=40), []  # 2048 // 600 = 3 states a chunk
    model = make_model(args)
    z = torch.randn(7, 4, generator=generator(1))
    previous = 0.5 * torch.randn(7, 3, 2, generator=generator(2))
    whole = plan(model, z, previous, bmpc.draw_plan(args, 7, 2, 3, generator(3)), args)
    spy = lambda *given: seen.append(len(given[2])) or bmpc.plan(*given)
    chunked = bmpc.plan_in_chunks(spy, model, model.policy, z, previous, generator(3), args)
    assert sum(seen) == 7 and max(seen) == 3
    for name, a, b in zip(bmpc.Plan._fields, whole, chunked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


# --- numbers that are not numbers


def test_a_candidate_without_a_finite_return_is_never_an_elite(double):
    args = toy_args(num_elites=100)
    model = Toy(args, None, lambda z: 0 * z[..., 0])
    model.reward = lambda z, a: torch.where(a > 0, math.nan, logits(-(a[..., 0] ** 2), args))
    found = toy_plan(model, torch.zeros(2, 1), args)
    assert (found.best <= 0).all() and (found.elite <= 0).all() and (found.mean <= 0).all()
    assert torch.isfinite(found.action).all() and (found.value > -1e8).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_if_no_candidate_has_a_finite_return_the_weights_are_uniform(double, value):
    args = toy_args(iterations=1)  # the toy's policy is N(0, 1)
    model = Toy(args, lambda z, a: a[..., 0], lambda z: 0 * z[..., 0])
    model.value = lambda z: torch.full((1, *z.shape[1:-1], args.num_bins), value)
    draws = bmpc.draw_plan(args, 1, 1, 3, generator())
    found = plan(model, torch.zeros(1, 1), torch.zeros(1, 3, 1), draws, args)
    candidates = torch.cat([draws.proposals.clamp(-1, 1), (2 * draws.samples[:, 0]).clamp(-1, 1)], 1)[0]
    ties = torch.full((1, len(candidates)), -1e9).topk(args.num_elites).indices[0]  # as topk breaks them
    elites = candidates[ties]
    assert found.value.item() == -1e9
    torch.testing.assert_close(found.mean[0], elites.mean(0))
    torch.testing.assert_close(found.std[0], elites.std(0, correction=0)[0])


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


def play(args, envs, planner, planning=True, step=0):
    """The model that played, and its returns."""
    run = start(args, FakeEnvs([9] * args.num_envs), bmpc.Functions(plan=planner))
    run.model, run.global_step = make_model(args), step
    return run.model, bmpc.play(run, envs, planning, [], [])


@pytest.mark.parametrize("drawn, part", [(False, "best"), (True, "elite")])
def test_evaluation_plays_the_best_elite_or_a_drawn_one_and_keeps_episodes_apart(drawn, part):
    """In warm starts and returns. Workers of 5 and 7 decisions share 5 episodes: 0 and 1 first, then whoever is free.

    The rest is not counted.
    """
    envs, planner = FakeEnvs([5, 7]), FakePlanner()
    _, returns = play(small_args(eval_episodes=5, eval_sample_elite=drawn), envs, planner)
    played = zip(envs.sent, planner.answers, strict=True)
    assert all((sent == getattr(answer, part).numpy()).all() for sent, answer in played) and len(envs.sent) == 15
    check_warm_start(planner, envs, first=0)
    total = lambda i, n: sum(i + 0.125 * k for k in range(1, n + 1))
    assert returns.tolist() == [total(0, 5), total(1, 7), total(0, 5), total(1, 7), total(0, 5)]
    assert [seed for _, seed in envs.begun[:5]] == [bmpc.make_seed(1, "eval", j) for j in range(5)]


def test_the_policy_alone_acts_with_its_squashed_mean():
    envs = FakeEnvs([3, 3])
    model, _ = play(small_args(eval_episodes=2), envs, FakePlanner(), planning=False)
    first = FakeEnvs([3, 3]).reset(np.ones(2, bool), [("eval", 0), ("eval", 1)])
    expected = torch.tanh(model.policy(model.encoder(torch.from_numpy(first))).chunk(2, -1)[0])
    np.testing.assert_array_equal(envs.sent[0], expected.detach().numpy())


def test_an_evaluation_is_a_function_of_the_seed_and_the_step():
    args, results = small_args(eval_episodes=2), []
    for step in (0, 0, 10):
        envs = FakeEnvs([4, 4])
        play(args, envs, bmpc.plan, step=step)
        results.append(torch.tensor(np.array(envs.sent)))
    assert same(results[0], results[1]) and not same(results[0], results[2])


def test_an_evaluation_that_is_asked_to_stop_is_abandoned_and_its_film_is_episode_0s(tmp_path):
    args, stop = small_args(eval_episodes=3, capture_video=True), []
    run, film = start(args, FakeEnvs([9, 9]), bmpc.Functions(plan=FakePlanner())), []
    assert len(bmpc.play(run, FakeEnvs([5, 7]), True, stop, film)) == 3
    assert len(film) == 5
    stop.append(15)
    assert bmpc.play(run, FakeEnvs([5, 7]), True, stop, film) is None
    assert bmpc.evaluate(run, FakeEnvs([5, 7]), stop, tmp_path / "video.mp4") is None and not list(tmp_path.iterdir())
