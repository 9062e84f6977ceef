"""Learning: math and networks, updates of the three scripts against the oracle, whole runs, random numbers."""

import copy
import functools
import math
import types

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
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
    stack_expert,
    start,
    train,
)

import bmpc
import bmpc_dual_policy
import bmpc_multihead
import tdmpc2

# --- math and networks

ON_BINS = [math.copysign(math.expm1(abs(s)), s) for s in np.linspace(-10, 10, 101)]  # values that lie on a bin
BETWEEN = [math.copysign(math.expm1(abs(s)), s) for s in np.linspace(-9.97, 9.97, 57)]


@pytest.mark.parametrize("args", [small_args(), small_args(vmin=-2.0, vmax=3.0, num_bins=7)], ids=["101", "7"])
def test_two_hot_matches_the_oracle(double, args):
    """Values lie on, between and beyond the bins."""
    low, high = (math.copysign(math.expm1(abs(s)), s) for s in (args.vmin, args.vmax))
    x = torch.tensor([0.0, 1e-8, *ON_BINS, *BETWEEN, low, high, low - 1, high + 1, 1e20, -1e20])
    target = bmpc.two_hot(x, args)
    torch.testing.assert_close(target, oracle.two_hot(x, args), rtol=0, atol=1e-10)
    torch.testing.assert_close(bmpc.two_hot_inv(target.log(), args), x.clamp(low, high), rtol=1e-9, atol=1e-9)
    assert bmpc.two_hot(torch.tensor([math.inf, -math.inf]), args)[:, [-1, 0]].tolist() == [[1, 0], [0, 1]]
    logits = 2 * torch.randn(40, args.num_bins, generator=generator())
    torch.testing.assert_close(bmpc.two_hot_inv(logits, args), oracle.two_hot_inv(logits, args), rtol=1e-9, atol=1e-12)


def test_compiled_mish_has_the_value_and_gradient_of_mish(monkeypatch):
    """Inputs include those for which exp would overflow."""
    x = torch.cat([torch.linspace(-30, 30, 6001), torch.tensor([-1e4, 1e4])]).requires_grad_()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    actual = bmpc.mish(x)
    expected = x * torch.tanh(F.softplus(x))
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-6)
    grads = [torch.autograd.grad(y.sum(), x)[0] for y in (actual, expected)]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_heads_one_by_one_and_at_once_match_the_oracle(double, shared):
    """Outputs and gradients are equal, also where the leading dimensions of x and a only broadcast."""
    simnorm = functools.partial(bmpc.simnorm, group_size=4)
    net = bmpc.MLP([7, 16, 16, 8], generator(), num_heads=3, output_activation=simnorm)
    x = torch.randn(1 if shared else 3, 4, 1, 5)
    a = torch.randn(1, 4, 6, 2)
    mask = torch.rand(3, 4, 6, 16)
    leaves = [v.requires_grad_() for v in (x, a, mask)] + list(net.parameters())
    weights = torch.randn(3, 4, 6, 8)
    joined = torch.cat([x.expand(3, 4, 6, 5), a.expand(3, 4, 6, 2)], -1)
    expected = torch.stack([oracle.network(net, h, joined[h], mask[h]) for h in range(3)])
    grads = lambda y: torch.autograd.grad((y * weights).sum(), leaves, retain_graph=True)
    for y in (net(x, a, mask), net.forward_heads(x, a, slice(None), mask)):  # the second computes all at once
        torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)
        for actual_grad, expected_grad in zip(grads(y), grads(expected), strict=True):
            torch.testing.assert_close(actual_grad, expected_grad, atol=1e-10, rtol=1e-10)


def test_network_shapes_and_initialization():
    sizes = dict(enc_dim=72, mlp_dim=68, latent_dim=64, num_enc_layers=4, num_q=5)
    args = small_args(episodic=True, td_target_use_ema_policy=True, **sizes)
    model = bmpc.WorldModel(TASK, args, generator())
    shapes = {
        "encoder": [(1, 4, 72), (1, 72, 72), (1, 72, 72), (1, 72, 64)],
        "dynamics": [(1, 66, 68), (1, 68, 68), (1, 68, 64)],
        "reward": [(1, 66, 68), (1, 68, 68), (1, 68, 101)],
        "value": [(5, 64, 68), (5, 68, 68), (5, 68, 101)],
        "policy": [(1, 64, 68), (1, 68, 68), (1, 68, 4)],
        "termination": [(1, 64, 68), (1, 68, 68), (1, 68, 1)],
    }
    for name, layer_shapes in shapes.items():
        layers = getattr(model, name).layers
        assert [layer.weight.shape for layer in layers] == layer_shapes
        for layer in layers:
            is_zero = name in ("reward", "value") and layer is layers[-1]
            assert layer.weight.std().item() == (0 if is_zero else pytest.approx(0.02, rel=0.15))
            assert (layer.bias == 0).all()
            assert not hasattr(layer, "activation") or ((layer.ln_weight == 1).all() and (layer.ln_bias == 0).all())
    z = model.encoder(torch.randn(5, TASK.obs_dim))
    for x in (z, model.dynamics(z[None], torch.randn(1, 5, TASK.action_dim))[0]):  # SimNorm: softmax in groups
        assert x.shape == (5, 64) and (x > 0).all()
        torch.testing.assert_close(x.unflatten(1, (-1, args.simnorm_dim)).sum(2), torch.ones(5, 16))
    first = model.value.layers[0].weight
    assert not torch.equal(first[0], first[1])  # the heads differ
    for target, online in ((model.target_value, model.value), (model.ema_policy, model.policy)):
        assert same(target.state_dict(), online.state_dict())


def test_dropout_rate():
    args = small_args(dropout=0.3, batch_size=64, mlp_dim=32)
    mask = bmpc.sample_update_noise(args, TASK.action_dim, generator_factory()).dropout_keep
    assert mask.shape == (args.num_q, args.horizon, 64, 32) and set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask.mean().item() == pytest.approx(0.7, abs=5 * math.sqrt(0.3 * 0.7 / mask.numel()))


# --- updates against the oracle


CASES = {
    "defaults": (bmpc, {}),
    "official": (bmpc, dict(
        normalize_rho_weights=False, consistency_coef=20.0, entropy_coef=1e-4, log_std_min=-3.0, enc_lr_scale=0.3,
        expert_std_scale=1.0, expert_std_min=0.0, num_q=2, reanalyze_log_std_min=-2.0,
    )),
    "ablations": (bmpc, dict(
        num_rollouts=3, td_horizon=2, imagine_initial_source="replay_true", encoder_consistency_coef=0.5,
        td_target_use_ema_policy=True, policy_ema_tau=0.2, policy_trust_region_coef=0.7, kl_reduction="sum",
    )),
    "targets from the rollout": (bmpc, dict(td_target_initial_source="same", batch_size=1)),
    "targets as values": (bmpc, dict(
        imagine_initial_source="replay_true", td_target_initial_source="same", entropy_coef=0.3, rho=0.8,
        policy_trust_region_coef=0.3,
    )),
    "episodic": (bmpc, dict(episodic=True, termination_coef=2.0, grad_clip_norm=0.01, dropout=0.4, td_horizon=3)),
    "other numbers": (bmpc, dict(
        num_q=1, lr=1e-2, tau=0.5, vmin=-3.0, vmax=3.0, num_bins=9, dropout=0.0, num_enc_layers=3, horizon=2,
        reward_coef=0.3, value_coef=0.7,
    )),
    "ensemble": (bmpc_multihead, dict(
        planner_num_dynamics_heads=2, ensemble_lr_scaling=True, encoder_consistency_coef=0.5, enc_lr_scale=0.5,
    )),
    "local bootstrap": (bmpc_multihead, dict(
        planner_num_dynamics_heads=3, local_td_bootstrap=True, td_horizon=2, num_rollouts=2, episodic=True,
    )),
    "two policies": (bmpc_dual_policy, dict(dual_policy_enabled=True, planner_num_dynamics_heads=2)),
    "two policies with EMA": (bmpc_dual_policy, dict(
        dual_policy_enabled=True, td_target_use_ema_policy=True, policy_ema_tau=0.2, policy_trust_region_coef=0.7,
        entropy_coef=0.1, grad_clip_norm=0.01,
    )),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_updates_match_the_oracle(double, name):
    """Losses and weights are equal in four updates with the same batches and noise. The second one is pretraining."""
    script, changes = CASES[name]
    args = small_args(script, **changes)
    model = make_model(args, script=script)
    model.kl_scale += 5 * torch.arange(1.0, model.kl_scale.numel() + 1).view_as(model.kl_scale)
    learner = oracle.Learner(model, args)
    optimizers = script.make_optimizers(model, args)
    for k in range(4):
        batch = make_batch(args, seed=k, script=script)
        noise = script.sample_update_noise(args, TASK.action_dim, generator_factory(k))
        metrics = script.update(script.Functions(), model, optimizers, batch, noise, args, pretraining=k == 1)
        actual = {name: float(value) for name, value in metrics.items()}
        expected = {f"losses/{name}": value for name, value in learner.update(batch, noise, k == 1).items()}
        assert actual == pytest.approx(expected, rel=1e-8, abs=1e-8), k
    for (name, actual), expected in zip(model.named_parameters(), learner.model.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6, msg=name)
    assert model.kl_scale.view(-1).tolist() == pytest.approx(learner.scales, rel=1e-8)


# --- Algorithm 1


def reference_run(model, args, envs, planner, warm_up):
    """Run Algorithm 1 with lists of episodes, from the weights of the model.

    Plans come from the planner, updates from the oracle, and random numbers from bmpc.py. Returns the learner, the rows
    of the replay buffer in the order of their steps, and the kinds of updates in order.
    """
    learner = oracle.Learner(model, args)
    E, A, T = args.num_envs, TASK.action_dim, args.horizon
    rows, windows, updates = [], [], []
    counters = types.SimpleNamespace(args=args, obs=torch.zeros(1), global_step=0, pretraining_updates=0, updates=0)
    make_generator = functools.partial(bmpc.Run.make_generator, counters)

    def update(pretraining):
        rng = np.random.default_rng([args.seed, counters.pretraining_updates, counters.updates])
        sampled = [windows[int(x * len(windows))] for x in rng.random(args.batch_size)]
        noise = bmpc.sample_update_noise(args, A, make_generator)
        if pretraining:
            counters.pretraining_updates += 1
        else:
            counters.updates += 1
        sampled_experts = [[window[t]["expert"] for window in sampled] for t in range(T)]
        reanalyzes = not pretraining and counters.updates % args.reanalyze_interval == 0
        if reanalyzes:
            states = [window[t] for t in range(T) for window in sampled[: args.reanalyze_batch_size]]
            no_mean = torch.zeros(len(states), T, A)
            planned = planner(None, None, torch.stack([row["obs"] for row in states]), no_mean, None, None)
            for row, elite_action, std in zip(states, planned.elite_action, planned.std, strict=True):
                row["expert"] = torch.stack([elite_action, std])
        stack = lambda name: torch.stack([torch.stack([window[t][name] for window in sampled]) for t in range(T)])
        obs, action, expert, *others = map(stack, ("obs", "action", "expert", "reward", "terminated", "next_obs"))
        batch = bmpc.Batch(obs, action, bmpc.Expert(*expert.unbind(2)), *others, None)
        # Windows that are not reanalyzed keep the experts they were sampled with, even if they share rows with others
        for t in range(T):
            for b in range(args.reanalyze_batch_size, args.batch_size):
                batch.expert.mean[t, b], batch.expert.std[t, b] = sampled_experts[t][b]
        learner.update(batch, noise, pretraining)
        if pretraining:
            updates.append("pretraining")
        else:
            updates.append("update with reanalyze" if reanalyzes else "update")

    obs = envs.start_episodes(np.ones(E, bool), [(i, 0) for i in range(E)], np.zeros((E, 4), np.float32))
    episodes = [[] for _ in range(E)]  # the rows of the current episode of each environment
    next_episode = [1] * E
    for step in range(0, args.total_timesteps, E):
        counters.global_step = step
        if step < warm_up:
            action = 2 * torch.rand(E, A, generator=make_generator("act")) - 1
            expert = torch.stack([torch.zeros(E, A), torch.ones(E, A)], 1)
        else:
            if step == warm_up:
                for _ in range(args.learning_starts):
                    update(pretraining=True)
            planned = planner(None, None, torch.from_numpy(obs), torch.zeros(E, T, A), None, None)
            action = planned.action
            expert = torch.stack([planned.action, planned.std], 1)
            for _ in range(E):
                update(pretraining=False)
        envs.step_async(action.numpy())
        next_obs, reward, terminated, truncated, _ = envs.step_wait()
        for i, episode in enumerate(episodes):
            row = dict(action=action[i], expert=expert[i], reward=reward[i], terminated=float(terminated[i]))
            row |= dict(obs=torch.from_numpy(obs[i]), next_obs=torch.from_numpy(next_obs[i]))
            row = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in row.items()}
            episode.append(row)
            rows.append(row)
            if len(episode) >= T:
                windows.append(episode[-T:])
        obs = next_obs
        for i in np.flatnonzero(terminated | truncated):
            obs = envs.start_episodes(np.arange(E) == i, list(enumerate(next_episode)), obs)
            episodes[i] = []
            next_episode[i] += 1
    return learner, rows, updates


def test_run_matches_algorithm_1(tmp_path):
    """A run has the same weights and rows as the reference: warm-up, pretraining, then planning and updates in turn.

    Every 5th update reanalyzes its batch.
    """
    args = small_args(learning_starts=13, total_timesteps=34, reanalyze_interval=5, episodic=True)
    envs = FakeEnvs([5, 7], terminal=(1,))
    run = start(args, envs, bmpc.Functions(plan=FakePlanner()))
    run.buffer.rows = run.buffer.rows.double()
    model = copy.deepcopy(run.model.double())
    train(run, envs, tmp_path)
    learner, rows, updates = reference_run(model, args, FakeEnvs([5, 7], terminal=(1,)), FakePlanner(), warm_up=14)
    # This checks the reference; the comparisons below check the run against it
    assert updates == ["pretraining"] * 13 + (["update"] * 4 + ["update with reanalyze"]) * 4
    for name, column in run.buffer.split_rows(run.buffer.rows.flatten(0, 1))._asdict().items():
        if name != "index":
            column = stack_expert(column) if name == "expert" else column
            assert torch.equal(column, torch.stack([row[name] for row in rows])), name
    for (name, actual), expected in zip(run.model.named_parameters(), learner.model.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9, msg=name)
    assert run.model.kl_scale.item() == pytest.approx(learner.scales[0], rel=1e-8)


@pytest.mark.parametrize("ratio, num_envs", [(0.5, 1), (4.0, 4)])
def test_order_of_plans_updates_and_steps(tmp_path, ratio, num_envs):
    """After d decisions there have been floor(d x ratio) updates.

    Updates run during a step of the environments, so they sample from the steps before it.
    """
    events = []
    envs = FakeEnvs([50] * num_envs)

    def recorded_plan(*plan_args):
        events.append("plan")
        return bmpc.plan(*plan_args)

    def recorded_sample(u):
        events.append(run.buffer.step)
        return sample(u)

    args = small_args(num_envs=num_envs, utd_ratio=ratio, total_timesteps=32, reanalyze_interval=0)
    run = start(args, envs, bmpc.Functions(plan=recorded_plan))
    envs.events = events
    sample = run.buffer.sample
    run.buffer.sample = recorded_sample
    train(run, envs, tmp_path)
    warm_up = 12 // num_envs  # steps
    expected = ["step_async", "step_wait"] * warm_up
    expected += [warm_up] * 12  # pretraining
    for step in range(warm_up, 32 // num_envs):
        before, after = (math.floor((n * num_envs - 12) * ratio) for n in (step, step + 1))
        expected += ["plan", "step_async", *[step] * (after - before), "step_wait"]
    assert events == expected


def test_utd_ratio_is_an_exact_decimal():
    """With floats, 0.29 x 100 is 28.999999999999996, so an update would come a decision late."""
    args = small_args(utd_ratio=0.29, num_envs=1, learning_starts=10)
    assert [bmpc.updates_due(args, 10 + d) for d in (0, 3, 4, 100, 200)] == [0, 0, 1, 29, 58]


# --- random numbers


def test_the_seed_determines_a_run(tmp_path):
    """Runs are equal bit for bit with the same seed only, and do not use the global generator of torch."""
    before = torch.random.get_rng_state()
    results = []
    for k, seed in enumerate((3, 3, 4)):
        args = small_args(seed=seed, total_timesteps=20, reanalyze_interval=3)
        envs = FakeEnvs([5, 7], seed=seed)
        state = bmpc.checkpoint_contents(run_loop(args, envs, tmp_path / str(k)))
        parts = [state[name] for name in ("model", "optimizers", "buffer")]
        results.append([parts, [action.tolist() for action in envs.sent]])
    assert same(results[0], results[1]) and not same(results[0], results[2])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_generators_depend_on_purpose_step_and_seed():
    run = start(small_args(), FakeEnvs([5, 7]))
    numbers = []
    for counter in ("", "global_step", "pretraining_updates", "updates", "seed"):
        if counter == "seed":
            run.args = small_args(seed=2)
        elif counter:
            setattr(run, counter, 10)
        for purpose in ("act", "update", "act"):
            numbers.append(torch.rand(3, generator=run.make_generator(purpose)).tolist())
        assert numbers[-1] == numbers[-3]  # both for acting at the same step
    assert len({tuple(x) for x in numbers}) == 10


# --- learning progress


@pytest.mark.parametrize("script", [bmpc, tdmpc2], ids=lambda script: script.__name__)
def test_agent_learns_to_follow_a_target(tmp_path, script):
    """Both planner and policy get returns above those of random actions (0.4 per step) and of zeros (0.5).

    The reward is 1 - |action - target|, and the target is a part of the observation.
    """

    class TargetEnvs(FakeEnvs):
        def obs(self):
            target = 0.8 * np.sin(self.seed + 2.0 * self.step)
            return np.stack([target, target**2, np.ones(self.num_envs), -target], 1).astype(np.float32)

        def step_wait(self):
            reward = 1 - np.abs(self.sent[-1] - self.obs()[:, :1]).mean(1)
            _, _, terminated, truncated, errors = super().step_wait()
            return self.obs(), reward, terminated, truncated, errors

    sizes = dict(
        num_envs=4, total_timesteps=500, learning_starts=200, batch_size=32, lr=1e-3, horizon=2,
        num_samples=48, num_elites=8, num_pi_trajs=8, mlp_dim=32, enc_dim=32, eval_episodes=4,
    )  # fmt: skip
    args = small_args(script, **sizes, **({} if script is tdmpc2 else {"reanalyze_batch_size": 4}))
    run = run_loop(args, TargetEnvs([10] * 4), tmp_path, script=script)
    reward = lambda use_planner: script.run_episodes(run, TargetEnvs([10] * 4), use_planner, [])[0].mean() / 10
    planner = reward(use_planner=True)
    policy = reward(use_planner=False)
    assert planner > 0.75 and policy > 0.75, (planner, policy)
