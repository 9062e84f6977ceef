"""BMPC once more: slow, in loops, written from the papers' formulas and the project's description, to be compared with.

It shares nothing with bmpc.py but the weights: networks are recomputed from them head by head, distributions come from
torch.distributions, Adam and the clip are written out. The planner, made of the same parts, is in plain.py.
"""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

# --- networks, from their weights


def normed(layer, head, x, keep, activation):
    x = x @ layer.weight[head] + layer.bias[head]
    if keep is not None:
        x = x * keep
    if activation == "none":
        return x
    x = F.layer_norm(x, x.shape[-1:], layer.ln_weight[head], layer.ln_bias[head])
    if activation == "mish":
        return x * torch.tanh(F.softplus(x))
    return torch.cat([torch.softmax(group, -1) for group in x.split(activation, -1)], -1)


def network(net, head, x, keep=None):
    """Head `head` of a stack on x (..., in); `keep` is the dropout mask of the first layer."""
    *hidden, last = net.layers
    for layer in hidden:
        x, keep = normed(layer, head, x, keep, "mish"), None
    return normed(
        last, head, x, keep, last.activation.keywords["group_size"] if hasattr(last, "activation") else "none"
    )


def gaussian(policy, z, args):
    low, high = args.log_std_min, args.log_std_max
    m, s = network(policy, 0, z).chunk(2, -1)
    return torch.tanh(m), torch.exp(low + (high - low) / 2 * (torch.tanh(s) + 1))


def drawn(policy, z, eps, args):
    mean, std = gaussian(policy, z, args)
    return (mean + std * eps).clamp(-1, 1)


def heads(args):
    return getattr(args, "planner_num_dynamics_heads", 1)


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
    s = (p * p.new_tensor(bins(args))).sum(-1)
    return torch.sign(s) * (torch.exp(s.abs()) - 1)


def cross_entropy(logits, target):
    return -(target * torch.log_softmax(logits, -1)).sum(-1)


# --- losses


def weights(args):
    powers = [args.rho**t for t in range(args.horizon)]
    return [w / (sum(powers) if args.normalize_rho_weights else args.horizon) for w in powers]


@torch.no_grad()
def imagined(model, head, z, inputs, act, values, args):
    """Returns of one trajectory of dynamics head `head` from z (..., L), by each head of `values`: (Q, ...).

    The action of step t is act(z, inputs[t]).
    """
    y, alive, gamma = 0.0, 1.0, 1.0
    for x in inputs:
        za = torch.cat([z, act(z, x)], -1)
        y = y + gamma * alive * scalar(network(model.reward, 0, za), args)
        z = network(model.dynamics, head, za)
        if args.episodic:
            alive = alive * (torch.sigmoid(network(model.termination, 0, z)[..., 0]) <= 0.5)
        gamma = gamma * args.discount
    return torch.stack([y + gamma * alive * scalar(network(values, q, z), args) for q in range(args.num_q)])


def td_targets(model, policy, z, eps, args):
    """The target of each value head (Q, B), from z (B, L) by eps (H or 1, td_horizon, B, A): means over dynamics heads.

    All dynamics heads share the first action, and unless the bootstrap is local all value heads their mean.
    """
    of = lambda h: torch.cat([eps[0, :1], eps[min(h, len(eps) - 1), 1:]])
    act = lambda z, eps: drawn(policy, z, eps, args)
    y = sum(imagined(model, h, z, of(h), act, model.target_value, args) for h in range(heads(args))) / heads(args)
    return y if getattr(args, "local_td_bootstrap", False) else y.mean(0, keepdim=True).expand_as(y)


def world_model_loss(model, batch, draws, args):
    """Every loss of the world model by name, and the states of the first dynamics head's rollout."""
    T, Q, R, H = args.horizon, args.num_q, args.num_rollouts, heads(args)
    td = draws.td if draws.td.dim() == 6 else draws.td[None]  # (H or 1, R, td_horizon, T, B, A)
    z_true, parts, ys = [network(model.encoder, 0, obs) for obs in [*batch.obs, batch.next_obs[-1]]], {}, []
    keep = draws.dropout_mask / (1 - args.dropout)
    z = [[z_true[0]] for _ in range(H)]

    def add(name, value, t, of=1):
        parts[name] = parts.get(name, 0.0) + weights(args)[t] * value.mean() / of

    for t in range(T):
        for h in range(H):
            za = torch.cat([z[h][t], batch.action[t]], -1)
            z[h].append(network(model.dynamics, h, za))
            add("consistency", (z[h][t + 1] - z_true[t + 1].detach()) ** 2, t, H)
            add("reward", cross_entropy(network(model.reward, 0, za), two_hot(batch.reward[t], args)), t, H)
            if args.episodic:
                p = torch.sigmoid(network(model.termination, 0, z[h][t + 1])[:, 0])
                ended = batch.terminated[t]
                add("termination", -(ended * torch.log(p) + (1 - ended) * torch.log(1 - p)), t, H)
            if args.encoder_consistency_coef:
                add("encoder_consistency", (z[h][t + 1].detach() - z_true[t + 1]) ** 2, t, H)
        start = z[0][t] if args.imagine_initial_source == "replay_rollout" else z_true[t]
        origin = z_true[t] if args.td_target_initial_source == "replay_true" else start
        policy = model.ema_policy if args.td_target_use_ema_policy else model.policy
        for r in range(R):
            targets = td_targets(model, policy, origin.detach(), td[:, r, :, t], args)
            ys.append(targets)
            for q in range(Q):
                logits = network(model.value, q, start, keep[q][t])
                add("value", cross_entropy(logits, two_hot(targets[q], args)), t, Q * R)
    total = args.consistency_coef * parts["consistency"] + args.reward_coef * parts["reward"]
    total = total + args.value_coef * parts["value"]
    if args.episodic:
        total = total + args.termination_coef * parts["termination"]
    if args.encoder_consistency_coef:
        total = total + args.encoder_consistency_coef * parts["encoder_consistency"]
    ys = torch.stack(ys).view(T, R, Q, -1)
    parts["td_target"] = ys.mean()
    if R > 1:
        parts["td_target_std_over_rollouts"] = ((ys - ys.mean(1, keepdim=True)) ** 2 / (R - 1)).sum(1).sqrt().mean()
    if H > 1:
        last = torch.stack([states[T].detach() for states in z])
        parts["latent_disagreement"] = ((last - last.mean(0)) ** 2).mean(0).sqrt().mean()
    return total, [x.detach() for x in z[0][:T]], parts


def policy_loss(policy, ema, scale, z, expert, args):
    """A policy's loss, the new S and the losses by name."""
    lam, A = weights(args), expert[0].shape[-1]
    reduce = (lambda kl: kl.sum(-1) / A) if args.kl_reduction == "mean" else (lambda kl: kl.sum(-1))
    kls, entropies, trusts = [], [], []
    for t in range(args.horizon):
        pi = Normal(*gaussian(policy, z[t], args))
        std = torch.maximum(args.expert_std_scale * expert[1][t], torch.tensor(args.expert_std_min))
        kls.append(reduce(kl_divergence(pi, Normal(expert[0][t], std))))
        entropies.append(pi.entropy().sum(-1))
        if args.policy_trust_region_coef:
            mean, std = gaussian(ema, z[t], args)
            trusts.append(reduce(kl_divergence(Normal(mean.detach(), std.detach()), pi)))
    low, high = np.percentile(kls[0].detach().numpy(), [5, 95])
    scale = scale + 0.01 * (max(high - low, 1.0) - scale)
    mean_over_time = lambda parts: sum(w * part.mean() for w, part in zip(lam, parts, strict=True))
    loss = mean_over_time(kls) / scale - args.entropy_coef * A * mean_over_time(entropies)
    parts = {"kl": torch.stack(kls).mean(), "entropy": torch.stack(entropies).mean()}
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
                g = g * min(1.0, self.bound / norm)
                self.m[i] = 0.9 * self.m[i] + 0.1 * g
                self.v[i] = 0.999 * self.v[i] + 0.001 * g**2
                m, v = self.m[i] / (1 - 0.9**self.steps), self.v[i] / (1 - 0.999**self.steps)
                p.sub_(self.lrs[i] * m / (v.sqrt() + self.eps))
        return norm


class Learner:
    """Updates of a copy of `model`; of two policies the second learns from the second half of the experts."""

    def __init__(self, model, args):
        self.model, self.args = copy.deepcopy(model), args
        m, self.scales = self.model, model.kl_scale.view(-1).tolist()
        self.policies = [("", m.policy, m.ema_policy)]
        if len(self.scales) > 1:
            self.policies.append(("optimistic_", m.optimistic_policy, m.optimistic_ema_policy))
        scaled = getattr(args, "ensemble_lr_scaling", False)
        rates = [(m.encoder, args.enc_lr_scale), (m.dynamics, heads(args) if scaled else 1), (m.reward, 1)]
        rates += [(m.value, args.num_q / 5 if scaled else 1)] + [(m.termination, 1)] * args.episodic
        rated = [(p, args.lr * rate) for part, rate in rates for p in part.parameters()]
        self.adam = Adam(*map(list, zip(*rated, strict=True)), 1e-8, args.grad_clip_norm)
        policy = [p for _, network, _ in self.policies for p in network.parameters()]
        self.policy_adam = Adam(policy, [args.lr] * len(policy), 1e-5, args.grad_clip_norm)

    def update(self, batch, draws, pretraining):
        """One update: its losses and gradient norms by name."""
        m, args, loss = self.model, self.args, 0.0
        total, z, parts = world_model_loss(m, batch, draws, args)
        follow = [(m.target_value, m.value, args.tau)]
        if not pretraining:  # on the model as the world model's loss saw it
            drawn_from = [Normal(*gaussian(policy, torch.stack(z), args)) for _, policy, _ in self.policies]
            if len(drawn_from) > 1:
                parts["kl_between_policies"] = kl_divergence(drawn_from[1], drawn_from[0]).mean()
            for k, (name, policy, ema) in enumerate(self.policies):
                A = policy.layers[-1].bias.shape[-1] // 2
                expert = [x[..., k * A : (k + 1) * A] for x in batch.expert]
                one, self.scales[k], more = policy_loss(policy, ema, self.scales[k], z, expert, args)
                loss, parts = loss + one, parts | {name + key: value for key, value in more.items()}
                follow += [(ema, policy, args.policy_ema_tau)] * (ema is not None)
            parts |= {"policy_grad_norm": self.policy_adam.step(loss)}
        parts |= {"total": total, "grad_norm": self.adam.step(total)}
        with torch.no_grad():
            for slow, fast, tau in follow:
                for x, y in zip(slow.parameters(), fast.parameters(), strict=True):
                    x.copy_((1 - tau) * x + tau * y)
        return {name: torch.as_tensor(value).item() for name, value in parts.items()}
