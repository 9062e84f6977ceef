"""An oracle: a second, slow implementation of BMPC in loops, from the formulas of the papers and the specification.

It shares nothing with bmpc.py but the weights. Networks are computed head by head, distributions come from
torch.distributions, and Adam and gradient clipping are written out. The planner in plain.py uses the same functions.
"""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

# --- networks


def normed_linear(layer, head, x, dropout_mask, activation):
    """Apply one head of a layer to x (..., in). `activation` is "none", "mish", or the group size of SimNorm."""
    x = x @ layer.weight[head] + layer.bias[head]
    if dropout_mask is not None:
        x = x * dropout_mask
    if activation == "none":
        return x
    x = F.layer_norm(x, x.shape[-1:], layer.ln_weight[head], layer.ln_bias[head])
    if activation == "mish":
        return x * torch.tanh(F.softplus(x))
    return torch.cat([torch.softmax(group, -1) for group in x.split(activation, -1)], -1)


def network(net, head, x, dropout_mask=None):
    """Apply one head of an ensemble of networks to x (..., in). `dropout_mask` belongs to the first layer."""
    *hidden, last = net.layers
    for layer in hidden:
        x = normed_linear(layer, head, x, dropout_mask, "mish")
        dropout_mask = None
    activation = last.activation.keywords["group_size"] if hasattr(last, "activation") else "none"
    return normed_linear(last, head, x, dropout_mask, activation)


def policy_gaussian(policy, z, args):
    """Compute mean and std of the policy: (..., L) -> (..., A) each."""
    low, high = args.log_std_min, args.log_std_max
    mean, log_std = network(policy, 0, z).chunk(2, -1)
    return torch.tanh(mean), torch.exp(low + (high - low) / 2 * (torch.tanh(log_std) + 1))


def sample_action(policy, z, eps, args):
    """Sample an action (..., A) of the policy with standard normal noise eps."""
    mean, std = policy_gaussian(policy, z, args)
    return (mean + std * eps).clamp(-1, 1)


def num_heads(args):
    """Return the number of dynamics heads, H."""
    return getattr(args, "planner_num_dynamics_heads", 1)


# --- two-hot distributions


def bins(args):
    """Return the positions of the bins, in symlog units."""
    return [args.vmin + k * (args.vmax - args.vmin) / (args.num_bins - 1) for k in range(args.num_bins)]


def two_hot(x, args):
    """Encode x (B,) as distributions (B, K), one number at a time."""
    positions = bins(args)
    rows = []
    for value in x.tolist():
        s = math.copysign(math.log1p(abs(value)), value)
        s = min(max(s, positions[0]), positions[-1])
        below = max(k for k in range(args.num_bins - 1) if positions[k] <= s)
        fraction = (s - positions[below]) / (positions[below + 1] - positions[below])
        row = [0.0] * args.num_bins
        row[below] = 1 - fraction
        row[below + 1] = fraction
        rows.append(row)
    return torch.tensor(rows)


def two_hot_inv(logits, args):
    """Decode logits (..., K) to scalars (...)."""
    p = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    s = (p * p.new_tensor(bins(args))).sum(-1)
    return torch.sign(s) * (torch.exp(s.abs()) - 1)


def cross_entropy(logits, target):
    return -(target * torch.log_softmax(logits, -1)).sum(-1)


# --- losses


def rho_weights(args):
    """Return the weights of the T steps of a rollout."""
    powers = [args.rho**t for t in range(args.horizon)]
    return [w / (sum(powers) if args.normalize_rho_weights else args.horizon) for w in powers]


@torch.no_grad()
def rollout_return(model, head, z, inputs, select_action, values, args):
    """Predict the return of one rollout of a dynamics head from z (..., L), with each head of `values`: (Q, ...).

    The action of step t is select_action(z, inputs[t]).
    """
    y = 0.0
    alive = 1.0
    gamma = 1.0
    for x in inputs:
        za = torch.cat([z, select_action(z, x)], -1)
        y = y + gamma * alive * two_hot_inv(network(model.reward, 0, za), args)
        z = network(model.dynamics, head, za)
        if args.episodic:
            alive = alive * (torch.sigmoid(network(model.termination, 0, z)[..., 0]) <= 0.5)
        gamma = gamma * args.discount
    return torch.stack([y + gamma * alive * two_hot_inv(network(values, q, z), args) for q in range(args.num_q)])


def td_targets(model, policy, z, eps, args):
    """Compute the target of each value head: z (B, L), eps (H or 1, td_horizon, B, A) -> (Q, B).

    Targets are averaged over dynamics heads, which share the first action. Without local_td_bootstrap, they are also
    averaged over value heads.
    """
    H = num_heads(args)
    select_action = lambda z, eps: sample_action(policy, z, eps, args)
    y = 0.0
    for h in range(H):
        later_eps = eps[min(h, len(eps) - 1), 1:]
        inputs = torch.cat([eps[0, :1], later_eps])
        y = y + rollout_return(model, h, z, inputs, select_action, model.target_value, args) / H
    return y if getattr(args, "local_td_bootstrap", False) else y.mean(0, keepdim=True).expand_as(y)


def world_model_loss(model, batch, noise, args):
    """Compute the losses of the world model.

    Returns the total, the states of the rollout of dynamics head 0 (T of (B, L)), and the losses by name.
    """
    T, Q, R, H = args.horizon, args.num_q, args.num_rollouts, num_heads(args)
    td_noise = noise.td if noise.td.dim() == 6 else noise.td[None]  # (H or 1, R, td_horizon, T, B, A)
    true_z = [network(model.encoder, 0, obs) for obs in [*batch.obs, batch.next_obs[-1]]]
    losses = {}
    targets = []
    dropout_mask = noise.dropout_keep / (1 - args.dropout)
    z = [[true_z[0]] for _ in range(H)]  # z[h][t]

    def add(name, value, t, terms=1):
        """Add the loss of step t, one of `terms` that are averaged."""
        losses[name] = losses.get(name, 0.0) + rho_weights(args)[t] * value.mean() / terms

    for t in range(T):
        for h in range(H):
            za = torch.cat([z[h][t], batch.action[t]], -1)
            z[h].append(network(model.dynamics, h, za))
            add("consistency", (z[h][t + 1] - true_z[t + 1].detach()) ** 2, t, H)
            add("reward", cross_entropy(network(model.reward, 0, za), two_hot(batch.reward[t], args)), t, H)
            if args.episodic:
                p = torch.sigmoid(network(model.termination, 0, z[h][t + 1])[:, 0])
                terminated = batch.terminated[t]
                add("termination", -(terminated * torch.log(p) + (1 - terminated) * torch.log(1 - p)), t, H)
            if args.encoder_consistency_coef:
                add("encoder_consistency", (z[h][t + 1].detach() - true_z[t + 1]) ** 2, t, H)
        value_z = z[0][t] if args.imagine_initial_source == "replay_rollout" else true_z[t]
        target_z = true_z[t] if args.td_target_initial_source == "replay_true" else value_z
        policy = model.ema_policy if args.td_target_use_ema_policy else model.policy
        for r in range(R):
            y = td_targets(model, policy, target_z.detach(), td_noise[:, r, :, t], args)  # (Q, B)
            targets.append(y)
            for q in range(Q):
                logits = network(model.value, q, value_z, dropout_mask[q][t])
                add("value", cross_entropy(logits, two_hot(y[q], args)), t, Q * R)
    total = (
        args.consistency_coef * losses["consistency"]
        + args.reward_coef * losses["reward"]
        + args.value_coef * losses["value"]
    )
    if args.episodic:
        total = total + args.termination_coef * losses["termination"]
    if args.encoder_consistency_coef:
        total = total + args.encoder_consistency_coef * losses["encoder_consistency"]
    y = torch.stack(targets).view(T, R, Q, -1)
    losses["td_target"] = y.mean()
    if R > 1:
        losses["td_target_std_over_rollouts"] = ((y - y.mean(1, keepdim=True)) ** 2 / (R - 1)).sum(1).sqrt().mean()
    if H > 1:
        last = torch.stack([states[T].detach() for states in z])
        losses["latent_disagreement"] = ((last - last.mean(0)) ** 2).mean(0).sqrt().mean()
    return total, [x.detach() for x in z[0][:T]], losses


def policy_loss(policy, ema_policy, scale, z, expert, args):
    """Compute the loss of one policy. `expert` is (mean, std), (T, B, A) each.

    Returns the loss, the new scale of the KL, and the losses by name.
    """
    expert_mean, expert_std = expert
    A = expert_mean.shape[-1]

    def reduce(kl):
        return kl.sum(-1) / A if args.kl_reduction == "mean" else kl.sum(-1)

    def weighted_sum(values):
        return sum(weight * value.mean() for weight, value in zip(rho_weights(args), values, strict=True))

    kls, entropies, ema_kls = [], [], []  # for each step
    for t in range(args.horizon):
        pi = Normal(*policy_gaussian(policy, z[t], args))
        std = torch.maximum(args.expert_std_scale * expert_std[t], torch.tensor(args.expert_std_min))
        kls.append(reduce(kl_divergence(pi, Normal(expert_mean[t], std))))
        entropies.append(pi.entropy().sum(-1))
        if args.policy_trust_region_coef:
            mean, std = policy_gaussian(ema_policy, z[t], args)
            ema_kls.append(reduce(kl_divergence(Normal(mean.detach(), std.detach()), pi)))
    low, high = np.percentile(kls[0].detach().numpy(), [5, 95])
    scale = scale + 0.01 * (max(high - low, 1.0) - scale)
    loss = weighted_sum(kls) / scale - args.entropy_coef * A * weighted_sum(entropies)
    losses = {"kl": torch.stack(kls).mean(), "entropy": torch.stack(entropies).mean()}
    if ema_kls:
        losses["trust_region"] = weighted_sum(ema_kls) / scale
        loss = loss + args.policy_trust_region_coef * losses["trust_region"]
    return loss, scale, losses | {"policy": loss, "kl_scale": torch.as_tensor(scale)}


class Adam:
    """Adam with a learning rate for each parameter. It clips the norm of the whole gradient to max_norm first."""

    def __init__(self, params, lrs, eps, max_norm):
        self.params, self.lrs, self.eps, self.max_norm = params, lrs, eps, max_norm
        self.steps = 0
        self.m = [torch.zeros_like(p) for p in params]
        self.v = [torch.zeros_like(p) for p in params]

    def step(self, loss):
        """Update the parameters. Returns the norm of the gradient before clipping."""
        grads = torch.autograd.grad(loss, self.params)
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
        self.steps += 1
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(self.params, grads, strict=True)):
                g = g * min(1.0, self.max_norm / norm)
                self.m[i] = 0.9 * self.m[i] + 0.1 * g
                self.v[i] = 0.999 * self.v[i] + 0.001 * g**2
                m = self.m[i] / (1 - 0.9**self.steps)
                v = self.v[i] / (1 - 0.999**self.steps)
                p.sub_(self.lrs[i] * m / (v.sqrt() + self.eps))
        return norm


class Learner:
    """Updates a copy of the model. With two policies, the second imitates the second half of the experts."""

    def __init__(self, model, args):
        self.model = m = copy.deepcopy(model)
        self.args = args
        self.scales = model.kl_scale.view(-1).tolist()
        self.policies = [("", m.policy, m.ema_policy)]  # prefix of the losses, policy, EMA policy
        if len(self.scales) > 1:
            self.policies.append(("optimistic_", m.optimistic_policy, m.optimistic_ema_policy))
        scaled = getattr(args, "ensemble_lr_scaling", False)
        lr_scales = [
            (m.encoder, args.enc_lr_scale),
            (m.dynamics, num_heads(args) if scaled else 1),
            (m.reward, 1),
            (m.value, args.num_q / 5 if scaled else 1),
        ]
        if args.episodic:
            lr_scales.append((m.termination, 1))
        params, lrs = [], []
        for net, lr_scale in lr_scales:
            for p in net.parameters():
                params.append(p)
                lrs.append(args.lr * lr_scale)
        self.adam = Adam(params, lrs, 1e-8, args.grad_clip_norm)
        policy_params = [p for _, policy, _ in self.policies for p in policy.parameters()]
        self.policy_adam = Adam(policy_params, [args.lr] * len(policy_params), 1e-5, args.grad_clip_norm)

    def update(self, batch, noise, pretraining):
        """Update all networks. Returns the losses and the norms of the gradients by name."""
        m, args = self.model, self.args
        total, z, losses = world_model_loss(m, batch, noise, args)
        ema_pairs = [(m.target_value, m.value, args.tau)]
        if not pretraining:  # before the step of the world model's optimizer
            gaussians = [Normal(*policy_gaussian(policy, torch.stack(z), args)) for _, policy, _ in self.policies]
            if len(gaussians) > 1:
                losses["kl_between_policies"] = kl_divergence(gaussians[1], gaussians[0]).mean()
            loss = 0.0
            for k, (prefix, policy, ema_policy) in enumerate(self.policies):
                A = policy.layers[-1].bias.shape[-1] // 2
                expert = [x[..., k * A : (k + 1) * A] for x in batch.expert]
                one_loss, self.scales[k], by_name = policy_loss(policy, ema_policy, self.scales[k], z, expert, args)
                loss = loss + one_loss
                losses |= {prefix + name: value for name, value in by_name.items()}
                if ema_policy is not None:
                    ema_pairs.append((ema_policy, policy, args.policy_ema_tau))
            losses["policy_grad_norm"] = self.policy_adam.step(loss)
        losses["total"] = total
        losses["grad_norm"] = self.adam.step(total)
        with torch.no_grad():
            for target, online, tau in ema_pairs:
                for x, y in zip(target.parameters(), online.parameters(), strict=True):
                    x.copy_((1 - tau) * x + tau * y)
        return {name: torch.as_tensor(value).item() for name, value in losses.items()}
