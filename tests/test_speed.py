"""What was made fast computes what the plain version computes, compiled what eager does, and nothing waits in secret.

There is no GPU here. On the meta device reading a value on the host raises, and so does mixing in a CPU tensor: what runs
there from end to end has no hidden synchronisation and no misplaced tensor. The tests on CUDA stand at the end.
"""

import dataclasses
import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import bmpc
import bmpc_dual_policy
import bmpc_multihead
import plain
from conftest import ROOT, FakeEnvs, NeverStop, TASK, generator, make_batch, make_model, small_args, start

META = torch.device("meta")
SCRIPTS = {
    bmpc: {},
    bmpc_multihead: {"planner_num_dynamics_heads": 2, "planner_value_std_coef_train": 0.5},
    bmpc_dual_policy: {"planner_num_dynamics_heads": 2, "planner_value_std_coef_train": 1.0, "dual_policy_enabled": True},
}
ALL_FLAGS = dict(
    td_target_use_ema_policy=True, policy_trust_region_coef=0.1, num_rollouts=2, encoder_consistency_coef=0.1,
    imagine_initial_source="replay_true", initial_expert_from_behavior=False, episodic=True, entropy_coef=1e-4,
)  # fmt: skip


def script_args(script, **changes):
    """The small arguments, of a sibling's Args."""
    return script.Args(**(dataclasses.asdict(small_args()) | SCRIPTS[script] | changes))


# --- against the plain version


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_a_fast_plan_equals_the_plain_one(dtype, close):
    torch.set_default_dtype(dtype)
    try:
        args = small_args(num_samples=64, num_elites=16)
        model, z = make_model(args, std=0.1), torch.rand(5, args.latent_dim)
        draws = bmpc.draw_plan(args, 5, TASK.action_dim, args.horizon, generator(), torch.device("cpu"))
        mean = 0.1 * torch.randn(5, args.horizon, TASK.action_dim)
        mine = bmpc.plan(model, model.policy, z, mean, draws, args, -5.0, 1.0)
        theirs = plain.plan(model, model.policy, z, mean, draws, args, -5.0, 1.0)
        for x, y in zip(mine, theirs):
            torch.testing.assert_close(x, y, atol=close, rtol=close)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("script, heads, most", [(bmpc, 1, 4), (bmpc_multihead, 1, 4), (bmpc_multihead, 2, 2)])
def test_chunks_of_states_are_planned_as_one_batch(script, heads, most):
    args, more = small_args(num_samples=512, num_elites=16), {}  # 2048 // 512 = 4 states a chunk
    if script is bmpc_multihead:
        args, more = script.Args(**dataclasses.asdict(args), planner_num_dynamics_heads=heads), {"std_coef": 0.5}
    model, z, seen = make_model(args, std=0.1, script=script), torch.rand(10, args.latent_dim), []
    draws = script.draw_plan(args, 10, TASK.action_dim, args.horizon, generator(), torch.device("cpu"))
    mean = torch.zeros(10, args.horizon, TASK.action_dim)

    def plan(*given):
        seen.append(len(given[2]))
        return script.plan(*given)

    chunked = script.plan_in_chunks(plan, model, model.policy, z, mean, draws, args, **more)
    whole = script.plan(model, model.policy, z, mean, draws, args, args.log_std_min, args.log_std_max, **more)
    assert sum(seen) == 10 and max(seen) == most
    for x, y in zip(chunked, whole):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype, close", [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_the_algebraic_mish_is_mish(dtype, close, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x = torch.cat([torch.linspace(-30, 30, 6001), torch.tensor([-1e4, 1e4])]).to(dtype).requires_grad_()
    y = bmpc.mish(x)
    monkeypatch.undo()
    truth = F.mish(x.detach().double())
    torch.testing.assert_close(y.detach().double(), truth, atol=close, rtol=close)
    reference = x.detach().double().requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), x)[0].double(), torch.autograd.grad(F.mish(reference).sum(), reference)[0], atol=1e-5, rtol=1e-5
    )


def test_the_product_with_a_concatenation_is_the_sum_of_two_with_its_gradients():
    layer = bmpc.Linear(3, 7, 5, generator()).double()
    x, a = torch.randn(3, 4, 1, 5).double(), torch.randn(1, 4, 6, 2).double()
    joined = torch.cat([x.expand(3, 4, 6, 5), a.expand(3, 4, 6, 2)], -1)
    mine, theirs = layer(x, a), layer(joined)
    torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)
    for p, q in zip(torch.autograd.grad(mine.square().sum(), layer.parameters()), torch.autograd.grad(theirs.square().sum(), layer.parameters())):
        torch.testing.assert_close(p, q, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("shared", [False, True])
def test_one_head_after_the_other_equals_the_stack_at_once_with_its_gradients(shared):
    net = bmpc.MLP([7, 16, 16, 8], generator(), heads=3, simnorm_dim=4).double()
    x, a, keep = torch.randn(1 if shared else 3, 4, 1, 5), torch.randn(1, 4, 6, 2), torch.rand(3, 4, 6, 16)
    x, a, keep = (v.double().requires_grad_() for v in (x, a, keep))
    leaves = [x, a, keep, *net.parameters()]
    weights = torch.randn(3, 4, 6, 8).double()
    one_by_one, at_once = net(x, a, keep), net.run(bmpc.ALL, x, a, keep)  # run: what a GPU does
    torch.testing.assert_close(one_by_one, at_once, atol=1e-12, rtol=1e-12)
    for p, q in zip(torch.autograd.grad((one_by_one * weights).sum(), leaves), torch.autograd.grad((at_once * weights).sum(), leaves)):
        torch.testing.assert_close(p, q, atol=1e-10, rtol=1e-10)


# --- one graph each, compiled once


def everything(script, functions, args, device, steps=2):
    """`steps` decisions of every environment, with updates and reanalyze: (Training, Progress)."""
    t, p = script.set_up(args, TASK, device)
    t = t._replace(functions=functions)
    E, O = args.num_envs, TASK.obs_dim
    draw = lambda *shape: torch.rand(*shape, generator=generator(len(shape)), device=device)
    t.buffer.begin(torch.ones(E, dtype=torch.bool, device=device), draw(E, O))
    for step in range(args.horizon + steps):
        if step < args.horizon:
            p.acted = script.act_randomly(E, TASK.action_dim, args, t.draws, device)
        else:
            p.acted, metrics = script.act(functions.plan, t.model, t.buffer, p.mean, args, t.draws)
            t.metrics.add(metrics, step)
            script.learn(t, p, script.Stopwatch(torch.device("cpu")), pretraining=step == args.horizon)
        t.buffer.add(p.acted.action, p.acted.expert, draw(E), draw(E), draw(E, O))
        t.buffer.begin(draw(E) > 0.5, draw(E, O))
        p.mean = p.acted.mean
    return t, p


def compiled_with(script, backend):
    return script.Functions(*(torch.compile(f, fullgraph=True, dynamic=False, backend=backend) for f in script.Functions()))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_each_function_is_one_graph_that_is_compiled_once(script):
    torch._dynamo.reset()
    args = script_args(script, reanalyze_interval=1, **ALL_FLAGS, num_samples=16, iterations=2, extra_iterations=0)
    functions = compiled_with(script, "aot_eager")
    everything(script, functions, args, torch.device("cpu"), steps=3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        everything(script, functions, args, torch.device("cpu"), steps=3)


def test_compiled_equals_eager_under_the_same_draws():
    """With the default compiler, where one is installed, else with the graphs alone."""
    import shutil

    torch._dynamo.reset()
    backend = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"
    args = small_args(horizon=2, iterations=2, num_samples=16)
    model, batch = make_model(args, std=0.1), make_batch(args)
    functions = compiled_with(bmpc, backend)
    draws = bmpc.draw_plan(args, 3, TASK.action_dim, args.horizon, generator(), torch.device("cpu"))
    z, mean = torch.rand(3, args.latent_dim), torch.zeros(3, args.horizon, TASK.action_dim)
    given = (model, model.policy, z, mean, draws, args, -5.0, 1.0)
    for x, y in zip(functions.plan(*given), bmpc.plan(*given)):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    noise = bmpc.draw_update(args, TASK.action_dim, generator(), torch.device("cpu"))
    online = bmpc.make_optimizers(model, args)[0].params
    gradients = []
    for loss in (functions.world_model_loss, bmpc.world_model_loss):
        total, states, _ = loss(model, batch, noise, args)
        gradients.append([total, states, *torch.autograd.grad(total, online)])
    for x, y in zip(*gradients):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-3)


def test_freed_memory_is_kept():
    """Tensors of the size of a plan's are made and dropped: once told, the process maps no page anew."""
    code = """
import resource, torch, bmpc
def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        kept = [torch.ones(2**20) for _ in range(4)]
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
page_faults()
before = page_faults()
bmpc.keep_freed_memory()
page_faults()
print(before, page_faults())
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = map(int, ran.stdout.split())
    if before < 1000:
        pytest.skip("another C library, or huge pages everywhere")
    assert after < before / 10


# --- ready for a GPU


@pytest.mark.parametrize(
    "script, changes", [(bmpc, {}), *((script, ALL_FLAGS) for script in SCRIPTS)], ids=lambda x: getattr(x, "__name__", "")
)
def test_acting_learning_and_sampling_never_read_the_device(script, changes):
    args = script_args(script, reanalyze_interval=1, device="meta", iterations=1, **changes)
    t, p = everything(script, script.Functions(), args, META, steps=2)
    assert p.updates == 1 and p.pretrained == 1
    assert all(x.device == META for x in t.model.state_dict().values())


def test_the_meta_device_does_catch_a_hidden_synchronisation(monkeypatch):
    honest = bmpc.score
    monkeypatch.setattr(bmpc, "score", lambda rewards, values: honest(rewards, values) if values.sum() > 0 else honest(rewards, values))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        everything(bmpc, bmpc.Functions(), small_args(device="meta"), META)


def test_one_copy_each_way_per_vector_step_and_one_per_log_interval(monkeypatch, tmp_path):
    """Counted over a run of bmpc.train; the copies of an episode's beginning and of checkpoints are counted apart."""
    args = small_args(total_timesteps=80, log_freq=20, utd_ratio=2.0)
    envs = FakeEnvs([7, 11])
    t, p = start(args, envs)
    counts = {"to_host": 0, "to_device": 0}
    for name in counts:
        true = getattr(bmpc, name)

        def counted(*given, name=name, true=true):
            counts[name] += 1
            return true(*given)

        monkeypatch.setattr(bmpc, name, counted)
    monkeypatch.setattr(bmpc.Checkpointer, "save", lambda *given: None)
    bmpc.train(t, p, envs, None, bmpc.Log(tmp_path, 1), NeverStop(), tmp_path)
    vector_steps, intervals = 80 // 2, 80 // 20
    assert counts["to_device"] == vector_steps
    # the first interval, of random actions alone, has no metrics to read
    assert vector_steps + intervals - 1 <= counts["to_host"] <= vector_steps + intervals


def test_shapes_do_not_depend_on_what_was_drawn():
    args, buffer = small_args(), None
    t, p = start(args, FakeEnvs([5, 9]))
    buffer = t.buffer
    for k in range(12):
        buffer.add(torch.rand(2, 2), torch.rand(2, 2, 2), torch.rand(2), torch.zeros(2), torch.rand(2, 4))
    shapes = {
        tuple(tuple(x.shape) for x in buffer.sample(torch.rand(args.batch_size, dtype=torch.float64, generator=generator(k))))
        for k in range(5)
    }
    assert len(shapes) == 1


def test_adam_is_capturable_on_cuda_only(monkeypatch):
    seen = []
    monkeypatch.setattr(bmpc, "adam", lambda *given, **options: seen.append(options["capturable"]))
    bmpc.Adam([([torch.zeros(2)], 0.1)], 1.0).step([torch.ones(2)])
    assert seen == [False]
    assert "capturable = self.params[0].is_cuda" in inspect.getsource(bmpc.Adam)


def test_all_that_the_optimizer_step_changes_stays_where_it_is(monkeypatch):
    """A CUDA graph is refused where an input that may move is changed in place."""
    from torch._inductor.compile_fx import compile_fx

    monkeypatch.setattr(torch._functorch.config, "enable_autograd_cache", False)  # a graph that was seen before would not come
    args, moving = small_args(policy_trust_region_coef=0.1), []
    t, _ = bmpc.set_up(args, TASK, torch.device("cpu"))

    def watch(graph, inputs, **options):
        places = [node for node in graph.graph.nodes if node.op == "placeholder"]
        changed = {places.index(node.args[0]) for node in graph.graph.nodes if "aten.copy_" in str(node.target)}
        assert len(changed) > 100
        moving.append(len(changed - set(options["static_input_idxs"])))
        raise RuntimeError("seen")

    for promised in (False, True):
        if promised:
            for optimizer in t.optimizers:
                optimizer.stay()
        step = torch.compile(bmpc.optimize, fullgraph=True, backend=lambda *graph: compile_fx(*graph, inner_compile=watch))
        grads, policy_grads = ([torch.randn_like(p) for p in optimizer.params] for optimizer in t.optimizers)
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="seen"):
            step(t.model, t.optimizers, grads, policy_grads, torch.tensor(1.0), args)
    state = sum(len(values) for optimizer in t.optimizers for values in optimizer.state_dict().values())
    assert moving == [state, 0]


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


@cuda
@pytest.mark.parametrize("graphs", [False, True], ids=["compiled", "captured"])
def test_on_cuda_compiled_and_captured_equal_eager(graphs):
    device, args = torch.device("cuda"), small_args(compile=True, cudagraphs=graphs, device="cuda", reanalyze_interval=2)
    fast = everything(bmpc, bmpc.compiled(args, device), args, device, steps=6)[0]
    eager = everything(bmpc, bmpc.Functions(), args, device, steps=6)[0]
    for x, y in zip(fast.model.parameters(), eager.model.parameters()):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-3)
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@cuda
def test_a_short_run_on_cuda(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--task cartpole-swingup --device cuda --steps 400 --learning-starts 100 --eval-freq 200 --log-freq 60 --eval-episodes 2 --model-size 1"
    assert bmpc.main(flags.split()) == 0
