"""What is compiled computes what eager does, nothing waits in secret, and memory and launches are what was promised.

There may be no GPU. On the meta device reading a value on the host raises, and so does mixing in a CPU tensor: what
runs there from end to end has no hidden synchronisation and no misplaced tensor. Some tests need a GPU.
"""

import functools
import re
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, TASK, FakeEnvs, generator, make_model, small_args, start, train
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import bmpc
import bmpc_dual_policy
import bmpc_multihead
import tdmpc2

META = torch.device("meta")
EMPTY = torch.ops.aten.empty.memory_format
ALL_FLAGS = dict(
    td_target_use_ema_policy=True, policy_trust_region_coef=0.1, num_rollouts=2, encoder_consistency_coef=0.1,
    imagine_initial_source="replay_true", initial_expert_from_behavior=False, episodic=True, entropy_coef=1e-4,
)  # fmt: skip
HEADS = dict(planner_num_dynamics_heads=2, planner_value_std_coef_train=0.7, local_td_bootstrap=True, td_horizon=2)
TWO_POLICIES = dict(dual_policy_enabled=True, policy_value_std_coef=-0.3)


def everything(functions, args, device, script=bmpc):
    """Vector steps without simulators, six of them after warm-up with updates and reanalyze: the run."""
    envs = FakeEnvs([5, 4] * (args.num_envs // 2), terminal=(1,) if args.episodic else ())
    run = script.Run(args, TASK, device)
    run.functions = functions or run.functions
    if device != META:
        run.model.load_state_dict(make_model(args, script=script).state_dict())
    for step in range(args.horizon + 6):
        acted = *script.random_action(args, TASK.action_dim, run.make_generator("act")), run.prev_mean
        if step >= args.horizon:
            *acted, metrics = script.act(
                run.functions.plan, run.model, run.obs, run.prev_mean, args, run.make_generator
            )
            run.accumulate_metrics(metrics)
            script.train_step(run, pretraining=step == args.horizon)
        script.store_step(run, envs, *acted)
    return run


COMPILED = {  # flags, and of a sibling what it changed; plans for acting and for reanalyze are of one shape
    "cpu": (bmpc, dict(compile=True), []),
    "multihead": (bmpc_multihead, ALL_FLAGS | HEADS | dict(reanalyze_value_std_coef=0.7), ["plan", "world_model_loss"]),
    "dual": (bmpc_dual_policy, ALL_FLAGS | HEADS | TWO_POLICIES, ["policy_loss"]),
    "cuda compiled": (bmpc, dict(compile=True, cudagraphs=False, device="cuda"), []),
    "cuda captured": (bmpc, dict(compile=True, device="cuda"), []),
}


@pytest.mark.parametrize("name", COMPILED)
def test_each_function_is_one_graph_that_is_compiled_once_and_equals_eager(name):
    """As a run compiles them, where there is a compiler; a sibling's with the graphs alone."""
    script, flags, names = COMPILED[name]
    sizes = dict(num_samples=16, iterations=2, num_envs=4, horizon=2, reanalyze_interval=1, reanalyze_batch_size=2)
    args = small_args(script, **sizes | flags)
    if args.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    torch._dynamo.reset()
    compile = functools.partial(torch.compile, fullgraph=True, dynamic=False, backend="aot_eager")
    functions = script.Functions()._replace(**{name: compile(getattr(script, name)) for name in names})
    with torch._dynamo.config.patch(error_on_recompile=args.device == "cpu"):
        fast = everything(functions if names else None, args, torch.device(args.device), script=script)
    eager = everything(script.Functions(), args, torch.device(args.device), script=script)
    results = lambda run: {
        part: bmpc.checkpoint_contents(run)[part] for part in ("model", "optimizers", "buffer", "metrics")
    }
    torch.testing.assert_close(results(fast), results(eager), atol=1e-4, rtol=1e-3)
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


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
bmpc.setup_torch(bmpc.Args(device="cpu"))
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
    for name in ("sample_plan_noise", "sample_update_noise", "random_action"):
        moved = lambda draw, *given: torch.utils._pytree.tree_map_only(torch.Tensor, to_meta, draw(*given))
        monkeypatch.setattr(bmpc, name, functools.partial(moved, getattr(bmpc, name)))
    monkeypatch.setattr(bmpc, "seeded_generator", lambda seed, key, device: generator(seed))


def test_acting_learning_and_sampling_never_read_the_device(meta):
    """With every flag; also once the ring is full: windows leave."""
    args = small_args(reanalyze_interval=1, iterations=1, buffer_size=10, **ALL_FLAGS)
    run = everything(None, args, META)
    assert run.updates == 5 and run.pretraining_updates == 1 and run.buffer.step > run.buffer.capacity
    assert all(x.device == META for x in run.model.state_dict().values())


def test_one_copy_each_way_per_vector_step_and_a_few_per_log_interval(monkeypatch, tmp_path):
    """Counted over a run of train; the copies of an episode's beginning and of checkpoints are counted apart."""
    args = small_args(total_timesteps=80, log_freq=20, utd_ratio=2.0)
    envs = FakeEnvs([7, 11])
    run = start(args, envs)
    copies = {name: mock.Mock(wraps=getattr(bmpc, name)) for name in ("to_device", "to_host")}
    for name, copy in copies.items():
        monkeypatch.setattr(bmpc, name, copy)
    monkeypatch.setattr(bmpc, "save_checkpoint", lambda *given: None)
    train(run, envs, tmp_path)
    updates = 12 + 2 * 68  # each says which windows it wants
    logged = 3 + 2 + 2 + 2  # metrics cross together that come together: of pretraining, updates and plans
    assert [copy.call_count for copy in copies.values()] == [80 // 2 + updates, 80 // 2 + logged]


class Memory(MemTracker):
    """The bytes of the tensors that live at once; without its hooks, which know no module that is called twice."""

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = lambda *given: None

    def told(self, when):
        return round(self.get_tracker_snapshot(when)[META]["Total"] / 1e9, 1)


@pytest.mark.parametrize("size, kept, peak", [(5, 0.5, 1.9), (19, 0.6, 3.4)])
def test_the_memory_of_the_default_run_is_what_readme_says(meta, size, kept, peak):
    """In GB, eager, all states of a reanalyze at once as on a GPU."""
    args, task = bmpc.resolve_args(bmpc.Args(model_size=size, compile=False))
    with Memory() as memory:
        run = bmpc.Run(args, task, META)
        run.buffer.start_indices = np.zeros(1, int)  # as if there were one
        assert memory.told("current") == kept
        for run.updates in (0, args.reanalyze_interval - 1):  # the first makes Adam's moments, the second reanalyzes
            bmpc.train_step(run, pretraining=False)
    assert memory.told("peak") == peak


class Launches(TorchDispatchMode):
    """Names the operations that would be launched on a GPU: all but those that only make a tensor or a view of one.

    What is captured there, a function and the backward that follows from it, is one. What the host counts is none: in
    numpy, and in the only tensors of 64 bits that are added to.
    """

    def __init__(self, monkeypatch, script):
        super().__init__()
        self.names = []
        for where, name in ((script, "to_device"), (script, "to_host"), (torch.Tensor, "backward")):
            monkeypatch.setattr(where, name, self.one(getattr(where, name)))
        self.functions = script.Functions(*map(self.one, script.Functions()))

    def one(self, function):
        def call(*args, **kwargs):
            self.names.append(function.__name__)
            with _disable_current_modes():
                return function(*args, **kwargs)

        return call

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        counting = str(function) == "aten.add_.Tensor" and args[0].itemsize == 8
        if not (counting or function.is_view or function.namespace == "profiler" or function == EMPTY):
            self.names.append(str(function))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("script", [bmpc, bmpc_multihead, bmpc_dual_policy, tdmpc2], ids=lambda script: script.__name__)
def test_how_much_is_launched_beside_the_graphs(monkeypatch, script):
    """Of an update and of a vector step, with default flags; the first of each makes moments and sums."""
    envs, args = FakeEnvs([50, 70]), small_args(script, **{} if script is tdmpc2 else {"reanalyze_interval": 0})
    launches = Launches(monkeypatch, script)
    run = start(args, envs, launches.functions, script)
    for _ in range(8):
        envs.step_async(None)
        acted = script.random_action(args, TASK.action_dim, run.make_generator("act"))
        script.store_step(run, envs, *([acted] if script is tdmpc2 else acted), run.prev_mean)

    def vector_step():
        *acted, metrics = script.act(run.functions.plan, run.model, run.obs, run.prev_mean, args, run.make_generator)
        run.accumulate_metrics(metrics)
        envs.step_async(script.to_host(acted[0]))
        script.store_step(run, envs, *acted)

    of_update = 29 if script is tdmpc2 else 25  # two draws of heads, and a group of parameters with a rate of its own
    for part, most in ((lambda: script.train_step(run, pretraining=False), of_update), (vector_step, 25)):
        part()
        launches.names.clear()
        with launches:
            part()
        graphs = {"plan", "world_model_loss", "policy_loss"}  # a backward begins with ones_like
        singles = [name for name in launches.names if name not in graphs]
        assert len(singles) <= most, "\n".join(singles)


def test_adam_is_fused_where_it_can_be_and_capturable_on_cuda_only():
    for device, fused in ((torch.device("cpu"), True), (META, False)):
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
    given = None, None, torch.zeros(6, 4), torch.zeros(6, 3, 2), generator(), args
    once = lambda: bmpc.run_planner(bmpc.clone_outputs(replayed), *given)
    first, second = once(), once()
    assert [set(x.flatten().tolist()) for x in (*first, *second)] == [{1.0}] * 6 + [{2.0}] * 6


def test_throughput_prints_its_table():
    """Its other rows gpu.py prints too."""
    command = [sys.executable, "tests/throughput.py", *"--small --runs 1 --modes eager --only sample loop".split()]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert re.search("sample 256 windows of 1M rows .* ms .*loop, one decision .* ms", ran.stdout, re.DOTALL)


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
    rows = ["act, 1 env", "act, 4 env", "act, 16 env", "reanalyze, 60 states", "update ", "4 updates"]
    for row in [*rows, "update, num_rollouts 4", "update, 2 policies"]:
        assert re.search(rf"^{row}.* ms .*share", said, re.MULTILINE), row
    lines = (tmp_path / "gpu.csv").read_text().splitlines()
    assert lines[0].startswith("call,mode,ms") and lines[-1].startswith("a decision,")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_a_short_run_on_cuda(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--task cartpole-swingup --device cuda --steps 400 --learning-starts 100 --eval-freq 200 --log-freq 60"
    assert bmpc.main(flags.split() + "--eval-episodes 2 --model-size 1".split()) == 0
