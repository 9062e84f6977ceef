"""What each ablation flag means, and that it means nothing at its default."""

import dataclasses
import math

import pytest
import torch
from conftest import FakeEnvs, FakePlanner, generator, make_model, run_loop, same, small_args, start, stored, train
from runs import numbers

import bmpc

# --- 2a: utd_ratio


@pytest.mark.parametrize("ratio, num_envs", [(1.0, 1), (0.5, 1), (0.5, 4), (4.0, 4)])
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


# --- 2c: the expert's source


COLLECTION = [  # use_chosen_action, chosen_action_noise, from_behavior, the expert's mean
    (True, True, True, "action"),  # the executed one
    (True, False, True, "elite"),  # the drawn one
    (False, True, True, "mean"),
    (True, True, False, "elite"),  # of the separate plan: it has no noise
    (False, True, False, "mean"),
]


def first_actions(answers, part):
    return torch.stack([x.mean[:, 0] if part == "mean" else getattr(x, part) for x in answers])


@pytest.mark.parametrize("chosen, noise, behavior, part", COLLECTION)
def test_the_expert_stored_at_collection(tmp_path, chosen, noise, behavior, part):
    args = small_args(
        reanalyze_use_chosen_action=chosen, chosen_action_noise=noise, initial_expert_from_behavior=behavior,
        reanalyze_interval=0, utd_ratio=0.001,
    )  # fmt: skip
    planner, plans = FakePlanner(), 1 if behavior else 2
    buffer = run_loop(args, FakeEnvs([50, 50]), tmp_path, bmpc.Functions(plan=planner)).buffer
    acting, source = planner.answers[::plans], planner.answers[plans - 1 :: plans]
    expert, action = stored(buffer).expert, stored(buffer).action  # (step, E, ...)
    assert (expert[:6, :, 0] == 0).all() and (expert[:6, :, 1] == 1).all()  # warm-up: N(0, 1)
    assert torch.equal(action[6:20], first_actions(acting, "action"))  # what was executed, whatever the expert
    assert torch.equal(expert[6:20], torch.stack([first_actions(source, part), first_actions(source, "std")], 2))


def test_a_separate_first_plan_is_unwarmed_noiseless_from_its_own_generator_and_leaves_the_acting_one_alone():
    """And the policy proposes, not its average."""
    args = small_args(initial_expert_from_behavior=False, td_target_use_ema_policy=True)
    run, without = (start(x, FakeEnvs([5, 7])) for x in (args, small_args(td_target_use_ema_policy=True)))
    model, mean = make_model(args), torch.rand(2, 3, 2, generator=generator(1))
    (action, expert, after), _ = bmpc.act(bmpc.plan, model, run.obs, mean, args, run.generator)
    (*acted, other, after_without), _ = bmpc.act(bmpc.plan, model, run.obs, mean, without.args, without.generator)
    assert same([action, after], [*acted, after_without]) and not torch.equal(expert, other)
    noise = bmpc.draw_plan(args, 2, 2, 3, run.generator("expert"))
    expected = bmpc.plan(model, model.policy, run.obs, torch.zeros(2, 3, 2), noise, args)
    torch.testing.assert_close(expert, torch.stack([expected.elite, expected.std], 1))


# --- 2g: the EMA policy


def test_the_ema_policy_exists_only_where_it_is_needed():
    uses = (dict(td_target_use_ema_policy=True), dict(policy_trust_region_coef=0.1))
    for changes, there in (({}, False), *((use, True) for use in uses)):
        assert (make_model(small_args(**changes)).ema_policy is not None) == there


# --- at the defaults


DIAGNOSTICS = {  # logged only where its flag is on
    "losses/encoder_consistency": dict(encoder_consistency_coef=0.1),
    "losses/trust_region": dict(policy_trust_region_coef=0.1),
    "losses/td_target_std_over_rollouts": dict(num_rollouts=2),
}


def ended(directory, args):
    """The end of a run's model and experts, and the tags it logged."""
    state = run_loop(args, FakeEnvs([5, 7]), directory).state_dict()
    tags = {tag for _, _, tag, _ in numbers(directory)}
    return [{k: x for k, x in state["model"].items() if "ema" not in k}, state["buffer"]], tags


def test_a_flag_at_its_default_leaves_every_bit_and_away_from_it_changes_the_run(tmp_path):
    """Also the EMA policy that nobody looks at, and a step of it that nobody takes: no draw, no bit is another."""
    args = small_args(log_freq=8, total_timesteps=16, reanalyze_interval=2)
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
