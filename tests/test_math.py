"""Two-hot regression, divergences, weights and layers, each against a closed form or a slow loop."""

import functools
import math

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from conftest import TASK, generator, make_model, small_args
from torch.distributions import Normal, kl_divergence

import bmpc

ARGS = small_args()
EDGES = [math.copysign(math.expm1(abs(s)), s) for s in np.linspace(-10, 10, 101)]  # the values that lie on a bin
BETWEEN = [math.copysign(math.expm1(abs(s)), s) for s in np.linspace(-9.97, 9.97, 57)]
BEYOND = [1e9, -1e9, math.expm1(10) + 1, -math.expm1(10) - 1]


def test_symlog_is_sign_times_log1p_and_symexp_inverts_it(double):
    x = torch.tensor([0.0, 1e-8, -1e-8, 0.5, -0.5, 1.0, -7.0, 1e4, -1e6])
    expected = [math.copysign(math.log1p(abs(v)), v) for v in x.tolist()]
    torch.testing.assert_close(bmpc.symlog(x), torch.tensor(expected))
    torch.testing.assert_close(bmpc.symexp(bmpc.symlog(x)), x, rtol=1e-12, atol=0)


@pytest.mark.parametrize("values", [[0.0], EDGES, BETWEEN, BEYOND], ids=["zero", "edges", "between", "beyond"])
def test_two_hot_equals_a_loop_over_values_and_bins(double, values):
    x = torch.tensor(values)
    torch.testing.assert_close(bmpc.two_hot(x, ARGS), oracle.two_hot(x, ARGS), rtol=0, atol=1e-10)


def test_two_hot_on_and_beyond_the_last_bin_never_wraps():
    last = math.expm1(10.0)
    for value, bin_ in ((last, 100), (1e20, 100), (math.inf, 100), (-last, 0), (-1e20, 0), (0.0, 50)):
        target = bmpc.two_hot(torch.tensor([value]), ARGS)[0]
        assert target[bin_] == pytest.approx(1.0, abs=1e-4) and target.sum() == pytest.approx(1.0, abs=1e-6)


def test_two_hot_uses_the_bins_it_is_told(double):
    args = small_args(vmin=-2.0, vmax=3.0, num_bins=7)
    x = torch.tensor([-50.0, -1.0, 0.0, 0.3, 5.0, 50.0])
    torch.testing.assert_close(bmpc.two_hot(x, args), oracle.two_hot(x, args), rtol=0, atol=1e-12)
    inverse = bmpc.two_hot_inv(bmpc.two_hot(x, args).log(), args)
    torch.testing.assert_close(inverse, x.clamp(-math.expm1(2.0), math.expm1(3.0)))


@pytest.mark.parametrize("values", [[0.0], EDGES, BETWEEN], ids=["zero", "edges", "between"])
def test_two_hot_inv_gives_back_what_two_hot_took(double, values):
    x = torch.tensor(values)
    torch.testing.assert_close(bmpc.two_hot_inv(bmpc.two_hot(x, ARGS).log(), ARGS), x, rtol=1e-9, atol=1e-9)


def test_two_hot_inv_is_symexp_of_the_mean_bin_for_any_logits(double):
    """The mean is taken in symlog units: the mean of symexp(bins) would be far larger."""
    logits = 2 * torch.randn(40, 101, generator=generator())
    expected = []
    for row in logits.tolist():
        p = [math.exp(v) for v in row]
        s = sum(w * place for w, place in zip(p, oracle.bins(ARGS), strict=True)) / sum(p)
        expected.append(math.copysign(math.expm1(abs(s)), s))
    torch.testing.assert_close(bmpc.two_hot_inv(logits, ARGS), torch.tensor(expected), rtol=1e-9, atol=1e-12)


def test_soft_cross_entropy_is_log_loss_of_the_soft_target(double):
    logits = torch.randn(5, 7, generator=generator(1))
    target = torch.rand(5, 7, generator=generator(2)).softmax(-1)
    expected = F.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(bmpc.soft_cross_entropy(logits, target), expected)


def test_gaussian_kl_is_the_closed_form_in_this_direction(double):
    mean_p, mean_q = torch.randn(2, 50, 3, generator=generator(3))
    std_p, std_q = torch.rand(2, 50, 3, generator=generator(4)) + 0.05
    expected = kl_divergence(Normal(mean_p, std_p), Normal(mean_q, std_q))
    torch.testing.assert_close(bmpc.gaussian_kl(mean_p, std_p, mean_q, std_q), expected)
    assert not torch.allclose(bmpc.gaussian_kl(mean_q, std_q, mean_p, std_p), expected, rtol=0.1)


def test_lambda_weights_by_hand():
    like = torch.zeros(1)
    assert bmpc.rho_weights(small_args(), like).tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert bmpc.rho_weights(small_args(rho=1.0), like).tolist() == pytest.approx([1 / 3] * 3)
    assert bmpc.rho_weights(small_args(horizon=1), like).tolist() == [1.0]
    official = small_args(normalize_rho_weights=False)
    assert bmpc.rho_weights(official, like).tolist() == pytest.approx([1 / 3, 1 / 6, 1 / 12])


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


def test_simnorm_is_a_softmax_of_every_group_of_neighbours(double):
    x = torch.randn(3, 12, generator=generator(5))
    for row, out in zip(x, bmpc.simnorm(x, 4), strict=True):
        for g in range(3):
            group = [math.exp(v) for v in row[4 * g : 4 * g + 4].tolist()]
            assert out[4 * g : 4 * g + 4].tolist() == pytest.approx([v / sum(group) for v in group])


def test_networks_equal_layers_written_out_head_by_head(double):
    """Linear, dropout, LayerNorm, Mish; LayerNorm and SimNorm end encoder and dynamics; heads side by side."""
    args = small_args(num_enc_layers=3, episodic=True)
    model = make_model(args)
    obs, z = torch.randn(7, 4, generator=generator(6)), torch.randn(7, 16, generator=generator(7))
    a = torch.rand(7, 2, generator=generator(8))
    za, keep = torch.cat([z, a], -1), torch.rand(3, 7, 12, generator=generator(9))
    close = lambda got, expected: torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    close(model.encoder(obs), oracle.network(model.encoder, 0, obs))
    close(model.dynamics(z[None], a[None])[0], oracle.network(model.dynamics, 0, za))
    close(model.reward(z, a), oracle.network(model.reward, 0, za))
    close(model.policy(z), oracle.network(model.policy, 0, z))
    close(model.termination(z), oracle.network(model.termination, 0, z))
    for q in range(3):
        close(model.value(z[None])[q], oracle.network(model.value, q, z))
        close(model.value(z[None], keep=keep)[q], oracle.network(model.value, q, z, keep[q]))


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
    mask = bmpc.dropout_mask((2, 5, 301), p, generator(3))
    expected, place = torch.full((3010,), 1 / (1 - p)), -1
    for u in torch.rand(5000, generator=generator(3), dtype=torch.float64).tolist():  # more than the mask draws
        place += math.ceil(math.log(1 - u) / math.log1p(-p)) if u > 0 else 1
        if place < 3010:
            expected[place] = 0
    assert torch.equal(mask, expected.view(2, 5, 301))


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_dropout_drops_each_element_on_its_own(p):
    """All eight patterns of three elements come as often as for independent ones, to five standard deviations."""
    rng, N = generator(4), 20_000
    dropped = torch.stack([bmpc.dropout_mask((3,), p, rng) == 0 for _ in range(N)])
    counts = torch.bincount((dropped * torch.tensor([1, 2, 4])).sum(1), minlength=8).tolist()
    for pattern, count in enumerate(counts):
        drops = pattern.bit_count()
        probability = p**drops * (1 - p) ** (3 - drops)
        assert abs(count - N * probability) <= 5 * math.sqrt(N * probability * (1 - probability)), pattern


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


@pytest.mark.parametrize("low, high", [(-5.0, 1.0), (-3.0, 0.5)])
def test_the_policy_squashes_its_mean_and_keeps_log_std_in_its_range(double, low, high):
    args = small_args(log_std_min=low, log_std_max=high)
    policy = make_model(args, std=3.0).policy
    z = 100 * torch.randn(500, 16, generator=generator(10))
    m, s = policy(z).chunk(2, -1)
    mean, std = bmpc.policy_gaussian(policy, z, args)
    torch.testing.assert_close(mean, torch.tanh(m))
    torch.testing.assert_close(std.log(), low + (high - low) / 2 * (torch.tanh(s) + 1))
    assert std.min() < math.exp(low + 0.1) and std.max() > math.exp(high - 0.1)  # the whole range is in use
    eps = torch.randn(500, 2, generator=generator(11))
    torch.testing.assert_close(bmpc.sample_action(policy, z, eps, args), (mean + std * eps).clamp(-1, 1))
