"""One update: targets by hand, every loss and weight against a second implementation, reanalyze, pretraining."""

import dataclasses
import math

import numpy as np
import oracle
import pytest
import torch
from conftest import CPU, TASK, FakeEnvs, copied, generator, make_batch, make_model, run_loop, same, small_args, start

import bmpc


def updates(args, count, seed=0, pretraining=lambda k: False, model=None):
    """`count` updates of bmpc.py and of the oracle on the same batches and draws: their metrics, and both models."""
    model = model or bmpc.WorldModel(TASK, args, generator(seed))
    slow, optimizers = oracle.Learner(model, args), bmpc.make_optimizers(model, args)
    rng, rows = generator(seed + 1), []
    for k in range(count):
        batch, draws = make_batch(args, seed=100 * seed + k), bmpc.draw_update(args, TASK.action_dim, rng)
        expected = slow.update(batch, draws, pretraining(k))
        found = bmpc.update(bmpc.Functions(), model, optimizers, batch, draws, args, pretraining(k))
        rows.append((expected, {name: float(value) for name, value in found.items()}))
    return rows, model, slow


def check_against_oracle(args, count, digits=1e-8, **options):
    rows, model, slow = updates(args, count, **options)
    for k, (expected, found) in enumerate(rows):
        for name, value in expected.items():
            assert found[f"losses/{name}"] == pytest.approx(value, rel=digits, abs=digits), (k, name)
    for (name, mine), other in zip(model.named_parameters(), slow.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6, msg=name)
    assert float(model.kl_scale) == pytest.approx(slow.scale, rel=digits)
    return rows


# --- against the second implementation


def test_the_baselines_losses_over_20_updates(double):
    """From fresh weights, 10 updates of pretraining first: what the flags of the ablations must leave as it is."""
    rows = check_against_oracle(small_args(), 20, pretraining=lambda k: k < 10)
    assert {"policy", "kl_scale", "policy_grad_norm"} <= set(rows[10][0]) and "policy" not in rows[9][0]
    assert rows[-1][0]["reward"] < rows[0][0]["reward"]  # it did learn


OFFICIAL = dict(
    normalize_rho_weights=False, consistency_coef=20.0, entropy_coef=1e-4, log_std_min=-3.0, enc_lr_scale=0.3,
    expert_std_scale=1.0, expert_std_min=0.0, num_q=2, reanalyze_log_std_min=-2.0,
)  # fmt: skip
ABLATIONS = dict(
    num_rollouts=3, td_horizon=2, imagine_initial_source="replay_true", encoder_consistency_coef=0.5,
    td_target_use_ema_policy=True, policy_ema_tau=0.2, policy_trust_region_coef=0.7, kl_reduction="sum",
)  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        OFFICIAL,
        ABLATIONS,
        dict(imagine_initial_source="replay_true", td_target_initial_source="same", entropy_coef=0.3, rho=0.8),
        dict(episodic=True, termination_coef=2.0, grad_clip_norm=0.01, dropout=0.4),
        dict(num_q=1, lr=1e-2, tau=0.5, vmin=-3.0, vmax=3.0, num_bins=9, dropout=0.0),
    ],
    ids=["official", "ablations", "same", "episodic", "other numbers"],
)
def test_every_loss_and_weight_under_other_flags(double, changes):
    args = small_args(**changes)
    check_against_oracle(args, 4, model=make_model(args), pretraining=lambda k: k == 1)


# --- TD targets by hand


class Line:
    """A model on a line: dynamics z + 1, reward z, heads of the target z and 3 z; online heads must not be asked."""

    def __init__(self, args, ends=lambda z: z > 1e9):
        logits = lambda x: bmpc.two_hot(x[..., 0], args).log()
        self.dynamics = lambda z, a: z + 1 + 0 * a
        self.reward = lambda z, a: logits(z + 0 * a)
        self.target_value = lambda z: torch.stack([logits(z[0]), logits(3 * z[0])])
        self.policy = lambda z: torch.cat([z * 0, z * 0], -1)
        self.termination = lambda z: torch.where(ends(z), 1.0, -1.0)


def target(args, z, **options):
    eps = torch.zeros(1, args.td_horizon, 1, len(z), 1)
    model = Line(args, **options)
    return bmpc.td_target(model, model.policy, torch.tensor(z).view(1, -1, 1), eps, args).flatten().tolist()


def test_a_td_target_is_the_reward_and_the_discounted_mean_of_the_heads(double):
    """At z: reward z, next z + 1, heads z + 1 and 3 (z + 1), whose mean is 2 (z + 1)."""
    z = [0.0, 1.5, -4.0, 100.0]
    assert target(small_args(discount=0.9), z) == pytest.approx([x + 0.9 * 2 * (x + 1) for x in z])


def test_a_td_target_of_three_steps_discounts_each_of_them(double):
    args = small_args(discount=0.9, td_horizon=3)
    z = [0.0, 1.5, -4.0]
    assert target(args, z) == pytest.approx([x + 0.9 * (x + 1) + 0.81 * (x + 2) + 0.729 * 2 * (x + 3) for x in z])


def test_a_terminals_value_is_zero_and_a_truncations_is_not(double):
    """Arriving beyond 4 ends the episode; without the head, as for a truncation, the value is bootstrapped."""
    ends = lambda z: z > 4
    z = [2.5, 3.5]
    assert target(small_args(episodic=True), z, ends=ends) == pytest.approx([2.5 + 0.9 * 7, 3.5])
    assert target(small_args(), z, ends=ends) == pytest.approx([2.5 + 0.9 * 7, 3.5 + 0.9 * 9])


def test_after_a_terminal_no_later_reward_counts(double):
    args = small_args(episodic=True, td_horizon=3)
    expected = [3.5, 2.5 + 0.9 * 3.5, 1.5 + 0.9 * 2.5 + 0.81 * 3.5]
    assert target(args, [3.5, 2.5, 1.5], ends=lambda z: z > 4) == pytest.approx(expected)
    edge = lambda z: (z > 4) & (z < 5)  # the model walks on beyond the terminal, to states that are none
    assert target(args, [3.5, 2.5, 1.5], ends=edge) == pytest.approx(expected)


def test_the_termination_head_learns_what_ended_and_the_target_obeys(double):
    """Observations of 1 are terminal, of -1 are not; the same windows without a terminal teach that nothing ends."""
    args = small_args(episodic=True, lr=3e-3, horizon=1, consistency_coef=20.0)
    for terminal in (1.0, 0.0):
        model = bmpc.WorldModel(TASK, args, generator())
        optimizers, rng = bmpc.make_optimizers(model, args), generator(1)
        batch = make_batch(args)
        side = torch.where(torch.arange(args.batch_size) % 2 == 0, 1.0, -1.0)
        obs = side[None, :, None].expand(2, -1, 4).clone()
        batch = batch._replace(obs=obs, reward=0 * batch.reward, terminated=terminal * (side > 0)[None].double())
        for _ in range(90):
            draws = bmpc.draw_update(args, 2, rng)
            bmpc.update(bmpc.Functions(), model, optimizers, batch, draws, args, pretraining=True)
        with torch.no_grad():
            model.target_value.layers[-1].bias[:, :, 60] = 50.0  # every state is worth the same, a lot
            value, z = math.expm1(2.0), model.encoder(obs)
            ends = (model.termination(z[1]) > 0)[:, 0]
            assert torch.equal(ends, (side > 0) & (terminal > 0))
            y = bmpc.td_target(model, model.policy, z[:1], draws.td, args)[0, 0, 0]
        torch.testing.assert_close(y, torch.where(ends, 0.0, 0.9 * value), rtol=0.05, atol=0.05)


def test_the_entropy_bonus_by_hand_and_as_the_official_code_samples_it(double):
    """entropy_coef x A x the sum over dimensions of log std + 0.5 log 2 pi e, whatever the KL's scale is.

    The official code takes -log pi(a) of a drawn a = mean + std eps instead: its gradient is the same for every eps.
    """
    args = small_args(horizon=1)
    model, batch = make_model(args), make_batch(args)
    z = torch.randn(1, 12, 16, generator=generator(1))
    model.kl_scale.fill_(7.0)
    without, _, _ = bmpc.policy_loss(model, z, batch.expert, args)
    bonus, _, _ = bmpc.policy_loss(model, z, batch.expert, dataclasses.replace(args, entropy_coef=0.01))
    mean, std = bmpc.policy_gaussian(model.policy, z, args)
    entropy = (std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1).mean()
    torch.testing.assert_close(without - bonus, 0.01 * 2 * entropy)
    eps = torch.randn(mean.shape, generator=generator(2))
    drawn = -torch.distributions.Normal(mean, std).log_prob(mean + std * eps).sum(-1).mean()
    grads = [torch.autograd.grad(x, [*model.policy.parameters()], retain_graph=True) for x in (without - bonus, drawn)]
    for mine, official in zip(*grads, strict=True):
        torch.testing.assert_close(mine, 0.01 * 2 * official)


# --- pretraining


@pytest.mark.parametrize("ema", [False, True])
def test_pretraining_leaves_the_policy_alone_and_nothing_else(ema):
    args = small_args(td_target_use_ema_policy=ema)
    model = make_model(args)
    optimizers, rng, before = bmpc.make_optimizers(model, args), generator(1), copied(model)
    for k in range(3):
        draws = bmpc.draw_update(args, 2, rng)
        batch = make_batch(args, seed=k)
        metrics = bmpc.update(bmpc.Functions(), model, optimizers, batch, draws, args, pretraining=True)
    for name, x in model.state_dict().items():
        still = name.startswith(("policy.", "ema_policy.", "kl_scale"))
        assert torch.equal(x, before[name]) == still, name
    assert not optimizers[1].state_dict()["state"]
    assert "losses/policy" not in metrics and "losses/value" in metrics


def test_a_run_pretrains_once_as_often_as_it_warmed_up_and_without_reanalyze(tmp_path, monkeypatch):
    calls = []
    original_update, original_reanalyze = bmpc.update, bmpc.reanalyze
    monkeypatch.setattr(bmpc, "update", lambda *x: calls.append(("update", x[-1])) or original_update(*x))
    monkeypatch.setattr(bmpc, "reanalyze", lambda *x: calls.append(("reanalyze", None)) or original_reanalyze(*x))
    args = small_args(learning_starts=13, total_timesteps=34, reanalyze_interval=5, utd_ratio=1.0)
    run_loop(args, FakeEnvs([5, 7]), tmp_path)
    assert calls[:13] == [("update", True)] * 13
    after = calls[13:]  # warm-up ended at 14, so 20 updates; before every 5th the experts are renewed
    expected = [[("reanalyze", None)] * (k % 5 == 0) + [("update", False)] for k in range(1, 21)]
    assert after == [call for calls in expected for call in calls]


# --- reanalyze


class Numbered:
    """A plan whose expert for a state says which state of all it was; states are numbers."""

    def __init__(self):
        self.count, self.previous, self.args, self.z = 0, [], [], []

    def __call__(self, model, policy, z, mean, draws, args):
        self.previous.append(mean)
        self.args.append(args)
        self.z.append(z)
        n = self.count + torch.arange(len(z), dtype=torch.float32)[:, None].expand(-1, 2)
        self.count += len(z)
        new = (n + 0.4)[:, None].repeat(1, mean.shape[1], 1)
        return bmpc.Plan(n + 0.1, n + 0.2, n + 0.3, new, n + 0.5, n[:, 0])


def reanalyzed(args, *firsts):
    """Reanalyzes windows that begin at these steps: plan, model, experts before, buffer, batch before and after."""
    buffer = bmpc.ReplayBuffer(small_args(num_envs=1, buffer_size=40), TASK, CPU)
    buffer.expert.copy_(-torch.rand(buffer.expert.shape, generator=generator()))
    buffer.obs.copy_(torch.randn(buffer.obs.shape, generator=generator(1)))
    rows = torch.tensor(firsts)[None] + torch.arange(3)[:, None]
    obs = buffer.obs[:, 0][torch.cat([rows, rows[-1:] + 1])]
    batch = make_batch(args)._replace(obs=obs, expert=buffer.expert[:, 0][rows], rows=rows)
    planner, old, model = Numbered(), buffer.expert[:, 0].clone(), make_model(args)
    new = bmpc.reanalyze(planner, model, buffer, batch, args, generator(2))
    return planner, model, old, buffer, batch, new


@pytest.mark.parametrize("firsts", [(4, 20, 5, 21, 30), (8, 8, 8, 10, 9)])
def test_reanalyze_rewrites_exactly_the_sampled_rows(firsts):
    """Windows 0 to 2 are planned anew; of a row that occurs twice one plan remains, in the batch and in the buffer."""
    args = small_args(batch_size=5, reanalyze_batch_size=3)
    planner, model, old, buffer, batch, new = reanalyzed(args, *firsts)
    planned = batch.rows[:, :3].flatten().tolist()  # plan k is for row planned[k]
    for row in range(40):
        expert = buffer.expert[row, 0]
        if row in planned:
            k = round(float(expert[0, 0]) - 0.2)
            assert planned[k] == row
            torch.testing.assert_close(expert, torch.tensor([[k + 0.2] * 2, [k + 0.5] * 2]))
        else:
            assert torch.equal(expert, old[row]), row
    assert torch.equal(new.expert[:, :3], buffer.expert[:, 0][batch.rows[:, :3]])
    assert torch.equal(new.expert[:, 3:], batch.expert[:, 3:])
    for name in ("obs", "action", "reward", "terminated", "rows"):
        assert torch.equal(getattr(new, name), getattr(batch, name))
    torch.testing.assert_close(torch.cat(planner.z), model.encoder(buffer.obs[:, 0][planned]))  # true observations


def test_reanalyze_has_no_previous_plan_and_its_own_horizon_and_range_of_the_policys_log_std():
    args = small_args(batch_size=5, reanalyze_batch_size=3)
    changed = dataclasses.replace(args, reanalyze_log_std_min=-2.0, reanalyze_log_std_max=0.5, reanalyze_horizon=2)
    for given, low, high, horizon in ((args, -5.0, 1.0, 3), (changed, -2.0, 0.5, 2)):
        planner = reanalyzed(given, 4, 20, 5, 21, 30)[0]
        assert {(a.log_std_min, a.log_std_max) for a in planner.args} == {(low, high)}
        assert all((mean == 0).all() and mean.shape[1] == horizon for mean in planner.previous)


def test_reanalyze_comes_before_its_updates_losses_with_the_parameters_as_they_stand(monkeypatch):
    run = start(small_args(reanalyze_interval=1), FakeEnvs([5, 7]))
    for _ in range(12):
        zero, ones = torch.zeros(2), torch.ones(2, 2, 2)
        run.buffer.add(torch.rand(2, 4), torch.zeros(2, 2), ones, zero, zero, torch.rand(2, 4), zero > 0)
    weights, seen = [], []
    original, loss = bmpc.reanalyze, bmpc.policy_loss

    def spy(*x):
        weights.append(copied(run.model))
        seen.append(original(*x))
        return seen[-1]

    def spy_loss(model, z, expert, args):
        assert torch.equal(expert, seen[-1].expert) and not torch.equal(expert, torch.ones_like(expert))
        now = copied(model)
        assert all(same(now[k], x) for k, x in weights[-1].items() if k.startswith("policy"))
        return loss(model, z, expert, args)

    monkeypatch.setattr(bmpc, "reanalyze", spy)
    run.functions = bmpc.Functions(policy_loss=spy_loss)
    for _ in range(3):
        bmpc.learn(run, pretraining=False)
    assert len(seen) == 3 and not same(weights[0], weights[1])


# --- random numbers


def test_the_global_generator_is_used_by_nothing(tmp_path):
    before = torch.random.get_rng_state()
    run_loop(small_args(reanalyze_interval=2), FakeEnvs([5, 7]), tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path):
    ends = []
    for k, seed in enumerate((3, 3, 4)):
        envs = FakeEnvs([5, 7])
        state = run_loop(small_args(seed=seed, reanalyze_interval=3), envs, tmp_path / str(k)).state_dict()
        parts = [state[name] for name in ("model", "optimizers", "buffer", "draws")]
        ends.append([parts, [action.tolist() for action in envs.sent]])
    assert same(ends[0], ends[1]) and not same(ends[0], ends[2])


# --- it learns


def test_the_agent_learns_to_follow_a_target_by_planning_and_by_imitation(tmp_path):
    """The reward is 1 - |a - target|, the target a part of the observation: random actions earn 0.4 a decision."""

    class Follow(FakeEnvs):
        def obs(self):
            target = 0.8 * np.sin(self.seed + 2.0 * self.step)
            return np.stack([target, target**2, np.ones(self.num_envs), -target], 1).astype(np.float32)

        def step_wait(self):
            reward = 1 - np.abs(self.sent[-1] - self.obs()[:, :1]).mean(1)
            _, _, terminated, truncated = super().step_wait()
            return self.obs(), reward, terminated, truncated

    args = small_args(
        num_envs=4, total_timesteps=500, learning_starts=200, batch_size=32, lr=1e-3, horizon=2, reanalyze_batch_size=4,
        num_samples=48, num_elites=8, num_pi_trajs=8, mlp_dim=32, enc_dim=32, eval_episodes=4,
    )  # fmt: skip
    run = run_loop(args, Follow([10] * 4), tmp_path)
    play = lambda planning: bmpc.play(run, Follow([10] * 4), planning, [], []).mean() / 10
    planner, policy = play(True), play(False)
    assert planner > 0.8 and policy > 0.75, (planner, policy)
