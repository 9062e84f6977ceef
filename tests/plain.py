"""The planner as one would first write it: one batch, inputs concatenated, every candidate scored in every iteration.

What bmpc.py does to be fast (the shared latent multiplied once, the proposals scored once, chunks that fit the cache,
stacked heads) is absent here. `throughput.py --compare` times it, and a test holds bmpc.plan against it.
"""

import torch
from oracle import gaussian, network

import bmpc


def returns(model, z, actions, args):
    """z (S, L), actions (S, N, T, A) -> (S, N)."""
    z = z[:, None].expand(-1, actions.shape[1], -1)
    total, discount = 0.0, 1.0
    for t in range(actions.shape[2]):
        za = torch.cat([z, actions[:, :, t]], -1)
        total = total + discount * bmpc.two_hot_inv(network(model.reward, 0, za), args)
        z = network(model.dynamics, 0, za)
        discount *= args.discount
    values = torch.stack([network(model.value, q, z) for q in range(args.num_q)])
    return total + discount * bmpc.two_hot_inv(values, args).mean(0)


@torch.no_grad()
def plan(model, policy, obs, mean, draws, args):
    """What bmpc.plan computes, for models with one dynamics head and no termination head."""
    z, (_, P, T, _) = network(model.encoder, 0, obs), draws.proposals.shape
    state, proposals = z[:, None].expand(-1, P, -1), []
    for t in range(T):
        m, std = gaussian(policy, state, args)
        proposals.append((m + std * draws.proposals[:, :, t]).clamp(-1, 1))
        state = network(model.dynamics, 0, torch.cat([state, proposals[t]], -1))
    proposals = torch.stack(proposals, 2)
    std = torch.full_like(mean, args.max_std)
    for i in range(draws.samples.shape[1]):
        samples = (mean[:, None] + std[:, None] * draws.samples[:, i]).clamp(-1, 1)
        actions = torch.cat([proposals, samples], 1)
        scores = returns(model, z, actions, args).nan_to_num(nan=-1e9, posinf=-1e9, neginf=-1e9)
        best, elite = scores.topk(args.num_elites, 1)
        elites = torch.stack([a[e] for a, e in zip(actions, elite, strict=True)])
        w = torch.softmax(args.temperature * (best - best[:, :1]), 1)
        mean = torch.einsum("se,seta->sta", w, elites)
        std = torch.einsum("se,seta->sta", w, (elites - mean[:, None]) ** 2).sqrt().clamp(args.min_std, args.max_std)
    chosen = (w.log() - torch.log(-torch.log(draws.elite))).argmax(1)
    first = torch.stack([e[c, 0] for e, c in zip(elites, chosen, strict=True)])
    value = torch.stack([b[c] for b, c in zip(best, chosen, strict=True)])
    action = (first + std[:, 0] * draws.noise).clamp(-1, 1)
    return bmpc.Plan(action, first, elites[:, 0, 0], mean, std[:, 0], value)
