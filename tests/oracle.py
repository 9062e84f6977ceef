"""BMPC once more: slow, in loops, written from the papers' formulas and the project's description, to be compared with.

It shares nothing with bmpc.py but the weights: networks are recomputed from them head by head, distributions come from
torch.distributions, Adam and the clip are written out, the planner is numpy on one state and one candidate at a time.
"""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

# --- networks, from their weights


def normed(layer, head, x, keep, activation):
    x = x @ layer.weight[head] + layer.bias[head, 0]
    if keep is not None:
        x = x * keep
    if activation == "none":
        return x
    x = F.layer_norm(x, x.shape[-1:], layer.scale[head], layer.shift[head])
    if activation == "mish":
        return x * torch.tanh(F.softplus(x))
    return torch.cat([torch.softmax(group, -1) for group in x.split(activation, -1)], -1)


def network(net, head, x, keep=None):
    """Head `head` of a stack on x (..., in); `keep` is the dropout mask of the first layer."""
    *hidden, last = net.layers
    for layer in hidden:
        x, keep = normed(layer, head, x, keep, "mish"), None
    return normed(last, head, x, keep, last.activation.keywords["group"] if last.activation else "none")


def gaussian(policy, z, args):
    low, high = args.log_std_min, args.log_std_max
    m, s = network(policy, 0, z).chunk(2, -1)
    return torch.tanh(m), torch.exp(low + (high - low) / 2 * (torch.tanh(s) + 1))


# --- scalars as distributions


def bins(args):
    return [args.vmin + k * (args.vmax - args.vmin) / (args.num_bins - 1) for k in range(args.num_bins)]


def two_hot(x, args):
    """x (B,) -> (B, K), number by number."""
    places, rows = bins(args), []
    for value in x.tolist():
        s = math.copysign(math.log1p(abs(value)), value)
        s = min(max(s, places[0]), places[-1])
        below = max(k for k in range(args.num_bins - 1) if places[k] <= s)
        share = (s - places[below]) / (places[below + 1] - places[below])
        row = [0.0] * args.num_bins
        row[below], row[below + 1] = 1 - share, share
        rows.append(row)
    return torch.tensor(rows)


def scalar(logits, args):
    p = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    s = sum(p[..., k] * place for k, place in enumerate(bins(args)))
    return torch.sign(s) * (torch.exp(s.abs()) - 1)


def cross_entropy(logits, target):
    return -(target * torch.log_softmax(logits, -1)).sum(-1)


# --- losses


def weights(args):
    powers = [args.rho**t for t in range(args.horizon)]
    return [w / (sum(powers) if args.normalize_rho_weights else args.horizon) for w in powers]


@torch.no_grad()
def td_target(model, policy, z, eps, args):
    """One imagined trajectory of eps (td_horizon, B, A) from z (B, L): y (B,)."""
    y, alive, gamma = torch.zeros(len(z)), torch.ones(len(z)), 1.0
    for noise in eps:
        mean, std = gaussian(policy, z, args)
        za = torch.cat([z, (mean + std * noise).clamp(-1, 1)], -1)
        y = y + gamma * alive * scalar(network(model.reward, 0, za), args)
        z = network(model.dynamics, 0, za)
        if args.episodic:
            alive = alive * (torch.sigmoid(network(model.termination, 0, z)[:, 0]) <= 0.5)
        gamma = gamma * args.discount
    heads = [scalar(network(model.target_value, q, z), args) for q in range(args.num_q)]
    return y + gamma * alive * sum(heads) / args.num_q


def world_model_loss(model, batch, draws, args):
    """Every loss of the world model by name, and the rollout's states."""
    T, Q, R = args.horizon, args.num_q, args.num_rollouts
    z_true = [network(model.encoder, 0, obs) for obs in batch.obs]
    z, parts = [z_true[0]], {}

    def add(name, value, t):
        parts[name] = parts.get(name, 0.0) + weights(args)[t] * value.mean()

    for t in range(T):
        za = torch.cat([z[t], batch.action[t]], -1)
        z.append(network(model.dynamics, 0, za))
        add("consistency", (z[t + 1] - z_true[t + 1].detach()) ** 2, t)
        add("reward", cross_entropy(network(model.reward, 0, za), two_hot(batch.reward[t], args)), t)
        start = z[t] if args.imagine_initial_source == "replay_rollout" else z_true[t]
        origin = z_true[t] if args.td_target_initial_source == "replay_true" else start
        policy = model.ema_policy if args.td_target_use_ema_policy else model.policy
        for r in range(R):
            target = two_hot(td_target(model, policy, origin.detach(), draws.td[r, :, t], args), args)
            for q in range(Q):
                keep = None if draws.keep is None else draws.keep[q, t]
                add("value", cross_entropy(network(model.value, q, start, keep), target) / (Q * R), t)
        if args.episodic:
            p = torch.sigmoid(network(model.termination, 0, z[t + 1])[:, 0])
            ended = batch.terminated[t]
            add("termination", -(ended * torch.log(p) + (1 - ended) * torch.log(1 - p)), t)
        if args.encoder_consistency_coef:
            add("encoder_consistency", (z[t + 1].detach() - z_true[t + 1]) ** 2, t)
    total = args.consistency_coef * parts["consistency"] + args.reward_coef * parts["reward"]
    total = total + args.value_coef * parts["value"]
    if args.episodic:
        total = total + args.termination_coef * parts["termination"]
    if args.encoder_consistency_coef:
        total = total + args.encoder_consistency_coef * parts["encoder_consistency"]
    return total, [x.detach() for x in z[:T]], parts


def policy_loss(model, scale, z, expert, args):
    """The policy's loss, the new S and the losses by name."""
    lam, A = weights(args), expert.shape[-1]
    reduce = (lambda kl: kl.sum(-1) / A) if args.kl_reduction == "mean" else (lambda kl: kl.sum(-1))
    kls, entropies, trusts = [], [], []
    for t in range(args.horizon):
        pi = Normal(*gaussian(model.policy, z[t], args))
        std = torch.maximum(args.expert_std_scale * expert[t, :, 1], torch.tensor(args.expert_std_min))
        kls.append(reduce(kl_divergence(pi, Normal(expert[t, :, 0], std))))
        entropies.append(pi.entropy().sum(-1))
        if args.policy_trust_region_coef:
            mean, std = gaussian(model.ema_policy, z[t], args)
            trusts.append(reduce(kl_divergence(Normal(mean.detach(), std.detach()), pi)))
    low, high = np.percentile(kls[0].detach().numpy(), [5, 95])
    scale = scale + 0.01 * (max(high - low, 1.0) - scale)
    mean_over_time = lambda parts: sum(w * part.mean() for w, part in zip(lam, parts, strict=True))
    loss = mean_over_time(kls) / scale - args.entropy_coef * A * mean_over_time(entropies)
    parts = {}
    if trusts:
        parts["trust_region"] = mean_over_time(trusts) / scale
        loss = loss + args.policy_trust_region_coef * parts["trust_region"]
    return loss, scale, parts | {"policy": loss, "kl_scale": torch.as_tensor(scale)}


class Adam:
    """Adam on parameters with a learning rate each, after clipping the norm of all their gradients together."""

    def __init__(self, params, lrs, eps, bound):
        self.params, self.lrs, self.eps, self.bound, self.steps = params, lrs, eps, bound, 0
        self.m, self.v = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]

    def step(self, loss):
        grads = torch.autograd.grad(loss, self.params)
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
        self.steps += 1
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(self.params, grads, strict=True)):
                g = g * min(1.0, self.bound / (norm + 1e-6))
                self.m[i] = 0.9 * self.m[i] + 0.1 * g
                self.v[i] = 0.999 * self.v[i] + 0.001 * g**2
                m, v = self.m[i] / (1 - 0.9**self.steps), self.v[i] / (1 - 0.999**self.steps)
                p.sub_(self.lrs[i] * m / (v.sqrt() + self.eps))
        return norm


class Learner:
    """Updates of a copy of `model`."""

    def __init__(self, model, args):
        self.model, self.args, self.scale = copy.deepcopy(model), args, float(model.kl_scale)
        m = self.model
        encoder, rest = [*m.encoder.parameters()], [m.dynamics, m.reward, m.value]
        rest = [p for part in rest + [m.termination] * args.episodic for p in part.parameters()]
        lrs = [args.lr * args.enc_lr_scale] * len(encoder) + [args.lr] * len(rest)
        self.adam = Adam(encoder + rest, lrs, 1e-8, args.grad_clip_norm)
        policy = [*m.policy.parameters()]
        self.policy_adam = Adam(policy, [args.lr] * len(policy), 1e-5, args.grad_clip_norm)

    def update(self, batch, draws, pretraining):
        """One update: its losses and gradient norms by name."""
        m, args = self.model, self.args
        total, z, parts = world_model_loss(m, batch, draws, args)
        if not pretraining:  # on the model as the world model's loss saw it
            loss, self.scale, more = policy_loss(m, self.scale, z, batch.expert, args)
            parts |= more | {"policy_grad_norm": self.policy_adam.step(loss)}
        parts |= {"total": total, "grad_norm": self.adam.step(total)}
        follow = [(m.target_value, m.value, args.tau)]
        if m.ema_policy is not None and not pretraining:
            follow.append((m.ema_policy, m.policy, args.policy_ema_tau))
        with torch.no_grad():
            for slow, fast, tau in follow:
                for x, y in zip(slow.parameters(), fast.parameters(), strict=True):
                    x.copy_((1 - tau) * x + tau * y)
        return {name: torch.as_tensor(value).item() for name, value in parts.items()}


# --- planner


class Simulator:
    """A model and its policy as functions of one state and one action, both numpy vectors."""

    def __init__(self, model, args):
        self.model, self.args = model, args

    def joined(self, z, a):
        return torch.cat([torch.from_numpy(z), torch.from_numpy(a)])

    def policy(self, z):
        return [x.numpy() for x in gaussian(self.model.policy, torch.from_numpy(z), self.args)]

    def dynamics(self, z, a):
        return network(self.model.dynamics, 0, self.joined(z, a)).numpy()

    def reward(self, z, a):
        return float(scalar(network(self.model.reward, 0, self.joined(z, a)), self.args))

    def values(self, z):
        heads = [network(self.model.value, q, torch.from_numpy(z)) for q in range(self.args.num_q)]
        return [float(scalar(head, self.args)) for head in heads]

    def ends(self, z):
        return float(torch.sigmoid(network(self.model.termination, 0, torch.from_numpy(z)))) > 0.5


def rollout_return(sim, z, actions, args):
    total, gamma = 0.0, 1.0
    for a in actions:
        total, z, gamma = total + gamma * sim.reward(z, a), sim.dynamics(z, a), gamma * args.discount
        if args.episodic and sim.ends(z):
            return total
    total = total + gamma * np.mean(sim.values(z))
    return total if np.isfinite(total) else -1e9


def plan(sim, z, mean, proposals, samples, elite_uniform, noise, args):
    """One plan from z (L,), with previous mean (T, A) and its own draws, all numpy. Returns a dict of numpy arrays."""
    candidates = []
    for eps in proposals:  # (T, A): the policy's sequences, rolled through the model
        state, sequence = z, []
        for e in eps:
            m, s = sim.policy(state)
            sequence.append(np.clip(m + s * e, -1, 1))
            state = sim.dynamics(state, sequence[-1])
        candidates.append((rollout_return(sim, z, sequence, args), np.array(sequence)))
    std = np.full_like(mean, args.max_std)
    for eps in samples:  # an iteration
        tried = [np.clip(mean + std * e, -1, 1) for e in eps]
        ranked = candidates + [(rollout_return(sim, z, actions, args), actions) for actions in tried]
        ranked = sorted(ranked, key=lambda pair: -pair[0])[: args.num_elites]
        w = np.array([math.exp(args.temperature * (value - ranked[0][0])) for value, _ in ranked])
        w = w / w.sum()
        mean = sum(wi * actions for wi, (_, actions) in zip(w, ranked, strict=True))
        std = np.sqrt(sum(wi * (actions - mean) ** 2 for wi, (_, actions) in zip(w, ranked, strict=True)))
        std = np.minimum(np.maximum(std, args.min_std), args.max_std)
    with np.errstate(divide="ignore"):
        chosen = int(np.argmax(np.log(w) - np.log(-np.log(elite_uniform))))
    drawn = ranked[chosen][1][0]
    return {
        "action": np.clip(drawn + std[0] * noise, -1, 1),
        "elite": drawn,
        "best": ranked[0][1][0],
        "mean": mean,
        "std": std[0],
        "value": ranked[chosen][0],
    }
