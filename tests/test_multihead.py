"""bmpc_multihead.py: what the dynamics heads, their disagreement and the value heads' own targets mean."""

import copy
import dataclasses
import math
import statistics

import pytest
import torch
from test_siblings import ACTION, FLAGS, FakeEnvs, load, small_args, small_run, small_training

m = load("bmpc_multihead.py")
NORMAL = dict(generator=torch.Generator().manual_seed(0))

EVERYTHING = dict(
    planner_num_dynamics_heads=2, planner_value_std_coef_train=0.7, planner_value_std_coef_eval=-0.4,
    local_td_bootstrap=True, ensemble_lr_scaling=True,
)  # fmt: skip


def normal(*shape):
    return torch.randn(*shape, **NORMAL)


def model_of(heads: int, module=m, **flags):
    """A model whose heads all differ in every layer, and its arguments."""
    args = small_args(module, planner_num_dynamics_heads=heads, **flags)
    model = module.WorldModel(module.TaskInfo(5, ACTION, 15), args, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model, args


def head_alone(network, h: int):
    """Head h of a stack, as a stack of one."""
    alone = copy.deepcopy(network)
    for p in alone.parameters():
        p.data = p.data[h : h + 1].clone()
    return alone


def latents(model, *shape):
    with torch.no_grad():
        return model.encoder(normal(*shape, 5))


def batch_of(args, T=3):
    B = args.batch_size
    expert = torch.stack([normal(T, B, ACTION).tanh(), normal(T, B, ACTION).exp()], 2)
    ended = torch.zeros(T, B)
    return m.Batch(
        normal(T + 1, B, 5), normal(T, B, ACTION).tanh(), normal(T, B), ended, expert, torch.zeros(T, B).long()
    )


def update_draws(args, seed=3):
    generator, variant = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    return m.draw_update(args, ACTION, generator, variant)


# --- scores


@pytest.mark.parametrize("coef", [0.0, 0.8, -1.5])
def test_a_score_is_the_mean_plus_the_coefficient_times_the_population_std(coef):
    """Against loops over candidates, dynamics heads, value heads and steps, each head alone."""
    model, args = model_of(3)
    z, actions = latents(model, 2), normal(2, 4, 3, ACTION).tanh()
    with torch.no_grad():
        scores, spread = m.score(*m.estimate_return(model, z, actions, args), coef)
    dynamics = [head_alone(model.dynamics, h) for h in range(3)]
    values = [head_alone(model.value, q) for q in range(args.num_q)]
    for s in range(2):
        for n in range(4):
            rewards, estimates = [], []
            for head in dynamics:
                x, total = z[s : s + 1], 0.0
                for t in range(3):
                    a = actions[s, n, t][None]
                    total += args.discount**t * m.two_hot_inv(model.reward(x, a), args).item()
                    x = head(x, a)
                rewards.append(total)
                estimates += [total + args.discount**3 * m.two_hot_inv(value(x), args).item() for value in values]
            assert len(estimates) == 3 * args.num_q
            assert spread[s, n].item() == pytest.approx(statistics.pstdev(estimates), rel=1e-4)
            assert scores[s, n].item() == pytest.approx(
                statistics.mean(estimates) + coef * statistics.pstdev(estimates), rel=1e-4, abs=1e-4
            )
            assert statistics.pstdev(rewards) > 1e-4, "the heads must disagree for this to be a test"


@pytest.mark.parametrize("coef", [0.0, 0.8, -1.5])
def test_two_equal_heads_plan_as_one(coef):
    one, args = model_of(1)
    two, args2 = model_of(2)
    state = one.state_dict()
    two.load_state_dict({k: v.expand_as(two.state_dict()[k]) for k, v in state.items()})
    z, mean = latents(one, 3), torch.zeros(3, 3, ACTION)
    draws = m.draw_plan(args, 3, ACTION, 3, torch.Generator().manual_seed(5))
    plans = [m.plan(model, model.policy, z, mean, draws, args, coef) for model in (one, two)]
    for name, a, b in zip(m.Plan._fields, *plans, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda x, name=name: f"{name}: {x}")


def test_disagreement_is_sought_above_0_and_avoided_below(monkeypatch):
    """All candidates have the same mean return; the heads disagree by the size of their first action."""
    model, args = model_of(2, iterations=1)

    def estimates(model, z, actions, args):
        size = actions[:, :, 0].norm(dim=-1)  # (S, N)
        return torch.stack([size, -size]), torch.zeros(args.num_q, 2, *size.shape)

    monkeypatch.setattr(m, "estimate_return", estimates)
    z, mean = latents(model, 4), torch.zeros(4, 3, ACTION)
    draws = m.draw_plan(args, 4, ACTION, 3, torch.Generator().manual_seed(5))
    plans = {coef: m.plan(model, model.policy, z, mean, draws, args, coef) for coef in (-1.0, 0.0, 1.0)}
    proposals = m.propose(model, model.policy, z, draws.proposals, args)
    samples = (2.0 * draws.samples[:, 0]).clamp(-1, 1)
    size = torch.cat([proposals, samples], 1)[:, :, 0].norm(dim=-1)  # (S, N)
    torch.testing.assert_close(plans[1.0].best.norm(dim=-1), size.amax(1))
    torch.testing.assert_close(plans[-1.0].best.norm(dim=-1), size.amin(1))
    assert (plans[1.0].spread > plans[0.0].spread).all() and (plans[0.0].spread > plans[-1.0].spread).all()
    assert (plans[0.0].bonus == 0).all() and torch.allclose(plans[1.0].bonus, torch.ones(4))  # the mean is 0


def test_scores_stay_finite():
    rewards, values = torch.zeros(2, 1, 3), torch.zeros(3, 2, 1, 3)
    values[0, 1, 0, 1], values[2, 0, 0, 2] = math.nan, math.inf
    for coef in (0.0, 1.0, -1.0):
        scores, spread = m.score(rewards, values, coef)
        assert scores.tolist() == [[0.0, -1e9, -1e9]] and torch.isfinite(spread).all()


# --- which coefficient


class Spy:
    """Stands for `plan` and keeps what it was asked."""

    def __init__(self, module):
        self.module, self.coefs, self.policies, self.plans, self.draws = module, [], [], [], []

    def __call__(self, model, policy, z, mean, draws, args, std_coef):
        self.coefs.append(std_coef)
        self.policies.append(policy)
        self.draws.append(draws)
        self.plans.append(self.module.plan(model, policy, z, mean, draws, args, std_coef))
        return self.plans[-1]


def filled_buffer(run):
    """Some steps of FakeEnvs in the buffer, with random actions."""
    envs, module = FakeEnvs(run.args.num_envs), load(type(run.model).__module__)
    module.enter_episodes(run, envs)
    for _ in range(12):
        acted = *module.act_randomly(run.args, ACTION, run.draws["collect"]), run.mean
        envs.step_async(acted[0].numpy())
        module.store(run, envs, *acted)
    return run.buffer


def returns_of(run, planning=True):
    return load(type(run.model).__module__).play(run, FakeEnvs(2), planning, [], []).tolist()


def nudge(network, size=0.3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in network.parameters():
            x.add_(size * torch.randn(x.shape, generator=generator))


COEFS = dict(planner_value_std_coef_train=0.5, planner_value_std_coef_eval=-0.25, reanalyze_value_std_coef=2.0)


def test_acting_evaluation_and_reanalyze_have_their_own_coefficients():
    for initial in (True, False):
        run = small_training(m, planner_num_dynamics_heads=2, initial_expert_from_behavior=initial, **COEFS)
        buffer, spy = filled_buffer(run), Spy(m)
        m.act(spy, run.model, run.obs, run.mean, run.args, run.draws)
        assert spy.coefs == ([0.5] if initial else [0.5, 0.5])
        spy.coefs.clear()
        m.reanalyze(spy, run.model, buffer, buffer.sample(update_draws(run.args).window), run.args, run.draws["learn"])
        assert set(spy.coefs) == {2.0}
        spy.coefs.clear()
        run.functions = run.functions._replace(plan=spy)
        returns_of(run)
        assert set(spy.coefs) == {-0.25}


def test_evaluation_knows_nothing_of_the_training_coefficient():
    returns = {}
    for train, evaluation in ((0.0, 0.0), (5.0, 0.0), (0.0, 5.0)):
        coefs = dict(planner_value_std_coef_train=train, planner_value_std_coef_eval=evaluation)
        run = small_training(m, planner_num_dynamics_heads=2, **coefs)
        nudge(run.model)
        returns[train, evaluation] = returns_of(run)
    assert returns[0.0, 0.0] == returns[5.0, 0.0] != returns[0.0, 5.0]


# --- value targets


def test_local_bootstrap_gives_each_value_head_its_own_target_and_global_the_same():
    model, args = model_of(2)
    local = small_args(m, planner_num_dynamics_heads=2, local_td_bootstrap=True)
    z, eps = latents(model, 3, args.batch_size), normal(1, 2, 1, 3, args.batch_size, ACTION)
    shared, own = (m.td_target(model, model.policy, z, eps, a) for a in (args, local))
    assert shared.shape == (1, 2, 3, args.batch_size) and own.shape == (args.num_q, 2, 3, args.batch_size)
    torch.testing.assert_close(own.mean(0, keepdim=True), shared)
    heads, values = [
        [head_alone(x, i) for i in range(n)] for x, n in ((model.dynamics, 2), (model.target_value, args.num_q))
    ]
    with torch.no_grad():
        mean, std = m.policy_gaussian(model.policy, z, args)
        for r in range(2):
            a = (mean + std * eps[0, r, 0]).clamp(-1, 1)  # one action, shared by the heads
            reward = m.two_hot_inv(model.reward(z, a), args)
            for q in range(args.num_q):
                y = sum(reward + args.discount * m.two_hot_inv(values[q](head(z, a)), args) for head in heads) / 2
                torch.testing.assert_close(own[q, r], y)
    assert (own[0] - own[1]).abs().max() > 1e-3


@pytest.mark.parametrize("local", [False, True])
def test_the_value_loss_meets_each_head_with_its_target(local):
    model, args = model_of(2, local_td_bootstrap=local, dropout=0.0, normalize_rho_weights=False)
    batch, draws = batch_of(args), update_draws(args)
    _, rollout, metrics = m.world_model_loss(model, batch, draws, args)
    with torch.no_grad():
        y = m.td_target(model, model.policy, model.encoder(batch.obs)[:3], draws.td, args)
        loss = torch.zeros(3)
        for q in range(args.num_q):
            logits = head_alone(model.value, q)(rollout)
            target = m.two_hot(y[q if local else 0, 0], args)
            loss += m.soft_cross_entropy(logits, target).mean(1) / args.num_q
    torch.testing.assert_close(metrics["losses/value"], (m.rho_weights(args, loss) * loss).sum())


def test_beyond_the_first_step_each_head_draws_its_own_action():
    model, args = model_of(2, td_horizon=2, num_rollouts=2)
    eps, z = update_draws(args).td, latents(model, 3, args.batch_size)
    assert eps.shape == (2, 2, 2, 3, args.batch_size, ACTION) and not torch.equal(eps[0], eps[1])
    y = m.td_target(model, model.policy, z, eps, args)
    gamma, expected = args.discount, 0.0
    with torch.no_grad():
        gaussian = lambda x: m.policy_gaussian(model.policy, x, args)
        for h in range(2):
            head, (mean, std) = head_alone(model.dynamics, h), gaussian(z)
            a = (mean + std * eps[0, :, 0]).clamp(-1, 1)  # (R, T, B, A)
            total, x = m.two_hot_inv(model.reward(z, a), args), head(z, a)
            mean, std = gaussian(x)
            a = (mean + std * eps[h, :, 1]).clamp(-1, 1)
            total, x = total + gamma * m.two_hot_inv(model.reward(x, a), args), head(x, a)
            values = sum(m.two_hot_inv(head_alone(model.target_value, q)(x), args) for q in range(args.num_q))
            expected = expected + (total + gamma**2 * values / args.num_q) / 2
    torch.testing.assert_close(y[0], expected)


@pytest.mark.parametrize("heads, td_horizon, extra", [(1, 1, False), (1, 3, False), (2, 1, False), (2, 3, True)])
def test_extra_draws_come_from_the_variants_generator_where_they_are_needed(heads, td_horizon, extra):
    base = load("bmpc.py")
    args = small_args(m, planner_num_dynamics_heads=heads, td_horizon=td_horizon)
    learn, learn_of_base, variant = (torch.Generator().manual_seed(9) for _ in range(3))
    mine = m.draw_update(args, ACTION, learn, variant)
    theirs = base.draw_update(small_args(base, td_horizon=td_horizon), ACTION, learn_of_base)
    assert (
        torch.equal(mine.td[0], theirs.td)
        and torch.equal(mine.window, theirs.window)
        and torch.equal(mine.keep, theirs.keep)
    )
    assert torch.equal(learn.get_state(), learn_of_base.get_state())
    assert (not torch.equal(variant.get_state(), torch.Generator().manual_seed(9).get_state())) == extra


# --- training the heads


def gradients(model, args, batch, draws):
    loss, rollout, metrics = m.world_model_loss(model, batch, draws, args)
    params = list(model.dynamics.parameters())
    return dict(zip(range(len(params)), torch.autograd.grad(loss, params))), rollout, metrics


def test_a_heads_consistency_gradient_reaches_that_head_alone():
    """Another weight in head 1 changes the gradient of head 1, and no bit of head 0's; the rollout is head 0's."""
    model, args = model_of(2, reward_coef=0.0, value_coef=0.0)
    batch, draws = batch_of(args), update_draws(args)
    before, rollout, metrics = gradients(model, args, batch, draws)
    with torch.no_grad():
        for p in model.dynamics.parameters():
            p[1] += 0.1 * normal(*p.shape[1:])
    after, rollout2, metrics2 = gradients(model, args, batch, draws)
    for a, b in zip(before.values(), after.values(), strict=True):
        assert a[0].abs().max() > 0 and torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])
    assert torch.equal(rollout, rollout2)
    assert not torch.equal(metrics["losses/consistency"], metrics2["losses/consistency"])


def test_consistency_and_reward_losses_are_means_over_heads():
    model, args = model_of(3, normalize_rho_weights=False, encoder_consistency_coef=1.0)
    batch, draws = batch_of(args), update_draws(args)
    _, _, metrics = m.world_model_loss(model, batch, draws, args)
    consistency, reward = torch.zeros(3), torch.zeros(3)
    with torch.no_grad():
        true = model.encoder(batch.obs)
        for h in range(3):
            head, z = head_alone(model.dynamics, h), true[0]
            for t in range(3):
                logits = model.reward(z, batch.action[t])
                reward[t] += m.soft_cross_entropy(logits, m.two_hot(batch.reward[t], args)).mean() / 3
                z = head(z, batch.action[t])
                consistency[t] += (z - true[t + 1]).square().mean() / 3
        weigh = lambda x: (m.rho_weights(args, x) * x).sum()
    torch.testing.assert_close(metrics["losses/consistency"], weigh(consistency))
    torch.testing.assert_close(metrics["losses/encoder_consistency"], weigh(consistency))
    torch.testing.assert_close(metrics["losses/reward"], weigh(reward))


@pytest.mark.parametrize("scaled", [False, True])
def test_learning_rates_grow_with_the_ensembles_if_asked(scaled):
    model, args = model_of(2, num_q=3, ensemble_lr_scaling=scaled, enc_lr_scale=0.5, episodic=True)
    optimizer, _ = m.make_optimizers(model, args)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    H, Q = (2, 3 / 5) if scaled else (1, 1)
    expected = {"encoder": 0.5, "dynamics": H, "reward": 1, "value": Q, "termination": 1}
    for name, factor in expected.items():
        assert all(rates[id(p)] == pytest.approx(args.lr * factor) for p in getattr(model, name).parameters()), name
    assert len(rates) == sum(len(list(getattr(model, name).parameters())) for name in expected)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in params]
    m.descend(sum(p.sum() for p in params), optimizer, args)
    for p, old in zip(params, before, strict=True):  # Adam's first step is the learning rate itself
        torch.testing.assert_close((old - p).detach(), torch.full_like(p, rates[id(p)]), rtol=1e-3, atol=1e-6)


def test_heads_begin_different():
    run = small_training(m, planner_num_dynamics_heads=3)
    for layer in run.model.dynamics.layers:
        weight = layer.weight
        assert weight.shape[0] == 3 and not torch.equal(weight[0], weight[1]) and not torch.equal(weight[1], weight[2])


# --- metrics, arguments, whole runs


def test_disagreement_is_logged_where_there_are_heads_to_disagree(tmp_path):
    names = {
        "planner/return_disagreement",
        "planner/bonus_share",
        "planner/proposal_share",
        "losses/latent_disagreement",
    }
    _, rows = small_run(m, tmp_path / "one", planner_value_std_coef_train=1.0)
    assert not names & {tag for _, tag, _ in rows}
    _, rows = small_run(m, tmp_path / "two", planner_num_dynamics_heads=2, planner_value_std_coef_train=1.0)
    values = {name: [float(x) for _, tag, x in rows if tag == name] for name in names}
    assert all(values.values())
    assert min(values["planner/return_disagreement"]) > 0 and min(values["losses/latent_disagreement"]) > 0
    assert all(0 < x < 1 for x in values["planner/bonus_share"]) and all(
        0 <= x <= 0.5 for x in values["planner/proposal_share"]
    )


def test_equal_heads_do_not_disagree():
    model, args = model_of(2)
    with torch.no_grad():
        for p in model.dynamics.parameters():
            p[1] = p[0]
    _, _, metrics = m.world_model_loss(model, batch_of(args), update_draws(args), args)
    assert metrics["losses/latent_disagreement"] < 1e-7


def test_the_share_of_proposals_counts_the_elites(monkeypatch):
    """The policy always plays +1 and samples hardly do: a return that is the action makes every proposal an elite."""
    model, args = model_of(2)
    monkeypatch.setattr(
        m, "policy_gaussian", lambda policy, z, args: (torch.ones(*z.shape[:-1], ACTION), torch.zeros(1))
    )
    z, mean = latents(model, 2), torch.zeros(2, 3, ACTION)
    draws = m.draw_plan(args, 2, ACTION, 3, torch.Generator().manual_seed(5))
    for sign, share in ((1.0, args.num_pi_trajs / args.num_elites), (-1.0, 0.0)):
        estimates = lambda model, z, actions, args: (
            sign * actions.sum((2, 3))[None],
            torch.zeros(1, 1, *actions.shape[:2]),
        )
        monkeypatch.setattr(m, "estimate_return", estimates)
        assert m.plan(model, model.policy, z, mean, draws, args, 0.0).proposed.tolist() == [share, share]


@pytest.mark.parametrize("flags", [
    dict(planner_num_dynamics_heads=0), dict(planner_value_std_coef_train=math.nan),
    dict(planner_value_std_coef_eval=math.inf), dict(reanalyze_value_std_coef=-math.inf),
])  # fmt: skip
def test_impossible_flags_are_refused(flags):
    args = dataclasses.replace(m.parse_args(["--task", "Pendulum-v1"]), **flags)
    with pytest.raises(m.Refused, match="--" + next(iter(flags)).replace("_", "-")):
        m.fill_in(args)


def test_the_number_of_heads_shapes_the_run():
    assert m.FREE not in m.notes()["planner_num_dynamics_heads"]


def test_all_flags_at_once_run(tmp_path):
    run, rows = small_run(m, tmp_path, **FLAGS["all at once"], **EVERYTHING, reanalyze_value_std_coef=-0.3)
    assert run.updates == 50 and all(math.isfinite(float(value)) for _, _, value in rows)


def check_compiled(module, functions: set[str], **flags):
    """One decision and one update with these functions traced as the compiler does: the eager numbers."""
    results = []
    for backend in (None, "aot_eager"):
        run = small_training(module, **flags)
        if backend:
            options = dict(backend=backend, fullgraph=True, dynamic=False)
            traced = {name: torch.compile(getattr(run.functions, name), **options) for name in functions}
            run.functions = run.functions._replace(**traced)
        filled_buffer(run)
        acted, _ = module.act(run.functions.plan, run.model, run.obs, run.mean, run.args, run.draws)
        run.updates = run.args.reanalyze_interval - 1
        module.learn(run, pretraining=False)
        results.append([*acted, *run.model.state_dict().values(), run.buffer.expert])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# Less to trace: plans for acting and for reanalyze are of one shape.
SHORT = dict(
    td_horizon=2, reanalyze_horizon=None, reanalyze_log_std_min=None, num_envs=2, reanalyze_batch_size=1, horizon=2
)


def test_all_flags_at_once_compile():
    flags = FLAGS["all at once"] | EVERYTHING | SHORT
    check_compiled(m, {"plan", "world_model_loss"}, **flags, reanalyze_value_std_coef=0.7)
