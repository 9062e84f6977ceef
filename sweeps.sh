#!/usr/bin/env bash
# Runs the sweeps of sweep_list/ on this machine or on a SLURM cluster.
#
#   bash sweeps.sh NAME... [OPTIONS] [-- FLAGS]
#
#   NAME             a sweep: its folder's name or what stands before the first underscore (2c, 1_test, 0_baseline);
#                    `all` is the plan, sweep_list/7_bmpc_equivalence/, without its baseline 1_test
#   FLAGS            go to every run and win over the sweep's own: -- --task cartpole-swingup --steps 6000
#
#   --dry-run        print the commands, one a line, and run nothing
#   --status         print which runs are done, running, failed and waiting
#   --report         write runs/report/report.md and report.html; --reference CSV draws published curves behind,
#                    --export DIR keeps the finished runs' curves, commands and versions in DIR, and the report there
#   --slurm          submit a job array; --sbatch "--partition=gpu --gres=gpu:1 --time=24:00:00" is handed to sbatch
#   --jobs N         runs at a time (here 1, with --slurm no limit)
#   --gpus 0,1,..    share these GPUs among the runs of this machine, one after the other
#
# For scripts: SWEEPS_NAMES, SWEEPS_FLAGS, SWEEPS_MODE (dry-run, status, report, slurm), SWEEPS_REFERENCE, SWEEPS_EXPORT,
# SWEEPS_SBATCH, SWEEPS_JOBS and SWEEPS_GPUS say the same, PYTHON names the interpreter.
#
# Runs are kept under runs/ of the current directory, their output in runs/logs/. The same command again skips what is
# done, resumes what was stopped and tries again what failed. Ctrl-C lets every run write its checkpoint.
# Exit codes: 0 all done; 1 a run failed; 2 bad input; 75 some runs are unfinished; 130, 143 stopped by Ctrl-C, SIGTERM.
set -euo pipefail

home=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
lists=$home/sweep_list
python=${PYTHON:-python}

die() {
  printf 'sweeps.sh: %s\n' "$1" >&2
  exit 2
}

# --- What a sweep's folder may say -----------------------------------------------------------------------------------

seeds() { seed_list=("$@"); }
flags() { common+=("$@"); }          # for every run of the sweep
question() { asked=$1; }             # the report answers it
switch() { if [[ $2 == on ]]; then echo "--$1"; else echo "--no-$1"; fi; }

# run SCRIPT CONFIGURATION FLAGS...: one run for each seed.
run() {
  local script=$1 configuration=$2 seed name task stem steps directory command record
  shift 2
  [[ $home -ef $PWD ]] || script=$home/$script
  name=$prefix${sweep}__$configuration
  [[ $name =~ ^[A-Za-z0-9_.-]+$ ]] || die "$sweep: a run cannot be named '$name'"
  task=$(value_of task env-id "${common[@]}" "$@" "${extra[@]}")
  steps=$(value_of steps total-timesteps "${common[@]}" "$@" "${extra[@]}")
  [[ $task && ${steps//_/} =~ ^[0-9]+$ ]] || die "$sweep: each run needs --task and a whole number of --steps"
  task=$(short_name "$task") stem=${script##*/}
  for seed in "${seed_list[@]}"; do
    directory=runs/${task}__${stem%.py}__${seed}__$name
    printf -v command '%q ' "$python" "$script" "${common[@]}" --seed "$seed" --run-name "$name" "$@" "${extra[@]}"
    case ${seen[$directory]-} in
      "") ;;
      "$command") continue ;;        # the sweep was named twice
      *) die "$sweep: two of its configurations would share $directory" ;;
    esac
    seen[$directory]=$command
    printf -v record '%s\t' "$directory" "${steps//_/}" "$prefix$sweep" "${prefix}1_test" "$configuration" "$seed" "$asked"
    records+=("$record${command% }")
  done
}

# include GROUP: all sweeps of a group under the settings that stand. Their runs carry the including sweep's name too.
include() {
  local prefix=${sweep}__ sweep asked folder
  for folder in "$lists/$1"/*/; do
    sweep=$(basename "$folder") asked=$sweep
    # shellcheck source=/dev/null
    source "$folder/sweep.sh"
  done
}

# --- From names to runs ----------------------------------------------------------------------------------------------

# The value of a flag that has two names. The last one given counts, as it does for the scripts.
value_of() {
  local first=--$1 second=--$2 value='' flag
  shift 2
  while (($#)); do
    flag=${1%%=*} flag=${flag//_/-}
    if [[ $flag == "$first" || $flag == "$second" ]]; then
      if [[ $1 == *=* ]]; then value=${1#*=}; else value=${2-}; fi
    fi
    shift
  done
  echo "$value"
}

# A task as it stands in the name of a run's directory: finger-turn_easy for finger-turn-easy, Pendulum-v1 as it is.
short_name() {
  local task=${1##*:} domain name
  if [[ $task == dm_control/* || $task != *-v[0-9]* ]]; then
    task=${task#dm_control/} task=${task%-v0}
    domain=${task%%-*} name=${task#*-}
    case $domain in cup) domain=ball_in_cup ;; pointmass) domain=point_mass ;; esac
    task=$domain-${name//-/_}
  fi
  echo "${task//\//_}"
}

folders_of() {
  local folder base found=()
  for folder in "$lists"/*/*/; do
    folder=${folder%/} base=$(basename "$folder")
    if [[ $1 == all ]]; then
      [[ $folder == */7_bmpc_equivalence/* && $base != 1_test ]] || continue
    else
      [[ $base == "$1" || $base == "$1"_* ]] || continue
    fi
    [[ ! -f $folder/sweep.sh ]] || found+=("$folder")
  done
  [[ $1 == all || ${#found[@]} == 1 ]] || die "${#found[@]} sweeps are called '$1'; there are: $(
    for folder in "$lists"/*/*/sweep.sh; do printf '%s ' "$(basename "$(dirname "$folder")")"; done)all"
  printf '%s\n' "${found[@]}"
}

read_sweep() {
  local folder=$1 prefix='' sweep asked
  local -a common=() seed_list=()
  sweep=$(basename "$folder") asked=$sweep
  # shellcheck source=/dev/null
  source "$folder/../settings.sh"
  # shellcheck source=/dev/null
  source "$folder/sweep.sh"
}

# --- One run ---------------------------------------------------------------------------------------------------------

is_done() {  # DIRECTORY STEPS
  local total
  total=$(sed -n 's/.*"total_timesteps": *\([0-9]*\).*/\1/p' "$1/finished.json" 2>/dev/null) || true
  ((${total:-0} >= $2 && ${#total} > 0))
}

# Starts or resumes the run of a record, unless it is done or somebody else is at it, and notes how it ended.
one() {
  local directory steps command name log code lock interrupted child='' stopped='' gpu_list
  IFS=$'\t' read -r directory steps _ _ _ _ _ command <<<"$1"
  name=${directory##*/} log=runs/logs/$name
  exec {lock}>>"$log.lock"           # held by the run itself too, so also when this shell is killed
  flock -w "${patience:-1}" "$lock" || { echo "elsewhere  $name"; return 0; }
  is_done "$directory" "$steps" && { echo "skip       $name: done"; return 0; }
  trap 'stopped=1 interrupted=1; [[ ! ${child-} ]] || kill -TERM "$child" 2>/dev/null || true' TERM INT HUP USR1
  if [[ ${gpus-} ]]; then
    IFS=, read -ra gpu_list <<<"$gpus"
    export CUDA_VISIBLE_DEVICES=${gpu_list[slot % ${#gpu_list[@]}]}
  fi
  rm -f "$log.exit"
  printf '\n== %(%F %T)T  %s\n' -1 "$command" >>"$log.log"
  echo "start      $name"
  set -m                             # a process group of its own: the signal comes once, and not to its workers
  eval "exec $command" </dev/null >>"$log.log" 2>&1 &
  child=$!
  set +m
  [[ ! $stopped ]] || kill -TERM "$child" 2>/dev/null || true
  while interrupted=''; do           # a signal ends the wait, not the run
    wait "$child" 2>/dev/null && code=0 || code=$?
    [[ $interrupted ]] || break
  done
  [[ ! $stopped ]] || ((code <= 128)) || code=75   # it was stopped before it could listen
  ((code > 0)) || is_done "$directory" "$steps" || code=1
  echo "$code" >"$log.exit"
  case $code in
    0) echo "done       $name" ;;
    75) echo "stopped    $name: goes on where it was the next time" ;;
    *) echo "FAILED     $name: exit code $code, $log.log ends: $(tail -n 1 "$log.log")" ;;
  esac
  return "$code"
}

# --- All of them -----------------------------------------------------------------------------------------------------

# Threads are shared out, so that runs do not choke each other.
share_threads() {
  local cores=${SLURM_CPUS_PER_TASK:-$(OMP_NUM_THREADS="" nproc)}
  local threads=$((cores > $1 ? cores / $1 : 1))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
  export MKL_NUM_THREADS=${MKL_NUM_THREADS:-$OMP_NUM_THREADS} # torch prefers it to the first
}

# xargs and its runs have a process group of their own: Ctrl-C reaches this script alone, which passes it on once and
# waits. The last command of the pipe outlives the signal, so the pipe ends when the last run has.
run_here() {
  local group reader interrupted stopped=''
  jobs=${jobs:-$(if [[ $gpus ]]; then tr -cd , <<<"$gpus," | wc -c; else echo 1; fi)}
  ((jobs <= ${#records[@]})) || jobs=${#records[@]}
  share_threads "$jobs"
  export gpus
  export -f one is_done
  set -m
  # shellcheck disable=SC2016          # the shell that xargs starts expands it
  printf '%s\0' "${records[@]}" |
    xargs -0 -n 1 -P "$jobs" --process-slot-var=slot bash -c 'one "$1" || true' one |
    (trap '' INT TERM HUP; exec cat) &
  reader=$!
  group=$(jobs -p)
  set +m
  trap 'stop 130' INT
  trap 'stop 143' TERM HUP
  while interrupted=''; do
    wait "$reader" || true
    [[ $interrupted ]] || break
  done
  summary "$stopped"
}

stop() {
  interrupted=1
  echo "sweeps.sh: stopping; each run writes its checkpoint first" >&2
  [[ $stopped ]] || kill -TERM -- "-$group" 2>/dev/null || true
  stopped=$1
}

summary() {
  local record directory steps code finished=0 failed=0
  for record in "${records[@]}"; do
    IFS=$'\t' read -r directory steps _ <<<"$record"
    code=$(cat "runs/logs/${directory##*/}.exit" 2>/dev/null) || true
    if is_done "$directory" "$steps"; then
      finished=$((finished + 1))
    elif ((${code:-75} != 75)); then
      failed=$((failed + 1))
    fi
  done
  echo "${#records[@]} runs: $finished done, $failed failed, $((${#records[@]} - finished - failed)) unfinished"
  [[ ! $1 ]] || exit "$1"
  ((failed == 0)) || exit 1
  ((finished == ${#records[@]})) || exit 75
}

# A job array over the runs that are not done. The list is written down: the array keeps its runs whatever is edited.
submit() {
  local record directory steps list options due=()
  [[ ! $gpus ]] || die "--gpus is for this machine; ask SLURM for them: --sbatch '--gres=gpu:1'"
  for record in "${records[@]}"; do
    IFS=$'\t' read -r directory steps _ <<<"$record"
    is_done "$directory" "$steps" || due+=("$record")
  done
  ((${#due[@]})) || { echo "nothing to submit: all ${#records[@]} runs are done"; return 0; }
  printf -v list 'runs/logs/slurm_%(%Y%m%d_%H%M%S)T_%d.runs' -1 $$
  printf '%s\n' "${due[@]}" >"$list"
  read -ra options <<<"$sbatch_options"
  sbatch --job-name=sweeps --array="0-$((${#due[@]} - 1))${jobs:+%$jobs}" --requeue --signal=B:USR1@120 \
    --open-mode=append --output='runs/logs/slurm_%A_%a.log' "${options[@]}" \
    --wrap="exec bash $(printf %q "$home/sweeps.sh") --slurm-task $list"
}

# One task of the array. SLURM requeues by itself when it takes the node away; after a checkpoint or a death by signal it
# has to be asked. Not so if the task was cancelled, which ends its state RUNNING, and not for ever if it keeps dying.
slurm_task() {
  local code=0
  patience=60                        # its predecessor on another node may still be ending
  share_threads 1
  one "$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$1")" || code=$?
  if ((code == 75 || code > 128 && ${SLURM_RESTART_COUNT:-0} < 20)) &&
    [[ $(squeue --noheader --job="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
    echo "requeue    exit code $code"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
}

# --- The command line ------------------------------------------------------------------------------------------------

[[ ${1-} != --slurm-task ]] || slurm_task "$2"

read -ra names <<<"${SWEEPS_NAMES-}"
read -ra extra <<<"${SWEEPS_FLAGS-}"
mode=${SWEEPS_MODE:-run} jobs=${SWEEPS_JOBS-} gpus=${SWEEPS_GPUS-} sbatch_options=${SWEEPS_SBATCH-} reference=${SWEEPS_REFERENCE-}
export_to=${SWEEPS_EXPORT-}
while (($#)); do
  [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
  case $1 in
    -h | --help) sed -n '2,/^set /{s/^# \{0,1\}//;/^set /d;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    --dry-run | --status | --report | --slurm) mode=${1#--} ;;
    --jobs | --gpus | --sbatch | --reference | --export)
      (($# > 1)) || die "$1 needs a value"
      case $1 in
        --jobs) jobs=$2 ;; --gpus) gpus=$2 ;; --sbatch) sbatch_options=$2 ;;
        --reference) reference=$2 ;; --export) export_to=$2 ;;
      esac
      shift ;;
    --) extra+=("${@:2}"); break ;;
    -*) die "unknown option $1; bash sweeps.sh --help lists them, flags of the runs come after --" ;;
    *) names+=("$1") ;;
  esac
  shift
done
((${#names[@]})) || die "which sweep? bash sweeps.sh all runs the plan, bash sweeps.sh --help says more"
[[ $mode =~ ^(run|dry-run|status|report|slurm)$ ]] || die "SWEEPS_MODE cannot be '$mode'"
[[ ! $jobs || $jobs =~ ^[1-9][0-9]*$ ]] || die "--jobs takes a whole number above 0, not '$jobs'"
[[ ! $gpus || $gpus =~ ^[^,]+(,[^,]+)*$ ]] || die "--gpus takes a list such as 0,1, not '$gpus'"
for flag in seed run-name exp-name; do
  [[ ! $(value_of "$flag" "$flag" "${extra[@]}") ]] || die "--$flag is the sweep's to set: it tells its runs apart"
done

declare -a records=()
declare -A seen=()
for name in "${names[@]}"; do
  folders=$(folders_of "$name")
  while read -r folder; do
    [[ $mode != report || ! -d ${folder%/*}/1_test ]] || read_sweep "${folder%/*}/1_test"   # what it is compared with
    read_sweep "$folder"
  done <<<"$folders"
done

case $mode in
  dry-run) printf '%s\n' "${records[@]##*$'\t'}" ;;
  status) printf '%s\n' "${records[@]}" | "$python" "$lists/report.py" --status ;;
  report) printf '%s\n' "${records[@]}" | "$python" "$lists/report.py" ${reference:+--reference "$reference"} ${export_to:+--export "$export_to"} ;;
  slurm) mkdir -p runs/logs && submit ;;
  run) mkdir -p runs/logs && run_here ;;
esac
