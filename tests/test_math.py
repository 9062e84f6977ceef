"""Two-hot regression, the KL's scale and layers, each against a closed form or a slow loop.

What is not here (divergences, step weights, SimNorm, the squashed Gaussian) test_learning.py holds against the oracle.
"""

import functools
import math

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from conftest import TASK, generator, small_args

import bmpc

EDGES = [math.copysign(math.expm1(abs(s)), s) for s in np.linspace(-10, 10, 101)]  # the values that lie on a bin
BETWEEN = [math.copysign(math.expm1(abs(s)), s) for s in np.linspace(-9.97, 9.97, 57)]


@pytest.mark.parametrize("args", [small_args(), small_args(vmin=-2.0, vmax=3.0, num_bins=7)], ids=["101", "7"])
def test_two_hot_and_its_inverse_equal_loops_over_values_and_bins(double, args):
    """On, between and beyond the bins, where nothing wraps around; the inverse is symexp of the mean bin."""
    low, high = (math.copysign(math.expm1(abs(s)), s) for s in (args.vmin, args.vmax))
    x = torch.tensor([0.0, 1e-8, *EDGES, *BETWEEN, low, high, low - 1, high + 1, 1e20, -1e20])
    target = bmpc.two_hot(x, args)
    torch.testing.assert_close(target, oracle.two_hot(x, args), rtol=0, atol=1e-10)
    torch.testing.assert_close(bmpc.two_hot_inv(target.log(), args), x.clamp(low, high), rtol=1e-9, atol=1e-9)
    assert bmpc.two_hot(torch.tensor([math.inf, -math.inf]), args)[:, [-1, 0]].tolist() == [[1, 0], [0, 1]]
    logits = 2 * torch.randn(40, args.num_bins, generator=generator())
    torch.testing.assert_close(bmpc.two_hot_inv(logits, args), oracle.scalar(logits, args), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 9, 101, 256])
def test_kl_scale_follows_the_spread_of_the_percentiles(double, count):
    kl = 50 * torch.rand(count, generator=generator()) ** 1.5
    spread = max(np.percentile(kl.numpy(), 95) - np.percentile(kl.numpy(), 5), 1.0)
    assert float(bmpc.update_kl_scale(torch.tensor(7.0), kl)) == pytest.approx(7 + 0.01 * (spread - 7))


@pytest.mark.parametrize("dtype, close", [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_mish_has_one_value_and_gradient_compiled_and_eager(monkeypatch, dtype, close):
    """The algebraic form that is compiled equals x tanh(softplus(x)) everywhere, also where exp would overflow."""
    x = torch.cat([torch.linspace(-30, 30, 6001), torch.tensor([-1e4, 1e4])]).to(dtype).requires_grad_()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    algebraic = bmpc.mish(x)
    monkeypatch.undo()
    truth = x * torch.tanh(F.softplus(x))
    for y in (algebraic, bmpc.mish(x)):
        torch.testing.assert_close(y, truth, atol=close, rtol=close)
        slopes = [torch.autograd.grad(v.sum(), x, retain_graph=True)[0] for v in (y, truth)]
        torch.testing.assert_close(*slopes, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_one_head_after_the_other_equals_the_stack_at_once_and_written_out_with_its_gradients(double, shared):
    """On x and a whose leading dimensions only broadcast: the product with [x, a] is the sum of two."""
    net = bmpc.MLP([7, 16, 16, 8], generator(), heads=3, last=functools.partial(bmpc.simnorm, group=4))
    x, a, keep = torch.randn(1 if shared else 3, 4, 1, 5), torch.randn(1, 4, 6, 2), torch.rand(3, 4, 6, 16)
    leaves = [v.requires_grad_() for v in (x, a, keep)] + list(net.parameters())
    weights = torch.randn(3, 4, 6, 8)
    joined = torch.cat([x.expand(3, 4, 6, 5), a.expand(3, 4, 6, 2)], -1)
    written = torch.stack([oracle.network(net, h, joined[h], keep[h]) for h in range(3)])
    grads = lambda y: torch.autograd.grad((y * weights).sum(), leaves, retain_graph=True)
    for y in (net(x, a, keep), net(x, a, keep, slice(None))):  # at once, as on a GPU
        torch.testing.assert_close(y, written, atol=1e-12, rtol=1e-12)
        for p, q in zip(grads(y), grads(written), strict=True):
            torch.testing.assert_close(p, q, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("p", [1e-30, 1e-4, 0.01, 0.3, 0.97])
def test_a_dropout_mask_walks_geometric_gaps(p):
    args = small_args(num_q=1, horizon=2, batch_size=5, mlp_dim=301, dropout=p)
    u = bmpc.draw_update(args, 2, generator(3)).dropout
    mask = bmpc.dropout_mask((1, 2, 5, 301), p, u)
    more = torch.rand(5000, generator=generator(4), dtype=torch.float64)
    assert torch.equal(mask, oracle.dropped(args, torch.cat([u, more])))  # the numbers reach to the end


def test_networks_have_the_layers_and_widths_asked_for():
    args = small_args(enc_dim=24, mlp_dim=20, latent_dim=16, num_enc_layers=4, num_q=5, episodic=True)
    model = bmpc.WorldModel(TASK, args, generator())
    widths = lambda net: [tuple(p.shape) for name, p in net.named_parameters() if name.endswith("weight")]
    assert widths(model.encoder) == [(1, 4, 24), (1, 24, 24), (1, 24, 24), (1, 24, 16)]
    assert widths(model.dynamics) == [(1, 18, 20), (1, 20, 20), (1, 20, 16)]
    assert widths(model.reward) == [(1, 18, 20), (1, 20, 20), (1, 20, 101)]
    assert widths(model.value) == widths(model.target_value) == [(5, 16, 20), (5, 20, 20), (5, 20, 101)]
    assert widths(model.policy) == [(1, 16, 20), (1, 20, 20), (1, 20, 4)]
    assert widths(model.termination) == [(1, 16, 20), (1, 20, 20), (1, 20, 1)]


def test_weights_begin_small_and_the_heads_of_rewards_and_values_at_zero():
    args = small_args(mlp_dim=128, latent_dim=128, enc_dim=128, num_q=4)
    model = bmpc.WorldModel(TASK, args, generator())
    for net in (model.encoder, model.dynamics, model.reward, model.value, model.policy):
        for name, p in net.named_parameters():
            if name.endswith("bias") or name.endswith("shift"):
                assert (p == 0).all()
            elif name.endswith("scale"):
                assert (p == 1).all()
            elif name == "layers.2.weight" and net in (model.reward, model.value):
                assert (p == 0).all()
            else:
                assert p.detach().std().item() == pytest.approx(0.02, rel=0.15)
    first = model.value.layers[0].weight
    assert not torch.equal(first[0], first[1])  # every head its own numbers
    assert torch.equal(first, model.target_value.layers[0].weight)
