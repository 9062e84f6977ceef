"""The siblings' own: who plans with which coefficient, whose experts are whose, what heads and policies leave alone.

Their losses, updates and plans test_learning.py and test_planner.py hold against the oracle.
"""

import math

import numpy as np
import pytest
import torch
from conftest import TASK, FakeEnvs, make_model, named, small_args, start, stored
from test_siblings import whole

import bmpc
import bmpc_dual_policy
import bmpc_multihead

ONE = dict(planner_num_dynamics_heads=2, planner_value_std_coef_train=0.5, reanalyze_value_std_coef=2.0)
TWO = dict(dual_policy_enabled=True, planner_num_dynamics_heads=2, planner_value_std_coef_train=0.5)
TWO |= dict(policy_value_std_coef=-0.25)
OFF = dict(dual_policy_enabled=False, policy_value_std_coef=0.0)
SCRIPTS = {False: (bmpc_multihead, ONE), True: (bmpc_dual_policy, TWO)}  # by whether there are two policies
each = pytest.mark.parametrize("two", [False, True], ids=["multihead", "dual"])


class Spy:
    """Stands for `plan` and keeps what it was asked and what it answered."""

    def __init__(self, script):
        self.script, self.coefs, self.policies, self.plans = script, [], [], []

    def __call__(self, model, policy, obs, mean, draws, args, std_coef):
        self.coefs.append(std_coef)
        self.policies.append(id(policy))
        self.plans.append(self.script.plan(model, policy, obs, mean, draws, args, std_coef))
        return self.plans[-1]


def begun(two, **flags):
    """A script, and a run of it with large weights after 10 random decisions of each environment."""
    script, own = SCRIPTS[two]
    args, envs = small_args(script, **own | flags), FakeEnvs([5, 7])
    run = start(args, envs, script=script)
    run.model.load_state_dict(make_model(args, script=script).state_dict())
    for _ in range(10):
        acted = *script.act_randomly(args, TASK.action_dim, run.generator("act")), run.mean
        envs.step_async(acted[0].numpy())
        script.store(run, envs, *acted)
    return script, run


# --- who plans


@each
@pytest.mark.parametrize("initial", [True, False])
def test_who_plans_to_act_and_whose_expert_is_stored(two, initial):
    """With two policies the optimistic one; the pessimistic one's expert is a plan of its own."""
    script, run = begun(two, initial_expert_from_behavior=initial)
    warm_up = [[0.0] * 2, [1.0] * 2] * (1 + two)
    assert stored(run.buffer).expert[:10].tolist() == [[warm_up] * 2] * 10
    spy, model = Spy(script), run.model
    (action, expert, mean), _ = script.act(spy, model, run.obs, run.mean, run.args, run.generator)
    plans = 1 if initial else 2
    acting = model.optimistic_policy if two else model.policy
    assert spy.policies == [id(acting)] * plans + [id(model.policy)] * two
    assert spy.coefs == [0.5] * plans + [-0.25] * two
    assert torch.equal(action, spy.plans[0].action) and torch.equal(mean, spy.plans[0].mean)
    first = spy.plans[plans - 1]
    parts = [spy.plans[-1].elite, spy.plans[-1].std] * two
    assert torch.equal(expert, torch.stack(parts + [first.action if initial else first.elite, first.std], 1))


@each
def test_the_pessimistic_policy_evaluates_with_a_coefficient_of_its_own(two):
    script, run = begun(two, planner_value_std_coef_eval=3.0)
    spy = Spy(script)
    run.functions = run.functions._replace(plan=spy)

    def played(planning):
        envs = FakeEnvs([5, 7])
        script.play(run, envs, planning, [], [])
        return [action.tolist() for action in envs.sent]

    alone = played(planning=False)
    assert not spy.plans and played(planning=True) != alone
    assert set(spy.policies) == {id(run.model.policy)} and set(spy.coefs) == {3.0}
    if two:
        run.model.optimistic_policy.load_state_dict(run.model.policy.state_dict())
        assert played(planning=False) == alone


@each
def test_reanalyze_rewrites_every_expert_of_the_sampled_rows_each_by_a_plan_of_its_own(two):
    script, run = begun(two)
    args = run.args
    batch, spy = run.buffer.sample(np.random.default_rng(0).random(args.batch_size)), Spy(script)
    given, old = batch.expert.clone(), stored(run.buffer).expert.clone()
    script.reanalyze(spy, run.model, run.buffer, batch, args, named())
    W, T = args.reanalyze_batch_size, args.horizon
    half = len(spy.policies) // (1 + two)  # a plan may come in chunks
    optimistic = [id(run.model.optimistic_policy)] * half if two else []
    assert spy.policies == [id(run.model.policy)] * half + optimistic
    assert spy.coefs == ([-0.25] * half + [0.5] * half if two else [2.0] * half)
    rows, experts = batch.place[:, :W].flatten(), stored(run.buffer).expert.flatten(0, 1)
    changed = (experts != old.flatten(0, 1)).any(-1)  # (rows, 2 or 4)
    assert changed[rows].all() and changed.sum() == (2 + 2 * two) * len(rows.unique())
    assert torch.equal(batch.expert[:, :W].flatten(0, 1), experts[rows])
    assert torch.equal(batch.expert[:, W:], given[:, W:])
    parts = [torch.cat([getattr(x, name) for x in spy.plans]).split(T * W) for name in ("elite", "std")]
    wanted = torch.stack([part[k] for k in range(1 + two) for part in parts], 1)
    for i, row in enumerate(rows):  # of a row that occurs twice one plan remains
        assert any(torch.equal(experts[row], wanted[j]) for j in (rows == row).nonzero().flatten()), i


def test_scores_stay_finite():
    rewards, values = torch.zeros(2, 1, 3), torch.zeros(3, 2, 1, 3)
    values[0, 1, 0, 1], values[2, 0, 0, 2] = math.nan, math.inf
    for coef in (0.0, 1.0, -1.0):
        scores, spread = bmpc_multihead.score(rewards, values, coef)
        assert scores.tolist() == [[0.0, -1e9, -1e9]] and torch.isfinite(spread).all()


# --- what is shared stays


@pytest.mark.parametrize("heads, td_horizon, extra", [(1, 3, False), (2, 1, False), (2, 3, True)])
def test_extra_draws_come_where_they_are_needed_and_leave_the_shared_ones(heads, td_horizon, extra):
    args = small_args(bmpc_multihead, planner_num_dynamics_heads=heads, td_horizon=td_horizon)
    mine = bmpc_multihead.draw_update(args, 2, named(9))
    theirs = bmpc.draw_update(small_args(td_horizon=td_horizon), 2, named(9))
    mine_of_base = mine._replace(td=mine.td[0])
    assert all(torch.equal(x, y) for x, y in zip(mine_of_base, theirs, strict=True))
    assert len(mine.td) == (heads if extra else 1) and (not extra or not torch.equal(mine.td[0], mine.td[1]))


@pytest.mark.parametrize("script", [bmpc, bmpc_multihead, bmpc_dual_policy], ids=lambda script: script.__name__)
def test_no_numbers_are_drawn_twice(tmp_path, monkeypatch, script):
    """A generator asked for twice at one place would give the same ones: every purpose has a name of its own."""
    own = {} if script is bmpc else ONE if script is bmpc_multihead else TWO
    asked, generator = [], script.Run.generator

    def listen(run, name):
        asked.append((name, run.global_step, run.pretrained, run.updates))
        return generator(run, name)

    monkeypatch.setattr(script.Run, "generator", listen)
    whole(script, tmp_path, initial_expert_from_behavior=False, td_horizon=2, reanalyze_interval=2, **own)
    wanted = {"act", "expert", "update", "reanalyze"} | ({"heads"} if own else set())
    assert {name for name, *_ in asked} == wanted | ({"own expert", "optimistic"} if own is TWO else set())
    assert len(set(asked)) == len(asked)


def test_heads_and_policies_begin_different_and_disturb_no_shared_number(tmp_path):
    """Also in a whole run, which logs what two policies and two heads have to say, and one of each does not."""
    off, off_rows, _ = whole(bmpc_dual_policy, tmp_path / "off", **TWO | OFF)
    on, on_rows, _ = whole(bmpc_dual_policy, tmp_path / "on", **TWO)
    fresh, shared = (bmpc_dual_policy.Run(run.args, TASK, run.obs.device).model for run in (on, off))
    state = fresh.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in shared.state_dict().items() if name != "kl_scale")
    weights = [network.layers[-1].weight for network in (fresh.policy, fresh.optimistic_policy)]
    assert weights[0].shape == weights[1].shape and (weights[0] != weights[1]).all()
    assert fresh.optimistic_ema_policy is None and shared.optimistic_policy is None
    assert all(not torch.equal(*layer.weight) for layer in fresh.dynamics.layers)
    _, one_head, _ = whole(bmpc_multihead, tmp_path / "one head", planner_value_std_coef_train=1.0)
    told = [{tag for _, _, tag, _ in rows} for rows in (one_head, off_rows, on_rows)]
    of = lambda part, *names: {f"{part}/{name}" for name in names}
    heads = of("planner", "return_disagreement", "bonus_share", "proposal_share") | of("losses", "latent_disagreement")
    policies = of("losses", "kl_between_policies", "optimistic_policy", "optimistic_kl")
    policies |= of("planner", "pessimistic_proposal_share")
    assert [tags & (heads | policies) for tags in told] == [set(), heads, heads | policies]
    above_zero = ("planner/return_disagreement", "losses/latent_disagreement", "losses/kl_between_policies")
    assert all(value > 0 for _, _, tag, value in on_rows if tag in above_zero)


# --- arguments

REFUSED = {
    "--planner-num-dynamics-heads 0": bmpc_multihead,
    "--planner-value-std-coef-train nan": bmpc_multihead,
    "--planner-value-std-coef-eval inf": bmpc_multihead,
    "--reanalyze-value-std-coef=-inf": bmpc_multihead,
    "--reanalyze-value-std-coef 1 --dual-policy-enabled": bmpc_dual_policy,
    "--policy-value-std-coef nan --dual-policy-enabled": bmpc_dual_policy,
    "--policy-value-std-coef 1": bmpc_dual_policy,
}


@pytest.mark.parametrize("flags", REFUSED)
def test_impossible_flags_are_refused(flags):
    script = REFUSED[flags]
    with pytest.raises(script.Refused, match=flags.replace("=", " ").split()[0]):
        script.fill_in(script.parse_args(["--task", "Pendulum-v1", *flags.split()]))


def test_heads_and_policies_shape_the_run():
    for name in ("planner_num_dynamics_heads", "dual_policy_enabled"):
        assert bmpc_dual_policy.FREE not in bmpc_dual_policy.notes()[name]
