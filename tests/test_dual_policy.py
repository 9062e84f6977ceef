"""bmpc_dual_policy.py: who proposes, who imitates whom, and what the second policy leaves alone."""

import math

import pytest
import torch
from test_multihead import EVERYTHING, SHORT, Spy, batch_of, check_compiled, filled_buffer, normal
from test_siblings import ACTION, FLAGS, FakeEnvs, load, small_run, small_training

m = load("bmpc_dual_policy.py")
CPU = torch.device("cpu")
DUAL = dict(dual_policy_enabled=True, planner_num_dynamics_heads=2, planner_value_std_coef_train=0.5, policy_value_std_coef=-0.25)
EMA = dict(policy_trust_region_coef=0.5, td_target_use_ema_policy=True)


def begun(**flags):
    """A run with some steps in its buffer and all weights moved: Training, Progress."""
    t, p = small_training(m, **DUAL | flags)
    filled_buffer(t, p)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for x in t.model.parameters():
            x.add_(0.3 * torch.randn(x.shape, generator=generator))
    return t, p


def sampled(t):
    draws = m.draw_update(t.args, ACTION, t.draws["learn"], CPU, t.draws["variant"])
    return t.buffer.sample(draws.window), draws


def expert_batch(args):
    """A batch whose rows hold an expert for each policy."""
    one, other = batch_of(args), batch_of(args)
    return one._replace(expert=torch.cat([one.expert, other.expert], 2))  # (T, B, 4, A)


def nudge(network):
    with torch.no_grad():
        for x in network.parameters():
            x.add_(0.1 * normal(*x.shape))


# --- planning


@pytest.mark.parametrize("initial", [True, False])
def test_the_optimistic_policy_proposes_and_acts_in_training(initial):
    """The plan that acts is hers, with the acting coefficient; the pessimistic expert is a plan of its own."""
    t, p = begun(initial_expert_from_behavior=initial)
    spy = Spy(m)
    acted, metrics = m.act(spy, t.model, t.buffer, p.mean, t.args, t.draws)
    optimistic, pessimistic = t.model.optimistic_policy, t.model.policy
    who = [optimistic, pessimistic] if initial else [optimistic, optimistic, pessimistic]
    assert [id(x) for x in spy.policies] == [id(x) for x in who]
    assert spy.coefs == ([0.5, -0.25] if initial else [0.5, 0.5, -0.25])
    assert torch.equal(acted.action, spy.plans[0].action) and torch.equal(acted.mean, spy.plans[0].mean)
    assert acted.expert.shape == (t.args.num_envs, 4, ACTION)
    hers = spy.plans[0].action if initial else spy.plans[1].elite
    for row, value in enumerate([spy.plans[-1].elite, spy.plans[-1].std, hers, spy.plans[0 if initial else 1].std]):
        assert torch.equal(acted.expert[:, row], value), row
    assert {"planner/proposal_share", "planner/pessimistic_proposal_share", "planner/bonus_share"} <= set(metrics)


def test_the_pessimistic_policy_plays_evaluation():
    t, _ = begun(planner_value_std_coef_eval=2.0)
    spy = Spy(m)
    returns = m.evaluate(spy, t.model, FakeEnvs(2), t.args, 0, True)
    alone = m.evaluate(spy, t.model, FakeEnvs(2), t.args, 0, False)
    assert set(map(id, spy.policies)) == {id(t.model.policy)} and set(spy.coefs) == {2.0}
    nudge(t.model.optimistic_policy)
    assert (m.evaluate(m.plan, t.model, FakeEnvs(2), t.args, 0, True) == returns).all()
    assert (m.evaluate(m.plan, t.model, FakeEnvs(2), t.args, 0, False) == alone).all()
    nudge(t.model.policy)
    assert (m.evaluate(m.plan, t.model, FakeEnvs(2), t.args, 0, False) != alone).any()


def test_reanalyze_rewrites_both_experts_each_by_a_plan_of_its_own():
    t, _ = begun()
    batch, _ = sampled(t)
    old, spy = t.buffer.expert.clone(), Spy(m)
    learn = t.draws["learn"].get_state()
    renewed = m.reanalyze(spy, t.model, t.buffer, batch, t.args, t.draws["learn"], t.draws["variant"])
    W, T = t.args.reanalyze_batch_size, t.args.horizon
    half = len(spy.policies) // 2  # a plan may come in chunks
    assert {id(x) for x in spy.policies[:half]} == {id(t.model.policy)} and set(spy.coefs[:half]) == {-0.25}
    assert {id(x) for x in spy.policies[half:]} == {id(t.model.optimistic_policy)} and set(spy.coefs[half:]) == {0.5}
    assert sum(len(x.std) for x in spy.plans) == 2 * W * T
    rows = batch.rows[:, :W].unique()
    changed = (t.buffer.expert != old).any(-1)  # (rows, 4)
    assert changed[rows].all() and changed.sum() == 4 * len(rows)
    assert torch.equal(renewed.expert[:, :W], t.buffer.expert[batch.rows[:, :W]])
    assert torch.equal(renewed.expert[:, W:], batch.expert[:, W:])
    last = {int(r): i for i, r in enumerate(batch.rows[:, :W].T.flatten())}  # the later window's plan stays
    elite, std = (torch.cat([getattr(x, name) for x in spy.plans]) for name in ("elite", "std"))
    for row, i in last.items():
        wanted = torch.stack([elite[i], std[i], elite[W * T + i], std[W * T + i]])
        assert torch.equal(t.buffer.expert[row], wanted)
    t.draws["learn"].set_state(learn)  # the shared stream gave one plan's numbers
    m.draw_plan(t.args, W * T, ACTION, T, t.draws["learn"], CPU)
    after = t.draws["learn"].get_state()
    t.draws["learn"].set_state(learn)
    m.reanalyze(m.plan, t.model, t.buffer, batch, t.args, t.draws["learn"], t.draws["variant"])
    assert torch.equal(t.draws["learn"].get_state(), after)


def test_warm_up_rows_have_two_standard_normal_experts():
    t, _ = begun()
    acted = m.act_randomly(2, ACTION, t.args, t.draws, CPU)
    assert acted.expert.tolist() == [[[0.0] * ACTION, [1.0] * ACTION] * 2] * 2
    assert t.buffer.expert.shape[1:] == (4, ACTION)


# --- learning


def loss_gradients(t, expert, z):
    """The gradients of the policy loss, for the pessimistic and for the optimistic policy."""
    loss, scale, _ = m.policy_loss(t.model, z, expert, t.args)
    grads = torch.autograd.grad(loss, t.optimizers[1].params)
    own = {id(x) for x in t.model.policy.parameters()}
    split = [[g for g, x in zip(grads, t.optimizers[1].params) if (id(x) in own) == mine] for mine in (True, False)]
    return *split, scale


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_each_policy_is_distilled_from_its_own_experts():
    t, _ = begun(**EMA)
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
    t, _ = begun(**EMA)
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
        p, q = (torch.distributions.Normal(*m.policy_gaussian(x, z, args.log_std_min, args.log_std_max)) for (x, _) in pairs)
    torch.testing.assert_close(metrics["losses/kl_between_policies"], torch.distributions.kl_divergence(q, p).mean())


def test_one_optimizer_one_clip_and_two_averages():
    t, p = begun(**EMA)
    params = [*t.model.policy.parameters(), *t.model.optimistic_policy.parameters()]
    optimizer = t.optimizers[1]
    assert [id(x) for x in optimizer.params] == [id(x) for x in params]
    norm = optimizer.step([torch.ones_like(x) for x in params])
    assert norm.item() == pytest.approx(math.sqrt(sum(x.numel() for x in params)), rel=1e-5)
    old = [x.clone() for x in t.model.optimistic_ema_policy.parameters()]
    grads = [torch.zeros_like(x) for x in t.optimizers[0].params]
    m.optimize(t.model, t.optimizers, grads, [torch.ones_like(x) for x in params], torch.tensor([3.0, 4.0]), t.args)
    for x, before, online in zip(t.model.optimistic_ema_policy.parameters(), old, t.model.optimistic_policy.parameters()):
        torch.testing.assert_close(x, before + t.args.policy_ema_tau * (online - before))
    assert t.model.kl_scale.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("ema", [False, True])
def test_value_targets_are_the_pessimistic_policys(ema):
    t, _ = begun(**EMA if ema else {})
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
    on, off = small_training(m, **DUAL)[0], small_training(m, **DUAL | dict(dual_policy_enabled=False))[0]
    shared = off.model.state_dict()
    assert all(torch.equal(x, on.model.state_dict()[name]) for name, x in shared.items() if name != "kl_scale")
    weights = [network.last.weight for network in (on.model.policy, on.model.optimistic_policy)]
    assert weights[0].shape == weights[1].shape and (weights[0] != weights[1]).all()
    assert on.model.optimistic_ema_policy is None and off.model.optimistic_policy is None


# --- whole runs and arguments


def test_a_run_takes_the_same_numbers_from_the_shared_generators(tmp_path):
    """And logs what two policies have to say."""
    off, _, rows = small_run(m, tmp_path / "off", **DUAL | dict(dual_policy_enabled=False, policy_value_std_coef=0.0))
    own = {"losses/kl_between_policies", "losses/optimistic_policy", "losses/optimistic_kl", "planner/pessimistic_proposal_share"}
    assert not own & {tag for _, tag, _ in rows}
    on, p, rows = small_run(m, tmp_path / "on", **DUAL)
    assert own <= {tag for _, tag, _ in rows} and p.updates == 50
    for name in ("collect", "expert", "learn"):
        assert torch.equal(on.draws[name].get_state(), off.draws[name].get_state()), name
    assert not torch.equal(on.draws["variant"].get_state(), off.draws["variant"].get_state())
    assert all(float(x) > 0 for _, tag, x in rows if tag == "losses/kl_between_policies")


def test_all_flags_at_once_run(tmp_path):
    _, p, rows = small_run(m, tmp_path, **FLAGS["all at once"], **EVERYTHING, dual_policy_enabled=True, policy_value_std_coef=-0.3)
    assert p.updates == 50 and all(math.isfinite(float(value)) for _, _, value in rows)


def test_all_flags_at_once_compile():
    flags = FLAGS["all at once"] | EVERYTHING | SHORT
    check_compiled(m, {"policy_loss", "optimize"}, **flags, dual_policy_enabled=True, policy_value_std_coef=0.7)


def test_a_reanalyze_coefficient_is_refused_beside_two_policies():
    args = m.parse_args("--task Pendulum-v1 --dual-policy-enabled --reanalyze-value-std-coef 1".split())
    with pytest.raises(m.Failure) as failure:
        m.fill_in(args)
    assert failure.value.code == 2 and "--reanalyze-value-std-coef" in str(failure.value) and "\n" not in str(failure.value)
    with pytest.raises(m.Failure):
        small_training(m, **DUAL | dict(policy_value_std_coef=math.nan))


def test_the_dual_policy_shapes_the_run():
    assert "dual_policy_enabled" in m.SHAPING_ARGS
