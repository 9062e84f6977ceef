"""tdmpc2.py: losses, weights and plans compared with a second implementation; the sampled value heads; short runs.

test_siblings.py checks that the rest is the same text as in bmpc.py, and test_speed.py checks the graphs.
"""

import functools
import itertools
from collections import Counter

import numpy as np
import oracle_tdmpc2 as oracle
import pytest
import torch
from conftest import (
    TASK,
    FakeEnvs,
    FakePlanner,
    generator,
    generator_factory,
    make_batch,
    make_model,
    record_generators,
    run_loop,
    same,
    small_args,
)
from conftest import start as start_run
from runs import numbers

import tdmpc2

tdmpc2_args = functools.partial(small_args, tdmpc2)
tdmpc2_model = functools.partial(make_model, script=tdmpc2)


# --- comparison with the second implementation

CASES = {
    "defaults": {},
    "one head": dict(num_q=1, enc_lr_scale=1.0, dropout=0.4, horizon=2),
    "two heads": dict(num_q=2, normalize_rho_weights=True, rho=0.8, grad_clip_norm=0.01),
    "five heads": dict(num_q=5, entropy_coef=0.3, tau=0.5, lr=1e-2, reward_coef=0.3, value_coef=0.7),
    "episodic": dict(episodic=True, termination_coef=2.0, encoder_consistency_coef=0.5),
    "no entropy": dict(entropy_coef=0.0, num_enc_layers=3, batch_size=1),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_weights_match_the_oracle(double, name):
    """After each of four updates, with the same batches and noise. Some transitions end an episode."""
    args = tdmpc2_args(**CASES[name])
    model = tdmpc2_model(args)
    model.q_scale += 5
    learner, optimizers = oracle.Learner(model, args), tdmpc2.make_optimizers(model, args)
    for k in range(4):
        batch = make_batch(args, seed=k, script=tdmpc2)
        noise = tdmpc2.sample_update_noise(args, TASK.action_dim, generator_factory(k))
        metrics = tdmpc2.update(tdmpc2.Functions(), model, optimizers, batch, noise, args)
        expected = {f"losses/{loss}": value for loss, value in learner.update(batch, noise).items()}
        assert {tag: float(value) for tag, value in metrics.items()} == pytest.approx(expected, rel=1e-7, abs=1e-7), k
    for (path, actual), weight in zip(model.named_parameters(), learner.model.parameters(), strict=True):
        torch.testing.assert_close(actual, weight, rtol=0, atol=1e-6, msg=path)
    assert model.q_scale.item() == pytest.approx(learner.scale, rel=1e-8)
    assert all(p.requires_grad for p in model.value.parameters())


PLANS = {
    "defaults": {},
    "narrow": dict(temperature=50.0, min_std=0.3, num_pi_trajs=1, num_elites=3, num_q=2),
    "no policy": dict(num_pi_trajs=0, min_std=0.001, discount=0.5),
    "episodic": dict(episodic=True, num_q=1, log_std_min=-2.0, max_std=0.4),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans_match_the_oracle(double, name):
    """All states at once, and in chunks of three."""
    args = tdmpc2_args(**PLANS[name])
    model = tdmpc2_model(args)
    obs = torch.randn(8, 4, generator=generator(1))
    prev_mean = 0.5 * torch.randn(8, 3, 2, generator=generator(2))
    noise = tdmpc2.sample_plan_noise(8, 3, 2, args, generator(3))
    expected = oracle.plan(model, model.policy, obs, prev_mean, noise, args)
    for plan in (tdmpc2.plan, tdmpc2.plan_in_chunks(tdmpc2.plan, lambda num_states: 3)):
        actual = plan(model, model.policy, obs, prev_mean, noise, args)
        for field, x, y in zip(tdmpc2.Plan._fields, actual, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9, msg=field)


# --- random numbers


def test_each_call_samples_two_different_heads_uniformly():
    args = tdmpc2_args(num_q=5)
    plan_heads = [tdmpc2.sample_plan_noise(3, 3, 2, args, generator(seed)).heads for seed in range(1000)]
    update_noise = [tdmpc2.sample_update_noise(args, 2, generator_factory(seed)) for seed in range(300)]
    assert all(heads.shape == (3, 2) and (heads == heads[0]).all() for heads in plan_heads)
    for name in ("td_heads", "policy_heads"):
        assert all(getattr(noise, name).shape == (2,) for noise in update_noise)
    pairs = Counter(tuple(sorted(heads[0].tolist())) for heads in plan_heads)
    assert pairs.keys() == set(itertools.combinations(range(5), 2))
    assert min(pairs.values()) > 60 and max(pairs.values()) < 140  # 100 are expected
    equal = {noise.td_heads.tolist() == noise.policy_heads.tolist() for noise in update_noise}
    assert equal == {True, False}  # target and policy loss have samples of their own
    assert tdmpc2.sample_heads(tdmpc2_args(num_q=1), generator()).tolist() == [0]


def test_no_random_number_is_used_twice(tmp_path, monkeypatch):
    """Each generator has its own purpose or step, and no two numbers of a sample are equal."""
    keys = record_generators(tdmpc2, monkeypatch)
    run_loop(tdmpc2_args(), FakeEnvs([5, 7]), tmp_path, script=tdmpc2)
    assert {name for name, *_ in keys} == {"act", "update"} and len(set(keys)) == len(keys)
    noise = tdmpc2.sample_update_noise(tdmpc2_args(), 2, generator_factory())
    normal = torch.cat([noise.td.flatten(), noise.policy.flatten()])
    assert len(normal.unique()) == len(normal) == (2 * 3 + 1) * 12 * 2
    noise = tdmpc2.sample_plan_noise(2, 3, 2, tdmpc2_args(), generator())
    normal = torch.cat([x.flatten() for x in (noise.policy, noise.samples, noise.action)])
    assert len(normal.unique()) == len(normal)


# --- runs


def test_pretraining_updates_the_policy_and_transitions_are_stored():
    """bmpc.py does not update the policy in pretraining."""
    args = tdmpc2_args(total_timesteps=34, learning_starts=13, episodic=True)
    envs = FakeEnvs([5, 7], terminal=(1,))
    run = start_run(args, envs, tdmpc2.Functions(plan=FakePlanner(tdmpc2)), tdmpc2)
    before = {name: x.clone() for name, x in run.model.state_dict().items()}
    tags = []
    run.accumulate_metrics = tags.extend
    run.global_step = 14
    for _ in range(4):
        action = tdmpc2.random_action(args, 2, run.make_generator("act"))
        envs.step_async(action.numpy())
        tdmpc2.store_step(run, envs, action, run.prev_mean)
    tdmpc2.train_step(run, pretraining=True)
    assert run.pretraining_updates == 1 and "losses/policy" in tags
    unchanged = [name for name, x in run.model.state_dict().items() if torch.equal(x, before[name])]
    assert not [name for name in unchanged if name.startswith(("policy", "value.layers.2"))], unchanged
    rows = run.buffer.split_rows(run.buffer.rows[:4])
    assert rows.reward.tolist() == [[0.125 * k, 1 + 0.125 * k] for k in range(1, 5)]
    assert torch.equal(rows.action.double(), torch.from_numpy(np.stack(envs.sent)).double())


def test_the_seed_determines_a_run_and_evaluations_do_not_change_it(tmp_path):
    results = []
    for k, (seed, eval_freq) in enumerate([(3, 0), (3, 20), (4, 0)]):
        args = tdmpc2_args(seed=seed, eval_freq=eval_freq, log_freq=10, episodic=True)
        envs = FakeEnvs([5, 7], terminal=(1,))
        run = start_run(args, envs, script=tdmpc2)
        (tmp_path / str(k)).mkdir()
        log = tdmpc2.MetricsLogger(tmp_path / str(k), args, 0)
        tdmpc2.train(run, envs, tdmpc2.RunController(run, FakeEnvs([5, 6]), log, [], tmp_path / str(k)))
        state = tdmpc2.checkpoint_contents(run)
        results.append([state[name] for name in ("model", "optimizers", "buffer")])
    assert same(results[0], results[1]) and not same(results[0], results[2])
    tags = {tag for _, _, tag, _ in numbers(tmp_path / "1")}
    assert {"losses/q", "losses/q_scale", "losses/entropy", "losses/termination", "eval/episodic_return"} <= tags


def test_actions_of_an_evaluation():
    """The policy alone acts with tanh of its mean, the planner with a sampled elite."""
    args, envs, planner = tdmpc2_args(), FakeEnvs([5, 7]), FakePlanner(tdmpc2)
    run = start_run(args, FakeEnvs([9, 9]), tdmpc2.Functions(plan=planner), tdmpc2)
    run.model = tdmpc2_model(args)
    obs = envs.start_episodes(np.ones(2, bool), [("eval", 0), ("eval", 1)], np.zeros((2, 4), np.float32))
    tdmpc2.run_episodes(run, envs, False, [])
    mean = run.model.policy(run.model.encoder(torch.from_numpy(obs)))[:, :2]
    torch.testing.assert_close(torch.from_numpy(envs.sent[0]), torch.tanh(mean))
    envs.sent.clear()
    tdmpc2.run_episodes(run, envs, True, [])
    assert all((sent == plan.elite_action.numpy()).all() for sent, plan in zip(envs.sent, planner.plans, strict=True))


# --- arguments


def test_the_small_preset_keeps_five_value_heads():
    """The model size sets their number otherwise, as in TD-MPC2. There are no flags of reanalyze."""
    task = ["--task", "Pendulum-v1"]
    for flags, num_q in ([], 5), (["--preset", "small"], 5), (["--model-size", "1"], 2):
        assert tdmpc2.resolve_args(tdmpc2.parse_args([*task, *flags]))[0].num_q == num_q
    with pytest.raises(SystemExit):
        tdmpc2.parse_args([*task, "--reanalyze-interval", "5"])
