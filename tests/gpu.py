"""What a GPU's owner runs once, ten minutes at most, and pastes: does it compute on CUDA what it should, and how fast?

    python tests/gpu.py                 # everything, on the first GPU
    python tests/gpu.py --minutes 4     # less of the training run at the end

It prints versions and the card; the tests on CUDA; waits of the host that should not be there; a run that is continued;
throughput with launches, the time the GPU was busy, and its share of the card's own rate; memory; a while of the
default dog-run. It ends with a Markdown table; gpu.csv has its rows.
"""

import argparse
import csv
import functools
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import runs
import throughput
import torch
from throughput import TWO_HEADS, TWO_POLICIES, Bench, bmpc

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"bmpc": {}, "bmpc_multihead": TWO_HEADS, "bmpc_dual_policy": TWO_POLICIES}
SHORT = "--task cartpole-swingup --learning-starts 40 --batch-size 16 --reanalyze-batch-size 4 --eval-freq 0"
SHORT += " --log-freq 20"
SMALL = "--num-envs 1 --enc-dim 16 --mlp-dim 16 --latent-dim 16 --num-samples 16 --num-elites 4 --num-pi-trajs 2"
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")


said = functools.partial(print, flush=True)


def run_script(name, cwd, *line, limit=0):
    """A run as a process, asked to stop after `limit` seconds if it has one: its exit code, the last lines it wrote."""
    command = ["timeout", "--foreground", "--preserve-status", "--kill-after=120", f"{limit}"]
    command += [sys.executable, str(ROOT / f"{name}.py"), *line]
    ran = subprocess.run(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return ran.returncode, "\n".join(ran.stdout.splitlines()[-8:])


# --- right?


def check_waits(options):
    """Acting, storing and learning under torch's alarm: whatever makes the host wait for the GPU raises."""
    bench = Bench(options)
    alarm = torch.cuda.set_sync_debug_mode if bench.device.type == "cuda" else lambda mode: None
    for name, changes in SCRIPTS.items():
        script = getattr(throughput, name)
        run, _ = bench.make(script, "eager", reanalyze_interval=2, **changes)
        rows = np.zeros(run.args.num_envs, np.float32)
        for mode in ("default", "error"):  # first Adam's state and cuBLAS's workspaces are made
            alarm(mode)
            planning = run.functions.plan, run.model, run.obs, run.prev_mean, run.args, run.make_generator
            action, expert, _, metrics = script.act(*planning)
            run.accumulate_metrics(metrics)
            reward = script.to_device(rows, bench.device)
            run.buffer.add(run.obs, action, expert, reward, reward, run.obs, rows > 0, rows > 0)
            script.train_step(run, pretraining=False)
            script.train_step(run, pretraining=False)  # with reanalyze
        alarm("default")
        said(f"waits: none in {name}")


def check_runs(options):
    """A short run of each script; of bmpc.py one that goes on where it stopped, against one that never did."""
    line = f"{SHORT} --device {options.device} " + (f"--no-compile {SMALL}" if options.small else "--model-size 1")
    for name, flags in SCRIPTS.items():
        results = []
        for stops in ((80,), (60, 80))[: 2 if name == "bmpc" else 1]:
            with tempfile.TemporaryDirectory() as cwd:
                for steps in stops:
                    code, text = run_script(name, cwd, *line.split(), f"--steps={steps}", *runs.words(flags))
                    if code:
                        raise SystemExit(f"{name} failed with code {code}:\n{text}")
                results.append(runs.numbers(cwd))
        same = "the same" if results[0] == results[-1] else "OTHER"
        said(f"a short run of {name}: good" + f"; continued, it logs {same} numbers" * (len(results) > 1))


def check_tests():
    """The tests on CUDA: eager equals compiled equals captured under the same draws, and more."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "cuda", str(ROOT / "tests" / "test_speed.py")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said("tests: " + (ran.stdout.strip().splitlines() or ["none"])[-1])
    if ran.returncode:
        raise SystemExit(ran.stdout[-4000:] + ran.stderr[-2000:])


# --- fast?


class Profiled(Bench):
    """Bench, and of each row what the host launches and how long the GPU is busy with it."""

    def time(self, name, mode, function, work=0.0):
        super().time(name, mode, function, work)
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] * (self.device.type == "cuda")
        with torch.profiler.profile(activities=kinds) as profiler:
            self.seconds(function)
        events = profiler.key_averages()
        busy = sum(event.self_device_time_total for event in events if event.device_type.name == "CUDA")
        launches = sum(event.count for event in events if event.key.startswith(LAUNCHES))
        self.rows[-1] |= {"launches": launches, "GPU ms": busy / 1e3}
        if self.device.type == "cuda":
            self.rows[-1]["peak MB"] = torch.cuda.max_memory_allocated() / 1e6
            torch.cuda.reset_peak_memory_stats()


def train(options, seconds):
    """The default dog-run for so long: decisions a second at its end, and the returns so far."""
    flags = f"--task dog-run --device {options.device} --log-freq 200"
    flags += f" --no-compile --learning-starts 16 --log-freq 4 --steps 24 --eval-freq 0 {SMALL}" * options.small
    with tempfile.TemporaryDirectory() as cwd:
        code, text = run_script("bmpc", cwd, *flags.split(), limit=0 if options.small else seconds)
        if code not in (0, bmpc.EXIT_RESUMABLE):
            raise SystemExit(f"the training run failed with code {code}:\n{text}")
        found = runs.numbers(cwd, speeds=True)
    of = lambda tag: [(step, value) for step, _, name, value in found if name == tag]
    speeds, returns = of("charts/SPS"), of("charts/episodic_return")
    if speeds:
        said(f"dog-run: at step {speeds[-1][0]}, {speeds[-1][1]:.2f} decisions a second")
    for step, value in returns:
        said(f"dog-run: at step {step} an episode's return was {value:.1f}")
    return speeds[-1][1] if speeds else float("nan")


def table(names, rows):
    """Rows as Markdown."""
    told = lambda x: f"{x:.3g}" if isinstance(x, float) else str(x)
    lines = [names, ["---"] * len(names)] + [[told(row.get(name, "")) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="of everything; the training run has what is left")
    parser.add_argument("--device", default="cuda", help="cpu stands in, to try this file")
    parser.add_argument("--small", action="store_true", help="tiny networks, nothing compiled, to try this file")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args(argv)
    start, options.num_q = time.perf_counter(), 5
    if options.device == "cuda" and not torch.cuda.is_available():
        said("no GPU on this machine: tests/gpu.py measures nothing")
        return 1
    device = bmpc.setup_torch(bmpc.Args(device=options.device))
    card = torch.cuda.get_device_properties(0) if device.type == "cuda" else None
    who = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}" if card else platform.machine()
    said(f"{who}, torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores")
    check_waits(options)
    check_runs(options)
    if card:
        check_tests()

    bench = Profiled(options)
    said(f"peak: {bench.peak() / 1e9:.0f} GFLOP/s at matmul precision {torch.get_float32_matmul_precision()}")
    for name in ("act", "update", "reanalyze"):
        for mode in ["eager"] if options.small else ["eager", "compiled", "captured"]:
            throughput.BENCHES[name](bench, mode)
    speed = train(options, max(30.0, 60 * options.minutes - (time.perf_counter() - start)))
    ms = {row["call"]: row["ms"] for row in bench.rows}  # of the last mode, the fastest
    parts = {"act": ms["act, 4 environments"] / 4, "update": ms["update"], "reanalyze": ms["reanalyze, 60 states"] / 10}
    parts["simulators and the rest"] = max(0.0, 1e3 / speed - sum(parts.values()))
    bench.rows += [{"call": f"a decision: {name}", "mode": "in the loop", "ms": value} for name, value in parts.items()]
    bench.rows.append({"call": "a decision", "mode": "in the loop", "ms": 1e3 / speed})
    names = list(dict.fromkeys(name for row in bench.rows for name in row))
    with open("gpu.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(bench.rows)
    said(f"\n{who}, torch {torch.__version__}\n\n{table(names, bench.rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
