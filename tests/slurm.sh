#!/usr/bin/env bash
# Test the job array of sweeps.sh on a real SLURM: start a cluster of one node, submit sweeps, and stop the cluster.
#
#   bash tests/slurm.sh EMPTY_DIRECTORY
#
# Four runs of fake_bmpc.py are submitted, two at a time. Two of them receive SLURM's warning signal halfway, and must
# be requeued and resumed from their checkpoints: the first, and the last, whose job id is that of the whole array. One
# run is cancelled, another ends with exit code 137, and neither must be requeued. A second submission must leave out
# the runs that are done. The jobs do not have the environment of the submission, so they only find an interpreter that
# is named by its absolute path. Needs root and Debian's packages slurm-wlm and munge, but no systemd or cgroups.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
lab=$(cd -- "$1" && pwd)
work="$lab/my runs"
python=$(command -v "${PYTHON:-python}")
unset PYTHON
export SLURM_CONF=$lab/slurm.conf
export FAKE_GATE=$lab/gate FAKE_FAIL=2__2a_utd__utd_ratio_2 FAKE_CODE=137
mkdir "$work" "$lab/project" "$lab/munge" "$lab/state" "$lab/spool"
cp -r "$root/sweeps.sh" "$root/sweep_list" "$lab/project"
cp "$root/tests/fake_bmpc.py" "$lab/project/bmpc.py"
mkdir -p "$lab/venv/bin"
printf '#!/bin/sh\nexec %q "$@"\n' "$python" >"$lab/venv/bin/python"
chmod +x "$lab/venv/bin/python"

read -r ctld_port d_port < <("$python" -c '
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
  for _ in $(seq 50); do                         # a step that is left when the daemons stop never ends
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
  fail "timed out: $*"
}

cd "$work"
sweep() { PATH=$lab/venv/bin:$PATH bash "$lab/project/sweeps.sh" 2a "$@" -- --steps 20; }
submit() { sweep --slurm --sbatch "--partition=main --cpus-per-task=1 --export=FAKE_GATE,FAKE_FAIL,FAKE_CODE" "$@"; }
run_dir() { echo "runs/dog-run__bmpc__$1__2a_utd__utd_ratio_$2"; }    # SEED RATIO
count_starts() { wc -l <"$(run_dir "$@")/starts"; }
is_halfway() { [[ $(cat "$(run_dir "$@")/checkpoint.pt") == '{"tenth": 5}' ]]; }
first_two_are_halfway() { is_halfway 1 2 && is_halfway 2 2; }
node_is_idle() { [[ $(sinfo -h -o %T) == idle ]]; }
is_pending() { squeue -h -t PD -o %K | grep -qx "$1"; }
send_warning() {                                                      # INDEX: as --signal does before the time limit
  timeout 5 scancel --batch --signal=USR1 "1_$1" || true
  wait_until is_pending "$1"
}
queue_is_empty() { [[ ! $(squeue -h "$@") ]]; }

wait_until node_is_idle
submit --jobs 2
wait_until first_two_are_halfway
send_warning 0
wait_until is_halfway 1 4
scancel 1_2                                                           # the third run
wait_until queue_is_empty -j 1_2
wait_until is_halfway 2 4
send_warning 3
touch "$lab/gate"                                                     # the second run ends with exit code 137
sleep 2                                                               # SLURM needs a second between starts of a job
scontrol update JobId=1_0,1_3 StartTime=now                           # SLURM would wait for two minutes
wait_until queue_is_empty

status=$(sweep --status) || true
[[ $status == *"2 done, 0 running, 1 failed, 1 waiting" ]] || fail "$status"
starts="$(count_starts 1 2) $(count_starts 2 2) $(count_starts 1 4) $(count_starts 2 4)"
[[ $starts == "2 1 1 2" ]] || fail "the runs were started $starts times instead of 2 1 1 2"
for run in "$(run_dir 1 2)" "$(run_dir 2 4)"; do
  grep -q 'continuing at step 10' "runs/logs/${run##*/}.log" || fail "a run was not resumed after the warning signal"
done
submit
[[ $(cat runs/logs/slurm_*.runs | wc -l) == 6 ]] || fail "the second submission should have two runs"
echo "SLURM requeued and resumed the runs that received the warning signal, not the cancelled and the failed one"
