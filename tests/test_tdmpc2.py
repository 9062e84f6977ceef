"""tdmpc2.py: every loss, weight and plan against a second implementation; two heads drawn at random; runs, graphs.

What it shares with bmpc.py other tests hold, and test_siblings.py holds that it is the same text.
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
    run_loop,
    same,
    small_args,
)
from conftest import start as start_run
from runs import numbers

import bmpc
import tdmpc2

small = functools.partial(small_args, tdmpc2)
model_of = functools.partial(make_model, script=tdmpc2)
META = torch.device("meta")


# --- against the second implementation

CASES = {
    "defaults": {},
    "one head": dict(num_q=1, enc_lr_scale=1.0, dropout=0.4, horizon=2),
    "two heads": dict(num_q=2, normalize_rho_weights=True, rho=0.8, grad_clip_norm=0.01),
    "five heads": dict(num_q=5, entropy_coef=0.3, tau=0.5, lr=1e-2),
    "episodic": dict(episodic=True, termination_coef=2.0, encoder_consistency_coef=0.5),
    "no entropy": dict(entropy_coef=0.0, num_enc_layers=3, batch_size=1),
}


@pytest.mark.parametrize("name", CASES)
def test_every_loss_and_weight_equals_the_oracles(double, name):
    """Over four updates from large weights on the same batches and draws; some of the rows ended the episode."""
    args = small(**CASES[name])
    model = model_of(args)
    model.q_scale += 5
    slow, optimizers = oracle.Learner(model, args), tdmpc2.make_optimizers(model, args)
    for k in range(4):
        batch = make_batch(args, seed=k, script=tdmpc2)
        draws = tdmpc2.sample_update_noise(args, TASK.action_dim, generator_factory(k))
        found = tdmpc2.update(tdmpc2.Functions(), model, optimizers, batch, draws, args)
        expected = {f"losses/{name}": value for name, value in slow.update(batch, draws).items()}
        assert {name: float(value) for name, value in found.items()} == pytest.approx(expected, rel=1e-7, abs=1e-7), k
    for (name, mine), other in zip(model.named_parameters(), slow.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6, msg=name)
    assert model.q_scale.item() == pytest.approx(slow.scale, rel=1e-8)
    assert all(p.requires_grad for p in model.value.parameters())


PLANS = {
    "defaults": {},
    "narrow": dict(temperature=50.0, min_std=0.3, num_pi_trajs=1, num_elites=3, num_q=2),
    "no policy": dict(num_pi_trajs=0, min_std=0.001, discount=0.5),
    "episodic": dict(episodic=True, num_q=1, log_std_min=-2.0, max_std=0.4),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_equals_the_plain_one_at_once_and_in_chunks(double, name):
    args = small(**PLANS[name])
    model = model_of(args)
    obs = torch.randn(8, 4, generator=generator(1))
    previous = 0.5 * torch.randn(8, 3, 2, generator=generator(2))
    draws = tdmpc2.sample_plan_noise(8, 3, 2, args, generator(3))
    expected = oracle.plan(model, model.policy, obs, previous, draws, args)
    for plan in (tdmpc2.plan, tdmpc2.plan_in_chunks(tdmpc2.plan, lambda num_states: 3)):
        found = plan(model, model.policy, obs, previous, draws, args)
        for field, x, y in zip(tdmpc2.Plan._fields, found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9, msg=field)


# --- draws


def test_two_different_heads_are_drawn_once_per_call_and_every_pair_as_often():
    args = small(num_q=5)
    of_plans = [tdmpc2.sample_plan_noise(3, 3, 2, args, generator(seed)).heads for seed in range(1000)]
    updates = [tdmpc2.sample_update_noise(args, 2, generator_factory(seed)) for seed in range(300)]
    assert all(heads.shape == (3, 2) and (heads == heads[0]).all() for heads in of_plans)
    for name in ("td_heads", "policy_heads"):
        assert all(getattr(noise, name).shape == (2,) for noise in updates)
    pairs = Counter(tuple(sorted(heads[0].tolist())) for heads in of_plans)
    assert pairs.keys() == set(itertools.combinations(range(5), 2))
    assert min(pairs.values()) > 60 and max(pairs.values()) < 140  # 100 each
    assert {tuple(noise.td_heads.tolist()) == tuple(noise.policy_heads.tolist()) for noise in updates} == {True, False}
    assert tdmpc2.sample_heads(small(num_q=1), generator()).tolist() == [0]


def test_no_numbers_are_drawn_twice(tmp_path, monkeypatch):
    """Within a call no two numbers are the same, and every call has a place or a purpose of its own."""
    asked, make = [], tdmpc2.Run.make_generator

    def listen(run, name):
        asked.append((name, run.global_step, run.pretraining_updates, run.updates))
        return make(run, name)

    monkeypatch.setattr(tdmpc2.Run, "make_generator", listen)
    run_loop(small(), FakeEnvs([5, 7]), tmp_path, script=tdmpc2)
    assert {name for name, *_ in asked} == {"act", "update"} and len(set(asked)) == len(asked)
    noise = tdmpc2.sample_update_noise(small(), 2, generator_factory())
    normal = torch.cat([noise.td.flatten(), noise.policy.flatten()])
    assert len(normal.unique()) == len(normal) == (2 * 3 + 1) * 12 * 2
    noise = tdmpc2.sample_plan_noise(2, 3, 2, small(), generator())
    normal = torch.cat([x.flatten() for x in (noise.policy, noise.candidates, noise.action)])
    assert len(normal.unique()) == len(normal)


# --- runs


def test_a_run_updates_everything_in_pretraining_too_and_stores_what_happened(tmp_path):
    args, envs = small(total_timesteps=34, learning_starts=13, episodic=True), FakeEnvs([5, 7], terminal=(1,))
    run = start_run(args, envs, tdmpc2.Functions(plan=FakePlanner(tdmpc2)), tdmpc2)
    before, seen = {name: x.clone() for name, x in run.model.state_dict().items()}, []
    run.accumulate_metrics = lambda values: seen.append(set(values))
    run.global_step = 14
    for _ in range(4):
        acted = tdmpc2.random_action(args, 2, run.make_generator("act")), run.prev_mean
        envs.step_async(acted[0].numpy())
        tdmpc2.store_step(run, envs, *acted)
    tdmpc2.train_step(run, pretraining=True)
    assert run.pretraining_updates == 1 and "losses/policy" in seen[0]
    unmoved = [name for name, x in run.model.state_dict().items() if torch.equal(x, before[name])]
    assert not [name for name in unmoved if name.startswith(("policy", "value.layers.2"))], unmoved
    rows = run.buffer.split_rows(run.buffer.rows[:4])
    assert rows.reward.tolist() == [[0.125 * k, 1 + 0.125 * k] for k in range(1, 5)]
    assert torch.equal(rows.action.double(), torch.from_numpy(np.stack(envs.sent)).double())


def test_the_same_seed_gives_the_same_bits_and_observers_change_none(tmp_path):
    ends = []
    for k, (seed, eval_freq) in enumerate([(3, 0), (3, 20), (4, 0)]):
        args, envs = small(seed=seed, eval_freq=eval_freq, log_freq=10, episodic=True), FakeEnvs([5, 7], terminal=(1,))
        run = start_run(args, envs, script=tdmpc2)
        (tmp_path / str(k)).mkdir()
        log = tdmpc2.MetricsLogger(tmp_path / str(k), args, 0)
        tdmpc2.train(run, envs, tdmpc2.RunController(run, FakeEnvs([5, 6]), log, [], tmp_path / str(k)))
        state = tdmpc2.checkpoint_contents(run)
        ends.append([state[name] for name in ("model", "optimizers", "buffer")])
    assert same(ends[0], ends[1]) and not same(ends[0], ends[2])
    tags = {tag for _, _, tag, _ in numbers(tmp_path / "1")}
    assert {"losses/q", "losses/q_scale", "losses/entropy", "losses/termination", "eval/episodic_return"} <= tags


def test_the_policy_alone_plays_tanh_of_its_mean_and_the_planner_a_drawn_elite():
    args, envs, planner = small(), FakeEnvs([5, 7]), FakePlanner(tdmpc2)
    run = start_run(args, FakeEnvs([9, 9]), tdmpc2.Functions(plan=planner), tdmpc2)
    run.model = model_of(args)
    obs = envs.start_episodes(np.ones(2, bool), [("eval", 0), ("eval", 1)], np.zeros((2, 4), np.float32))
    tdmpc2.run_episodes(run, envs, False, [])
    mean = run.model.policy(run.model.encoder(torch.from_numpy(obs)))[:, :2]
    torch.testing.assert_close(torch.from_numpy(envs.sent[0]), torch.tanh(mean))
    envs.sent.clear()
    tdmpc2.run_episodes(run, envs, True, [])
    assert all((sent == a.elite_action.numpy()).all() for sent, a in zip(envs.sent, planner.plans, strict=True))


# --- devices and graphs


def vector_steps(args, device, functions=None):
    """Vector steps without simulators, some of them with plans and updates: the run."""
    envs = FakeEnvs([5, 4] * (args.num_envs // 2), terminal=(1,) if args.episodic else ())
    run = tdmpc2.Run(args, TASK, device)
    run.functions = functions or run.functions
    if device != META:
        run.model.load_state_dict(model_of(args).state_dict())
    for step in range(args.horizon + 6):
        acted = [tdmpc2.random_action(args, TASK.action_dim, run.make_generator("act")), run.prev_mean]
        if step >= args.horizon:
            *acted, metrics = tdmpc2.act(
                run.functions.plan, run.model, run.obs, run.prev_mean, args, run.make_generator
            )
            run.accumulate_metrics(metrics)
            tdmpc2.train_step(run, pretraining=step == args.horizon)
        tdmpc2.store_step(run, envs, *acted)
    return run


def test_acting_learning_and_sampling_never_read_the_device(monkeypatch):
    """On the meta device reading a value raises. Draws are made on the CPU, since there is no generator on meta."""
    to_meta = lambda x: x.to(META)
    for name in ("sample_plan_noise", "sample_update_noise", "random_action"):
        moved = lambda draw, *given: torch.utils._pytree.tree_map_only(torch.Tensor, to_meta, draw(*given))
        monkeypatch.setattr(tdmpc2, name, functools.partial(moved, getattr(tdmpc2, name)))
    monkeypatch.setattr(tdmpc2, "seeded_generator", lambda seed, key, device: generator(seed))
    run = vector_steps(small(iterations=1, buffer_size=10, episodic=True, encoder_consistency_coef=0.1), META)
    assert run.updates == 5 and run.pretraining_updates == 1 and run.buffer.step > run.buffer.capacity
    assert all(x.device == META for x in run.model.state_dict().values())


def test_each_function_is_one_graph_that_is_compiled_once_and_equals_eager():
    args = small(num_samples=16, iterations=2, num_envs=4, horizon=2, episodic=True)
    torch._dynamo.reset()
    compile = functools.partial(torch.compile, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        fast = vector_steps(args, torch.device("cpu"), tdmpc2.Functions(*map(compile, tdmpc2.Functions())))
    eager = vector_steps(args, torch.device("cpu"), tdmpc2.Functions())
    results = lambda run: {
        part: bmpc.checkpoint_contents(run)[part] for part in ("model", "optimizers", "buffer", "metrics")
    }
    torch.testing.assert_close(results(fast), results(eager), atol=1e-4, rtol=1e-3)


# --- arguments


def test_sizes_are_td_mpc2s_and_the_small_preset_keeps_five_value_heads():
    of = lambda *flags: tdmpc2.resolve_args(tdmpc2.parse_args(["--task", "Pendulum-v1", *flags]))[0]
    assert (of().num_q, of("--preset", "small").num_q, of("--model-size", "1").num_q) == (5, 5, 2)
    with pytest.raises(SystemExit):
        of("--reanalyze-interval", "5")
