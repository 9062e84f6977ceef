"""In all three scripts: who plans with which coefficient, whose experts are whose; what heads and policies leave alone.

Their losses, updates and plans test_learning.py and test_planner.py hold against the oracle.
"""

import math

import numpy as np
import pytest
import torch
from conftest import TASK, FakeEnvs, FakePlanner, generator, named, same, small_args, stack_expert, start
from test_siblings import whole

import bmpc
import bmpc_dual_policy
import bmpc_multihead

ONE = dict(planner_num_dynamics_heads=2, planner_value_std_coef_train=0.5, reanalyze_value_std_coef=2.0)
TWO = dict(dual_policy_enabled=True, planner_num_dynamics_heads=2, planner_value_std_coef_train=0.5)
TWO |= dict(policy_value_std_coef=-0.25)
OWN = {bmpc: {}, bmpc_multihead: ONE, bmpc_dual_policy: TWO}
each = pytest.mark.parametrize("script", OWN, ids=lambda script: script.__name__)


def begun(script, **flags):
    """A run after 10 random decisions of each environment, its planner, and its policies, the optimistic one last."""
    args, envs = small_args(script, **OWN[script] | flags), FakeEnvs([5, 7])
    planner = FakePlanner(script)
    run = start(args, envs, script.Functions(plan=planner), script)
    for _ in range(10):
        acted = *script.random_action(args, TASK.action_dim, run.make_generator("act")), run.prev_mean
        envs.step_async(acted[0].numpy())
        script.store_step(run, envs, *acted)
    return run, planner, [run.model.policy] + ([run.model.optimistic_policy] if script is bmpc_dual_policy else [])


def part(answer, name):
    return answer.mean[:, 0] if name == "mean" else getattr(answer, name)


# --- who plans


COLLECTION = [  # use_chosen_action, chosen_action_noise, from_behavior, the expert's mean
    (True, True, True, "action"),  # the executed one
    (True, False, True, "elite_action"),  # the drawn one
    (False, True, True, "mean"),
    (True, True, False, "elite_action"),  # of the separate plan: it has no noise
    (False, True, False, "mean"),
]


@each
@pytest.mark.parametrize("chosen, noise, behavior, mean", COLLECTION)
def test_who_plans_to_act_and_whose_expert_is_stored(script, chosen, noise, behavior, mean):
    """With two policies the optimistic one acts; the pessimistic one's expert is a plan of its own.

    No policy's average proposes, and no plan but the acting one has a previous one.
    """
    flags = dict(reanalyze_use_chosen_action=chosen, chosen_action_noise=noise, initial_expert_from_behavior=behavior)
    run, planner, (*pessimistic, acts) = begun(script, td_target_use_ema_policy=True, **flags)
    two, given, plans = len(pessimistic), torch.rand(run.prev_mean.shape, generator=generator()), 1 if behavior else 2
    stored = stack_expert(run.buffer.split_rows(run.buffer.rows).expert)[:10]
    assert (stored.mean((0, 1, 3)) == torch.tensor([0, 1] * (1 + two))).all()
    action, expert, after, told = script.act(planner, run.model, run.obs, given, run.args, run.make_generator)
    assert planner.policies == [acts] * plans + pessimistic
    assert planner.coefs == ([0.5] * plans + [-0.25] * two) * (script is not bmpc)
    assert same(planner.previous, [given] + [0 * given] * (plans - 1 + two))
    acting, first, own = (planner.answers[k] for k in (0, plans - 1, -1))
    experts = [part(own, "elite_action" if chosen else "mean"), own.std] * two + [part(first, mean), first.std]
    assert same([action, after, stack_expert(expert)], [acting.action, acting.mean, torch.stack(experts, 1)])
    of_heads = ["return_disagreement", "bonus_share", "proposal_share"] * (script is not bmpc)
    names = ["elite_std", "value", *["pessimistic_proposal_share"] * two, *of_heads]
    assert list(told) == [f"planner/{name}" for name in names]


@each
def test_the_pessimistic_policy_evaluates_with_a_coefficient_of_its_own_alone_by_its_squashed_mean(script):
    own = {} if script is bmpc else dict(planner_value_std_coef_eval=3.0)
    run, planner, policies = begun(script, **own)
    model, envs = run.model, FakeEnvs([5, 7])
    obs = torch.from_numpy(
        envs.start_episodes(np.ones(2, bool), [("eval", 0), ("eval", 1)], np.zeros((2, 4), np.float32))
    )
    script.run_episodes(run, envs, False, [])
    assert not planner.answers
    torch.testing.assert_close(torch.from_numpy(envs.sent[0]), torch.tanh(model.policy(model.encoder(obs)))[:, :2])
    script.run_episodes(run, envs, True, [])
    assert set(planner.policies) == {policies[0]} and set(planner.coefs) == set(own.values())


SOURCES = [
    ({}, "elite_action"),
    (dict(chosen_action_noise=False), "elite_action"),
    (dict(reanalyze_use_chosen_action=False), "mean"),
]


@each
@pytest.mark.parametrize("source, mean", SOURCES)
def test_reanalyze_rewrites_exactly_the_experts_of_the_sampled_rows_each_by_a_plan_of_its_own(script, source, mean):
    """Of windows 0 to 2; of a row that occurs twice one plan remains, in the batch and in the buffer.

    There is no previous plan; horizon and range of the policy's log std are reanalyze's.
    """
    limits = dict(reanalyze_log_std_min=-2.0, reanalyze_log_std_max=0.5, reanalyze_horizon=2)
    run, planner, policies = begun(script, **limits | source)
    batch, rows = run.buffer.sample(np.array([0.1, 0.3, 0.15, 0.45, 0.9])), run.buffer.rows.flatten(0, 1)
    given, wanted, place = stack_expert(batch.expert), rows.clone(), batch.index[:, :3].flatten().tolist()
    assert len(set(place)) == 4  # windows 0 and 2 are the same, 1 begins a step later, 3 another one later
    script.reanalyze(planner, run.model, run.buffer, batch, run.args, named())
    assert planner.policies == policies
    assert planner.coefs == {bmpc: [], bmpc_multihead: [2.0], bmpc_dual_policy: [-0.25, 0.5]}[script]
    assert {(a.log_std_min, a.log_std_max) for a in planner.args} == {(-2.0, 0.5)}
    assert same(planner.previous, [torch.zeros(9, 2, 2)] * len(policies))
    found = stack_expert(run.buffer.split_rows(rows).expert)
    assert same(planner.obs, [run.buffer.split_rows(wanted).obs[place]] * len(policies))  # true observations
    for row in place:
        k = int(found[row, 0, 0])
        assert place[k] == row
        new = [torch.cat([part(plan, name)[k] for plan in planner.answers]) for name in (mean, "std")]
        for stored, x in zip(run.buffer.split_rows(wanted).expert, new):
            stored[row] = x
    assert torch.equal(rows, wanted)
    assert torch.equal(stack_expert(batch.expert), torch.cat([found[batch.index[:, :3]], given[:, 3:]], 1))


@pytest.mark.parametrize("coef", [[], [0.0], [1.0], [-1.0]], ids=str)
def test_scores_are_finite_and_lowest_where_a_return_is_not(coef):
    rewards, values = torch.zeros(2, 1, 4), torch.zeros(3, 2, 1, 4)
    values[0, 1, 0, 1], values[2, 0, 0, 2], values[1, :, 0, 3] = math.nan, math.inf, -math.inf
    scores = (bmpc_multihead if coef else bmpc).candidate_scores(rewards, values, *coef)
    scores = torch.cat(scores) if coef else scores
    assert scores[0].tolist() == [0.0, -1e9, -1e9, -1e9] and scores.isfinite().all()  # and the spread over heads


# --- what is shared stays


@pytest.mark.parametrize("heads, td_horizon, extra", [(1, 3, False), (2, 1, False), (2, 3, True)])
def test_extra_draws_come_where_they_are_needed_and_leave_the_shared_ones(heads, td_horizon, extra):
    args = small_args(bmpc_multihead, planner_num_dynamics_heads=heads, td_horizon=td_horizon)
    mine = bmpc_multihead.sample_update_noise(args, 2, named(9))
    theirs = bmpc.sample_update_noise(small_args(td_horizon=td_horizon), 2, named(9))
    mine_of_base = mine._replace(td=mine.td[0])
    assert all(torch.equal(x, y) for x, y in zip(mine_of_base, theirs, strict=True))
    assert len(mine.td) == (heads if extra else 1) and (not extra or not torch.equal(mine.td[0], mine.td[1]))


@each
def test_no_numbers_are_drawn_twice(tmp_path, monkeypatch, script):
    """A generator asked for twice at one place would give the same ones: every purpose has a name of its own."""
    own, asked, generator = OWN[script], [], script.Run.make_generator

    def listen(run, name):
        asked.append((name, run.global_step, run.pretraining_updates, run.updates))
        return generator(run, name)

    monkeypatch.setattr(script.Run, "make_generator", listen)
    whole(script, tmp_path, initial_expert_from_behavior=False, td_horizon=2, reanalyze_interval=2, **own)
    wanted = {"act", "expert", "update", "reanalyze"} | ({"heads"} if own else set())
    assert {name for name, *_ in asked} == wanted | ({"own expert", "optimistic"} if own is TWO else set())
    assert len(set(asked)) == len(asked)


def test_heads_and_policies_begin_different_and_disturb_no_shared_number():
    of = lambda **flags: bmpc_dual_policy.WorldModel(TASK, small_args(bmpc_dual_policy, **flags), generator())
    both, one = of(**TWO), of(planner_num_dynamics_heads=2)
    state = both.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in one.state_dict().items() if name != "kl_scale")
    first, second = (network.layers[-1].weight for network in (both.policy, both.optimistic_policy))
    assert first.shape == second.shape and (first != second).all()
    assert all(not torch.equal(*layer.weight) for layer in both.dynamics.layers)


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
    with pytest.raises(script.UsageError, match=flags.replace("=", " ").split()[0]):
        script.resolve_args(script.parse_args(["--task", "Pendulum-v1", *flags.split()]))


def test_heads_and_policies_shape_the_run():
    for name in ("planner_num_dynamics_heads", "dual_policy_enabled"):
        assert bmpc_dual_policy.RESUMABLE not in bmpc_dual_policy.field_metadata()[name]
