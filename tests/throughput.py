"""A benchmark of the agent, relative to the peak rate of the machine.

    python tests/throughput.py                  # act, reanalyze, update, sampling and the loop, eager and compiled
    python tests/throughput.py --compare        # also the straightforward planner of tests/plain.py
    python tests/throughput.py --only act reanalyze --num-q 2

Model size 5 on dog-run (A = 38, 8 iterations). Each row shows the median and the range of several timed calls, after
two that are not timed. GFLOP counts the multiplications of the straightforward formulas (a multiply-add counts as two).
`share` is this count, divided by the time and by the peak rate: that of `torch.mm` on 2048 x 2048 matrices, the best of
10 right before or right after each timed call. It is the median over the calls and can be compared across machines.
`best` is the same for the shortest call and the highest peak rate measured.
"""

import argparse
import contextlib
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import plain  # noqa: E402
import runs  # noqa: E402
import torch  # noqa: E402

import bmpc  # noqa: E402
import bmpc_dual_policy  # noqa: E402
import bmpc_multihead  # noqa: E402
import tdmpc2  # noqa: E402

TASK = bmpc.TaskInfo(223, 38, 500)  # dog-run
TINY = dict(enc_dim=16, mlp_dim=16, latent_dim=16, num_enc_layers=2, num_samples=32, num_elites=8)
TINY |= dict(num_envs=1, iterations=1, extra_iterations=0, batch_size=32)  # for --small
TWO_HEADS = dict(planner_num_dynamics_heads=2)
TWO_POLICIES = TWO_HEADS | dict(dual_policy_enabled=True)


def flops(args):
    """Count the FLOPs of one plan and of one update by the straightforward formulas."""
    H = getattr(args, "planner_num_dynamics_heads", 1)
    policies = 2 if getattr(args, "dual_policy_enabled", False) else 1
    O, A = TASK.obs_dim, TASK.action_dim  # noqa: E741
    L, M, K, T, B = args.latent_dim, args.mlp_dim, args.num_bins, args.horizon, args.batch_size
    Q, R = args.num_q, args.num_rollouts
    # Multiply-adds of one application of each network
    encoder = O * args.enc_dim + args.enc_dim * L
    dynamics = H * ((L + A) * M + M * M + M * L)
    reward = (L + A) * M + M * M + M * K
    value = L * M + M * M + M * K
    policy = L * M + M * M + M * 2 * A
    candidate = T * (dynamics + H * reward) + H * Q * value
    iterations = args.iterations + args.extra_iterations
    trained = (T + 1) * B * encoder + T * B * (dynamics + H * reward + Q * value)
    targets = R * T * B * (policy + reward + dynamics + H * Q * value)
    # Forward and backward pass take three times as much as the forward pass
    update = 2.0 * (3 * trained + targets + 3 * T * B * policies * policy)
    return {"plan": 2.0 * args.num_samples * iterations * candidate, "update": update}


class Bench:
    """Time functions, and measure the peak rate of the machine before and after each call."""

    def __init__(self, options):
        self.options = options
        self.device = torch.device(options.device)
        self.rows = []
        self.size = 128 if options.small else 2048
        self.matrix = torch.randn(self.size, self.size, device=self.device)

    def seconds(self, function):
        """Measure the seconds of one call."""
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        function()
        wait()
        return time.perf_counter() - start

    def peak(self):
        """Measure the rate of a large matrix product, in FLOP/s."""
        return 2 * self.size**3 / min(self.seconds(lambda: torch.mm(self.matrix, self.matrix)) for _ in range(10))

    def time(self, name, mode, function, work=0.0):
        """Time a function that computes `work` FLOPs, print a row and store it."""
        for _ in range(2):
            function()
        times = []
        peaks = [self.peak()]
        for _ in range(self.options.runs):
            times.append(self.seconds(function))
            peaks.append(self.peak())
        call_peaks = [max(pair) for pair in zip(peaks, peaks[1:], strict=False)]  # of before and after the call
        share = statistics.median(work / seconds / peak for seconds, peak in zip(times, call_peaks, strict=True))
        best = work / min(times) / max(peaks)
        median, low, high = (1e3 * x for x in (statistics.median(times), min(times), max(times)))  # ms
        row = f"{name:34s} {mode:9s} {median:10.2f} ms  [{low:.2f}, {high:.2f}]  "
        if work > 0:
            row += f"{work / 1e9:9.1f} GFLOP  {work / median / 1e6:7.0f} GFLOP/s  share {share:.2f}  best {best:.2f}"
        print(row, flush=True)
        self.rows.append({"call": name, "mode": mode, "ms": median, "GFLOP": work / 1e9, "share": share})

    def make(self, script, mode, **changes):
        """Make a run at model size 5 with 100 random steps in its replay buffer. Returns it and the plan function."""
        sizes = dict(zip(bmpc.MODEL_SIZE_FIELDS, bmpc.MODEL_SIZES[5], strict=True)) | dict(num_q=self.options.num_q)
        if self.options.small:
            sizes |= TINY
        sizes |= changes
        sizes |= dict(compile=mode in ("compiled", "captured"), cudagraphs=mode == "captured")
        if script is not tdmpc2:
            sizes |= dict(reanalyze_horizon=3, reanalyze_log_std_min=-5.0, reanalyze_log_std_max=1.0)
        args = script.Args(action_repeat=2, discount=0.99, buffer_size=20_000, **sizes)
        run = script.Run(args, TASK, self.device)
        E = args.num_envs
        random = lambda *shape: torch.rand(E, *shape, device=self.device)
        for _ in range(100):
            action = script.random_action(args, TASK.action_dim, run.make_generator("act"))
            transition = [action] if script is tdmpc2 else [*action]  # the action, and its expert
            obs = random(TASK.obs_dim)
            run.buffer.add(obs, *transition, random(), 0 * random(), obs, np.zeros(E, bool), np.zeros(E, bool))
        plain_plan = lambda *inputs: script.Plan(*plain.plan(*inputs))
        return run, plain_plan if mode == "plain" else run.functions.plan


def bench_act(bench, mode):
    cases = [(f"act, {E} environments", bmpc, dict(num_envs=E), E) for E in (1, 4, 16)]
    if mode != "plain":  # with two policies, there is a plan for the expert of each
        cases += [("act, 2 heads", bmpc_multihead, TWO_HEADS, 4)]
        cases += [("act, 2 policies", bmpc_dual_policy, TWO_POLICIES, 8)]
    for name, script, changes, plans in cases:
        run, plan = bench.make(script, mode, **changes)
        act = lambda: script.act(plan, run.model, run.obs, run.prev_mean, run.args, run.make_generator)
        bench.time(name, mode, act, plans * flops(run.args)["plan"])
    if mode != "plain":
        run, plan = bench.make(tdmpc2, mode)
        bench.time(
            "act, tdmpc2.py",
            mode,
            lambda: tdmpc2.act(plan, run.model, run.obs, run.prev_mean, run.args, run.make_generator),
        )


def bench_reanalyze(bench, mode):
    run, plan = bench.make(bmpc, mode)
    args = run.args
    batch = run.buffer.sample(np.random.default_rng(0).random(args.batch_size))
    work = args.reanalyze_batch_size * args.horizon * flops(args)["plan"]
    reanalyze = lambda: bmpc.reanalyze(plan, run.model, run.buffer, batch, args, run.make_generator)
    bench.time("reanalyze, 60 states", mode, reanalyze, work)


def bench_update(bench, mode):
    if mode == "plain":
        return
    cases = [("update", bmpc, {}, 1), ("4 updates (utd 4)", bmpc, {}, 4)]
    cases += [("update, num_rollouts 4", bmpc, dict(num_rollouts=4), 1)]
    cases += [("update, 2 heads", bmpc_multihead, TWO_HEADS, 1)]
    cases += [("update, 2 policies", bmpc_dual_policy, TWO_POLICIES, 1)]
    for name, script, changes, count in cases:
        run, _ = bench.make(script, mode, reanalyze_interval=0, **changes)
        updates = lambda: [script.train_step(run, pretraining=False) for _ in range(count)]
        bench.time(name, mode, updates, count * flops(run.args)["update"])
    run, _ = bench.make(tdmpc2, mode)
    bench.time("update, tdmpc2.py", mode, lambda: tdmpc2.train_step(run, pretraining=False))


def bench_sample(bench, mode):
    if mode == "eager":
        buffer = bmpc.ReplayBuffer(bmpc.Args(), TASK, bench.device)
        buffer.start_indices = np.arange(200_000 - 12)  # as if it were full; the rows are not initialized
        u = np.random.default_rng(0).random(256)
        bench.time("sample 256 windows of 200k rows", mode, lambda: buffer.sample(u))


def bench_loop(bench, mode):
    """Measure the whole training loop on dog-run, from the speed that a run logs."""
    if mode == "plain":
        return
    sizes = dict(task="dog-run", device=bench.options.device, num_q=bench.options.num_q, learning_starts=16, steps=56)
    sizes |= dict(log_freq=8, eval_freq=0)
    if bench.options.small:
        sizes |= TINY
    sizes |= dict(compile=mode != "eager", cudagraphs=mode == "captured")
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        assert bmpc.main(runs.words(sizes)) == 0
        rows = runs.numbers(directory, speeds=True)
    seconds = statistics.mean(1 / speed for step, _, tag, speed in rows if tag == "charts/SPS" and step > 24)
    print(f"{'loop, one decision':34s} {mode:9s} {seconds * 1e3:10.2f} ms", flush=True)


BENCHES = dict(act=bench_act, reanalyze=bench_reanalyze, update=bench_update, sample=bench_sample, loop=bench_loop)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="also time the straightforward planner")
    parser.add_argument("--small", action="store_true", help="tiny networks, to test this script")
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled", "captured"], default=["eager", "compiled"])
    parser.add_argument("--num-q", type=int, default=5)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    bmpc.setup_torch(bmpc.Args(device=options.device))
    bench = Bench(options)
    threads = torch.get_num_threads()
    peak = f"{bench.peak() / 1e9:.0f} GFLOP/s"
    print(f"torch {torch.__version__}, {bench.device}, {threads} threads, peak {peak}, Q = {options.num_q}")
    for name in options.only:
        for mode in ["plain", *options.modes] if options.compare else options.modes:
            BENCHES[name](bench, mode)
    if bench.device.type == "cuda":
        print(f"peak memory on the device: {torch.cuda.max_memory_allocated() / 1e6:.0f} MB")
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")


if __name__ == "__main__":
    main()
