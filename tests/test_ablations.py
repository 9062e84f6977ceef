"""What each ablation flag means, and that it means nothing at its default."""

import dataclasses
import math

import pytest
import torch
from conftest import TASK, FakeEnvs, generator, make_batch, make_model, run_loop, same, small_args, start, train

import bmpc

ALL = dict(  # every flag away from its default
    utd_ratio=2.0, reanalyze_use_chosen_action=False, initial_expert_from_behavior=False, num_rollouts=4,
    imagine_initial_source="replay_true", td_target_initial_source="same", encoder_consistency_coef=0.5,
    td_target_use_ema_policy=True, policy_ema_tau=0.03, policy_trust_region_coef=1.0,
)  # fmt: skip


def draws_for(args, seed=0):
    return bmpc.draw_update(args, TASK.action_dim, generator(seed))


def world(model, batch, draws, args):
    """The world model's total and its metrics by short name."""
    total, _, metrics = bmpc.world_model_loss(model, batch, draws, args)
    return total, {name.removeprefix("losses/"): value for name, value in metrics.items()}


# --- 2a: utd_ratio


@pytest.mark.parametrize("num_envs", [1, 4])
@pytest.mark.parametrize("ratio", [0.5, 2.0, 4.0])
def test_a_decision_is_followed_by_exactly_utd_ratio_updates(tmp_path, monkeypatch, ratio, num_envs):
    """Counted at every vector step: floor(d x ratio) after d decisions, on the rows stored before this decision's."""
    made, counts = [0], []
    monkeypatch.setattr(bmpc, "update", lambda *x: made.__setitem__(0, made[0] + 1) or {"x": torch.zeros(())})
    args = small_args(num_envs=num_envs, utd_ratio=ratio, total_timesteps=32, reanalyze_interval=0)
    events = []
    envs = FakeEnvs([5, 7, 6, 30][:num_envs], events=events)
    original = envs.step_wait
    envs.step_wait = lambda: counts.append(made[0]) or original()
    run_loop(args, envs, tmp_path)
    warm_up = 12
    decisions = [num_envs * (k + 1) for k in range(len(counts))]
    assert counts == [0 if d <= warm_up else 12 + math.floor((d - warm_up) * ratio) for d in decisions]
    assert decisions[-1] == 32 and made[0] == 12 + 20 * ratio


def test_utd_ratio_is_an_exact_decimal():
    """As a float, 0.29 x 100 is 28.999999999999996, and an update would be late."""
    args = small_args(utd_ratio=0.29, num_envs=1, learning_starts=10)
    assert [bmpc.updates_due(args, 10 + d) for d in (0, 3, 4, 100, 200)] == [0, 0, 1, 29, 58]
    assert math.floor(100 * 0.29) == 28


def test_planning_updating_and_stepping_come_in_the_specs_order(tmp_path, monkeypatch):
    events, original = [], bmpc.update
    monkeypatch.setattr(bmpc, "update", lambda *x: events.append("update") or original(*x))

    def planner(*x):
        events.append("plan")
        return bmpc.plan(*x)

    args = small_args(num_envs=1, total_timesteps=15, reanalyze_interval=0)
    run_loop(args, FakeEnvs([50], events=events), tmp_path, bmpc.Functions(plan=planner))
    warm_up = ["step_async", "step_wait"] * 12 + ["update"] * 12
    assert events == warm_up + ["plan", "step_async", "update", "step_wait"] * 3


def test_updates_see_the_rows_stored_before_the_decision_under_way(tmp_path):
    steps, run = [], start(small_args(num_envs=1, total_timesteps=16, reanalyze_interval=0), FakeEnvs([50]))
    original = run.buffer.sample
    run.buffer.sample = lambda u: steps.append(run.buffer.step) or original(u)
    train(run, FakeEnvs([50]), tmp_path)
    assert steps == [12] * 12 + [12, 13, 14, 15]


# --- 2c: the expert's source


class Distinct:
    """A plan whose parts can be told apart, in the acting plan (call 1 of a decision) and in any other."""

    def __init__(self, plans_a_decision):
        self.calls, self.every = 0, plans_a_decision

    def __call__(self, model, policy, z, mean, draws, args):
        base = 0.0 if self.calls % self.every == 0 else -1.0
        self.calls += 1
        part = lambda x: torch.full((len(z), 2), base + x)
        return bmpc.Plan(
            part(0.1), part(0.2), part(0.3), torch.full_like(mean, base + 0.4), part(0.5).abs(), part(0.6)[:, 0]
        )


COLLECTION = [  # use_chosen_action, chosen_action_noise, from_behavior, the expert's mean and std
    (True, True, True, 0.1, 0.5),  # the executed action
    (True, False, True, 0.2, 0.5),  # the drawn elite
    (False, True, True, 0.4, 0.5),  # the plan's mean
    (True, True, False, -0.8, 0.5),  # the drawn elite of the separate plan: it has no noise
    (False, True, False, -0.6, 0.5),  # its mean
]


@pytest.mark.parametrize("chosen, noise, behavior, mean, std", COLLECTION)
def test_the_expert_stored_at_collection(tmp_path, chosen, noise, behavior, mean, std):
    args = small_args(
        reanalyze_use_chosen_action=chosen, chosen_action_noise=noise, initial_expert_from_behavior=behavior,
        reanalyze_interval=0, utd_ratio=0.001,
    )  # fmt: skip
    functions = bmpc.Functions(plan=Distinct(1 if behavior else 2))
    buffer = run_loop(args, FakeEnvs([50, 50]), tmp_path, functions).buffer
    expert, action = buffer.expert, buffer.action  # (step, E, ...)
    assert (expert[:6, :, 0] == 0).all() and (expert[:6, :, 1] == 1).all()  # warm-up: N(0, 1)
    assert (action[6:20] == 0.1).all() and (action[:6] != 0.1).all()  # what was executed, whatever the expert
    torch.testing.assert_close(expert[6:20, :, 0], torch.full((14, 2, 2), mean))
    torch.testing.assert_close(expert[6:20, :, 1], torch.full((14, 2, 2), std))


@pytest.mark.parametrize("chosen, noise, mean", [(True, True, 0.2), (True, False, 0.2), (False, True, 0.4)])
def test_the_expert_after_reanalyze(chosen, noise, mean):
    """The drawn elite's first action, never the noise; or the plan's mean."""
    args = small_args(reanalyze_use_chosen_action=chosen, chosen_action_noise=noise)
    buffer, batch = bmpc.ReplayBuffer(args, TASK, torch.device("cpu")), make_batch(args)
    new = bmpc.reanalyze(Distinct(1), make_model(args), buffer, batch, args, generator())
    torch.testing.assert_close(new.expert[:, :3, 0], torch.full((3, 3, 2), mean))
    torch.testing.assert_close(new.expert[:, :3, 1], torch.full((3, 3, 2), 0.5))
    torch.testing.assert_close(buffer.expert.flatten(0, 1)[batch.rows[:, :3]], new.expert[:, :3])


def test_a_separate_first_plan_leaves_the_acting_plan_and_its_warm_start_alone(tmp_path):
    """Real plans, no updates after pretraining: the same actions and means, other experts."""
    runs = []
    for behavior in (True, False):
        args = small_args(initial_expert_from_behavior=behavior, utd_ratio=0.001)
        runs.append(run_loop(args, FakeEnvs([5, 7]), tmp_path / str(behavior)))
    a, b = runs
    assert torch.equal(a.buffer.action, b.buffer.action) and torch.equal(a.mean, b.mean)
    assert torch.equal(a.draws["collect"].get_state(), b.draws["collect"].get_state())
    assert not torch.equal(a.buffer.expert, b.buffer.expert)


def test_a_separate_first_plan_is_unwarmed_noiseless_and_from_its_own_generator():
    args = small_args(initial_expert_from_behavior=False)
    run = start(args, FakeEnvs([5, 7]))
    mean, rng = torch.rand(2, 3, 2, generator=generator(1)), generator()
    rng.set_state(run.draws["expert"].get_state())
    (_, expert, _), _ = bmpc.act(bmpc.plan, run.model, run.obs, mean, args, run.draws)
    z, noise = run.model.encoder(run.obs), bmpc.draw_plan(args, 2, 2, 3, rng)
    expected = bmpc.plan(run.model, run.model.policy, z, torch.zeros(2, 3, 2), noise, args)
    torch.testing.assert_close(expert, torch.stack([expected.elite, expected.std], 1))


# --- 2d: num_rollouts


def test_four_rollouts_are_the_mean_of_four_losses_under_the_same_draws(double):
    args = small_args(num_rollouts=4, td_horizon=2)
    model, batch, draws = make_model(args), make_batch(args), draws_for(args)
    _, four = world(model, batch, draws, args)
    one = dataclasses.replace(args, num_rollouts=1)
    each = [world(model, batch, draws._replace(td=draws.td[r : r + 1]), one)[1]["value"] for r in range(4)]
    torch.testing.assert_close(four["value"], sum(each) / 4)
    assert max(each) > min(each) + 1e-4  # four different ones
    y = bmpc.td_target(model, model.policy, torch.stack([model.encoder(o) for o in batch.obs[:3]]), draws.td, args)
    torch.testing.assert_close(four["td_target_std_over_rollouts"], y[0].std(0).mean())


# --- 2e: where values are predicted, and where imagination starts


@pytest.mark.parametrize("imagine", ["replay_rollout", "replay_true"])
@pytest.mark.parametrize("source", ["replay_true", "same"])
def test_values_are_predicted_and_imagined_at_the_states_asked_for(monkeypatch, imagine, source):
    args = small_args(imagine_initial_source=imagine, td_target_initial_source=source)
    model, batch, seen = make_model(args), make_batch(args), {}
    original = bmpc.td_target
    monkeypatch.setattr(bmpc, "td_target", lambda m, p, z, *x: seen.update(imagined=z) or original(m, p, z, *x))
    model.value.register_forward_pre_hook(lambda module, inputs: seen.update(predicted=inputs[0]))
    bmpc.world_model_loss(model, batch, draws_for(args), args)
    true = torch.stack([model.encoder(obs) for obs in batch.obs[:3]])
    rollout = [true[0]]
    for t in range(2):
        rollout.append(model.dynamics(rollout[t][None], batch.action[t][None])[0])
    states = {"replay_true": true, "replay_rollout": torch.stack(rollout)}
    assert not torch.allclose(true[1:], states["replay_rollout"][1:], atol=1e-2)  # they can be told apart
    torch.testing.assert_close(seen["predicted"][0], states[imagine])
    torch.testing.assert_close(seen["imagined"], states["replay_true" if source == "replay_true" else imagine])
    assert not seen["imagined"].requires_grad


def gradients(model, total, *networks):
    """The norm of total's gradient in each network."""
    norms = []
    for name in networks:
        grads = torch.autograd.grad(
            total, list(getattr(model, name).parameters()), retain_graph=True, allow_unused=True
        )
        norms.append(sum(0.0 if g is None else float(g.abs().sum()) for g in grads))
    return norms


# --- 2f: encoder consistency


def test_encoder_consistency_is_the_same_distance_with_its_gradient_in_the_encoder_only():
    args = small_args(consistency_coef=0.0, reward_coef=0.0, value_coef=0.0, encoder_consistency_coef=1.0)
    model, batch = make_model(args), make_batch(args)
    total, metrics = world(model, batch, draws_for(args), args)
    assert torch.equal(metrics["encoder_consistency"], metrics["consistency"])
    assert float(total.detach()) == pytest.approx(float(metrics["consistency"]))
    encoder, dynamics = gradients(model, total, "encoder", "dynamics")
    assert encoder > 1e-3 and dynamics == 0


# --- 2g: the EMA policy


def test_the_ema_policy_exists_only_where_it_is_needed():
    uses = (dict(td_target_use_ema_policy=True), dict(policy_trust_region_coef=0.1))
    for changes, there in (({}, False), *((use, True) for use in uses)):
        assert (bmpc.WorldModel(TASK, small_args(**changes), generator()).ema_policy is not None) == there


def test_the_ema_policy_acts_in_td_targets_only():
    """Another EMA changes the targets, and nothing in plans, other losses or, without trust region, the policy's."""
    args = small_args(td_target_use_ema_policy=True)
    model, batch, draws = make_model(args), make_batch(args), draws_for(args)
    z = model.encoder(batch.obs[0]).detach()
    noise = bmpc.draw_plan(args, 12, 2, 3, generator())

    def everything():
        _, states, metrics = bmpc.world_model_loss(model, batch, draws, args)
        planned = bmpc.plan_in_chunks(bmpc.plan, model, model.policy, z, torch.zeros(12, 3, 2), noise, args)
        metrics = metrics | bmpc.policy_loss(model, states, batch.expert, args)[2]
        return metrics | {f"plan/{name}": x for name, x in zip(planned._fields, planned, strict=True)}

    before = everything()
    with torch.no_grad():
        for p in model.ema_policy.parameters():
            p.mul_(-1.5)
    after = everything()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"losses/td_target", "losses/value", "losses/total"}


def trust_region(model, z, expert, args):
    """The trust region's part of the policy loss, with its gradient: the loss with it less the loss without."""
    with_it, scale, metrics = bmpc.policy_loss(model, z, expert, args)
    without, _, _ = bmpc.policy_loss(model, z, expert, dataclasses.replace(args, policy_trust_region_coef=0.0))
    return with_it - without, scale, metrics


def test_the_trust_region_is_zero_at_the_start_and_its_gradient_pulls_towards_the_ema(double):
    args = small_args(policy_trust_region_coef=1.0)
    fresh = bmpc.WorldModel(TASK, args, generator())
    z, expert = torch.randn(3, 12, 16, generator=generator(2)), make_batch(args).expert
    found, _, metrics = trust_region(fresh, z, expert, args)
    assert metrics["losses/trust_region"] == 0 and abs(found.item()) < 1e-12
    model = make_model(args)
    model.ema_policy.load_state_dict(model.policy.state_dict())
    with torch.no_grad():
        model.policy.layers[-1].bias[..., :2] += torch.tensor([0.4, -0.4])  # the means moved apart, one up and one down
    found, _, _ = trust_region(model, z, expert, args)
    (grad,) = torch.autograd.grad(found, [model.policy.layers[-1].bias])
    assert found > 0.01 and grad[0, 0, 0] > 0 and grad[0, 0, 1] < 0  # descent brings them back
    assert not any(p.requires_grad for p in model.ema_policy.parameters())


# --- at the defaults, and all together


DIAGNOSTICS = {  # logged only where its flag is on
    "losses/encoder_consistency": dict(encoder_consistency_coef=0.1),
    "losses/trust_region": dict(policy_trust_region_coef=0.1),
    "losses/td_target_std_over_rollouts": dict(num_rollouts=2),
}


def ended(directory, args):
    """The end of a run's model, experts and generators, and the tags it logged."""
    run = run_loop(args, FakeEnvs([5, 7]), directory)
    state = run.state_dict()
    tags = {line.split(",")[2] for line in (directory / "metrics.csv").read_text().splitlines()[1:]}
    return [{k: x for k, x in state["model"].items() if "ema" not in k}, state["buffer"], state["draws"]], tags


def test_a_flag_at_its_default_leaves_every_bit_and_away_from_it_changes_the_run(tmp_path):
    """Also the EMA policy that nobody looks at, and a step of it that nobody takes: no draw, no bit is another."""
    args = small_args(log_freq=10, total_timesteps=20, reanalyze_interval=4)
    base, tags = ended(tmp_path / "base", args)
    assert tags.isdisjoint(DIAGNOSTICS) and "losses/value" in tags
    tiny = dict(policy_trust_region_coef=1e-30)  # the copy and the term are there, but round off
    for k, changes in enumerate([dict(policy_ema_tau=0.5), tiny]):
        assert same(ended(tmp_path / f"same{k}", dataclasses.replace(args, **changes))[0], base), changes
    others = dict(
        utd_ratio=2.0, reanalyze_use_chosen_action=False, chosen_action_noise=False, initial_expert_from_behavior=False,
        imagine_initial_source="replay_true", td_target_initial_source="same", td_target_use_ema_policy=True,
    )  # fmt: skip
    changed = [(changes, {name}) for name, changes in DIAGNOSTICS.items()]
    for k, (changes, more) in enumerate(changed + [({name: value}, set()) for name, value in others.items()]):
        state, found = ended(tmp_path / str(k), dataclasses.replace(args, **changes))
        assert not same(state, base) and found == tags | more, changes


def test_all_flags_at_once_run_on_every_number_finite(tmp_path):
    args = small_args(log_freq=10, reanalyze_interval=3, **ALL)
    run = run_loop(args, FakeEnvs([5, 7]), tmp_path)
    assert run.updates == 56 and run.pretrained == 12
    assert all(torch.isfinite(x).all() for x in run.model.state_dict().values())
    values = [float(line.split(",")[3]) for line in (tmp_path / "metrics.csv").read_text().splitlines()[1:]]
    assert all(map(math.isfinite, values)) and len(values) > 50
