"""Learning: numbers and layers against loops and closed forms, every loss and weight of the three scripts against a
second implementation; whole runs and their order of events, random numbers.
"""

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
    make_batch,
    make_model,
    named,
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

# --- numbers and layers

EDGES = [math.copysign(math.expm1(abs(s)), s) for s in np.linspace(-10, 10, 101)]  # the values that lie on a bin
BETWEEN = [math.copysign(math.expm1(abs(s)), s) for s in np.linspace(-9.97, 9.97, 57)]


@pytest.mark.parametrize("args", [small_args(), small_args(vmin=-2.0, vmax=3.0, num_bins=7)], ids=["101", "7"])
def test_two_hot_and_its_inverse_equal_loops_over_values_and_bins(double, args):
    """On, between and beyond the bins, where nothing wraps around; the inverse is symexp of the mean bin."""
    low, high = (math.copysign(math.expm1(abs(s)), s) for s in (args.vmin, args.vmax))
    x = torch.tensor([0.0, 1e-8, *EDGES, *BETWEEN, low, high, low - 1, high + 1, 1e20, -1e20])
    target = bmpc.two_hot(x, args)
    torch.testing.assert_close(target, oracle.two_hot(x, args), rtol=0, atol=1e-10)
    torch.testing.assert_close(bmpc.two_hot_inv(target.log(), args), x.clamp(low, high), rtol=1e-9, atol=1e-9)
    assert bmpc.two_hot(torch.tensor([math.inf, -math.inf]), args)[:, [-1, 0]].tolist() == [[1, 0], [0, 1]]
    logits = 2 * torch.randn(40, args.num_bins, generator=generator())
    torch.testing.assert_close(bmpc.two_hot_inv(logits, args), oracle.scalar(logits, args), rtol=1e-9, atol=1e-12)


def test_mish_as_it_is_compiled_has_the_value_and_gradient_of_mish(monkeypatch):
    """Everywhere, also where exp would overflow."""
    x = torch.cat([torch.linspace(-30, 30, 6001), torch.tensor([-1e4, 1e4])]).requires_grad_()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    algebraic, truth = bmpc.mish(x), x * torch.tanh(F.softplus(x))
    torch.testing.assert_close(algebraic, truth, atol=2e-6, rtol=2e-6)
    slopes = [torch.autograd.grad(y.sum(), x)[0] for y in (algebraic, truth)]
    torch.testing.assert_close(*slopes, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_one_head_after_the_other_equals_the_stack_at_once_and_written_out_with_its_gradients(double, shared):
    """On x and a whose leading dimensions only broadcast: the product with [x, a] is the sum of two."""
    net = bmpc.MLP(
        [7, 16, 16, 8], generator(), heads=3, output_activation=functools.partial(bmpc.simnorm, group_size=4)
    )
    x, a, keep = torch.randn(1 if shared else 3, 4, 1, 5), torch.randn(1, 4, 6, 2), torch.rand(3, 4, 6, 16)
    leaves = [v.requires_grad_() for v in (x, a, keep)] + list(net.parameters())
    weights = torch.randn(3, 4, 6, 8)
    joined = torch.cat([x.expand(3, 4, 6, 5), a.expand(3, 4, 6, 2)], -1)
    written = torch.stack([oracle.network(net, h, joined[h], keep[h]) for h in range(3)])
    grads = lambda y: torch.autograd.grad((y * weights).sum(), leaves, retain_graph=True)
    for y in (net(x, a, keep), net.forward_heads(x, a, keep, slice(None))):  # at once, as on a GPU
        torch.testing.assert_close(y, written, atol=1e-12, rtol=1e-12)
        for p, q in zip(grads(y), grads(written), strict=True):
            torch.testing.assert_close(p, q, atol=1e-10, rtol=1e-10)


def test_networks_have_the_widths_asked_for_and_begin_small_rewards_and_values_at_zero():
    sizes = dict(enc_dim=72, mlp_dim=68, latent_dim=64, num_enc_layers=4, num_q=5)
    args = small_args(episodic=True, td_target_use_ema_policy=True, **sizes)
    model = bmpc.WorldModel(TASK, args, generator())
    widths = {
        "encoder": [(1, 4, 72), (1, 72, 72), (1, 72, 72), (1, 72, 64)],
        "dynamics": [(1, 66, 68), (1, 68, 68), (1, 68, 64)],
        "reward": [(1, 66, 68), (1, 68, 68), (1, 68, 101)],
        "value": [(5, 64, 68), (5, 68, 68), (5, 68, 101)],
        "policy": [(1, 64, 68), (1, 68, 68), (1, 68, 4)],
        "termination": [(1, 64, 68), (1, 68, 68), (1, 68, 1)],
    }
    for name, of_layers in widths.items():
        layers = getattr(model, name).layers
        assert [layer.weight.shape for layer in layers] == of_layers
        for layer in layers:
            begins_at_zero = name in ("reward", "value") and layer is layers[-1]
            assert layer.weight.std().item() == (0 if begins_at_zero else pytest.approx(0.02, rel=0.15))
            assert (layer.bias == 0).all()
            assert not hasattr(layer, "activation") or ((layer.ln_weight == 1).all() and (layer.ln_bias == 0).all())
    first = model.value.layers[0].weight
    assert not torch.equal(first[0], first[1])  # every head its own numbers
    for average, of in ((model.target_value, model.value), (model.ema_policy, model.policy)):
        assert same(average.state_dict(), of.state_dict())


def test_the_share_of_dropped_elements_is_the_dropout():
    args = small_args(dropout=0.3, batch_size=64, mlp_dim=32)
    kept = bmpc.sample_update_noise(args, TASK.action_dim, named()).dropout_mask
    assert kept.shape == (args.num_q, args.horizon, 64, 32) and set(kept.unique().tolist()) == {0.0, 1.0}
    assert kept.mean().item() == pytest.approx(0.7, abs=5 * math.sqrt(0.3 * 0.7 / kept.numel()))


# --- against the second implementation


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
    "from the rollout": (bmpc, dict(td_target_initial_source="same", batch_size=1)),
    "same": (bmpc, dict(
        imagine_initial_source="replay_true", td_target_initial_source="same", entropy_coef=0.3, rho=0.8,
        policy_trust_region_coef=0.3,
    )),
    "episodic": (bmpc, dict(episodic=True, termination_coef=2.0, grad_clip_norm=0.01, dropout=0.4, td_horizon=3)),
    "other numbers": (bmpc, dict(
        num_q=1, lr=1e-2, tau=0.5, vmin=-3.0, vmax=3.0, num_bins=9, dropout=0.0, num_enc_layers=3, horizon=2,
    )),
    "heads": (bmpc_multihead, dict(
        planner_num_dynamics_heads=2, ensemble_lr_scaling=True, encoder_consistency_coef=0.5, enc_lr_scale=0.5,
    )),
    "local targets": (bmpc_multihead, dict(
        planner_num_dynamics_heads=3, local_td_bootstrap=True, td_horizon=2, num_rollouts=2, episodic=True,
    )),
    "two policies": (bmpc_dual_policy, dict(dual_policy_enabled=True, planner_num_dynamics_heads=2)),
    "and averages": (bmpc_dual_policy, dict(
        dual_policy_enabled=True, td_target_use_ema_policy=True, policy_ema_tau=0.2, policy_trust_region_coef=0.7,
        entropy_coef=0.1, grad_clip_norm=0.01,
    )),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_loss_and_weight_equals_the_oracles(double, name):
    """Over four updates from large weights on the same batches and draws, the second one of pretraining."""
    script, changes = CASES[name]
    args = small_args(script, **changes)
    model = make_model(args, script=script)
    model.kl_scale += 5 * torch.arange(1.0, model.kl_scale.numel() + 1).view_as(model.kl_scale)
    slow, optimizers = oracle.Learner(model, args), script.make_optimizers(model, args)
    for k in range(4):
        batch, draws = (
            make_batch(args, seed=k, script=script),
            script.sample_update_noise(args, TASK.action_dim, named(k)),
        )
        found = script.update(script.Functions(), model, optimizers, batch, draws, args, pretraining=k == 1)
        expected = {f"losses/{name}": value for name, value in slow.update(batch, draws, k == 1).items()}
        assert {name: float(value) for name, value in found.items()} == pytest.approx(expected, rel=1e-8, abs=1e-8), k
    for (name, mine), other in zip(model.named_parameters(), slow.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6, msg=name)
    assert model.kl_scale.view(-1).tolist() == pytest.approx(slow.scales, rel=1e-8)


# --- the whole of Algorithm 1


def written_out(model, args, envs, planner, warm_up):
    """A run once more, in lists: what its model learned, its rows in the order they were made, and what it did.

    From the model's weights; a plan is what the planner says, an update the oracle's, the draws are bmpc's.
    """
    slow = oracle.Learner(model, args)
    E, A, T = args.num_envs, TASK.action_dim, args.horizon
    rows, windows, did = [], [], []
    place = types.SimpleNamespace(args=args, obs=torch.zeros(1), global_step=0, pretraining_updates=0, updates=0)
    draws = functools.partial(bmpc.Run.make_generator, place)  # by where the run is

    def update(pretraining):
        u = np.random.default_rng([args.seed, place.pretraining_updates, place.updates]).random(args.batch_size)
        batch, drawn = [windows[int(x * len(windows))] for x in u], bmpc.sample_update_noise(args, A, draws)
        place.pretraining_updates += pretraining
        place.updates += not pretraining
        stale = [[window[t]["expert"] for window in batch] for t in range(T)]
        if renews := not pretraining and place.updates % args.reanalyze_interval == 0:
            states = [window[t] for t in range(T) for window in batch[: args.reanalyze_batch_size]]
            new = planner(None, None, torch.stack([row["obs"] for row in states]), torch.zeros(len(states), T, A), 0, 0)
            for row, elite, std in zip(states, new.elite_action, new.std, strict=True):
                row["expert"] = torch.stack([elite, std])
        stack = lambda name: torch.stack([torch.stack([window[t][name] for window in batch]) for t in range(T)])
        obs, action, expert, *others = map(stack, ("obs", "action", "expert", "reward", "terminated", "next_obs"))
        found = bmpc.Batch(obs, action, bmpc.Expert(*expert.unbind(2)), *others, None)
        for t in range(T):  # a window that is not planned anew keeps what it was sampled with, also of shared rows
            for b in range(args.reanalyze_batch_size, args.batch_size):
                found.expert.mean[t, b], found.expert.std[t, b] = stale[t][b]
        slow.update(found, drawn, pretraining)
        did.append("pretraining" if pretraining else "renewed" if renews else "learning")

    obs = envs.start_episodes(np.ones(E, bool), [(i, 0) for i in range(E)], np.zeros((E, 4), np.float32))
    episodes, begun = [[] for _ in range(E)], [1] * E
    for step in range(0, args.total_timesteps, E):
        place.global_step = step
        if step < warm_up:
            action = 2 * torch.rand(E, A, generator=draws("act")) - 1
            expert = torch.stack([torch.zeros(E, A), torch.ones(E, A)], 1)
        else:
            for _ in range(args.learning_starts if step == warm_up else 0):
                update(True)
            acting = planner(None, None, torch.from_numpy(obs), torch.zeros(E, T, A), None, None)
            action, expert = acting.action, torch.stack([acting.action, acting.std], 1)
            for _ in range(E):
                update(False)
        envs.step_async(action.numpy())
        next_obs, reward, terminated, truncated, _ = envs.step_wait()
        for i, episode in enumerate(episodes):
            row = dict(action=action[i], expert=expert[i], reward=reward[i], terminated=float(terminated[i]))
            row |= dict(obs=torch.from_numpy(obs[i]), next_obs=torch.from_numpy(next_obs[i]))
            row = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in row.items()}
            episode.append(row)
            rows.append(row)
            windows += [episode[-T:]] * (len(episode) >= T)
        obs = next_obs
        for i in np.flatnonzero(terminated | truncated):
            obs = envs.start_episodes(np.arange(E) == i, list(enumerate(begun)), obs)
            episodes[i], begun[i] = [], begun[i] + 1
    return slow, rows, did


def test_a_run_is_algorithm_1_written_out(tmp_path):
    """Warm-up, as many updates of pretraining, then plans and updates in turn, on whole and unfinished episodes.

    Every 5th update plans anew right before it. All weights at the end are equal, and all rows in their order.
    """
    args = small_args(learning_starts=13, total_timesteps=34, reanalyze_interval=5, episodic=True)
    envs = FakeEnvs([5, 7], terminal=(1,))
    run = start(args, envs, bmpc.Functions(plan=FakePlanner()))
    run.buffer.rows, model = run.buffer.rows.double(), copy.deepcopy(run.model.double())
    train(run, envs, tmp_path)
    slow, rows, did = written_out(model, args, FakeEnvs([5, 7], terminal=(1,)), FakePlanner(), warm_up=14)
    # the schedule, in words: what follows holds the run to it
    assert did == ["pretraining"] * 13 + (["learning"] * 4 + ["renewed"]) * 4
    for name, column in run.buffer.split_rows(run.buffer.rows.flatten(0, 1))._asdict().items():
        if name != "index":
            column = stack_expert(column) if name == "expert" else column
            assert torch.equal(column, torch.stack([row[name] for row in rows])), name
    for (name, mine), other in zip(run.model.named_parameters(), slow.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-9, msg=name)
    assert run.model.kl_scale.item() == pytest.approx(slow.scales[0], rel=1e-8)


@pytest.mark.parametrize("ratio, num_envs", [(0.5, 1), (4.0, 4)])
def test_planning_utd_ratio_updates_a_decision_and_stepping_come_in_the_specs_order(tmp_path, ratio, num_envs):
    """After d decisions floor(d x ratio) updates; they see the steps stored before the decision under way."""
    events, envs = [], FakeEnvs([50] * num_envs)
    functions = bmpc.Functions(plan=lambda *x: events.append("plan") or bmpc.plan(*x))
    args = small_args(num_envs=num_envs, utd_ratio=ratio, total_timesteps=32, reanalyze_interval=0)
    run = start(args, envs, functions)
    envs.events, original = events, run.buffer.sample
    run.buffer.sample = lambda u: events.append(run.buffer.step) or original(u)
    train(run, envs, tmp_path)
    expected, warm_up = ["step_async", "step_wait"] * (12 // num_envs), 12 // num_envs
    expected += [warm_up] * 12
    for step in range(warm_up, 32 // num_envs):
        before, after = (math.floor((n * num_envs - 12) * ratio) for n in (step, step + 1))
        expected += ["plan", "step_async", *[step] * (after - before), "step_wait"]
    assert events == expected


def test_utd_ratio_is_an_exact_decimal():
    """As a float, 0.29 x 100 is 28.999999999999996, and an update would be late."""
    args = small_args(utd_ratio=0.29, num_envs=1, learning_starts=10)
    assert [bmpc.updates_due(args, 10 + d) for d in (0, 3, 4, 100, 200)] == [0, 0, 1, 29, 58]
    assert math.floor(100 * 0.29) == 28


# --- random numbers


def test_the_same_seed_gives_the_same_bits_another_seed_others_and_the_global_generator_nothing(tmp_path):
    before, ends = torch.random.get_rng_state(), []
    for k, seed in enumerate((3, 3, 4)):
        args, envs = small_args(seed=seed, total_timesteps=20, reanalyze_interval=3), FakeEnvs([5, 7], seed=seed)
        state = bmpc.checkpoint_contents(run_loop(args, envs, tmp_path / str(k)))
        parts = [state[name] for name in ("model", "optimizers", "buffer")]
        ends.append([parts, [action.tolist() for action in envs.sent]])
    assert same(ends[0], ends[1]) and not same(ends[0], ends[2])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_every_purpose_and_every_place_of_a_run_has_numbers_of_its_own():
    run, found = start(small_args(), FakeEnvs([5, 7])), []
    for counter in ("global_step", "pretraining_updates", "updates", "seed"):
        for name in ("act", "update", "act"):
            found.append(torch.rand(3, generator=run.make_generator(name)).tolist())
        if counter == "seed":
            run.args = small_args(seed=2)
        else:
            setattr(run, counter, 10)
        assert found[-1] == found[-3]
    assert len({tuple(x) for x in found}) == 8


# --- it learns


@pytest.mark.parametrize("script", [bmpc, tdmpc2], ids=lambda script: script.__name__)
def test_the_agent_learns_to_follow_a_target_with_the_planner_and_the_policy_alone(tmp_path, script):
    """The reward is 1 - |a - target|, the target a part of the observation: random actions earn 0.4, none 0.5."""

    class Follow(FakeEnvs):
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
    run = run_loop(args, Follow([10] * 4), tmp_path, script=script)
    play = lambda planning: script.run_episodes(run, Follow([10] * 4), planning, [])[0].mean() / 10
    planner, policy = play(True), play(False)
    assert planner > 0.75 and policy > 0.75, (planner, policy)
