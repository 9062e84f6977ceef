#!/usr/bin/env bash
# shellcheck disable=SC1090,SC1091
# Runs the sweeps of sweep_list/ on this machine or on a SLURM cluster: bash sweeps.sh NAME... [OPTIONS] [-- FLAGS]
#
#   NAME             a sweep: its folder's name or what stands before the first underscore (2c, 1_test, 0_baseline);
#                    `all` is the plan, sweep_list/7_bmpc_equivalence/, without its baseline 1_test
#   FLAGS            go to every run and win over the sweep's own: -- --task cartpole-swingup --steps 6000
#   --dry-run        print the commands, one a line, and run nothing
#   --status         print which runs are done, running, failed and waiting
#   --report         write runs/report/report.md; --export DIR keeps the finished runs' curves, commands and versions
#                    in DIR, and the report there
#   --slurm          submit a job array; --sbatch "--partition=gpu --gres=gpu:1 --time=24:00:00" is handed to sbatch
#   --seeds 1,2,3    instead of the seeds that the sweeps and their settings name
#   --jobs N         runs at a time (here 1, with --slurm no limit)
#   --gpus 0,1,..    share these GPUs among the runs of this machine, one after the other
# For scripts: SWEEPS_NAMES, SWEEPS_FLAGS, SWEEPS_MODE (dry-run, status, report, slurm), SWEEPS_EXPORT, SWEEPS_SBATCH,
# SWEEPS_SEEDS, SWEEPS_JOBS and SWEEPS_GPUS say the same, PYTHON names the interpreter.
#
# Runs are kept under runs/ of the current directory, their output in runs/logs/. The same command again skips what is
# done, resumes what was stopped and tries again what failed. Ctrl-C and SIGTERM let every run write its checkpoint.
# Exit codes, --status included: 0 all done; 1 a run failed; 2 bad input; 75 unfinished, the same command goes on.
set -euo pipefail
shopt -s nullglob

home=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
lists=$home/sweep_list python=${PYTHON:-python}

die() { echo "sweeps.sh: $1" >&2; exit 2; }

# --- What a sweep's folder may say -----------------------------------------------------------------------------------

seeds() { [[ ${SWEEPS_SEEDS-} ]] || seed_list=("$@"); }
flags() { common+=("$@"); }          # for every run of the sweep
question() { asked=$1; }             # the report answers it
switch() { if [[ $2 == on ]]; then echo "--$1"; else echo "--no-$1"; fi; }

# run SCRIPT CONFIGURATION FLAGS...: one run for each seed.
run() {
  local script=$1 configuration=$2 name=${sweep}__$2 seed task steps directory command record
  shift 2
  [[ $home -ef $PWD ]] || script=$home/$script
  task=$(value_of 'task|env[-_]id' "${common[@]}" "$@" "${extra[@]}")
  steps=$(value_of 'steps|total[-_]timesteps' "${common[@]}" "$@" "${extra[@]}")
  [[ $task && ${steps//_/} =~ ^[0-9]+$ ]] || die "$sweep: each run needs --task and a whole number of --steps"
  for seed in "${seed_list[@]}"; do
    directory=runs/$(short_name "$task")__$(basename "$script" .py)__${seed}__$name
    printf -v command ' %q' "$python" "$script" "${common[@]}" --seed "$seed" --run-name "$name" "$@" "${extra[@]}"
    [[ ${seen[$directory]-$command} == "$command" ]] || die "$sweep: two of its configurations would share $directory"
    printf -v record '%s\t' "$directory" "${steps//_/}" "$sweep" "$baseline" "$configuration" "$seed" "$asked"
    [[ ${seen[$directory]-} ]] || records+=("$record${command# }")    # once, however often the sweep is named
    seen[$directory]=$command
  done
}

# include GROUP [SWEEP]: the sweeps of a group, or one, under the settings that stand. Their runs carry the including
# sweep's name too.
include() {
  local file
  for file in "$lists/$1"/${2-*}/sweep.sh; do read_sweep "$file" "${sweep}__"; done
}

read_sweep() {  # FILE [PREFIX]
  local folder=${1%/*} common=("${common[@]}") seed_list=("${seed_list[@]}")
  local sweep=${2-}${folder##*/} baseline=${2-}1_test asked=${2-}${folder##*/}
  source "$1"
}

# The value of a flag, given as a pattern of its names. The last one counts, as it does for the scripts.
value_of() {  # NAME|NAME WORDS...
  [[ ! " ${*:2}" =~ .*" --"($1)[=\ ]([^ ]+) ]] || echo "${BASH_REMATCH[-1]}"
}

# A task as it stands in the name of a run's directory: finger-turn_easy for finger-turn-easy, Pendulum-v1 as it is.
short_name() {
  local task=${1##*:} domain
  if [[ $task == dm_control/* || $task != *-v[0-9]* ]]; then
    task=${task#dm_control/} task=${task%-v0} domain=${task%%-*} task=${task#*-}
    case $domain in cup) domain=ball_in_cup ;; pointmass) domain=point_mass ;; esac
    task=$domain-${task//-/_}
  fi
  echo "${task//\//_}"
}

# --- The runs --------------------------------------------------------------------------------------------------------

# What the runs say of themselves: a table, a page, or the records of those that are not done.
report() { printf '%s\n' "${records[@]}" | "$python" "$lists/report.py" "$@"; }

# Starts or resumes the run of a record, and notes at the end of its log how it ended.
one() {
  local directory=${1%%$'\t'*} command=${1##*$'\t'} name log cores code last child='' stopped=''
  name=${directory##*/} log=runs/logs/$name.log
  trap 'stopped=1; [[ ! $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM INT HUP USR1
  cores=${SLURM_CPUS_PER_TASK:-$(nproc)}                              # shared out, so that runs do not choke each other
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > jobs ? cores / jobs : 1))}
  printf '\n== %(%F %T)T  %s\n' -1 "$command" >>"$log"
  echo "start      $name"
  eval "exec $command" </dev/null >>"$log" 2>&1 &
  child=$!
  [[ ! $stopped ]] || kill -TERM "$child" 2>/dev/null || true
  while kill -0 "$child"; do wait "$child" || true; done 2>/dev/null  # a signal ends the wait, not the run
  wait "$child" && code=0 || code=$?
  [[ ! $stopped ]] || ((code <= 128)) || code=75                      # it was stopped before it could listen
  last=$(tail -n 1 "$log")
  case $code:$last in
    0:* | 2:*'holds a finished run'*) echo "done       $name"; code=0 ;; # by another sweeps.sh meanwhile
    75:*) echo "stopped    $name: goes on where it was the next time" ;;
    2:*'in use by another process') echo "elsewhere  $name: $last"; code=75 ;;
    *) echo "FAILED     $name: exit code $code, $log ends: $last" ;;
  esac
  echo "== exit code $code" >>"$log"                                  # --status reads it
  return "$code"
}

# Each run has a process group of its own: Ctrl-C reaches this script alone, which passes it on and waits.
run_here() {
  local record slot pid pids=() gpus jobs stopped=''
  IFS=, read -ra gpus <<<"${SWEEPS_GPUS-}"
  jobs=${SWEEPS_JOBS:-$((${#gpus[@]} > 1 ? ${#gpus[@]} : 1))}
  trap stop INT TERM HUP
  for record in "${due[@]}"; do
    slot=0
    while kill -0 "${pids[slot]-}" 2>/dev/null; do                    # until one of the slots is free
      slot=$(((slot + 1) % jobs))
      ((slot)) || sleep 0.2 || true                                   # Ctrl-C ends it too
    done
    [[ ! $stopped ]] || break
    ((${#gpus[@]} == 0)) || export CUDA_VISIBLE_DEVICES=${gpus[slot % ${#gpus[@]}]}
    set -m
    one "$record" &
    set +m
    pids[slot]=$!
  done
  while [[ $(jobs -rp) ]]; do wait || true; done
  report --status | tail -n 1
}

stop() {
  stopped=1
  for pid in $(jobs -rp); do kill -TERM "$pid" || true; done
  echo "sweeps.sh: stopping; each run writes its checkpoint first" >&2
}

# A job array over the runs that are due. Their list is written down: the array keeps its runs whatever is edited.
submit() {
  local list options
  printf -v list 'runs/logs/slurm_%(%Y%m%d_%H%M%S)T_%d.runs' -1 $$
  printf '%s\n' "${due[@]}" >"$list"
  read -ra options <<<"${SWEEPS_SBATCH-}"
  sbatch --job-name=sweeps --array="0-$((${#due[@]} - 1))${SWEEPS_JOBS:+%$SWEEPS_JOBS}" --requeue --signal=B:USR1@120 \
    --open-mode=append --output='runs/logs/slurm_%A_%a.log' "${options[@]}" \
    --wrap="exec bash $(printf %q "$home/sweeps.sh") --slurm-task $list"
}

# One task of the array. SLURM requeues by itself when it takes the node away; after a checkpoint it has to be asked.
# Not so if the task was cancelled, which ends its state RUNNING. The last task's SLURM_JOB_ID means the whole array.
slurm_task() {
  local jobs=1 code=0 task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  one "$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$1")" || code=$?
  if ((code == 75)) && [[ $(squeue --noheader --job="$task" --format=%T) == RUNNING ]]; then
    scontrol requeue "$task"
  fi
  exit "$code"
}

# --- The command line ------------------------------------------------------------------------------------------------

[[ ${1-} != --slurm-task ]] || slurm_task "$2"

read -ra names <<<"${SWEEPS_NAMES-}"
read -ra extra <<<"${SWEEPS_FLAGS-}"
while (($#)); do
  [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
  case $1 in
    -h | --help) sed -n '3,/^set /{s/^# \{0,1\}//;/^set /d;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    --dry-run | --status | --report | --slurm) SWEEPS_MODE=${1#--} ;;
    --jobs | --gpus | --seeds | --sbatch | --export)
      (($# > 1)) || die "$1 needs a value"
      option=${1#--}
      printf -v "SWEEPS_${option^^}" %s "$2"
      shift ;;
    --) extra+=("${@:2}"); break ;;
    -*) die "unknown option $1; bash sweeps.sh --help lists them, flags of the runs come after --" ;;
    *) names+=("$1") ;;
  esac
  shift
done
((${#names[@]})) || die "which sweep? bash sweeps.sh all runs the plan, bash sweeps.sh --help says more"
[[ ${SWEEPS_JOBS:-1} =~ ^[1-9][0-9]*$ ]] || die "--jobs takes a whole number above 0, not '$SWEEPS_JOBS'"
[[ ${SWEEPS_GPUS:-0} =~ ^[^,]+(,[^,]+)*$ ]] || die "--gpus takes a list such as 0,1, not '$SWEEPS_GPUS'"
[[ ! ${SWEEPS_GPUS-} || ${SWEEPS_MODE-} != slurm ]] || die "--gpus is not for SLURM: --sbatch --gres=gpu:1"
[[ ${SWEEPS_SEEDS:-0} =~ ^[0-9]+(,[0-9]+)*$ ]] || die "--seeds takes a list such as 1,2,3, not '$SWEEPS_SEEDS'"
[[ ! $(value_of 'seed|(run|exp)[-_]name' "${extra[@]}") ]] || die "the sweep sets --seed, --run-name and --exp-name"

records=()
declare -A seen=()
for name in "${names[@]}"; do
  files=("$lists"/*/"$name"/sweep.sh "$lists"/*/"$name"_*/sweep.sh)
  [[ $name != all ]] || files=("$lists"/7_bmpc_equivalence/[!1]*/sweep.sh)
  [[ $name == all || ${#files[@]} == 1 ]] || die "'$name' names ${#files[@]} of: all $(cd "$lists" && echo */*/)"
  for file in "${files[@]}"; do
    group=${file%/*/*} common=()
    IFS=, read -ra seed_list <<<"${SWEEPS_SEEDS-}"
    source "$group/settings.sh"
    [[ ${SWEEPS_MODE-} != report || $group != */7_* ]] || read_sweep "$group/1_test/sweep.sh"    # to compare with
    read_sweep "$file"
  done
done

case ${SWEEPS_MODE:-run} in
  dry-run) printf '%s\n' "${records[@]##*$'\t'}" ;;
  status) report --status ;;
  report) report ${SWEEPS_EXPORT:+--export "$SWEEPS_EXPORT"} ;;
  run | slurm)
    mkdir -p runs/logs
    due=$(report --due)
    [[ $due ]] || { echo "nothing to do: all ${#records[@]} runs are done"; exit 0; }
    readarray -t due <<<"$due"
    if [[ ${SWEEPS_MODE-} == slurm ]]; then submit; else run_here; fi ;;
  *) die "SWEEPS_MODE cannot be '$SWEEPS_MODE'" ;;
esac
