"""How fast the agent is, against what the machine could do.

    python tests/throughput.py                  # act, reanalyze, update, sampling and the whole loop, eager and compiled
    python tests/throughput.py --compare        # and the planner as one would first write it (tests/plain.py)
    python tests/throughput.py --only act reanalyze --num-q 2 --json

Model size 5 on dog-run (A = 38, 8 iterations). Each row is the median and the range of several runs after burn-in. GFLOP
counts what the plain formulas multiply (two for a multiply-add); `share` is that count over the time and over the rate of
`torch.mm` on 2048 x 2048 matrices, the best of 10 just before or just after each timed run, the median over the runs: it
compares across machines, and a machine that others share may slow down between two runs. `best` is the share of the
shortest run in the best rate seen near any of them: what is left when nobody disturbs.
"""

import argparse
import csv
import dataclasses
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

import bmpc  # noqa: E402
import bmpc_dual_policy  # noqa: E402
import bmpc_multihead  # noqa: E402

OBS, A = 223, 38  # dog-run
TWO_HEADS = {"planner_num_dynamics_heads": 2}


def flops(args) -> dict[str, float]:
    """FLOPs by the plain formulas: of one plan and of one update."""
    heads, policies = getattr(args, "planner_num_dynamics_heads", 1), 1 + getattr(args, "dual_policy_enabled", False)
    L, M, K, T, B, Q, R = (
        args.latent_dim, args.mlp_dim, args.num_bins, args.horizon, args.batch_size, args.num_q, args.num_rollouts
    )  # fmt: skip
    dynamics, reward = heads * ((L + A) * M + M * M + M * L), (L + A) * M + M * M + M * K
    value, policy = L * M + M * M + M * K, L * M + M * M + M * 2 * A
    encoder = OBS * args.enc_dim + args.enc_dim * L
    candidate = T * (dynamics + heads * reward) + heads * Q * value
    iterations = args.iterations + args.extra_iterations
    trained = (T + 1) * B * encoder + T * B * (dynamics + heads * reward + Q * value)
    targets = R * T * B * (policy + reward + dynamics + heads * Q * value)
    return {
        "plan": 2.0 * args.num_samples * iterations * candidate,
        "update": 2.0 * (3 * trained + targets + 3 * T * B * policies * policy),
    }


class Bench:
    """Times functions between measurements of the machine's peak."""

    def __init__(self, device: torch.device, runs: int):
        self.device, self.runs, self.rows, self.peaks = device, runs, [], []
        self.square = torch.randn(2048, 2048, device=device)

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, function) -> float:
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start

    def peak(self) -> float:
        """The rate of a large matrix product, FLOP/s."""
        return 2 * 2048**3 / min(self.seconds(lambda: torch.mm(self.square, self.square)) for _ in range(10))

    def time(self, name: str, mode: str, function, work: float = 0.0, per: int = 1):
        """Adds a row; `work` in FLOPs, `per` calls make one unit."""
        first = self.seconds(function)
        self.seconds(function)
        times, peaks = [], [self.peak()]
        for _ in range(self.runs):
            times.append(self.seconds(function) / per)
            peaks.append(self.peak())
        median = statistics.median(times)
        near = [max(pair) for pair in zip(peaks, peaks[1:])]
        share = statistics.median(work / seconds / peak for seconds, peak in zip(times, near))
        row = dict(name=name, mode=mode, seconds=median, low=min(times), high=max(times), gflop=work / 1e9, first=first)
        row |= dict(
            peak=max(peaks) / 1e9, share=share if work else None, best=work / min(times) / max(peaks) if work else None
        )
        self.rows.append(row)
        rate = (
            f"{work / 1e9:9.1f} GFLOP  {work / median / 1e9:7.0f} GFLOP/s  share {share:.2f}  best {row['best']:.2f}"
            if work
            else ""
        )
        print(
            f"{name:34s} {mode:9s} {median * 1e3:10.2f} ms  [{min(times) * 1e3:.2f}, {max(times) * 1e3:.2f}]  {rate}",
            flush=True,
        )


def make(script, device, compile: bool, **changes):
    """A run of the script at model size 5 with a full enough buffer: (Training, Progress, Args)."""
    args = script.Args(
        env_id="dog-run", action_repeat=2, discount=0.99, compile=compile, total_timesteps=8_000, **changes
    )
    sizes = {k: v for k, v in bmpc.MODEL_SIZES[5].items() if k not in changes}
    args = dataclasses.replace(args, **sizes)
    t, p = script.set_up(args, script.TaskInfo(OBS, A, 500), device)
    fill(t.buffer, 100)
    return t, p, args


def fill(buffer, steps: int):
    """Random rows."""
    E, device = buffer.num_envs, buffer.base.device
    buffer.begin(torch.ones(E, dtype=torch.bool, device=device), torch.randn(E, OBS, device=device))
    for _ in range(steps):
        action, expert = torch.rand(E, A, device=device) * 2 - 1, torch.rand(E, *buffer.expert.shape[1:], device=device)
        buffer.add(
            action,
            expert,
            torch.rand(E, device=device),
            torch.zeros(E, device=device),
            torch.randn(E, OBS, device=device),
        )


def bench_act(bench, device, mode, options):
    for envs in (1, 4, 16):
        t, p, args = make(bmpc, device, mode == "compiled", num_q=options.num_q, num_envs=envs)
        plan = t.functions.plan
        if mode == "plain":
            import plain

            plan = plain.plan
        act = lambda: bmpc.act(plan, t.model, t.buffer, p.mean, args, t.draws)
        bench.time(f"act, {envs} environments", mode, act, envs * flops(args)["plan"])


def bench_reanalyze(bench, device, mode, options):
    t, p, args = make(bmpc, device, mode == "compiled", num_q=options.num_q)
    batch = t.buffer.sample(bmpc.draw_update(args, A, t.draws["learn"], device).window)
    plan, chunks = t.functions.plan, bmpc.plan_in_chunks
    if mode == "plain":  # the first version knows no chunks either
        import plain

        plan = plain.plan
        bmpc.plan_in_chunks = lambda plan, model, policy, z, mean, draws, args, low, high: plan(
            model, policy, z, mean, draws, args, args.log_std_min, args.log_std_max
        )
    work = args.reanalyze_batch_size * args.horizon * flops(args)["plan"]
    bench.time(
        "reanalyze, 60 states",
        mode,
        lambda: bmpc.reanalyze(plan, t.model, t.buffer, batch, args, t.draws["learn"]),
        work,
    )
    bmpc.plan_in_chunks = chunks


def bench_update(bench, device, mode, options):
    if mode == "plain":
        return
    cases = [
        ("update", bmpc, {}, 1),
        ("4 updates (utd 4)", bmpc, {}, 4),
        ("update, num_rollouts 4", bmpc, {"num_rollouts": 4}, 1),
    ]
    cases += [("update, 2 dynamics heads", bmpc_multihead, TWO_HEADS, 1)]
    cases += [("update, 2 heads, 2 policies", bmpc_dual_policy, TWO_HEADS | {"dual_policy_enabled": True}, 1)]
    for name, script, changes, count in cases:
        t, p, args = make(script, device, mode == "compiled", num_q=options.num_q, reanalyze_interval=0, **changes)

        def updates():
            for _ in range(count):
                script.learn(t, p, script.Stopwatch(device), pretraining=False)

        bench.time(name, mode, updates, count * flops(args)["update"])


def bench_heads(bench, device, mode, options):
    if mode == "plain":
        return
    cases = [
        ("2 heads", bmpc_multihead, {}, 1),
        ("2 heads, 2 policies", bmpc_dual_policy, {"dual_policy_enabled": True}, 2),
    ]
    for name, script, changes, plans in cases:  # each policy's expert is a plan of its own
        t, p, args = make(script, device, mode == "compiled", num_q=options.num_q, **TWO_HEADS, **changes)
        act = lambda: script.act(t.functions.plan, t.model, t.buffer, p.mean, args, t.draws)
        bench.time(f"act, {args.num_envs} envs, {name}", mode, act, args.num_envs * plans * flops(args)["plan"])


def bench_sample(bench, device, mode, options):
    if mode != "eager":
        return
    buffer = bmpc.ReplayBuffer(4, 250_000, bmpc.TaskInfo(OBS, A, 500), 3, device)
    fill(buffer, 10)
    buffer.tail += 249_000  # as if full; what the rows hold does not matter to the clock
    u = torch.rand(256, dtype=torch.float64, device=device)
    bench.time("sample 256 windows of 1M rows", mode, lambda: buffer.sample(u))


def bench_loop(bench, device, mode, options):
    """The whole loop on dog-run, from what a run logs: seconds a decision, and the sum of its parts."""
    if mode == "plain":
        return
    steps = 16 + 40
    flags = (
        f"--task dog-run --device {device} --num-q {options.num_q} --learning-starts 16 --steps {steps} --log-freq 8 "
    )
    flags += f"--eval-freq 0 --checkpoint-freq 0 --{'' if mode == 'compiled' else 'no-'}compile"
    with tempfile.TemporaryDirectory() as directory:
        here = os.getcwd()
        os.chdir(directory)
        try:
            assert bmpc.main(flags.split()) == 0
            (path,) = Path("runs").glob("*/metrics.csv")
            rows = list(csv.DictReader(open(path)))
        finally:
            os.chdir(here)
    value = lambda tag: statistics.mean(
        float(r["value"]) for r in rows if r["tag"] == tag and int(r["global_step"]) > 16
    )
    whole = statistics.mean(
        1 / float(r["value"]) for r in rows if r["tag"] == "charts/SPS" and int(r["global_step"]) > 16
    )
    parts = {name: value(f"time/{name}") for name in ("environment", "acting", "updating", "reanalyzing")}
    bench.rows.append(dict(name="loop, one decision", mode=mode, seconds=whole, parts=parts))
    listed = ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in parts.items())
    print(
        f"{'loop, one decision':34s} {mode:9s} {whole * 1e3:10.2f} ms  parts: {listed}; sum {sum(parts.values()) * 1e3:.2f} ms"
    )
    envs = bmpc.Envs("dm_control/dog-run-v0", 2, 4)
    try:
        envs.reset(torch.ones(4, dtype=torch.bool).numpy(), [1, 2, 3, 4])
        action = torch.zeros(4, A).numpy()
        alone = (
            statistics.median(bench.seconds(lambda: (envs.step_async(action), envs.step_wait())) for _ in range(50)) / 4
        )
    finally:
        envs.kill()
    print(
        f"{'  its environments, alone':34s} {'':9s} {alone * 1e3:10.2f} ms  hidden behind learning: {1 - parts['environment'] / alone:.0%}"
    )


BENCHES = dict(
    act=bench_act,
    reanalyze=bench_reanalyze,
    update=bench_update,
    heads=bench_heads,
    sample=bench_sample,
    loop=bench_loop,
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="also time the plain planner")
    parser.add_argument("--json", action="store_true", help="print all rows as JSON at the end")
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--num-q", type=int, default=5)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    bmpc.resolve_env_id("dog-run")
    bench = Bench(device, options.runs)
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, peak {bench.peak() / 1e9:.0f} GFLOP/s, Q = {options.num_q}"
    )
    for name in options.only:
        for mode in (["plain"] if options.compare else []) + options.modes:
            BENCHES[name](bench, device, mode, options)
    if device.type == "cuda":
        print(f"peak memory on the device: {torch.cuda.max_memory_allocated() / 1e6:.0f} MB")
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")
    if options.json:
        print(json.dumps(bench.rows, indent=2))


if __name__ == "__main__":
    main()
