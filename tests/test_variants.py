"""Acting, evaluation, reanalyze and arguments of all three scripts, with several dynamics heads or two policies.

test_learning.py and test_planner.py compare their losses, updates and plans with the oracle.
"""

import math

import numpy as np
import pytest
import torch
from conftest import (
    TASK,
    FakeEnvs,
    FakePlanner,
    generator,
    generator_factory,
    record_generators,
    same,
    small_args,
    stack_expert,
    start,
)
from test_siblings import run_with_evaluations

import bmpc
import bmpc_dual_policy
import bmpc_multihead

MULTIHEAD = dict(planner_num_dynamics_heads=2, planner_value_std_coef_train=0.5, reanalyze_value_std_coef=2.0)
DUAL = dict(dual_policy_enabled=True, planner_num_dynamics_heads=2, planner_value_std_coef_train=0.5)
DUAL |= dict(policy_value_std_coef=-0.25)
VARIANT_FLAGS = {bmpc: {}, bmpc_multihead: MULTIHEAD, bmpc_dual_policy: DUAL}
each_script = pytest.mark.parametrize("script", VARIANT_FLAGS, ids=lambda script: script.__name__)


def start_variant(script, **flags):
    """Make a run and take 10 random decisions in each environment.

    Returns the run, its planner and its policies: the pessimistic and the optimistic one, or the only one.
    """
    args = small_args(script, **VARIANT_FLAGS[script] | flags)
    envs = FakeEnvs([5, 7])
    planner = FakePlanner(script)
    run = start(args, envs, script.Functions(plan=planner), script)
    for _ in range(10):
        action, expert = script.random_action(args, TASK.action_dim, run.make_generator("act"))
        envs.step_async(action.numpy())
        script.store_step(run, envs, action, expert, run.prev_mean)
    policies = [run.model.policy]
    if script is bmpc_dual_policy:
        policies.append(run.model.optimistic_policy)
    return run, planner, policies


def first_action(planned, field):
    """Return an action of a plan, where the field "mean" stands for the first step of the mean."""
    return planned.mean[:, 0] if field == "mean" else getattr(planned, field)


# --- plans and experts


ACTING = [  # use_chosen_action, chosen_action_noise, from_behavior, field that is the mean of the expert
    (True, True, True, "action"),
    (True, False, True, "elite_action"),
    (False, True, True, "mean"),
    (True, True, False, "elite_action"),  # of the separate plan, which has no exploration noise
    (False, True, False, "mean"),
]


@each_script
@pytest.mark.parametrize("chosen, noise, behavior, field", ACTING)
def test_plans_and_experts_when_acting(script, chosen, noise, behavior, field):
    """With two policies, the optimistic one acts, and the expert of the pessimistic one is planned separately.

    EMA policies propose no candidates. Only the acting plan starts from the previous one.
    """
    flags = dict(reanalyze_use_chosen_action=chosen, chosen_action_noise=noise, initial_expert_from_behavior=behavior)
    run, planner, policies = start_variant(script, td_target_use_ema_policy=True, **flags)
    acting_policy = policies[-1]
    dual = len(policies) == 2
    warm_up_experts = stack_expert(run.buffer.split_rows(run.buffer.rows).expert)[:10]
    assert (warm_up_experts.mean((0, 1, 3)) == torch.tensor([0, 1] * len(policies))).all()  # mean 0, std 1

    prev_mean = torch.rand(run.prev_mean.shape, generator=generator())
    action, expert, mean, metrics = script.act(planner, run.model, run.obs, prev_mean, run.args, run.make_generator)
    acting_plans = 1 if behavior else 2  # the second is the separate plan for the expert
    expected_policies = [acting_policy] * acting_plans
    expected_coefs = [0.5] * acting_plans
    if dual:
        expected_policies.append(policies[0])
        expected_coefs.append(-0.25)
    assert planner.policies == expected_policies
    assert planner.std_coefs == ([] if script is bmpc else expected_coefs)
    no_mean = torch.zeros_like(prev_mean)
    assert same(planner.prev_means, [prev_mean] + [no_mean] * (len(expected_policies) - 1))

    acting, expert_plan = planner.plans[0], planner.plans[acting_plans - 1]
    experts = [first_action(expert_plan, field), expert_plan.std]
    if dual:
        pessimistic = planner.plans[-1]
        experts = [first_action(pessimistic, "elite_action" if chosen else "mean"), pessimistic.std, *experts]
    assert same([action, mean, stack_expert(expert)], [acting.action, acting.mean, torch.stack(experts, 1)])

    names = ["plan_std", "value"]
    if dual:
        names.append("pessimistic_proposal_share")
    if script is not bmpc:
        names += ["return_disagreement", "bonus_share", "proposal_share"]
    assert list(metrics) == [f"planner/{name}" for name in names]


@each_script
def test_evaluation_uses_the_pessimistic_policy_and_its_own_coefficient(script):
    """Without the planner, actions are the squashed mean of the policy."""
    flags = {} if script is bmpc else dict(planner_value_std_coef_eval=3.0)
    run, planner, policies = start_variant(script, **flags)
    model = run.model
    envs = FakeEnvs([5, 7])
    no_obs = np.zeros((2, 4), np.float32)
    obs = torch.from_numpy(envs.start_episodes(np.ones(2, bool), [("eval", 0), ("eval", 1)], no_obs))
    script.run_episodes(run, envs, use_planner=False, stop_signals=[])
    assert not planner.plans
    torch.testing.assert_close(torch.from_numpy(envs.sent[0]), torch.tanh(model.policy(model.encoder(obs)))[:, :2])
    script.run_episodes(run, envs, use_planner=True, stop_signals=[])
    assert set(planner.policies) == {policies[0]} and set(planner.std_coefs) == set(flags.values())


REANALYZE = [  # flags, field that is the mean of the expert
    ({}, "elite_action"),
    (dict(chosen_action_noise=False), "elite_action"),
    (dict(reanalyze_use_chosen_action=False), "mean"),
]


@each_script
@pytest.mark.parametrize("flags, field", REANALYZE)
def test_reanalyze_replaces_the_experts_of_the_sampled_rows(script, flags, field):
    """Only windows 0 to 2 are reanalyzed. A row that occurs twice gets one of its plans, in both batch and buffer.

    Plans start from zeros, and have the horizon and the range of the policy's log std that are set for reanalyze.
    """
    flags = flags | dict(reanalyze_log_std_min=-2.0, reanalyze_log_std_max=0.5, reanalyze_horizon=2)
    run, planner, policies = start_variant(script, **flags)
    batch = run.buffer.sample(np.array([0.1, 0.3, 0.15, 0.45, 0.9]))
    old_experts = stack_expert(batch.expert)
    rows = run.buffer.rows.flatten(0, 1)
    expected_rows = rows.clone()
    index = batch.index[:, :3].flatten().tolist()
    assert len(set(index)) == 4  # windows 0 and 2 are equal, window 1 starts a step later, window 3 another one
    script.reanalyze(planner, run.model, run.buffer, batch, run.args, generator_factory())

    # Arguments of the planner
    assert planner.policies == policies
    assert planner.std_coefs == {bmpc: [], bmpc_multihead: [2.0], bmpc_dual_policy: [-0.25, 0.5]}[script]
    assert {(args.log_std_min, args.log_std_max) for args in planner.args} == {(-2.0, 0.5)}
    assert same(planner.prev_means, [torch.zeros(9, 2, 2)] * len(policies))
    assert same(planner.obs, [run.buffer.split_rows(expected_rows).obs[index]] * len(policies))

    # New experts
    new_experts = stack_expert(run.buffer.split_rows(rows).expert)
    for row in index:
        k = int(new_experts[row, 0, 0])  # FakePlanner numbers the states
        assert index[k] == row
        for stored, name in zip(run.buffer.split_rows(expected_rows).expert, (field, "std")):
            stored[row] = torch.cat([first_action(planned, name)[k] for planned in planner.plans])
    assert torch.equal(rows, expected_rows)
    expected = torch.cat([new_experts[batch.index[:, :3]], old_experts[:, 3:]], 1)
    assert torch.equal(stack_expert(batch.expert), expected)


@pytest.mark.parametrize("std_coef", [[], [0.0], [1.0], [-1.0]], ids=str)
def test_scores_of_returns_that_are_not_finite(std_coef):
    """The scores are finite, and so is their std over heads."""
    rewards = torch.zeros(2, 1, 4)
    values = torch.zeros(3, 2, 1, 4)
    values[0, 1, 0, 1] = math.nan
    values[2, 0, 0, 2] = math.inf
    values[1, :, 0, 3] = -math.inf
    scores = (bmpc_multihead if std_coef else bmpc).candidate_scores(rewards, values, *std_coef)
    scores = torch.cat(scores) if std_coef else scores  # of scores and their std
    assert scores[0].tolist() == [0.0, -1e9, -1e9, -1e9] and scores.isfinite().all()


# --- random numbers and initial weights


@pytest.mark.parametrize("heads, td_horizon, extra", [(1, 3, False), (2, 1, False), (2, 3, True)])
def test_additional_heads_do_not_change_the_shared_noise(heads, td_horizon, extra):
    """`extra`: each dynamics head has its own noise after the first step."""
    args = small_args(bmpc_multihead, planner_num_dynamics_heads=heads, td_horizon=td_horizon)
    noise = bmpc_multihead.sample_update_noise(args, 2, generator_factory(9))
    base_noise = bmpc.sample_update_noise(small_args(td_horizon=td_horizon), 2, generator_factory(9))
    shared = noise._replace(td=noise.td[0])
    assert all(torch.equal(x, y) for x, y in zip(shared, base_noise, strict=True))
    assert len(noise.td) == (heads if extra else 1)
    assert not extra or not torch.equal(noise.td[0], noise.td[1])


@each_script
def test_each_generator_is_used_once(tmp_path, monkeypatch, script):
    """Generators with the same purpose, made at the same step and update, would repeat the same random numbers."""
    keys = record_generators(script, monkeypatch)
    flags = dict(initial_expert_from_behavior=False, td_horizon=2, reanalyze_interval=2) | VARIANT_FLAGS[script]
    run_with_evaluations(script, tmp_path, **flags)
    purposes = {"act", "expert", "update", "reanalyze"}
    if script is not bmpc:
        purposes |= {"heads"}
    if script is bmpc_dual_policy:
        purposes |= {"own expert", "optimistic"}
    assert {purpose for purpose, *_ in keys} == purposes
    assert len(set(keys)) == len(keys)


def test_initial_weights_of_heads_and_policies():
    """They differ from each other. A second policy does not change any other weight."""
    make = lambda **flags: bmpc_dual_policy.WorldModel(TASK, small_args(bmpc_dual_policy, **flags), generator())
    dual = make(**DUAL)
    single = make(planner_num_dynamics_heads=2)
    state = dual.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in single.state_dict().items() if name != "kl_scale")
    pessimistic, optimistic = (policy.layers[-1].weight for policy in (dual.policy, dual.optimistic_policy))
    assert pessimistic.shape == optimistic.shape and (pessimistic != optimistic).all()
    assert all(not torch.equal(*layer.weight) for layer in dual.dynamics.layers)


# --- arguments

INVALID = {
    "--planner-num-dynamics-heads 0": bmpc_multihead,
    "--planner-value-std-coef-train nan": bmpc_multihead,
    "--planner-value-std-coef-eval inf": bmpc_multihead,
    "--reanalyze-value-std-coef=-inf": bmpc_multihead,
    "--reanalyze-value-std-coef 1 --dual-policy-enabled": bmpc_dual_policy,
    "--policy-value-std-coef nan --dual-policy-enabled": bmpc_dual_policy,
    "--policy-value-std-coef 1": bmpc_dual_policy,
}


@pytest.mark.parametrize("flags", INVALID)
def test_invalid_flags_are_rejected(flags):
    script = INVALID[flags]
    with pytest.raises(script.UsageError, match=flags.replace("=", " ").split()[0]):
        script.resolve_args(script.parse_args(["--task", "Pendulum-v1", *flags.split()]))
