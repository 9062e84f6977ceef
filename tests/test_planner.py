"""MPPI: against toy problems with known answers, a numpy version of one plan, and itself one state at a time."""

import math

import numpy as np
import oracle
import pytest
import torch
from conftest import FakeEnvs, generator, make_model, run_loop, same, small_args, start

import bmpc


def logits(x, args):
    """Logits that stand for exactly the scalar x (...): (..., K)."""
    return bmpc.two_hot(x, args).log()


class Toy:
    """A model with dynamics z + a, and reward r(z, a), value v(z), policy (z -> mean) given; latents are points."""

    def __init__(self, args, reward, value, policy=None, log_std=0.0, ends=None, num_q=2):
        self.dynamics = lambda z, a: z + a
        self.reward = lambda z, a: logits(reward(z, a), args)
        self.value = lambda z: logits(torch.stack([value(z[0]) + q - (num_q - 1) / 2 for q in range(num_q)]), args)
        mean = policy or torch.zeros_like
        squash = math.atanh(2 * (log_std - args.log_std_min) / (args.log_std_max - args.log_std_min) - 1)
        self.policy = lambda z: torch.cat([torch.atanh(mean(z)), torch.full_like(z, squash)], -1)
        if ends:
            self.termination = lambda z: torch.where(ends(z), 5.0, -5.0)[..., None]


def toy_args(**changes):
    """Fine bins, so that the toy's scalars are what the planner sees, and enough samples to find the best."""
    return small_args(**(dict(num_samples=512, num_elites=32, num_pi_trajs=8, iterations=10, min_std=0.01) | changes))


def plan(model, z, mean, draws, args):
    """bmpc.plan, all states in one piece, by the model's own policy."""
    return bmpc.plan(model, model.policy, z, mean, draws, args)


def toy_plan(model, z, args, seed=0, mean=None):
    S, A = z.shape
    draws = bmpc.draw_plan(args, S, A, args.horizon, generator(seed))
    mean = torch.zeros(S, args.horizon, A) if mean is None else mean
    return plan(model, z, mean, draws, args)


# --- known answers


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


def test_the_discount_decides_between_a_reward_now_and_a_value_later(double):
    """Up pays 1 at once, three times down pays 2 in the end, not both: the bend between them is gamma^3 = 1/2."""
    for discount, sign in ((0.7, 1), (0.9, -1)):
        args = toy_args(temperature=20.0, discount=discount)
        at_start = lambda z, a: ((z.abs() < 1e-9) & (a > 0))[..., 0] * 1.0
        model = Toy(args, at_start, lambda z: 2.0 * (z[..., 0] < -2.5), num_q=1)
        model.dynamics = lambda z, a: z + a + 0.001  # one never comes back to the start exactly
        found = toy_plan(model, torch.zeros(1, 1), args)
        assert found.best.sign() == sign, discount
        assert found.value == pytest.approx(1.0 if sign > 0 else 2 * discount**3, abs=1e-6)


def test_a_policy_proposal_stays_a_candidate_to_the_last_iteration(double):
    """Only the policy knows the needle in the haystack; its sequences are sampled once and must never be dropped."""
    args = toy_args(iterations=6, num_pi_trajs=1, num_samples=64, num_elites=8, log_std_min=-12.0)
    needle = torch.tensor([0.123456, -0.654321])
    near = lambda z, a: 50.0 * (((a - needle).abs() < 1e-3).all(-1) & (z.sum(-1) > -1e9))
    model = Toy(args, near, lambda z: 0 * z[..., 0], policy=lambda z: needle.expand_as(z), log_std=-11.9)
    found = toy_plan(model, torch.zeros(3, 2), args)
    torch.testing.assert_close(found.best, needle.expand(3, 2), rtol=0, atol=1e-3)
    assert found.value == pytest.approx([50 * (1 + 0.9 + 0.81)] * 3, rel=1e-6)


def test_after_a_foreseen_termination_nothing_counts(double):
    """Beyond 0.5 the episode ends: the step that leads there is the last with a reward, even if one walks back."""
    args = toy_args(episodic=True)
    one, ten, ends = lambda z, a: a[..., 0] * 0 + 1, lambda z: z[..., 0] * 0 + 10, lambda z: z[..., 0] > 0.5
    model = Toy(args, one, ten, ends=ends, num_q=1)
    actions = torch.tensor(
        [
            [[0.0], [0.0], [0.0]],
            [[0.6], [0.0], [0.0]],
            [[0.3], [0.3], [0.0]],
            [[0.2], [0.2], [0.2]],
            [[0.6], [-0.6], [0.0]],
        ]
    )
    returns = bmpc.score(*bmpc.estimate_return(model, torch.zeros(1, 1), actions[None], args))[0]
    assert returns.tolist() == pytest.approx([1 + 0.9 + 0.81 + 7.29, 1, 1.9, 2.71, 1])


# --- against numpy


def check_against_numpy(model, args, z, previous, horizon=3):
    S, A = z.shape[0], previous.shape[-1]
    draws = bmpc.draw_plan(args, S, A, horizon, generator(3))
    found = plan(model, z, previous, draws, args)
    with torch.no_grad():
        for s in range(S):
            mine = [x[s].numpy() for x in (z, previous, *draws)]
            expected = oracle.plan(oracle.Simulator(model, args), *mine, args)
            for name, value in expected.items():
                np.testing.assert_allclose(getattr(found, name)[s].numpy(), value, rtol=1e-7, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(
    "horizon, changes",
    [
        (3, dict()),
        (3, dict(temperature=5.0, min_std=0.3, num_pi_trajs=1, num_elites=3)),  # the std's lower bound binds
        (3, dict(temperature=0.01, max_std=0.3, num_elites=20)),  # and its upper bound
        (3, dict(num_pi_trajs=0, min_std=0.001, discount=0.5)),
        (3, dict(episodic=True, num_q=1, log_std_min=-2.0, max_std=0.4)),  # ended at the same corner, two would tie
        (5, dict(log_std_min=-2.0, log_std_max=0.0)),  # a horizon that is not the model's, as reanalyze may ask for
    ],
    ids=["defaults", "narrow", "wide", "no policy", "episodic", "as reanalyze"],
)
def test_a_plan_equals_its_numpy_version(double, horizon, changes):
    """Elites, weights, mean, std, the drawn elite, the noise on it and its return, on a random model."""
    args = small_args(**changes)
    model = make_model(args)
    z = model.encoder(torch.randn(2, 4, generator=generator(1))).detach()
    previous = 0.5 * torch.randn(2, horizon, 2, generator=generator(2))
    check_against_numpy(model, args, z, previous, horizon)


def test_twenty_actions_get_two_more_iterations():
    shapes = lambda A, **changes: (
        bmpc.draw_plan(small_args(iterations=6, **changes), 2, A, 3, generator()).samples.shape
    )
    assert shapes(19)[1] == 6 and shapes(20)[1] == 8 and shapes(38)[1] == 8
    assert shapes(38, extra_iterations=0)[1] == 6
    assert shapes(20) == (2, 8, 16, 3, 20)  # N - P sequences


# --- one plan of many


def test_a_plan_for_a_batch_equals_plans_one_by_one_under_the_same_draws(double):
    args, seen = small_args(num_samples=600, num_elites=40), []  # 2048 // 600 = 3 states a chunk
    model = make_model(args)
    z = model.encoder(torch.randn(7, 4, generator=generator(1))).detach()
    previous = 0.5 * torch.randn(7, 3, 2, generator=generator(2))
    draws = bmpc.draw_plan(args, 7, 2, 3, generator(3))
    whole = plan(model, z, previous, draws, args)
    spy = lambda *given: seen.append(len(given[2])) or bmpc.plan(*given)
    chunked = bmpc.plan_in_chunks(spy, model, model.policy, z, previous, draws, args)
    assert sum(seen) == 7 and max(seen) == 3
    part = lambda s: (z[s : s + 1], previous[s : s + 1], bmpc.PlanDraws(*(x[s : s + 1] for x in draws)))
    single = bmpc.Plan(*map(torch.cat, zip(*(plan(model, *part(s), args) for s in range(7)), strict=True)))
    for name, a, b, c in zip(bmpc.Plan._fields, whole, chunked, single, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-9, msg=name)
        torch.testing.assert_close(b, c, rtol=1e-9, atol=1e-9, msg=name)


def test_elites_are_drawn_by_their_weights(double):
    """One state many times, the draws shared but those of the elite: frequencies equal the softmax of the returns."""
    args, S = small_args(num_elites=5, num_pi_trajs=1, num_samples=8, temperature=0.7, iterations=1), 8_000
    model = make_model(args)
    one = bmpc.draw_plan(args, 1, 2, 3, generator(4))
    draws = bmpc.PlanDraws(*(x.expand(S, *x.shape[1:]) for x in one))
    draws = draws._replace(elite=torch.rand(S, 5, generator=generator(5)))
    z = model.encoder(torch.randn(1, 4, generator=generator(6))).detach().expand(S, -1)
    value = plan(model, z, torch.zeros(S, 3, 2), draws, args).value
    returns, counts = value.mul(1e9).round().div(1e9).unique(return_counts=True)
    expected = torch.softmax(0.7 * returns, 0)
    assert len(returns) == 5 and expected.max() > 1.3 * expected.min()
    torch.testing.assert_close(counts / S, expected, rtol=0, atol=0.02)


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


class Recorder:
    """A plan that answers with unmistakable numbers and keeps what it was asked."""

    def __init__(self):
        self.previous, self.z, self.answers = [], [], []

    def __call__(self, model, policy, z, mean, draws, args):
        self.previous.append(mean.clone())
        self.z.append(z.clone())
        S, T, A = mean.shape
        n = len(self.previous)
        rows = lambda x: torch.full((S, A), x)
        new = (n + torch.arange(S * T * A).view(S, T, A) / 1000).to(mean)
        self.answers.append(bmpc.Plan(rows(0.1), rows(0.2), rows(0.3), new, rows(0.5), torch.zeros(S)))
        return self.answers[-1]


def test_the_warm_start_shifts_by_one_and_is_cleared_exactly_where_an_episode_began(tmp_path):
    """Episodes of 5 and 7 decisions, so that the two begin apart and, at last, together."""
    recorder, envs = Recorder(), FakeEnvs([5, 7])
    args = small_args(total_timesteps=12 + 2 * 40, reanalyze_interval=0, utd_ratio=0.001)
    run_loop(args, envs, tmp_path, bmpc.Functions(plan=recorder))
    begun = kept = 0
    assert len(recorder.previous) == 40
    for k in range(1, 40):
        decision = 6 + k  # of each environment; 6 were random
        for i, length in enumerate(envs.lengths):
            if decision % length == 0:
                assert (recorder.previous[k][i] == 0).all()
                begun += 1
            else:
                assert torch.equal(recorder.previous[k][i, :-1], recorder.answers[k - 1].mean[i, 1:])
                assert (recorder.previous[k][i, -1] == 0).all()
                kept += 1
    assert (recorder.previous[0] == 0).all() and begun > 10 and kept > 50


def test_plans_see_the_encoded_current_observations(tmp_path):
    recorder, envs = Recorder(), FakeEnvs([5, 7])
    args = small_args(total_timesteps=12 + 2 * 8, reanalyze_interval=0, utd_ratio=0.001)
    run = run_loop(args, envs, tmp_path, bmpc.Functions(plan=recorder))
    again = FakeEnvs(
        [5, 7]
    )  # the same episodes, walked through by hand; no update after pretraining changed the encoder
    obs = again.reset(np.ones(2, bool), [seed for _, seed in envs.begun[:2]])
    seen, seeds = [], {i: [s for j, s in envs.begun if j == i][1:] for i in range(2)}
    for _ in range(14):
        seen.append(obs)
        again.step_async(None)
        obs, _, _, truncated = again.step_wait()
        if truncated.any():
            obs = again.reset(truncated, [seeds[i].pop(0) if truncated[i] else 0 for i in range(2)])
    for k in range(8):
        assert torch.equal(recorder.z[k], run.model.encoder(torch.from_numpy(seen[6 + k])))


# --- evaluation


def play(args, envs, planner, planning=True, step=0):
    """The model that played, and its returns."""
    run = start(args, FakeEnvs([9] * args.num_envs), bmpc.Functions(plan=planner))
    run.model, run.global_step = make_model(args), step
    return run.model, bmpc.play(run, envs, planning, [], [])


def test_evaluation_plays_the_best_elite_and_the_official_flag_a_drawn_one():
    for flag, first in ((False, 0.3), (True, 0.2)):
        envs = FakeEnvs([5, 7])
        play(small_args(eval_sample_elite=flag), envs, Recorder())
        assert all((sent == np.float32(first)).all() for sent in envs.sent) and len(envs.sent) >= 10


def test_evaluation_warm_starts_within_an_episode_only():
    recorder, envs = Recorder(), FakeEnvs([5, 7])
    play(small_args(eval_episodes=4), envs, recorder)
    for k in range(1, len(recorder.previous)):
        for i, length in enumerate(envs.lengths):
            expected = recorder.answers[k - 1].mean[i, 1:]
            begins = k % length == 0
            assert torch.equal(recorder.previous[k][i, :-1], torch.zeros_like(expected) if begins else expected)
            assert (recorder.previous[k][i, -1] == 0).all()


def test_evaluation_returns_belong_to_their_episodes():
    """Workers of 5 and 7 decisions share 5 episodes: 0 and 1 first, then whoever is free; the rest is not counted."""
    envs = FakeEnvs([5, 7])
    _, returns = play(small_args(eval_episodes=5), envs, Recorder())
    total = lambda i, n: sum(i + 0.125 * k for k in range(1, n + 1))
    assert returns.tolist() == [total(0, 5), total(1, 7), total(0, 5), total(1, 7), total(0, 5)]
    assert [seed for _, seed in envs.begun[:5]] == [bmpc.make_seed(1, "eval", j) for j in range(5)]


def test_the_policy_alone_acts_with_its_squashed_mean():
    envs = FakeEnvs([3, 3])
    model, _ = play(small_args(eval_episodes=2), envs, Recorder(), planning=False)
    first = FakeEnvs([3, 3]).reset([True, True], [seed for _, seed in envs.begun[:2]])
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
    run, film = start(args, FakeEnvs([9, 9]), bmpc.Functions(plan=Recorder())), []
    assert len(bmpc.play(run, FakeEnvs([5, 7]), True, stop, film)) == 3
    assert len(film) == 5
    stop.append(15)
    assert bmpc.play(run, FakeEnvs([5, 7]), True, stop, film) is None
    assert bmpc.evaluate(run, FakeEnvs([5, 7]), stop, tmp_path / "video.mp4") is None and not list(tmp_path.iterdir())
