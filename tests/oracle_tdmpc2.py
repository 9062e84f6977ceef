"""TD-MPC2 once more: slow, in loops over steps and heads, written from the paper's formulas and its published code.

Networks, distributions and Adam are those of oracle.py; nothing comes from tdmpc2.py but the weights. `plan` is the
planner as one would first write it: every candidate is scored in every iteration.
"""

import copy

import numpy as np
import torch
from oracle import Adam, cross_entropy, network, two_hot, two_hot_inv
from torch.distributions import Normal


def gaussian(policy, z, args):
    """Mean and std before the action is squashed."""
    m, s = network(policy, 0, z).chunk(2, -1)
    return m, torch.exp(args.log_std_min + (args.log_std_max - args.log_std_min) / 2 * (torch.tanh(s) + 1))


def drawn(policy, z, eps, args):
    mean, std = gaussian(policy, z, args)
    return torch.tanh(mean + std * eps)


def q(values, head, z, a, args):
    """Q(z, a) of one head: (...)."""
    return two_hot_inv(network(values, head, torch.cat([z, a], -1)), args)


def weights(args, steps):
    powers = [args.rho**t for t in range(steps)]
    return [w / (sum(powers) if args.normalize_rho_weights else steps) for w in powers]


def world_model_loss(model, batch, draws, args):
    """The total, the T + 1 states of the rollout, and every loss of the world model by name."""
    T, Q = args.horizon, args.num_q
    z_true = [network(model.encoder, 0, obs) for obs in [*batch.obs, batch.next_obs[-1]]]
    keep, z, parts, ys = draws.dropout_keep / (1 - args.dropout), [z_true[0]], {}, []

    def add(name, value, t):
        parts[name] = parts.get(name, 0.0) + weights(args, T)[t] * value.mean()

    for t in range(T):
        za = torch.cat([z[t], batch.action[t]], -1)
        z.append(network(model.dynamics, 0, za))
        add("consistency", (z[t + 1] - z_true[t + 1].detach()) ** 2, t)
        add("reward", cross_entropy(network(model.reward, 0, za), two_hot(batch.reward[t], args)), t)
        if args.episodic:
            p = torch.sigmoid(network(model.termination, 0, z[t + 1])[:, 0])
            ended = batch.terminated[t]
            add("termination", -(ended * torch.log(p) + (1 - ended) * torch.log(1 - p)), t)
        if args.encoder_consistency_coef:
            add("encoder_consistency", (z[t + 1].detach() - z_true[t + 1]) ** 2, t)
        with torch.no_grad():
            a = drawn(model.policy, z_true[t + 1], draws.td[t], args)
            bootstrap = torch.stack([q(model.target_value, k, z_true[t + 1], a, args) for k in draws.td_heads.tolist()])
            y = torch.where(
                batch.terminated[t] > 0, batch.reward[t], batch.reward[t] + args.discount * bootstrap.min(0)[0]
            )
        ys.append(y)
        for k in range(Q):
            add("value", cross_entropy(network(model.value, k, za, keep[k][t]), two_hot(y, args)) / Q, t)
    total = args.consistency_coef * parts["consistency"] + args.reward_coef * parts["reward"]
    total = total + args.value_coef * parts["value"]
    if args.episodic:
        total = total + args.termination_coef * parts["termination"]
    if args.encoder_consistency_coef:
        total = total + args.encoder_consistency_coef * parts["encoder_consistency"]
    return total, [x.detach() for x in z], parts | {"td_target": torch.stack(ys).mean()}


def policy_loss(model, scale, z, draws, args):
    """The policy's loss, the new S and the losses by name. The entropy term is written as the published code has it."""
    lam, loss, qs, entropies = weights(args, args.horizon + 1), 0.0, [], []
    for t in range(args.horizon + 1):
        mean, std = gaussian(model.policy, z[t], args)
        eps = draws.policy[t]
        u = mean + std * eps
        a = torch.tanh(u)
        of_gaussian = Normal(mean, std).log_prob(u).sum(-1)
        log_prob = of_gaussian - torch.log(torch.relu(1 - a**2) + 1e-6).sum(-1)
        entropies.append(-log_prob)
        drawn_heads = [q(model.value, k, z[t], a, args) for k in draws.policy_heads.tolist()]
        qs.append(sum(drawn_heads) / len(drawn_heads))
        if t == 0:
            low, high = np.percentile(qs[0].detach().numpy(), [5, 95])
            scale = scale + 0.01 * (max(high - low, 1.0) - scale)
        scaled_entropy = -log_prob * (
            a.shape[-1] * Normal(0.0, 1.0).log_prob(eps).sub(std.log()).sum(-1) / (log_prob + 1e-8)
        )
        loss = loss - lam[t] * (qs[t] / scale + args.entropy_coef * scaled_entropy).mean()
    parts = {"q": torch.stack(qs).mean(), "entropy": torch.stack(entropies).mean()}
    return loss, scale, parts | {"policy": loss, "q_scale": torch.as_tensor(scale)}


class Learner:
    """Updates of a copy of `model`."""

    def __init__(self, model, args):
        self.model, self.args = copy.deepcopy(model), args
        m, self.scale = self.model, model.q_scale.item()
        rates = [(m.encoder, args.enc_lr_scale), (m.dynamics, 1), (m.reward, 1), (m.value, 1)]
        rates += [(m.termination, 1)] * args.episodic
        rated = [(p, args.lr * rate) for part, rate in rates for p in part.parameters()]
        self.adam = Adam(*map(list, zip(*rated, strict=True)), 1e-8, args.grad_clip_norm)
        policy = list(m.policy.parameters())
        self.policy_adam = Adam(policy, [args.lr] * len(policy), 1e-5, args.grad_clip_norm)

    def update(self, batch, draws):
        """One update, the world model's first: its losses and gradient norms by name."""
        m, args = self.model, self.args
        total, z, parts = world_model_loss(m, batch, draws, args)
        parts |= {"total": total, "grad_norm": self.adam.step(total)}
        loss, self.scale, more = policy_loss(m, self.scale, z, draws, args)
        parts |= more | {"policy_grad_norm": self.policy_adam.step(loss)}
        with torch.no_grad():
            for slow, fast in zip(m.target_value.parameters(), m.value.parameters(), strict=True):
                slow.copy_((1 - args.tau) * slow + args.tau * fast)
        return {name: torch.as_tensor(value).item() for name, value in parts.items()}


@torch.no_grad()
def plan(model, policy, obs, mean, draws, args):
    """The fields of the script's Plan."""
    z, T = network(model.encoder, 0, obs)[:, None], mean.shape[1]
    heads = draws.heads[0].tolist()

    def returns(actions, last_eps):
        """Of actions (S, N, T, A), and then one of the policy."""
        state, total, alive = z.expand(-1, actions.shape[1], -1), 0.0, 1.0
        for t in range(T):
            za = torch.cat([state, actions[:, :, t]], -1)
            total = total + args.discount**t * alive * two_hot_inv(network(model.reward, 0, za), args)
            state = network(model.dynamics, 0, za)
            if args.episodic:
                alive = alive * (torch.sigmoid(network(model.termination, 0, state)[..., 0]) <= 0.5)
        a = drawn(policy, state, last_eps, args)
        return total + args.discount**T * alive * sum(q(model.value, k, state, a, args) for k in heads) / len(heads)

    state, proposals = z.expand(-1, draws.policy.shape[1], -1), []
    for t in range(T):
        proposals.append(drawn(policy, state, draws.policy[:, :, t], args))
        state = network(model.dynamics, 0, torch.cat([state, proposals[-1]], -1))
    std = torch.full_like(mean, args.max_std)
    for eps in draws.samples.unbind(1):
        samples = (mean[:, None] + std[:, None] * eps[:, :, :T]).clamp(-1, 1)
        actions = torch.cat([torch.stack(proposals, 2), samples], 1)  # (S, N, T, A)
        scores = returns(actions, torch.cat([draws.policy[:, :, T], eps[:, :, T]], 1))
        best, elite = scores.topk(args.num_elites, 1)
        elites = torch.stack([a[e] for a, e in zip(actions, elite, strict=True)])
        w = torch.softmax(args.temperature * (best - best[:, :1]), 1)
        mean = torch.einsum("se,seta->sta", w, elites)
        std = torch.einsum("se,seta->sta", w, (elites - mean[:, None]) ** 2).sqrt().clamp(args.min_std, args.max_std)
    chosen = (w.log() - torch.log(-torch.log(draws.elite))).argmax(1)
    first = torch.stack([e[c, 0] for e, c in zip(elites, chosen, strict=True)])
    value = torch.stack([b[c] for b, c in zip(best, chosen, strict=True)])
    return [(first + std[:, 0] * draws.action).clamp(-1, 1), first, elites[:, 0, 0], mean, std[:, 0], value]
