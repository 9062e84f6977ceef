"""The planner as one would first write it: one batch, inputs concatenated, every candidate scored in every iteration.

What bmpc.py does to be fast (the shared latent multiplied once, the proposals scored once, chunks that fit the cache,
stacked heads) is absent here. `throughput.py --compare` times it, and tests hold the scripts' plans against it.
"""

import torch
from oracle import drawn, heads, imagined, network


@torch.no_grad()
def plan(model, policy, obs, mean, draws, args, coef=None):
    """The fields of the scripts' Plan; the last one, of the heads' spread, only where that has a coefficient."""
    z, (_, P, _, _) = network(model.encoder, 0, obs)[:, None], draws.policy.shape
    state, proposals = z.expand(-1, P, -1), []
    for eps in draws.policy.unbind(2):  # the policy's sequences, rolled through the model
        proposals.append(drawn(policy, state, eps, args))
        state = network(model.dynamics, 0, torch.cat([state, proposals[-1]], -1))
    std = torch.full_like(mean, args.max_std)
    for eps in draws.candidates.unbind(1):
        samples = (mean[:, None] + std[:, None] * eps).clamp(-1, 1)
        actions = torch.cat([torch.stack(proposals, 2), samples], 1)  # (S, N, T, A)
        start, given = z.expand(-1, actions.shape[1], -1), lambda z, a: a
        each = [imagined(model, h, start, actions.unbind(2), given, model.value, args) for h in range(heads(args))]
        spread = torch.cat(each).std(0, correction=0)
        scores = torch.cat(each).mean(0) + (coef or 0.0) * spread
        best, elite = scores.nan_to_num(nan=-1e9, posinf=-1e9, neginf=-1e9).topk(args.num_elites, 1)
        elites = torch.stack([a[e] for a, e in zip(actions, elite, strict=True)])
        w = torch.softmax(args.temperature * (best - best[:, :1]), 1)
        mean = torch.einsum("se,seta->sta", w, elites)
        std = torch.einsum("se,seta->sta", w, (elites - mean[:, None]) ** 2).sqrt().clamp(args.min_std, args.max_std)
    chosen = (w.log() - torch.log(-torch.log(draws.elite))).argmax(1)
    first = torch.stack([e[c, 0] for e, c in zip(elites, chosen, strict=True)])
    value = torch.stack([b[c] for b, c in zip(best, chosen, strict=True)])
    action = (first + std[:, 0] * draws.action).clamp(-1, 1)
    fields = [action, first, elites[:, 0, 0], mean, std[:, 0], value]
    if coef is None:
        return fields
    spread = spread.gather(1, elite)
    share = abs(coef * spread) / (abs(coef * spread) + abs(best - coef * spread))
    return [*fields, spread.mean(1), share.mean(1), ((elite < P) * 1.0).mean(1)]
