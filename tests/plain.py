"""A straightforward MPPI planner: one batch, concatenated inputs, every candidate scored in every iteration.

It has none of the optimizations of bmpc.py: a shared latent state that is multiplied once, policy candidates that are
scored once, chunks that fit the cache, stacked heads. Tests compare the plans of the scripts with it, and
`throughput.py --compare` times it.
"""

import torch
from oracle import network, num_heads, rollout_return, sample_action


@torch.no_grad()
def plan(model, policy, obs, prev_mean, noise, args, std_coef=None):
    """Plan for S states. Returns the fields of the script's Plan; with std_coef, those of the ensemble's Plan."""
    z = network(model.encoder, 0, obs)[:, None]
    P = noise.policy.shape[1]

    # Candidates from the policy
    state = z.expand(-1, P, -1)
    policy_actions = []
    for eps in noise.policy.unbind(2):
        policy_actions.append(sample_action(policy, state, eps, args))
        state = network(model.dynamics, 0, torch.cat([state, policy_actions[-1]], -1))

    # MPPI
    mean = prev_mean
    std = torch.full_like(mean, args.max_std)
    for eps in noise.samples.unbind(1):
        samples = (mean[:, None] + std[:, None] * eps).clamp(-1, 1)
        actions = torch.cat([torch.stack(policy_actions, 2), samples], 1)  # (S, N, T, A)
        start = z.expand(-1, actions.shape[1], -1)
        select_action = lambda z, a: a
        returns = torch.cat(
            [
                rollout_return(model, h, start, actions.unbind(2), select_action, model.value, args)
                for h in range(num_heads(args))
            ]
        )  # (H * Q, S, N)
        return_std = returns.std(0, correction=0)
        scores = returns.mean(0) + (std_coef or 0.0) * return_std
        scores = scores.nan_to_num(nan=-1e9, posinf=-1e9, neginf=-1e9)
        elite_scores, elite_index = scores.topk(args.num_elites, 1)
        elites = torch.stack([a[index] for a, index in zip(actions, elite_index, strict=True)])
        w = torch.softmax(args.temperature * (elite_scores - elite_scores[:, :1]), 1)
        mean = torch.einsum("se,seta->sta", w, elites)
        std = torch.einsum("se,seta->sta", w, (elites - mean[:, None]) ** 2).sqrt().clamp(args.min_std, args.max_std)

    # Sample an elite and add exploration noise
    sampled = (w.log() - torch.log(-torch.log(noise.elite))).argmax(1)
    elite_action = torch.stack([x[i, 0] for x, i in zip(elites, sampled, strict=True)])
    value = torch.stack([x[i] for x, i in zip(elite_scores, sampled, strict=True)])
    action = (elite_action + std[:, 0] * noise.action).clamp(-1, 1)
    fields = [action, elite_action, elites[:, 0, 0], mean, std[:, 0], value]
    if std_coef is None:
        return fields
    elite_std = return_std.gather(1, elite_index)
    bonus = std_coef * elite_std
    bonus_share = abs(bonus) / (abs(bonus) + abs(elite_scores - bonus))
    proposal_share = (elite_index < P).to(z.dtype)
    return [*fields, elite_std.mean(1), bonus_share.mean(1), proposal_share.mean(1)]
