"""How fast the agent is, against what the machine could do.

    python tests/throughput.py                  # act, reanalyze, update, sampling and the loop, eager and compiled
    python tests/throughput.py --compare        # and the planner as one would first write it (tests/plain.py)
    python tests/throughput.py --only act reanalyze --num-q 2

Model size 5 on dog-run (A = 38, 8 iterations). Each row is the median and the range of several runs after burn-in.
GFLOP counts what the plain formulas multiply (two for a multiply-add); `share` is that count over the time and over the
rate of `torch.mm` on 2048 x 2048 matrices, the best of 10 just before or just after each timed run, the median over the
runs: it compares across machines. `best` is the share of the shortest run in the best rate seen near any of them.
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

TASK = bmpc.TaskInfo(223, 38, 500)  # dog-run
TINY = dict(enc_dim=16, mlp_dim=16, latent_dim=16, num_enc_layers=2, num_samples=32, num_elites=8)
TINY |= dict(num_envs=1, iterations=1, extra_iterations=0)  # to try this file
TWO_HEADS = dict(planner_num_dynamics_heads=2)
TWO_POLICIES = TWO_HEADS | dict(dual_policy_enabled=True)


def flops(args):
    """FLOPs by the plain formulas: of one plan and of one update."""
    heads, policies = getattr(args, "planner_num_dynamics_heads", 1), 1 + getattr(args, "dual_policy_enabled", False)
    L, M, K, T, B = args.latent_dim, args.mlp_dim, args.num_bins, args.horizon, args.batch_size
    (obs, A, _), Q, R = TASK, args.num_q, args.num_rollouts
    dynamics, reward = heads * ((L + A) * M + M * M + M * L), (L + A) * M + M * M + M * K
    value, policy = L * M + M * M + M * K, L * M + M * M + M * 2 * A
    encoder = obs * args.enc_dim + args.enc_dim * L
    candidate = T * (dynamics + heads * reward) + heads * Q * value
    iterations = args.iterations + args.extra_iterations
    trained = (T + 1) * B * encoder + T * B * (dynamics + heads * reward + Q * value)
    targets = R * T * B * (policy + reward + dynamics + heads * Q * value)
    update = 2.0 * (3 * trained + targets + 3 * T * B * policies * policy)
    return {"plan": 2.0 * args.num_samples * iterations * candidate, "update": update}


class Bench:
    """Times functions between measurements of the machine's peak."""

    def __init__(self, options):
        self.options, self.device, self.rows = options, torch.device(options.device), []
        self.size = 128 if options.small else 2048
        self.square = torch.randn(self.size, self.size, device=self.device)

    def seconds(self, function):
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        function()
        wait()
        return time.perf_counter() - start

    def peak(self):
        """The rate of a large matrix product, FLOP/s."""
        return 2 * self.size**3 / min(self.seconds(lambda: torch.mm(self.square, self.square)) for _ in range(10))

    def time(self, name, mode, function, work=0.0):
        """Prints a row, and keeps it; `work` in FLOPs."""
        for _ in range(2):
            function()
        times, peaks = [], [self.peak()]
        for _ in range(self.options.runs):
            times.append(self.seconds(function))
            peaks.append(self.peak())
        near = [max(pair) for pair in zip(peaks, peaks[1:], strict=False)]
        share = statistics.median(work / seconds / peak for seconds, peak in zip(times, near, strict=True))
        best, ms = work / min(times) / max(peaks), [1e3 * x for x in (statistics.median(times), min(times), max(times))]
        rate = f"{work / 1e9:9.1f} GFLOP  {work / ms[0] / 1e6:7.0f} GFLOP/s  share {share:.2f}  best {best:.2f}"
        print(f"{name:34s} {mode:9s} {ms[0]:10.2f} ms  [{ms[1]:.2f}, {ms[2]:.2f}]  {rate * (work > 0)}", flush=True)
        self.rows.append({"call": name, "mode": mode, "ms": ms[0], "GFLOP": work / 1e9, "share": share})

    def make(self, script, mode, **changes):
        """A run of the script at model size 5 with 100 random steps in its buffer, and the plan to use."""
        sizes = dict(zip(bmpc.MODEL_SIZE_FIELDS, bmpc.MODEL_SIZES[5], strict=True)) | dict(num_q=self.options.num_q)
        sizes |= (TINY if self.options.small else {}) | changes
        sizes |= dict(compile=mode in ("compiled", "captured"), cudagraphs=mode == "captured")
        follows = dict(reanalyze_horizon=3, reanalyze_log_std_min=-5.0, reanalyze_log_std_max=1.0)
        args = script.Args(action_repeat=2, discount=0.99, buffer_size=20_000, **follows, **sizes)
        run, E = script.Run(args, TASK, self.device), args.num_envs
        random = lambda *shape: torch.rand(E, *shape, device=self.device)
        for _ in range(100):
            action, expert = script.random_action(args, TASK.action_dim, run.make_generator("act"))
            obs = random(TASK.obs_dim)
            run.buffer.add(obs, action, expert, random(), 0 * random(), obs, np.zeros(E, bool), np.zeros(E, bool))
        return run, plain.plan if mode == "plain" else run.functions.plan


def bench_act(bench, mode):
    cases = [(f"act, {E} environments", bmpc, dict(num_envs=E), E) for E in (1, 4, 16)]
    if mode != "plain":  # each policy's expert is a plan of its own
        cases += [("act, 2 heads", bmpc_multihead, TWO_HEADS, 4)]
        cases += [("act, 2 policies", bmpc_dual_policy, TWO_POLICIES, 8)]
    for name, script, changes, plans in cases:
        run, plan = bench.make(script, mode, **changes)
        act = lambda s=script, r=run, p=plan: s.act(p, r.model, r.obs, r.prev_mean, r.args, r.make_generator)
        bench.time(name, mode, act, plans * flops(run.args)["plan"])


def bench_reanalyze(bench, mode):
    run, plan = bench.make(bmpc, mode)
    args = run.args
    batch = run.buffer.sample(np.random.default_rng(0).random(args.batch_size))
    work = args.reanalyze_batch_size * args.horizon * flops(args)["plan"]
    renew = lambda: bmpc.reanalyze(plan, run.model, run.buffer, batch, args, run.make_generator)
    bench.time("reanalyze, 60 states", mode, renew, work)


def bench_update(bench, mode):
    cases = [("update", bmpc, {}, 1), ("4 updates (utd 4)", bmpc, {}, 4)]
    cases += [("update, num_rollouts 4", bmpc, dict(num_rollouts=4), 1)]
    cases += [("update, 2 heads", bmpc_multihead, TWO_HEADS, 1)]
    cases += [("update, 2 policies", bmpc_dual_policy, TWO_POLICIES, 1)]
    for name, script, changes, count in cases if mode != "plain" else []:
        run, _ = bench.make(script, mode, reanalyze_interval=0, **changes)
        updates = lambda s=script, r=run, n=count: [s.train_step(r, pretraining=False) for _ in range(n)]
        bench.time(name, mode, updates, count * flops(run.args)["update"])


def bench_sample(bench, mode):
    if mode == "eager":
        buffer = bmpc.ReplayBuffer(bmpc.Args(), TASK, bench.device)
        buffer.start_indices = np.arange(1_000_000 - 3)  # as if full, whatever the rows hold
        u = np.random.default_rng(0).random(256)
        bench.time("sample 256 windows of 1M rows", mode, lambda: buffer.sample(u))


def bench_loop(bench, mode):
    """The whole loop on dog-run, from what a run logs."""
    if mode == "plain":
        return
    sizes = dict(task="dog-run", device=bench.options.device, num_q=bench.options.num_q, learning_starts=16, steps=56)
    sizes |= dict(log_freq=8, eval_freq=0) | (TINY if bench.options.small else {})
    sizes |= dict(compile=mode != "eager", cudagraphs=mode == "captured")
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        assert bmpc.main(runs.words(sizes)) == 0
        rows = runs.numbers(directory, speeds=True)
    whole = statistics.mean(1 / speed for step, _, tag, speed in rows if tag == "charts/SPS" and step > 24)
    print(f"{'loop, one decision':34s} {mode:9s} {whole * 1e3:10.2f} ms", flush=True)


BENCHES = dict(act=bench_act, reanalyze=bench_reanalyze, update=bench_update, sample=bench_sample, loop=bench_loop)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="also time the plain planner")
    parser.add_argument("--small", action="store_true", help="tiny networks, to try this file")
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled", "captured"], default=["eager", "compiled"])
    parser.add_argument("--num-q", type=int, default=5)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    bmpc.setup_torch(bmpc.Args(device=options.device))
    bench, threads = Bench(options), torch.get_num_threads()
    peak = f"{bench.peak() / 1e9:.0f} GFLOP/s"
    print(f"torch {torch.__version__}, {bench.device}, {threads} threads, peak {peak}, Q = {options.num_q}")
    for name in options.only:
        for mode in ["plain"] * options.compare + options.modes:
            BENCHES[name](bench, mode)
    if bench.device.type == "cuda":
        print(f"peak memory on the device: {torch.cuda.max_memory_allocated() / 1e6:.0f} MB")
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")


if __name__ == "__main__":
    main()
