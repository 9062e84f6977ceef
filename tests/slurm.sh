#!/usr/bin/env bash
# Proves the job array of sweeps.sh on a real SLURM: a cluster of one node, started here and stopped again.
#
#   bash tests/slurm.sh EMPTY_DIRECTORY
#
# Four runs, two at a time, of the scripts' stand-in. Two get SLURM's warning signal midway and must be requeued and
# resumed from their checkpoints: the first, and the last, whose job id is the whole array's. One is cancelled, one is
# killed, and these must not be. A second submission must leave out what is done. Needs root and Debian's slurm-wlm and
# munge, but no systemd, cgroups or existing cluster.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
lab=$(cd -- "$1" && pwd)
work="$lab/my runs"
export PYTHON=${PYTHON:-python} SLURM_CONF=$lab/slurm.conf
export FAKE_GATE=$lab/gate FAKE_FAIL=2__2a_utd__utd_ratio_2 FAKE_CODE=137
mkdir "$work" "$lab/project" "$lab/munge" "$lab/state" "$lab/spool"
cp -r "$root/sweeps.sh" "$root/sweep_list" "$lab/project"
cp "$root/tests/fake_bmpc.py" "$lab/project/bmpc.py"

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
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
KillWait=5
NodeName=node NodeHostname=localhost NodeAddr=127.0.0.1 CPUs=2
PartitionName=main Nodes=node Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
END
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

wait_until() {  # COMMAND...
  for _ in $(seq 600); do
    if "$@" 2>/dev/null; then return 0; fi
    sleep 0.2
  done
  fail "waited in vain for $*"
}

cd "$work"
sweep() { bash "$lab/project/sweeps.sh" 2a "$@" -- --steps 20; }
run_of() { echo "runs/dog-run__bmpc__$1__2a_utd__utd_ratio_$2"; }     # SEED RATIO
starts_of() { wc -l <"$(run_of "$@")/starts"; }
is_midway() { [[ $(cat "$(run_of "$@")/checkpoint.pt") == '{"tenth": 5}' ]]; }
first_two_are_midway() { is_midway 1 2 && is_midway 2 2; }
node_is_idle() { [[ $(sinfo -h -o %T) == idle ]]; }
is_pending() { squeue -h -t PD -o %K | grep -qx "$1"; }
warn() {                                                              # TASK, as --signal does before time is up
  timeout 5 scancel --batch --signal=USR1 "1_$1" || true
  wait_until is_pending "$1"
}
queue_is_empty() { [[ ! $(squeue -h "$@") ]]; }

wait_until node_is_idle
sweep --slurm --jobs 2 --sbatch "--partition=main --cpus-per-task=1"
wait_until first_two_are_midway
warn 0
wait_until is_midway 1 4
scancel 1_2                                                           # the third: by its user
wait_until queue_is_empty -j 1_2
wait_until is_midway 2 4
warn 3
touch "$lab/gate"                                                     # the second is killed
sleep 2                                                               # SLURM tells a job's starts apart by the second
scontrol update JobId=1_0,1_3 StartTime=now                           # SLURM would wait for two minutes
wait_until queue_is_empty

status=$(sweep --status) || true
[[ $status == *"2 done, 0 running, 1 failed, 1 waiting" ]] || fail "$status"
[[ "$(starts_of 1 2) $(starts_of 2 2) $(starts_of 1 4) $(starts_of 2 4)" == "2 1 1 2" ]] || fail "started too often"
for run in "$(run_of 1 2)" "$(run_of 2 4)"; do
  grep -q 'continuing at step 10' "runs/logs/${run##*/}.log" || fail "a warned run was not resumed"
done
sweep --slurm
[[ $(cat runs/logs/slurm_*.runs | wc -l) == 6 ]] || fail "the second submission should hold two runs"
echo "a real SLURM: the warned runs came back and went on, a cancelled or killed one did not"
