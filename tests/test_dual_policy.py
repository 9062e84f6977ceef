"""bmpc_dual_policy.py: who proposes, who imitates whom, and what the second policy leaves alone."""

import math

import pytest
import torch
from test_multihead import EVERYTHING, SHORT, Spy, batch_of, check_compiled, filled_buffer, normal, nudge, returns_of
from test_siblings import ACTION, FLAGS, load, small_run, small_training

m = load("bmpc_dual_policy.py")
DUAL = dict(
    dual_policy_enabled=True,
    planner_num_dynamics_heads=2,
    planner_value_std_coef_train=0.5,
    policy_value_std_coef=-0.25,
)
OFF = dict(dual_policy_enabled=False, policy_value_std_coef=0.0)
EMA = dict(policy_trust_region_coef=0.5, td_target_use_ema_policy=True)


def begun(**flags):
    """A run with some steps in its buffer and all weights moved."""
    run = small_training(m, **DUAL | flags)
    filled_buffer(run)
    nudge(run.model)
    return run


def sampled(run):
    draws = m.draw_update(run.args, ACTION, run.draws["learn"], run.draws["variant"])
    return run.buffer.sample(draws.window), draws


def expert_batch(args):
    """A batch whose rows hold an expert for each policy."""
    one, other = batch_of(args), batch_of(args)
    return one._replace(expert=torch.cat([one.expert, other.expert], 2))  # (T, B, 4, A)


# --- planning


@pytest.mark.parametrize("initial", [True, False])
def test_the_optimistic_policy_proposes_and_acts_in_training(initial):
    """The plan that acts is hers, with the acting coefficient; the pessimistic expert is a plan of its own."""
    t = begun(initial_expert_from_behavior=initial)
    spy = Spy(m)
    (action, expert, mean), metrics = m.act(spy, t.model, t.obs, t.mean, t.args, t.draws)
    optimistic, pessimistic = t.model.optimistic_policy, t.model.policy
    who = [optimistic, pessimistic] if initial else [optimistic, optimistic, pessimistic]
    assert [id(x) for x in spy.policies] == [id(x) for x in who]
    assert spy.coefs == ([0.5, -0.25] if initial else [0.5, 0.5, -0.25])
    assert torch.equal(action, spy.plans[0].action) and torch.equal(mean, spy.plans[0].mean)
    assert expert.shape == (t.args.num_envs, 4, ACTION)
    hers = spy.plans[0].action if initial else spy.plans[1].elite
    for row, value in enumerate([spy.plans[-1].elite, spy.plans[-1].std, hers, spy.plans[0 if initial else 1].std]):
        assert torch.equal(expert[:, row], value), row
    assert {"planner/proposal_share", "planner/pessimistic_proposal_share", "planner/bonus_share"} <= set(metrics)


def test_the_pessimistic_policy_plays_evaluation():
    t = begun(planner_value_std_coef_eval=2.0)
    spy = Spy(m)
    t.functions = t.functions._replace(plan=spy)
    returns, alone = returns_of(t), returns_of(t, planning=False)
    assert set(map(id, spy.policies)) == {id(t.model.policy)} and set(spy.coefs) == {2.0}
    nudge(t.model.optimistic_policy)
    assert returns_of(t) == returns and returns_of(t, planning=False) == alone
    nudge(t.model.policy)
    assert returns_of(t, planning=False) != alone


def test_reanalyze_rewrites_both_experts_each_by_a_plan_of_its_own():
    t = begun()
    batch, _ = sampled(t)
    old, spy = t.buffer.expert.clone(), Spy(m)
    learn = t.draws["learn"].get_state()
    renewed = m.reanalyze(spy, t.model, t.buffer, batch, t.args, t.draws["learn"], t.draws["variant"])
    W, T = t.args.reanalyze_batch_size, t.args.horizon
    half = len(spy.policies) // 2  # a plan may come in chunks
    assert {id(x) for x in spy.policies[:half]} == {id(t.model.policy)} and set(spy.coefs[:half]) == {-0.25}
    assert {id(x) for x in spy.policies[half:]} == {id(t.model.optimistic_policy)} and set(spy.coefs[half:]) == {0.5}
    assert sum(len(x.std) for x in spy.plans) == 2 * W * T
    rows, experts = batch.rows[:, :W].flatten(), t.buffer.expert.flatten(0, 1)
    changed = (experts != old.flatten(0, 1)).any(-1)  # (rows, 4)
    assert changed[rows].all() and changed.sum() == 4 * len(rows.unique())
    assert torch.equal(renewed.expert[:, :W].flatten(0, 1), experts[rows])
    assert torch.equal(renewed.expert[:, W:], batch.expert[:, W:])
    elite, std = (torch.cat([getattr(x, name) for x in spy.plans]) for name in ("elite", "std"))
    wanted = torch.stack(
        [elite[: T * W], std[: T * W], elite[T * W :], std[T * W :]], 1
    )  # by row; of twins one remains
    for i, row in enumerate(rows):
        twins = (rows == row).nonzero().flatten()
        assert any(torch.equal(experts[row], wanted[j]) for j in twins), i
    t.draws["learn"].set_state(learn)  # the shared stream gave one plan's numbers
    m.draw_plan(t.args, W * T, ACTION, T, t.draws["learn"])
    after = t.draws["learn"].get_state()
    t.draws["learn"].set_state(learn)
    m.reanalyze(m.plan, t.model, t.buffer, batch, t.args, t.draws["learn"], t.draws["variant"])
    assert torch.equal(t.draws["learn"].get_state(), after)


def test_warm_up_rows_have_two_standard_normal_experts():
    t = begun()
    _, expert = m.act_randomly(t.args, ACTION, t.draws["collect"])
    assert expert.tolist() == [[[0.0] * ACTION, [1.0] * ACTION] * 2] * 2
    assert t.buffer.expert.shape[2:] == (4, ACTION)


# --- learning


def loss_gradients(t, expert, z):
    """The gradients of the policy loss, for the pessimistic and for the optimistic policy, and the KL scales."""
    loss, scale, _ = m.policy_loss(t.model, z, expert, t.args)
    networks = [t.model.policy, t.model.optimistic_policy]
    return *(torch.autograd.grad(loss, list(x.parameters()), retain_graph=True) for x in networks), scale


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_each_policy_is_distilled_from_its_own_experts():
    t = begun(**EMA)
    batch, z = expert_batch(t.args), t.model.encoder(normal(3, t.args.batch_size, 5)).detach()
    first, second, scale = loss_gradients(t, batch.expert, z)
    for rows, hers in ((slice(0, 2), False), (slice(2, 4), True)):
        expert = batch.expert.clone()
        expert[:, :, rows] = expert[:, :, rows] * 0.5
        a, b, other = loss_gradients(t, expert, z)
        assert same(first, a) == hers and same(second, b) == (not hers)
        assert (scale[0] == other[0]) == hers and (scale[1] == other[1]) == (not hers)


def test_each_policy_has_its_own_loss_scale_and_trust_region():
    """The loss is the sum of what two single policies with these experts, scales and averages have."""
    t = begun(**EMA)
    model, args = t.model, t.args
    batch, z = expert_batch(args), model.encoder(normal(3, args.batch_size, 5)).detach()
    with torch.no_grad():
        model.kl_scale.copy_(torch.tensor([2.0, 7.0]))
    loss, scale, metrics = m.policy_loss(model, z, batch.expert, args)
    pairs = [(model.policy, model.ema_policy), (model.optimistic_policy, model.optimistic_ema_policy)]
    alone = [
        m.imitation_loss(policy, ema, torch.tensor(s), z, batch.expert[:, :, rows], args)
        for (policy, ema), s, rows in zip(pairs, (2.0, 7.0), (slice(0, 2), slice(2, 4)))
    ]
    torch.testing.assert_close(loss, alone[0][0] + alone[1][0])
    torch.testing.assert_close(scale, torch.stack([alone[0][1], alone[1][1]]))
    for name in ("kl", "kl_scale", "entropy", "trust_region"):
        torch.testing.assert_close(metrics[f"losses/{name}"], alone[0][2][f"losses/{name}"])
        torch.testing.assert_close(metrics[f"losses/optimistic_{name}"], alone[1][2][f"losses/{name}"])
    torch.testing.assert_close(metrics["losses/policy"] + metrics["losses/optimistic_policy"], loss.detach())
    with torch.no_grad():
        p, q = (torch.distributions.Normal(*m.policy_gaussian(x, z, args)) for (x, _) in pairs)
    torch.testing.assert_close(metrics["losses/kl_between_policies"], torch.distributions.kl_divergence(q, p).mean())


def test_one_optimizer_one_clip_and_two_averages():
    t = begun(**EMA)
    params = [*t.model.policy.parameters(), *t.model.optimistic_policy.parameters()]
    optimizer = t.optimizers[1]
    assert [id(x) for group in optimizer.param_groups for x in group["params"]] == [id(x) for x in params]
    norm = m.descend(sum(x.sum() for x in params), optimizer, t.args)
    assert norm.item() == pytest.approx(math.sqrt(sum(x.numel() for x in params)), rel=1e-5)
    old = [x.clone() for x in t.model.optimistic_ema_policy.parameters()]
    batch, draws = sampled(t)
    t.model.kl_scale.copy_(torch.tensor([2.0, 7.0]))
    m.update(t.functions, t.model, t.optimizers, batch, draws, t.args, pretraining=False)
    followed = zip(t.model.optimistic_ema_policy.parameters(), old, t.model.optimistic_policy.parameters(), strict=True)
    for x, before, online in followed:
        torch.testing.assert_close(x, before + t.args.policy_ema_tau * (online - before))
    assert (t.model.kl_scale != torch.tensor([2.0, 7.0])).all() and t.model.kl_scale[0] < t.model.kl_scale[1]


@pytest.mark.parametrize("ema", [False, True])
def test_value_targets_are_the_pessimistic_policys(ema):
    t = begun(**EMA if ema else {})
    batch, draws = sampled(t)
    target = lambda: m.world_model_loss(t.model, batch, draws, t.args)[2]["losses/td_target"].item()
    before = target()
    nudge(t.model.optimistic_policy)
    if ema:
        nudge(t.model.optimistic_ema_policy)
    assert target() == before
    nudge(t.model.ema_policy if ema else t.model.policy)
    assert target() != before


def test_the_second_policy_is_independent_and_disturbs_no_shared_number():
    on, off = small_training(m, **DUAL), small_training(m, **DUAL | OFF)
    shared = off.model.state_dict()
    assert all(torch.equal(x, on.model.state_dict()[name]) for name, x in shared.items() if name != "kl_scale")
    weights = [network.layers[-1].weight for network in (on.model.policy, on.model.optimistic_policy)]
    assert weights[0].shape == weights[1].shape and (weights[0] != weights[1]).all()
    assert on.model.optimistic_ema_policy is None and off.model.optimistic_policy is None


# --- whole runs and arguments


def test_a_run_takes_the_same_numbers_from_the_shared_generators(tmp_path):
    """And logs what two policies have to say."""
    off, rows = small_run(m, tmp_path / "off", **DUAL | OFF)
    own = {
        "losses/kl_between_policies",
        "losses/optimistic_policy",
        "losses/optimistic_kl",
        "planner/pessimistic_proposal_share",
    }
    assert not own & {tag for _, tag, _ in rows}
    on, rows = small_run(m, tmp_path / "on", **DUAL)
    assert own <= {tag for _, tag, _ in rows} and on.updates == 50
    for name in ("collect", "expert", "learn"):
        assert torch.equal(on.draws[name].get_state(), off.draws[name].get_state()), name
    assert not torch.equal(on.draws["variant"].get_state(), off.draws["variant"].get_state())
    assert all(float(x) > 0 for _, tag, x in rows if tag == "losses/kl_between_policies")


def test_all_flags_at_once_run(tmp_path):
    flags = FLAGS["all at once"] | EVERYTHING | dict(dual_policy_enabled=True, policy_value_std_coef=-0.3)
    run, rows = small_run(m, tmp_path, **flags)
    assert run.updates == 50 and all(math.isfinite(float(value)) for _, _, value in rows)


def test_all_flags_at_once_compile():
    flags = FLAGS["all at once"] | EVERYTHING | SHORT
    check_compiled(m, {"policy_loss"}, **flags, dual_policy_enabled=True, policy_value_std_coef=0.7)


def test_a_reanalyze_coefficient_is_refused_beside_two_policies():
    for flags in (
        "--dual-policy-enabled --reanalyze-value-std-coef 1",
        "--dual-policy-enabled --policy-value-std-coef nan",
    ):
        with pytest.raises(m.Refused, match=flags.split()[1]):
            m.fill_in(m.parse_args(["--task", "Pendulum-v1", *flags.split()]))


def test_the_dual_policy_shapes_the_run():
    assert m.FREE not in m.notes()["dual_policy_enabled"]
