"""Compiled functions match eager ones, the host does not wait for the GPU, and memory and launches are limited.

Most tests need no GPU. They use the meta device, where reading a value on the host raises an exception, and so does
mixing in a CPU tensor. A run that works there has no hidden synchronization and no tensor on the wrong device.
"""

import ctypes
import functools
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import runs
import throughput
import torch
from conftest import TASK, FakeEnvs, generator, make_model, small_args, start, train
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

import bmpc
import bmpc_dual_policy
import bmpc_multihead
import tdmpc2

SCRIPTS = [bmpc, bmpc_multihead, bmpc_dual_policy, tdmpc2]
META = torch.device("meta")
EMPTY = torch.ops.aten.empty.memory_format
ALL_FLAGS = dict(
    td_target_use_ema_policy=True, policy_trust_region_coef=0.1, num_rollouts=2, encoder_consistency_coef=0.1,
    imagine_initial_source="replay_true", initial_expert_from_behavior=False, episodic=True, entropy_coef=1e-4,
)  # fmt: skip
HEADS = dict(planner_num_dynamics_heads=2, planner_value_std_coef_train=0.7, local_td_bootstrap=True, td_horizon=2)
TWO_POLICIES = dict(dual_policy_enabled=True, policy_value_std_coef=-0.3)


def random_transition(run, script):
    """Return a list of a random action and its expert; tdmpc2.py has no expert."""
    transition = script.random_action(run.args, TASK.action_dim, run.make_generator("act"))
    return [transition] if script is tdmpc2 else [*transition]


def short_run(functions, args, device, script=bmpc, steps=6):
    """Make a run on fake environments with some vector steps after the warm-up, with updates and reanalyze."""
    envs = FakeEnvs([5, 4] * (args.num_envs // 2), terminal=(1,) if args.episodic else ())
    run = script.Run(args, TASK, device)
    run.functions = functions or run.functions
    if device != META:
        run.model.load_state_dict(make_model(args, script=script).state_dict())
    with script.compile_ahead(run, TASK):
        for step in range(args.horizon + steps):
            acted = [*random_transition(run, script), run.prev_mean]
            if step >= args.horizon:
                *acted, metrics = script.act(
                    run.functions.plan, run.model, run.obs, run.prev_mean, args, run.make_generator
                )
                run.accumulate_metrics(metrics)
                script.train_step(run, pretraining=step == args.horizon)
            script.store_step(run, envs, *acted)
    return run


NAMES = bmpc.Functions._fields  # plan, world_model_loss, policy_loss
COMPILED = {  # script, flags, and for a sibling the functions that it changes
    "cpu": (bmpc, dict(compile=True), []),
    "multihead": (bmpc_multihead, ALL_FLAGS | HEADS | dict(reanalyze_value_std_coef=0.7), ["plan", "world_model_loss"]),
    "dual": (bmpc_dual_policy, ALL_FLAGS | HEADS | TWO_POLICIES, ["policy_loss"]),
    "tdmpc2": (tdmpc2, dict(episodic=True), NAMES),
    "cuda compiled": (bmpc, dict(compile=True, cudagraphs=False, device="cuda"), []),
    "cuda captured": (bmpc, dict(compile=True, device="cuda"), []),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_functions_match_eager(name, monkeypatch, tmp_path):
    """Each function is one graph that is compiled once.

    bmpc.py uses the compiler of a run, on a CPU in two processes. Whether the first one loads what the second one
    compiled is tested only if the cache is empty, as on a new machine. Siblings use the backend "eager", which captures
    graphs but needs no compiler; their functions are called twice, which shows whether they are compiled again.
    """
    script, flags, names = COMPILED[name]
    iterations, steps = (1, 3) if names else (2, 6)
    sizes = dict(num_samples=16, iterations=iterations, num_envs=4, horizon=2, num_q=2)
    if script is not tdmpc2:
        sizes |= dict(reanalyze_interval=1, reanalyze_batch_size=2)  # plans have the same shape as those for acting
    args = small_args(script, **sizes | flags)
    if args.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if name == "cpu":
        bmpc.setup_torch(args)  # as in the second process
        # Here, the main module is not the script
        monkeypatch.setattr(bmpc, "COMPILE_AHEAD", bmpc.COMPILE_AHEAD.replace("torch = script.torch\n", ""))
        monkeypatch.setenv("OMP_NUM_THREADS", "2")  # for the second process; with one thread there is none
        torch.set_num_threads(2)
    second_processes = []
    said = tmp_path / "said"  # by the second process

    def popen(argv, *args, make=subprocess.Popen, **options):
        if bmpc.COMPILE_AHEAD not in argv:
            return make(argv, *args, **options)
        with said.open("w") as file:
            second_processes.append(make(argv, *args, **options | {"stdout": file}))
        return second_processes[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    compile = functools.partial(torch.compile, fullgraph=True, dynamic=False, backend="eager")
    functions = script.Functions()._replace(**{name: compile(getattr(script, name)) for name in names})
    with torch._dynamo.config.patch(error_on_recompile=args.device == "cpu"):
        compiled = short_run(functions if names else None, args, torch.device(args.device), script, steps)
    torch.set_num_threads(1)
    if name == "cpu":  # two parts of a plan, the policy loss and its gradients; the latter may be loaded as one
        assert "compiled part 3 " in said.read_text()
        assert torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"] >= 4
    assert [process.returncode for process in second_processes] == ([0] if name == "cpu" else [])
    eager = short_run(script.Functions(), args, torch.device(args.device), script, steps)
    parts = ("model", "optimizers", "buffer", "metrics")
    results = lambda run: {part: bmpc.checkpoint_contents(run)[part] for part in parts}
    torch.testing.assert_close(results(compiled), results(eager), atol=1e-4, rtol=1e-3)
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


# --- the second process that compiles


@pytest.fixture
def two_threads():
    """With one thread, there is no second process."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("command, code", [("false", 1), ("sleep 60", -signal.SIGKILL)])
def test_a_run_does_not_depend_on_the_second_process(monkeypatch, two_threads, command, code):
    """If it fails, the first plan goes on. If it still compiles when the run ends by an error, it is killed."""
    processes = []

    def popen(argv, make=subprocess.Popen, **options):
        processes.append(make(command.split(), **options))
        return processes[-1]

    functions = bmpc.Functions(policy_loss=functools.partial(bmpc.policy_loss))  # is another one, as if compiled
    run = start(small_args(), FakeEnvs([5, 4]), functions)
    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(bmpc.RunError), bmpc.compile_ahead(run, TASK):
        if command == "false":
            bmpc.act(run.functions.plan, run.model, run.obs, run.prev_mean, run.args, run.make_generator)
        raise bmpc.RunError
    assert [process.returncode for process in processes] == [code]


def test_the_second_process_ends_if_the_main_process_is_killed(tmp_path):
    script = "import time; print('started', flush=True); time.sleep(20); print('not killed')"
    (tmp_path / "script.py").write_text(script)
    program = [sys.executable, "-c", bmpc.COMPILE_AHEAD, str(tmp_path), "script", "{}", "[]"]
    main_process = ["sh", "-c", '"$@" & wait', "sh", *program]
    with subprocess.Popen(main_process, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "started\n"
        process.kill()
        assert process.stdout.read() == ""  # it is open until both processes have ended


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_second_process_calls_what_it_should_compile(monkeypatch, script):
    """The plans of acting and of reanalyze, and the policy loss. The main process compiles the world model loss."""
    calls = []

    def recorded(name):
        return lambda *args: calls.append(name) or getattr(script, name)(*args)

    monkeypatch.setattr(script, "make_functions", lambda args, device: script.Functions(*map(recorded, NAMES)))
    script.fill_compiler_cache(small_args(script), TASK)
    plan_again = [] if script is tdmpc2 else ["plan"]
    assert calls == ["plan", *["policy_loss"] * 9, *plan_again, "policy_loss"]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library")
def test_setup_torch_keeps_freed_memory(tmp_path):
    """After setup_torch, allocating tensors as large as those of a plan again causes no new page faults."""
    code = """
import ctypes, resource
def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        kept = [torch.ones(2**20) for _ in range(4)]
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for parameter in (-1, -3):
    ctypes.CDLL(None).mallopt(parameter, 2**17)  # the thresholds of a new process; imports have raised them
before = page_faults()
setup_torch(Args(device="cpu"))
page_faults()
print(before, page_faults())
"""
    run = runs.Run(tmp_path, [], moments=[("instead", code)]).wait()
    before, after = map(int, run.said().split())
    if before < 1000:
        pytest.skip("few page faults already: huge pages")
    assert after < before / 10


# --- GPU: synchronization, memory and launches


@pytest.fixture
def meta(monkeypatch):
    """Let scripts run on the meta device: noise is sampled on the CPU, since meta has no generator, and moved there."""

    def on_meta(sample, *args):
        return torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to(META), sample(*args))

    for script in SCRIPTS:
        for name in ("sample_plan_noise", "sample_update_noise", "random_action"):
            monkeypatch.setattr(script, name, functools.partial(on_meta, getattr(script, name)))
        monkeypatch.setattr(script, "seeded_generator", lambda seed, key, device: generator(seed))


@pytest.mark.parametrize(
    "script, flags",
    [
        (bmpc, ALL_FLAGS | dict(reanalyze_interval=1)),
        (bmpc_multihead, ALL_FLAGS | HEADS | dict(reanalyze_interval=1, reanalyze_value_std_coef=0.7)),
        (bmpc_dual_policy, ALL_FLAGS | HEADS | TWO_POLICIES | dict(reanalyze_interval=1)),
        (tdmpc2, dict(episodic=True, encoder_consistency_coef=0.1)),
    ],
    ids=["bmpc", "multihead", "dual", "tdmpc2"],
)
def test_no_synchronization(meta, script, flags):
    """With all flags that add work, and also after the replay buffer is full and windows become invalid."""
    args = small_args(script, iterations=1, buffer_size=10, **flags)
    run = short_run(None, args, META, script=script, steps=3)
    assert run.updates == 2 and run.pretraining_updates == 1 and run.buffer.step > run.buffer.capacity
    assert all(x.device == META for x in run.model.state_dict().values())


def test_number_of_copies_between_host_and_device(monkeypatch, tmp_path):
    """There is one copy each way per vector step, one to the device per update, and a few per log entry."""
    args = small_args(total_timesteps=80, log_freq=20, utd_ratio=2.0)
    envs = FakeEnvs([7, 11])
    run = start(args, envs)
    copies = {name: mock.Mock(wraps=getattr(bmpc, name)) for name in ("to_device", "to_host")}
    for name, copy in copies.items():
        monkeypatch.setattr(bmpc, name, copy)
    monkeypatch.setattr(bmpc, "save_checkpoint", lambda *args: None)
    train(run, envs, tmp_path)
    updates = 12 + 2 * 68  # each copies the indices of its windows
    logged = 3 + 2 + 2 + 2  # one copy for each set of metrics: of pretraining, updates and plans
    assert [copy.call_count for copy in copies.values()] == [80 // 2 + updates, 80 // 2 + logged]


class MemoryTracker(MemTracker):
    """Track the memory of tensors. Module hooks are off: they do not support a module that is called twice."""

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = lambda *args: None

    def gigabytes(self, when):
        """Return the memory that is used, "current" or "peak"."""
        return round(self.get_tracker_snapshot(when)[META]["Total"] / 1e9, 1)


@pytest.mark.parametrize("size, kept, peak", [(5, 0.5, 1.9), (19, 0.6, 3.4)])
def test_memory_of_a_default_run(meta, size, kept, peak):
    """results/README.md states these GB: eager, with all states of reanalyze at once, as on a GPU."""
    args, task = bmpc.resolve_args(bmpc.Args(model_size=size, compile=False))
    with MemoryTracker() as memory:
        run = bmpc.Run(args, task, META)
        run.buffer.start_indices = np.zeros(1, int)  # as if there were one valid window
        assert memory.gigabytes("current") == kept
        for run.updates in (0, args.reanalyze_interval - 1):  # the first makes the state of Adam, the second reanalyzes
            bmpc.train_step(run, pretraining=False)
    assert memory.gigabytes("peak") == peak


class Launches(TorchDispatchMode):
    """Record the operations that would be launched on a GPU: all but those that make empty tensors or views.

    A function that would be captured in a CUDA graph counts as one launch, and so does its backward pass. Counters on
    the host do not count; they are the only 64-bit tensors that are added to.
    """

    def __init__(self, monkeypatch, script):
        super().__init__()
        self.names = []
        for owner, name in ((script, "to_device"), (script, "to_host"), (torch.Tensor, "backward")):
            monkeypatch.setattr(owner, name, self.as_one_launch(getattr(owner, name)))
        self.functions = script.Functions(*map(self.as_one_launch, script.Functions()))

    def as_one_launch(self, function):
        def call(*args, **kwargs):
            self.names.append(function.__name__)
            with _disable_current_modes():
                return function(*args, **kwargs)

        return call

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        counter = str(function) == "aten.add_.Tensor" and args[0].itemsize == 8
        if not (counter or function.is_view or function.namespace == "profiler" or function == EMPTY):
            self.names.append(str(function))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_number_of_launches_besides_graphs(monkeypatch, script):
    """Count those of an update and of a vector step, with default flags."""
    envs = FakeEnvs([50, 70])
    args = small_args(script, **{} if script is tdmpc2 else {"reanalyze_interval": 0})
    launches = Launches(monkeypatch, script)
    run = start(args, envs, launches.functions, script)
    for _ in range(8):
        envs.step_async(None)
        script.store_step(run, envs, *random_transition(run, script), run.prev_mean)

    def update():
        script.train_step(run, pretraining=False)

    def vector_step():
        *acted, metrics = script.act(run.functions.plan, run.model, run.obs, run.prev_mean, args, run.make_generator)
        run.accumulate_metrics(metrics)
        envs.step_async(script.to_host(acted[0]))
        script.store_step(run, envs, *acted)

    # tdmpc2.py samples heads, and has a group of parameters with a learning rate of its own
    for part, most in ((update, 29 if script is tdmpc2 else 25), (vector_step, 25)):
        part()  # the first call allocates the state of Adam and the sums of metrics
        launches.names.clear()
        with launches:
            part()
        graphs = {"plan", "world_model_loss", "policy_loss"}
        others = [name for name in launches.names if name not in graphs]  # "backward" stands for its ones_like
        assert len(others) <= most, "\n".join(others)


def test_adam_is_fused_and_on_cuda_capturable():
    expected = {"cpu": (True, False), "meta": (False, False), "cuda": (True, True)}
    for device, flags in expected.items():
        model = bmpc.WorldModel(TASK, small_args(), generator())
        with FakeTensorMode():  # its tensors need no GPU
            model._apply(lambda x, device=device: torch.empty(x.shape, device=device))
            for optimizer in bmpc.make_optimizers(model, small_args()):
                assert (optimizer.defaults["fused"], optimizer.defaults["capturable"]) == flags


def test_plans_of_a_captured_graph_are_copied():
    """Each replay of a CUDA graph overwrites its previous outputs."""
    graph_output = torch.zeros(6, 2)

    def replayed_plan(model, policy, z, prev_mean, noise, args):
        graph_output.add_(1.0)
        rows = graph_output[: len(z)]
        return bmpc.Plan(rows, rows, rows, rows[:, None], rows, rows[:, 0])

    plan_fn = bmpc.clone_outputs(replayed_plan)
    inputs = None, None, torch.zeros(6, 4), torch.zeros(6, 3, 2), generator(), small_args()
    first = bmpc.run_planner(plan_fn, *inputs)
    second = bmpc.run_planner(plan_fn, *inputs)
    assert [set(x.flatten().tolist()) for x in (*first, *second)] == [{1.0}] * 6 + [{2.0}] * 6


# --- the benchmarks themselves


@pytest.mark.parametrize(
    "script, flags, plans",
    [
        (bmpc_multihead, throughput.TWO_HEADS | dict(num_rollouts=2), 1),
        (bmpc_dual_policy, dict(dual_policy_enabled=True), 2),
    ],
    ids=["multihead", "dual"],
)
def test_flops_are_those_of_the_plain_planner_and_of_an_update(script, flags, plans):
    """The formula of a plan leaves out the encoding of a state and the rollout of a policy candidate, here 1%. That of
    an update is less exact, here by up to 9%: it counts gradients of inputs, which are not computed, and leaves out the
    KL between two policies.
    """
    bench = throughput.Bench(SimpleNamespace(small=True, device="cpu", num_q=2))
    sizes = dict(mlp_dim=64, latent_dim=64, num_pi_trajs=1, iterations=2, extra_iterations=1, reanalyze_interval=0)
    run, plan = bench.make(script, "plain", **sizes, **flags)
    work = throughput.flops(run.args)
    act = lambda: script.act(plan, run.model, run.obs, run.prev_mean, run.args, run.make_generator)
    update = lambda: script.train_step(run, pretraining=False)
    for function, expected, tolerance in ((act, plans * work["plan"], 0.01), (update, work["update"], 0.1)):
        with FlopCounterMode(display=False) as counter:
            function()
        assert counter.get_total_flops() == pytest.approx(expected, rel=tolerance)


def test_throughput_prints_its_table(tmp_path):
    """The test of gpu.py checks the other rows."""
    flags = "--small --runs 1 --modes eager --only sample loop".split()
    run = runs.Run(tmp_path, flags, script="throughput").wait()
    assert not run.code, run
    assert re.search("sample 256 windows of 200k rows .* ms .*loop, one decision .* ms", run.said(), re.DOTALL)


def test_gpu_prints_its_table_on_a_cpu(monkeypatch, tmp_path, capsys):
    import gpu

    def run_script(name, cwd, *argv, limit=0):
        run = runs.Run(Path(cwd), argv, script=name).wait()  # without importing everything again
        return run.code, run.said()

    monkeypatch.setattr(gpu, "run_script", run_script)
    monkeypatch.chdir(tmp_path)
    if not torch.cuda.is_available():
        assert gpu.main([]) == 1 and capsys.readouterr().out.count("\n") == 1
    monkeypatch.setattr(gpu, "SCRIPTS", {"bmpc": {}})
    assert gpu.main(["--device", "cpu", "--small", "--runs", "1"]) == 0
    output = capsys.readouterr().out
    for line in ("waits: none in bmpc", "it logs the same numbers", "dog-run: at step", "| update | eager | "):
        assert line in output, output
    rows = ["act, 1 env", "act, 4 env", "act, 16 env", "reanalyze, 60 states", "update ", "4 updates"]
    for row in [*rows, "update, num_rollouts 4", "update, 2 policies"]:
        assert re.search(rf"^{row}.* ms .*share", output, re.MULTILINE), row
    lines = (tmp_path / "gpu.csv").read_text().splitlines()
    assert lines[0].startswith("call,mode,ms") and lines[-1].startswith("a decision: reanalyze,share,")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_a_short_run_on_cuda(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--task cartpole-swingup --device cuda --steps 400 --learning-starts 100 --eval-freq 200 --log-freq 60"
    assert bmpc.main(flags.split() + "--eval-episodes 2 --model-size 1".split()) == 0
