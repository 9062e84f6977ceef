#!/usr/bin/env bash
# Proves the job array of sweeps.sh on a real SLURM: a cluster of one node, started here and stopped again.
#
#   bash tests/slurm.sh EMPTY_DIRECTORY [real]
#
# Four runs, two at a time. One is killed midway, one gets SLURM's warning signal, one is cancelled, one fails. The first
# two must be requeued and resumed from their checkpoints, the other two must not, and a second submission must leave out
# what is done. Stand-ins take the place of the scripts; with `real` the scripts themselves run, at a tiny size, in minutes.
# Needs root and Debian's slurm-wlm and munge; systemd, cgroups and an existing cluster it does not need.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
lab=$(cd -- "$1" && pwd)
scripts=${2-fake}
export PYTHON=${PYTHON:-python} SLURM_CONF=$lab/slurm.conf

if [[ $scripts == real ]]; then
  project=$root
  steps=800
  flags=(--task cartpole-swingup --learning-starts 300 --checkpoint-freq 100 --log-freq 100 --eval-freq 800 --eval-episodes 1
    --model-size 1 --enc-dim 32 --mlp-dim 32 --latent-dim 32 --num-q 2 --num-samples 32 --num-elites 8 --num-pi-trajs 4
    --iterations 2 --reanalyze-interval 50 --batch-size 32 --no-compile --device cpu)
else
  project=$lab/project
  mkdir "$project"
  cp -r "$root/sweeps.sh" "$root/sweep_list" "$project"
  for script in bmpc.py bmpc_multihead.py bmpc_dual_policy.py; do cp "$root/tests/fake_bmpc.py" "$project/$script"; done
  steps=20 flags=()
  export FAKE_GATE=$lab/gate FAKE_FAIL=2__2a_utd__utd_ratio_4
fi
flags+=(--steps "$steps")

# --- The cluster -----------------------------------------------------------------------------------------------------

read -r ctld_port d_port < <("$PYTHON" -c '
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(s.getsockname()[1] for s in sockets))')

cat >"$SLURM_CONF" <<END
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$ctld_port
SlurmdPort=$d_port
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$lab/munge/socket
StateSaveLocation=$lab/state
SlurmdSpoolDir=$lab/spool
SlurmctldPidFile=$lab/slurmctld.pid
SlurmdPidFile=$lab/slurmd.pid
SlurmctldLogFile=$lab/slurmctld.log
SlurmdLogFile=$lab/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=5
NodeName=node NodeHostname=localhost NodeAddr=127.0.0.1 CPUs=2
PartitionName=main Nodes=node Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
END
mkdir "$lab/munge" "$lab/state" "$lab/spool"
chmod 755 "$lab/munge"
(umask 077 && head -c 128 /dev/urandom >"$lab/munge/key")

stop_cluster() {
  scancel --name=sweeps 2>/dev/null || true
  for _ in $(seq 50); do                         # a step that outlives its daemons would wait for them for ever
    [[ $(squeue -h 2>/dev/null) ]] || break
    sleep 0.2
  done
  kill "$(cat "$lab/slurmctld.pid")" "$(cat "$lab/slurmd.pid")" 2>/dev/null || true
  munged --stop --socket="$lab/munge/socket" 2>/dev/null || true
}
trap stop_cluster EXIT
munged --force --socket="$lab/munge/socket" --key-file="$lab/munge/key" --pid-file="$lab/munge/pid" \
  --log-file="$lab/munge/log" --seed-file="$lab/munge/seed"
slurmctld -c
slurmd -N node

fail() {
  printf 'slurm.sh: %s\n' "$1" >&2
  squeue >&2 || true
  tail -n 20 "$lab"/slurmctld.log "$lab"/slurmd.log "$work"/runs/logs/*.log >&2 || true
  exit 1
}

wait_until() {  # WHAT COMMAND...
  local what=$1
  shift
  for _ in $(seq 3000); do
    if "$@"; then return 0; fi
    sleep 0.2
  done
  fail "waited in vain until $what"
}

node_is_idle() { [[ $(sinfo -h -o %T 2>/dev/null) == idle ]]; }

# --- The sweep -------------------------------------------------------------------------------------------------------

work="$lab/my runs"
mkdir "$work"
cd "$work"
wait_until "the node is up" node_is_idle

run_of() { ls -d runs/*__"$1"__2a_utd__utd_ratio_"$2"; }
starts_of() { grep -c '^== ' "runs/logs/$(basename "$(run_of "$@")").log"; }
pid_of() { awk -v inode=":$(stat -c %i "$(run_of "$@")/lock")" '$2 == "POSIX" && index($6, inode) {print $5}' /proc/locks; }
step_of() { tail -n 1 "$(run_of "$@")/metrics.csv" | cut -d, -f1; }
is_midway() { [[ -f $(run_of "$@" 2>/dev/null)/checkpoint.pt && $(step_of "$@") -ge $((steps / 2)) ]]; }
both_midway() { is_midway 1 2 && is_midway 2 2; }
status() { bash "$project/sweeps.sh" 2a --status -- "${flags[@]}"; }
both_wait() { [[ $(squeue -h -t PD -o '%K' | grep -cE '^[01]$') == 2 ]]; }
is_gone() { [[ ! $(squeue -h -j "$1" 2>/dev/null) ]]; }
queue_is_empty() { [[ ! $(squeue -h) ]]; }

bash "$project/sweeps.sh" 2a --slurm --jobs 2 --sbatch "--partition=main --cpus-per-task=1" -- "${flags[@]}"
wait_until "two runs have a checkpoint" both_midway
status | tail -n 1
kill -KILL "$(pid_of 1 2)"                       # the first run: as the memory's killer does
timeout 5 scancel --batch --signal=USR1 1_1 || true   # the second: as --signal does before the time is up
wait_until "both wait in the queue again" both_wait
wait_until "the third run has a checkpoint" is_midway 1 4
scancel 1_2                                      # the third: by its user
squeue
wait_until "the cancelled run has stopped" is_gone 1_2
touch "$lab/gate"
for task in 1_0 1_1; do scontrol update JobId="$task" StartTime=now; done   # SLURM would wait for two minutes
wait_until "the queue is empty" queue_is_empty
status

for seed in 1 2; do
  [[ $(starts_of "$seed" 2) == 2 ]] || fail "run $seed of utd_ratio 2 was not started twice"
  grep -q 'continuing at step' "runs/logs/$(basename "$(run_of "$seed" 2)").log" || fail "run $seed of utd_ratio 2 was not resumed"
done
[[ $(starts_of 1 4) == 1 && $(starts_of 2 4) == 1 ]] || fail "a cancelled or failed run was started again"
if [[ $scripts == real ]]; then
  due=1
  status | grep -q '3 done, 0 running, 0 failed, 1 waiting' || fail "three runs should be done and one wait"
else
  due=2
  status | grep -q '2 done, 0 running, 1 failed, 1 waiting' || fail "two runs should be done, one failed and one wait"
fi
bash "$project/sweeps.sh" 2a --slurm -- "${flags[@]}"
[[ $(cat runs/logs/slurm_*.runs | wc -l) == $((4 + due)) ]] || fail "the second submission should hold $due runs"
echo "a real SLURM: the killed and the warned run came back and went on, a cancelled or failed one did not"
