"""Check correctness and speed on a GPU. The output is meant to be pasted into a report.

    python tests/gpu.py                              # everything, on the first GPU
    python tests/gpu.py --only waits runs speed      # some parts; most compile for some minutes
    python tests/gpu.py --only train --minutes 10    # a longer training run

The parts:

    waits   check that the host never waits for the GPU unnecessarily
    runs    check that short runs of all scripts work, and that a resumed run logs the same numbers
    tests   run the tests on CUDA
    speed   measure throughput, kernel launches, busy time of the GPU and memory; gpu.csv holds the same table
    train   train on dog-run with default flags for some minutes, and print the decisions per second
"""

import argparse
import csv
import functools
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import runs
import throughput
import torch
from throughput import TWO_HEADS, TWO_POLICIES, Bench, bmpc

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"bmpc": {}, "bmpc_multihead": TWO_HEADS, "bmpc_dual_policy": TWO_POLICIES, "tdmpc2": {}}
SHORT = "--task cartpole-swingup --learning-starts 40 --batch-size 16 --eval-freq 0 --log-freq 20"
SMALL = "--num-envs 1 --enc-dim 16 --mlp-dim 16 --latent-dim 16 --num-samples 16 --num-elites 4 --num-pi-trajs 2"
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")


print_now = functools.partial(print, flush=True)


def run_script(name, cwd, *argv, limit=0):
    """Run a script as a process and stop it after `limit` seconds, unless 0. Returns the exit code and last lines."""
    command = ["timeout", "--foreground", "--preserve-status", "--kill-after=120", f"{limit}"]
    command += [sys.executable, str(ROOT / f"{name}.py"), *argv]
    result = subprocess.run(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return result.returncode, "\n".join(result.stdout.splitlines()[-8:])


# --- correctness


def check_waits(options):
    """Act, store and learn in torch's sync debug mode, in which whatever makes the host wait for the GPU raises."""
    bench = Bench(options)
    set_sync_debug_mode = torch.cuda.set_sync_debug_mode if bench.device.type == "cuda" else lambda mode: None
    for name, changes in SCRIPTS.items():
        script = getattr(throughput, name)
        run, _ = bench.make(script, "eager", **({} if name == "tdmpc2" else {"reanalyze_interval": 2}), **changes)
        rows = np.zeros(run.args.num_envs, np.float32)
        for mode in ("default", "error"):  # the first pass allocates the state of Adam and the workspaces of cuBLAS
            set_sync_debug_mode(mode)
            *transition, _, metrics = script.act(  # the action, and its expert (not in tdmpc2.py)
                run.functions.plan, run.model, run.obs, run.prev_mean, run.args, run.make_generator
            )
            run.accumulate_metrics(metrics)
            reward = script.to_device(rows, bench.device)
            run.buffer.add(run.obs, *transition, reward, reward, run.obs, rows > 0, rows > 0)
            script.train_step(run, pretraining=False)
            script.train_step(run, pretraining=False)  # with reanalyze (not in tdmpc2.py)
        set_sync_debug_mode("default")
        print_now(f"waits: none in {name}")


def check_runs(options):
    """Make a short run of each script. Compare one of bmpc.py with one that is resumed in between."""
    argv = f"{SHORT} --device {options.device} ".split()
    argv += f"--no-compile {SMALL}".split() if options.small else ["--model-size", "1"]
    for name, flags in SCRIPTS.items():
        results = []
        for stops in [[80], [60, 80]] if name == "bmpc" else [[80]]:
            with tempfile.TemporaryDirectory() as cwd:
                for steps in stops:
                    reanalyze = [] if name == "tdmpc2" else ["--reanalyze-batch-size=4"]
                    code, text = run_script(name, cwd, *argv, f"--steps={steps}", *reanalyze, *runs.words(flags))
                    if code:
                        raise SystemExit(f"{name} failed with code {code}:\n{text}")
                results.append(runs.numbers(cwd))
        message = f"a short run of {name}: passed"
        if len(results) > 1:
            which = "the same" if results[0] == results[1] else "DIFFERENT"
            message += f"; resumed, it logs {which} numbers"
        print_now(message)


def check_tests():
    """Run the tests on CUDA: eager, compiled and captured functions give equal results for the same noise, and more."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "cuda", str(ROOT / "tests" / "test_speed.py")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = result.stdout.strip().splitlines()
    print_now(f"tests: {lines[-1] if lines else 'none'}")
    if result.returncode:
        raise SystemExit(result.stdout[-4000:] + result.stderr[-2000:])


# --- speed


class ProfiledBench(Bench):
    """A Bench that also measures, for each row, the launches by the host and the busy time of the GPU."""

    def time(self, name, mode, function, work=0.0):
        super().time(name, mode, function, work)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profiler:
            self.seconds(function)
        events = profiler.key_averages()
        # Annotations such as "update" span the kernels under them, which are counted themselves
        kernels = [event for event in events if event.device_type.name == "CUDA" and not event.is_user_annotation]
        busy = sum(event.self_device_time_total for event in kernels)
        launches = sum(event.count for event in events if event.key.startswith(LAUNCHES))
        self.rows[-1] |= {"launches": launches, "GPU ms": busy / 1e3}
        if self.device.type == "cuda":
            self.rows[-1]["peak MB"] = torch.cuda.max_memory_allocated() / 1e6
            torch.cuda.reset_peak_memory_stats()


def train(options):
    """Train on dog-run with default flags. Print returns, and the decisions per second after pretraining."""
    flags = f"--task dog-run --device {options.device} --log-freq 200"
    warm_up = 16 if options.small else bmpc.Args().learning_starts
    if options.small:
        flags += f" --no-compile --learning-starts 16 --log-freq 4 --steps 24 --eval-freq 0 {SMALL}"
    with tempfile.TemporaryDirectory() as cwd:
        code, text = run_script("bmpc", cwd, *flags.split(), limit=0 if options.small else 60 * options.minutes)
        if code not in (0, bmpc.EXIT_RESUMABLE):
            raise SystemExit(f"the training run failed with code {code}:\n{text}")
        rows = runs.numbers(cwd, speeds=True)
    for step, _, tag, value in rows:
        if tag == "charts/episodic_return":
            print_now(f"dog-run: at step {step}, the return of an episode was {value:.1f}")
    speeds = [(step, value) for step, _, tag, value in rows if tag == "charts/SPS" and step > warm_up]
    if not speeds:
        raise SystemExit("the training run did not get beyond pretraining; give it more --minutes")
    step, speed = speeds[-1]
    print_now(f"dog-run: at step {step}, {speed:.2f} decisions per second, {1e3 / speed:.3g} ms each")


def table(names, rows):
    """Format rows as a Markdown table."""
    cell = lambda x: f"{x:.3g}" if isinstance(x, float) else str(x)
    lines = [names, ["---"] * len(names)] + [[cell(row.get(name, "")) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measure(options, hardware):
    """Measure each call, print the table and write it to gpu.csv."""
    bench = ProfiledBench(options)
    print_now(f"peak: {bench.peak() / 1e9:.0f} GFLOP/s at matmul precision {torch.get_float32_matmul_precision()}")
    for name in ("act", "update", "reanalyze"):
        for mode in ["eager"] if options.small else ["eager", "captured"]:
            throughput.BENCHES[name](bench, mode)
    ms = {row["call"]: row["ms"] for row in bench.rows}  # of the last mode, which is the fastest
    # Milliseconds per decision; the simulators and the rest come on top
    parts = {"act": ms["act, 4 environments"] / 4, "update": ms["update"], "reanalyze": ms["reanalyze, 60 states"] / 10}
    bench.rows += [{"call": f"a decision: {name}", "mode": "share", "ms": value} for name, value in parts.items()]
    names = list(dict.fromkeys(name for row in bench.rows for name in row))
    with open("gpu.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(bench.rows)
    print_now(f"\n{hardware}, torch {torch.__version__}\n\n{table(names, bench.rows)}\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("waits", "runs", "tests", "speed", "train")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--minutes", type=float, default=5, help="length of the training run")
    parser.add_argument("--device", default="cuda", help="cpu: to test this script without a GPU")
    parser.add_argument("--small", action="store_true", help="tiny networks, nothing compiled, to test this script")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args(argv)
    options.num_q = 5
    if options.device == "cuda" and not torch.cuda.is_available():
        print_now("no GPU on this machine: nothing to measure")
        return 1
    device = bmpc.setup_torch(bmpc.Args(device=options.device))
    hardware = platform.machine()
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        hardware = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    print_now(f"{hardware}, torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores")
    if "waits" in options.only:
        check_waits(options)
    if "runs" in options.only:
        check_runs(options)
    if "tests" in options.only and device.type == "cuda":
        check_tests()
    if "speed" in options.only:
        measure(options, hardware)
    if "train" in options.only:
        train(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
