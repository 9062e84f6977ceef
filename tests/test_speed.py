"""What was made fast computes what the plain version computes, compiled what eager does, and nothing waits in secret.

There may be no GPU. On the meta device reading a value on the host raises, and so does mixing in a CPU tensor: what
runs there from end to end has no hidden synchronisation and no misplaced tensor. The tests on CUDA stand at the end.
"""

import functools
import re
import shutil
import subprocess
import sys
import weakref

import numpy as np
import plain
import pytest
import torch
from conftest import CPU, ROOT, TASK, FakeEnvs, generator, make_batch, make_model, named, small_args, start, train
from torch.utils._python_dispatch import TorchDispatchMode

import bmpc
import bmpc_dual_policy
import bmpc_multihead

META = torch.device("meta")
ALL_FLAGS = dict(
    td_target_use_ema_policy=True, policy_trust_region_coef=0.1, num_rollouts=2, encoder_consistency_coef=0.1,
    imagine_initial_source="replay_true", initial_expert_from_behavior=False, episodic=True, entropy_coef=1e-4,
)  # fmt: skip
HEADS = dict(planner_num_dynamics_heads=2, planner_value_std_coef_train=0.7, local_td_bootstrap=True, td_horizon=2)


def test_a_fast_plan_equals_the_plain_one(double):
    args = small_args(num_samples=64, num_elites=16)
    model, rng = make_model(args, std=0.1), generator()
    z, draws = torch.randn(5, 4, generator=rng), bmpc.draw_plan(args, 5, 2, args.horizon, rng)
    mean = 0.1 * torch.randn(5, args.horizon, 2, generator=rng)
    plans = [plan(model, model.policy, z, mean, draws, args) for plan in (bmpc.plan, plain.plan)]
    for x, y in zip(*plans, strict=True):
        torch.testing.assert_close(x, y, atol=1e-10, rtol=1e-10)


def everything(functions, args, device, steps=2, script=bmpc):
    """`steps` decisions of every environment, with updates and reanalyze, without simulators: the run."""
    run, E, obs_dim = script.Run(args, TASK, device), args.num_envs, TASK.obs_dim
    run.functions = functions
    draw = lambda *shape: torch.rand(*shape, generator=generator(len(shape))).to(device)
    ended = lambda n: np.random.default_rng(run.buffer.step).random(n) > 0.8
    for step in range(args.horizon + steps):
        if step < args.horizon:
            acted = *script.act_randomly(args, TASK.action_dim, run.generator("act")), run.mean
        else:
            acted, metrics = script.act(functions.plan, run.model, run.obs, run.mean, args, run.generator)
            run.measure(metrics)
            script.learn(run, pretraining=step == args.horizon)
        action, expert, mean = (x.to(device) for x in acted)
        run.buffer.add(run.obs, action, expert, draw(E), draw(E), draw(E, obs_dim), ended(E))
        run.obs, run.mean = draw(E, obs_dim), script.shift(mean)
    return run


def compiled_with(backend, script, *names):
    """The script's functions, of which these are compiled."""
    options = dict(fullgraph=True, dynamic=False, backend=backend)
    return script.Functions(**{name: torch.compile(getattr(script.Functions(), name), **options) for name in names})


COMPILED = {  # what a sibling changed, with its flags; plans for acting and for reanalyze are of one shape
    "multihead": (bmpc_multihead, ["plan", "world_model_loss"], HEADS | dict(reanalyze_value_std_coef=0.7)),
    "dual": (bmpc_dual_policy, ["policy_loss"], HEADS | dict(dual_policy_enabled=True, policy_value_std_coef=-0.3)),
}


@pytest.mark.parametrize("name", COMPILED)
def test_each_function_is_one_graph_that_is_compiled_once(name):
    torch._dynamo.reset()
    script, names, own = COMPILED[name]
    sizes = dict(num_samples=16, iterations=2, horizon=1, reanalyze_interval=1, reanalyze_batch_size=2, num_q=2)
    args = small_args(script, **ALL_FLAGS, **sizes, **own)
    functions = compiled_with("aot_eager", script, *names)
    everything(functions, args, CPU, 2, script)
    with torch._dynamo.config.patch(error_on_recompile=True):
        run = everything(functions, args, CPU, 3, script)
    eager = everything(script.Functions(), args, CPU, 3, script)
    for (name, x), y in zip(run.model.named_parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-3, msg=name)
    assert len(run.means()) > 10  # all of them finite


def test_compiled_once_each_function_equals_eager_under_the_same_draws():
    """With the default compiler, where one is installed, else with the graphs alone."""
    torch._dynamo.reset()
    backend = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"
    args = small_args(horizon=2, iterations=2, num_samples=16)
    model, functions = make_model(args, std=0.1), compiled_with(backend, bmpc, *bmpc.Functions._fields)
    online = [[p for x in of.param_groups for p in x["params"]] for of in bmpc.make_optimizers(model, args)]
    for seed in range(2):
        batch, rng, results = make_batch(args, seed=seed), generator(seed), []
        draws, noise = bmpc.draw_plan(args, 3, 2, 2, rng), bmpc.draw_update(args, 2, named(seed))
        obs, mean = torch.randn(3, TASK.obs_dim, generator=rng), torch.zeros(3, 2, TASK.action_dim)
        for plan, world_model_loss, policy_loss in (functions, bmpc.Functions()):
            with torch._dynamo.config.patch(error_on_recompile=seed > 0):
                planned = plan(model, model.policy, obs, mean, draws, args)
                total, z, _ = world_model_loss(model, batch, noise, args)
                loss, scale, _ = policy_loss(model, z, batch.expert, args)
            gradients = [*torch.autograd.grad(total, online[0]), *torch.autograd.grad(loss, online[1])]
            results.append([*planned, total, z, loss, scale, *gradients])
        for x, y in zip(*results, strict=True):
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
bmpc.choose_device(bmpc.Args(device="cpu"))
page_faults()
print(before, page_faults())
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = map(int, ran.stdout.split())
    if before < 1000:
        pytest.skip("another C library, or huge pages everywhere")
    assert after < before / 10


# --- ready for a GPU


@pytest.fixture
def meta(monkeypatch):
    """Draws are made on the CPU, since there is no generator on meta, and moved there."""

    to_meta = lambda x: x.to(META)
    for name in ("draw_plan", "draw_update", "act_randomly"):
        moved = lambda draw, *given: torch.utils._pytree.tree_map_only(torch.Tensor, to_meta, draw(*given))
        monkeypatch.setattr(bmpc, name, functools.partial(moved, getattr(bmpc, name)))
    monkeypatch.setattr(bmpc, "make_generator", lambda seed, name, device: generator(seed))


def test_acting_learning_and_sampling_never_read_the_device(meta):
    """With every flag; also once the ring is full: windows leave."""
    args = small_args(reanalyze_interval=1, iterations=1, buffer_size=10, **ALL_FLAGS)
    run = everything(bmpc.Functions(), args, META, steps=4)
    assert run.updates == 3 and run.pretrained == 1 and run.buffer.step > run.buffer.capacity
    assert all(x.device == META for x in run.model.state_dict().values())


def test_the_meta_device_does_catch_a_hidden_synchronisation(meta, monkeypatch):
    honest = bmpc.score
    monkeypatch.setattr(bmpc, "score", lambda rewards, values: honest(rewards, values + bool(values.sum() > 0)))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        everything(bmpc.Functions(), small_args(), META)


def test_one_copy_each_way_per_vector_step_and_a_few_per_log_interval(monkeypatch, tmp_path):
    """Counted over a run of train; the copies of an episode's beginning and of checkpoints are counted apart."""
    args = small_args(total_timesteps=80, log_freq=20, utd_ratio=2.0)
    envs, counts = FakeEnvs([7, 11]), {"to_host": 0, "to_device": 0}
    run = start(args, envs)

    def counted(name, true, *given):
        counts[name] += 1
        return true(*given)

    for name in counts:
        monkeypatch.setattr(bmpc, name, functools.partial(counted, name, getattr(bmpc, name)))
    monkeypatch.setattr(bmpc, "save_checkpoint", lambda *given: None)
    train(run, envs, tmp_path)
    updates = 12 + 2 * 68  # each says which windows it wants
    logged = 3 + 2 + 2 + 2  # metrics cross together that come together: of pretraining, updates and plans
    assert counts == {"to_device": 80 // 2 + updates, "to_host": 80 // 2 + logged}


class Memory(TorchDispatchMode):
    """The bytes of the tensors on the meta device that live at once."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = set(), 0, 0

    def forget(self, key, size):
        self.known.discard(key)
        self.now -= size

    def note(self, x):
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if x.device == META and key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key, size)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **kwargs or {})
        torch.utils._pytree.tree_map_only(torch.Tensor, self.note, results)
        return results


@pytest.mark.parametrize("size, kept, peak", [(5, 0.5, 1.9), (19, 0.6, 3.4)])
def test_the_memory_of_the_default_run_is_what_readme_says(meta, size, kept, peak):
    """In GB, eager, all states of a reanalyze at once as on a GPU."""
    args, task = bmpc.fill_in(bmpc.Args(model_size=size, compile=False))
    with Memory() as memory:
        run = bmpc.Run(args, task, META)
        for _ in range(4):
            zeros = lambda *shape: torch.zeros(4, *shape, device=META)
            parts = [zeros(task.obs_dim), zeros(task.action_dim), zeros(2, task.action_dim), zeros(), zeros()]
            run.buffer.add(*parts, zeros(task.obs_dim), np.zeros(4, bool))
        assert round(memory.now / 1e9, 1) == kept
        for run.updates in (0, args.reanalyze_interval - 1):  # the first makes Adam's moments, the second reanalyzes
            bmpc.learn(run, pretraining=False)
    assert round(memory.peak / 1e9, 1) == peak, memory.peak


class Launches(TorchDispatchMode):
    """Names the operations that would be launched on a GPU: all but those that look at a tensor another way.

    What is captured there, a function and the backward that follows from it, is one. What the host counts is none: in
    numpy, and in the only tensors of 64 bits that are added to.
    """

    def __init__(self, monkeypatch, script):
        super().__init__()
        self.names, self.inside = [], False
        for where, name in ((script, "to_device"), (script, "to_host"), (torch.Tensor, "backward")):
            monkeypatch.setattr(where, name, self.one(getattr(where, name), name))
        self.functions = script.Functions(*(self.one(f, f.__name__) for f in script.Functions()))

    def one(self, function, name):
        def call(*args, **kwargs):
            self.names.append(name)
            self.inside = True
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = False

        return call

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        counting = str(function) == "aten.add_.Tensor" and args[0].itemsize == 8
        if not (self.inside or counting or function.is_view or function.namespace == "profiler"):
            self.names.append(str(function))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("script", [bmpc, bmpc_multihead, bmpc_dual_policy], ids=lambda script: script.__name__)
def test_how_much_is_launched_beside_the_graphs(monkeypatch, script):
    """Of an update and of a vector step, with default flags; the first of each makes moments and sums."""
    envs, args = FakeEnvs([50, 70]), small_args(script, reanalyze_interval=0)
    launches = Launches(monkeypatch, script)
    run = start(args, envs, launches.functions, script)
    for _ in range(8):
        envs.step_async(None)
        script.store(run, envs, *script.act_randomly(args, TASK.action_dim, run.generator("act")), run.mean)

    def vector_step():
        acted, metrics = script.act(run.functions.plan, run.model, run.obs, run.mean, args, run.generator)
        run.measure(metrics)
        envs.step_async(script.to_host(acted[0]))
        script.store(run, envs, *acted)

    for part, most in ((lambda: script.learn(run, pretraining=False), 25), (vector_step, 25)):
        part()
        launches.names.clear()
        with launches:
            part()
        graphs = {"plan", "world_model_loss", "policy_loss"}  # a backward begins with ones_like
        singles = [name for name in launches.names if name not in graphs]
        assert len(singles) <= most, "\n".join(singles)


def test_adam_is_fused_where_it_can_be_and_capturable_on_cuda_only():
    for device, fused in ((CPU, True), (META, False)):
        model = bmpc.WorldModel(TASK, small_args(), generator()).to(device)
        for optimizer in bmpc.make_optimizers(model, small_args()):
            assert (optimizer.defaults["fused"], optimizer.defaults["capturable"]) == (fused, False)


def test_what_a_replay_returns_is_kept_before_the_next():
    """A captured graph overwrites what it returned at its next replay: what plans leave behind is a copy."""
    kept = torch.zeros(6, 2)

    def replayed(model, policy, z, mean, draws, args):
        kept.add_(1.0)
        rows = kept[: len(z)]
        return bmpc.Plan(rows, rows, rows, rows[:, None], rows, rows[:, 0])

    args = small_args()
    given = replayed, None, None, torch.zeros(6, 4), torch.zeros(6, 3, 2), generator(), args
    once = lambda: bmpc.plan_in_chunks(*given)
    first, second = once(), once()
    assert [set(x.flatten().tolist()) for x in (*first, *second)] == [{1.0}] * 6 + [{2.0}] * 6


def test_throughput_prints_its_table():
    command = [sys.executable, str(ROOT / "tests" / "throughput.py"), "--small", "--runs", "1", "--modes", "eager"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    rows = ["act, 1 env", "act, 4 env", "act, 16 env", "reanalyze, 60 states", "update ", "4 updates"]
    for row in [*rows, "update, num_rollouts 4", "update, 2 policies"]:
        assert re.search(rf"^{row}.* ms .*share", ran.stdout, re.MULTILINE), row
    assert "sample 256 windows of 1M rows" in ran.stdout and "loop, one decision" in ran.stdout


def test_gpu_prints_its_table_with_a_cpu_standing_in(monkeypatch, tmp_path, capsys):
    import gpu

    monkeypatch.chdir(tmp_path)
    if not torch.cuda.is_available():
        assert gpu.main([]) == 1 and capsys.readouterr().out.count("\n") == 1
    monkeypatch.setattr(gpu, "SCRIPTS", {"bmpc": {}})
    assert gpu.main(["--device", "cpu", "--small", "--runs", "1", "--minutes", "0"]) == 0
    said = capsys.readouterr().out
    for line in ("waits: none in bmpc", "it logs the same numbers", "dog-run: at step", "| update | eager | "):
        assert line in said, said
    rows = (tmp_path / "gpu.csv").read_text().splitlines()
    assert rows[0].startswith("call,mode,ms") and rows[-1].startswith("a decision,")


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


@cuda
@pytest.mark.parametrize("graphs", [False, True], ids=["compiled", "captured"])
def test_on_cuda_compiled_and_captured_equal_eager(graphs):
    device = torch.device("cuda")
    args = small_args(compile=True, cudagraphs=graphs, device="cuda", reanalyze_interval=2)
    fast = everything(bmpc.compiled(args, device), args, device, steps=6)
    eager = everything(bmpc.Functions(), args, device, steps=6)
    for x, y in zip(fast.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-3)
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@cuda
def test_a_short_run_on_cuda(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--task cartpole-swingup --device cuda --steps 400 --learning-starts 100 --eval-freq 200 --log-freq 60"
    assert bmpc.main(flags.split() + "--eval-episodes 2 --model-size 1".split()) == 0
