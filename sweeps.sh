#!/usr/bin/env bash
# shellcheck disable=SC1090,SC1091
# Run the sweeps of sweep_list/ on this machine or on a SLURM cluster: bash sweeps.sh NAME... [OPTIONS] [-- FLAGS]
#
#   NAME             a sweep: the name of its folder, or its beginning up to an underscore if no other has it (2c);
#                    `all` stands for the plan, sweep_list/7_bmpc_equivalence/, without its baseline 1_test
#   FLAGS            are added to every run and override the sweep's own: -- --task cartpole-swingup --steps 6000
#   --dry-run        print the command of each run, one per line, and run nothing
#   --status         print which runs are done, running, failed or waiting
#   --report         write runs/report/report.md
#   --export DIR     with --report: copy the curves, commands and versions of the finished runs to DIR, list the others
#                    there, and write the report there
#   --axis AXIS      with --report: compare over decisions, updates or seconds; the last two write report_AXIS.md
#   --slurm          submit a SLURM job array with one task per run. Before you submit again, wait until the first array
#                    has left the queue: tasks that wait there would be submitted twice
#   --sbatch OPTIONS with --slurm: options for sbatch, such as
#                    "--partition=gpu --gres=gpu:1 --cpus-per-task=6 --mem=24G --time=24:00:00"
#   --seeds 1,2,3    use these seeds instead of those in the sweeps and their settings
#   --jobs N         run at most N runs at a time (default: 1, or one per GPU of --gpus; with --slurm: no limit)
#   --gpus 0,1,...   distribute the runs on this machine over these GPUs
#
# The environment variable PYTHON is the Python interpreter (default: python, or python3 if there is no python).
#
# Runs are written to runs/ in the current directory, their output to runs/logs/. Repeating a command skips the runs
# that are done, resumes those that were stopped, and retries those that failed. Ctrl-C, SIGTERM and a closed terminal
# stop the runs; each one writes a checkpoint first.
# Exit codes, also of --status: 0 all runs are done; 1 a run failed; 2 invalid input; 75 some runs are unfinished, and
# the same command resumes them.
set -euo pipefail

project_dir=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
sweep_list=$project_dir/sweep_list

die() { echo "sweeps.sh: $1" >&2; exit 2; }

# --- Functions that settings.sh and sweep.sh call --------------------------------------------------------------------

# seeds SEED...: the seeds of the following runs, unless --seeds is given.
seeds() { ((${#given_seeds[@]})) || seed_list=("$@"); }

# flags FLAG...: flags of all following runs.
flags() { common_flags+=("$@"); }

# question TEXT: the question that the report answers.
question() { sweep_question=${1//[[:space:]]/ }; }

# switch FLAG on|off: print --FLAG or --no-FLAG.
switch() { if [[ $2 == on ]]; then echo "--$1"; else echo "--no-$1"; fi; }

# run SCRIPT CONFIGURATION FLAG...: add one run per seed to the list.
run() {
  local script=$1 configuration=$2 run_name=${sweep}__$2 task steps seed key directory command record
  shift 2
  task=$(flag_value 'task|env[-_]id' "${common_flags[@]}" "$@" "${extra_flags[@]}")
  steps=$(flag_value 'steps|total[-_]timesteps' "${common_flags[@]}" "$@" "${extra_flags[@]}")
  steps=${steps//_/}  # the scripts read 200_000, too
  [[ $task && $steps =~ ^[0-9]+$ ]] || die "$sweep: each run needs --task and --steps, a whole number"
  ((${#seed_list[@]})) || die "$sweep has no seeds; add the line 'seeds 1 2' to its sweep.sh, or use --seeds 1,2"
  task=$(directory_task_name "$task")
  for seed in "${seed_list[@]}"; do
    directory=runs/${task}__$(basename "$script" .py)__${seed}__$run_name
    key="$task $seed $run_name"  # without the script, since the report groups runs by configuration alone
    printf -v command ' %q' "$python" "$script_dir$script" "${common_flags[@]}" --seed "$seed" \
      --run-name "$run_name" "$@" "${extra_flags[@]}"
    command=${command# }
    if [[ ! ${command_of[$key]-} ]]; then
      printf -v record '%s\t' "$directory" "$steps" "$sweep" "$baseline" "$configuration" "$seed" "$sweep_question"
      records+=("$record$command")
      command_of[$key]=$command
    elif [[ ${command_of[$key]} != "$command" ]]; then
      die "two configurations of $sweep have the name $configuration; give them different names"
    fi  # otherwise its sweep was named twice
  done
}

# include GROUP [SWEEP]: add the runs of all sweeps of a group, or of those whose name matches the pattern SWEEP, with
# the present seeds and flags. Their run names begin with the name of the including sweep.
include() {
  local file found=''
  for file in "$sweep_list/$1"/${2-*}/sweep.sh; do
    [[ -e $file ]] || continue
    found=1
    read_sweep "$file" "${sweep}__"
  done
  [[ $found ]] || die "$sweep includes ${*}, which is not in $sweep_list; name a GROUP or a GROUP and a SWEEP of it"
}

# Read a sweep.sh. It may also set `baseline`, the sweep whose configuration `baseline` it is compared with. A line
# `sweep=NAME run ...` adds a run that belongs to the sweep NAME.
read_sweep() {  # FILE [PREFIX]
  local folder=${1%/*} common_flags=("${common_flags[@]}") seed_list=("${seed_list[@]}")
  local sweep=${2-}${folder##*/} sweep_question=${2-}${folder##*/}
  local baseline=$sweep
  [[ ! -e ${folder%/*}/1_test ]] || baseline=${2-}1_test  # if its group has one
  source "$1"
}

# Print the value of a flag, or nothing. PATTERN matches its names. The last occurrence counts, as in the scripts.
flag_value() {  # PATTERN WORD...
  [[ ! " ${*:2}" =~ .*" --"($1)[=\ ]([^ ]+) ]] || echo "${BASH_REMATCH[-1]}"
}

# Print the name of a task as the scripts write it in the name of a run directory: finger-turn_easy for
# finger-turn-easy, Pendulum-v1 unchanged.
directory_task_name() {  # TASK
  local task=${1##*:} domain
  if [[ $task == dm_control/* || $1 != *:* && $task != *-v[0-9]* ]]; then
    task=${task#dm_control/}
    task=${task%-v0}
    domain=${task%%-*}
    task=${task#*-}
    case $domain in
      cup) domain=ball_in_cup ;;
      pointmass) domain=point_mass ;;
    esac
    task=$domain-${task//-/_}
  fi
  echo "${task//\//_}"
}

# --- Execution -------------------------------------------------------------------------------------------------------

# Pass the records to report.py: it prints the status table or the records of unfinished runs, or writes the report.
# Without -X utf8 it would start itself a second time.
report() { printf '%s\n' "${records[@]}" | "$python" -X utf8 "$sweep_list/report.py" "$@"; }

# Print a line. It is discarded if the terminal or pipe behind standard output is closed, which must not end the runs.
say() { { echo "$1"; } 2>/dev/null || true; }

# Start or resume the run of a record, and wait for its end. The exit code is appended to the log: --status reads it.
execute_run() {  # RECORD
  local directory=${1%%$'\t'*} command=${1##*$'\t'} name log size cores exit_code error child='' stopped=''
  name=${directory##*/}
  log=runs/logs/$name.log
  trap 'stopped=1; [[ ! $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM INT HUP USR1
  cores=${SLURM_CPUS_PER_TASK:-$(nproc)}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > jobs ? cores / jobs : 1))}  # runs at a time share the cores
  # With a GPU of its own, a run that cannot use it should fail rather than train on the CPU for days
  if [[ ${CUDA_VISIBLE_DEVICES-} =~ ^([0-9]|GPU-|MIG-) && $command != *' --device'* ]]; then
    command+=' --device cuda'
  fi
  printf '\n== %(%F %T)T  %s\n' -1 "$command" >>"$log"
  say "start      $name"
  size=$(wc -c <"$log")
  eval "exec $command" </dev/null >>"$log" 2>&1 &
  child=$!
  [[ ! $stopped ]] || kill -TERM "$child" 2>/dev/null || true        # a signal arrived before `child` was set
  while kill -0 "$child"; do wait "$child" || true; done 2>/dev/null  # a signal interrupts `wait`, but not the run
  wait "$child" && exit_code=0 || exit_code=$?
  # A run that was stopped while it was starting had no signal handler yet, and nothing to save.
  if [[ $stopped ]] && ((exit_code > 128)); then exit_code=75; fi
  # If another process runs it, its lines are in this log, too
  error=$(tail -c +$((size + 1)) "$log" | grep -a '\.py: error: ' | tail -n 1 || true)
  error=${error:-$(tail -n 1 "$log")}
  case $exit_code:$error in
    0:*) say "done       $name" ;;
    2:*"$directory holds a finished run of "*"; continue it with more --steps"*)  # another sweeps.sh finished it
      say "done       $name"
      exit_code=0 ;;
    2:*"$directory is in use by another process")
      say "in use     $name: another process runs it"
      exit_code=75 ;;
    75:*) say "stopped    $name: the same command resumes it" ;;
    *) say "FAILED     $name: exit code $exit_code, $log ends with: $error" ;;
  esac
  echo "== exit code $exit_code" >>"$log"
  return "$exit_code"
}

# Execute the unfinished runs on this machine, `jobs` at a time. Each has its own process group, so that Ctrl-C in a
# terminal reaches only this script, which stops the runs and waits for them.
run_here() {
  local record slot slot_pids=() jobs stopped=''
  jobs=${option[jobs]-$((${#gpus[@]} > 1 ? ${#gpus[@]} : 1))}
  trap stop_runs INT TERM HUP USR1
  trap '' PIPE                                                        # see `say`
  for record in "${unfinished[@]}"; do
    slot=0
    while kill -0 "${slot_pids[slot]-}" 2>/dev/null; do               # find or wait for a free slot
      slot=$(((slot + 1) % jobs))
      ((slot)) || sleep 0.2 || true                                   # Ctrl-C interrupts it
    done
    [[ ! $stopped ]] || break
    ((${#gpus[@]} == 0)) || export CUDA_VISIBLE_DEVICES=${gpus[slot % ${#gpus[@]}]}
    set -m
    execute_run "$record" &
    set +m
    slot_pids[slot]=$!
  done
  while [[ $(jobs -rp) ]]; do wait || true; done
  exit_with_counts
}

# Print how many runs are done, failed and so on, and exit with the code that says the same.
exit_with_counts() {
  local status exit_code=0
  status=$(report --status) || exit_code=$?
  say "${status##*$'\n'}"
  exit "$exit_code"
}

stop_runs() {
  local pid
  stopped=1
  for pid in $(jobs -rp); do kill -TERM "$pid" 2>/dev/null || true; done
  say "sweeps.sh: stopping; each run writes a checkpoint first" >&2
}

# Submit a job array for the unfinished runs. Their records are written to a file, so that the tasks of the array do not
# depend on later changes of the sweeps.
submit_array() {
  local record_file sbatch_options
  printf -v record_file 'runs/logs/slurm_%(%Y%m%d_%H%M%S)T_%d.runs' -1 $$
  printf '%s\n' "${unfinished[@]}" >"$record_file"
  split_words sbatch_options "${option[sbatch]-}"
  sbatch --job-name=sweeps --array="0-$((${#unfinished[@]} - 1))${option[jobs]+%${option[jobs]}}" --requeue \
    --signal=B:USR1@120 --open-mode=append --output='runs/logs/slurm_%A_%a.log' "${sbatch_options[@]}" \
    --wrap="exec bash $(printf %q "$project_dir/sweeps.sh") --slurm-task $record_file"
}

# Execute one task of the job array. SLURM requeues a task by itself only if its node fails or the task is preempted. A
# task that ends with exit code 75 is requeued here, unless it was cancelled: its state is then no longer RUNNING. The
# task is identified by array and index, because the SLURM_JOB_ID of the last task refers to the whole array.
run_array_task() {  # RECORD_FILE
  local jobs=1 exit_code=0 task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  execute_run "$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$1")" || exit_code=$?
  if ((exit_code == 75)) && [[ $(squeue --noheader --job="$task" --format=%T) == RUNNING ]]; then
    scontrol requeue "$task"
  fi
  exit "$exit_code"
}

# --- The command line ------------------------------------------------------------------------------------------------

# Split TEXT at white space of any kind into the array ARRAY.
split_words() {  # ARRAY TEXT
  read -ra "$1" <<<"${2//[[:space:]]/ }"
}

# Split TEXT at commas and white space. Fail if an element is missing or does not match the pattern ELEMENT.
split_list() {  # ARRAY TEXT ELEMENT
  local text=${2//[[:space:]]/ } pattern="^ *($3( *[, ] *$3)*)? *$"
  [[ $text =~ $pattern ]] || return 1
  read -ra "$1" <<<"${text//,/ }"
}

# Append the folder of the sweep NAME to `folders`, or those of the whole plan if NAME is `all`.
find_sweep() {  # NAME
  local sweeps matches
  shopt -s nullglob
  sweeps=("$sweep_list"/*/*/sweep.sh)
  matches=("$sweep_list"/*/"$1"/sweep.sh)
  ((${#matches[@]})) || matches=("$sweep_list"/*/"$1"_*/sweep.sh)
  [[ $1 != all ]] || matches=("$sweep_list"/7_bmpc_equivalence/{[!1],1[!_]}*/sweep.sh)
  shopt -u nullglob
  matches=("${matches[@]%/sweep.sh}")
  folders+=("${matches[@]}")
  [[ ${#matches[@]} != 1 && $1 != all ]] || return 0
  sweeps=("${sweeps[@]%/sweep.sh}")
  ((${#matches[@]})) || die "there is no sweep '$1'; the sweeps are: all ${sweeps[*]##*/}"
  [[ ${matches[0]} != */"$1" ]] || die "several sweeps are named '$1'; rename all but one of: ${matches[*]}"
  die "'$1' is the beginning of several names; give one or more of: ${matches[*]##*/}"
}

# Check that the interpreter exists and has the packages that this mode needs. For SLURM it is given its absolute path,
# because the PATH of a node may differ. Symbolic links are kept: a virtual environment is identified by the path of its
# interpreter, which is a link to that of the system.
check_python() {
  local advice='activate the virtual environment, or set PYTHON to its interpreter' path packages=(numpy scipy)
  path=$(type -P "$python") || die "there is no Python interpreter '$python'; $advice"
  [[ $path == /* ]] || path=$PWD/$path
  [[ $mode != slurm ]] || python=$path
  [[ $mode != run && $mode != slurm ]] || packages+=(torch)
  [[ $mode != report ]] || packages+=(matplotlib)
  "$path" -c 'import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, sys.argv[1:])))' \
    "${packages[@]}" 2>/dev/null || die "$path cannot import all of ${packages[*]}; $advice"
}

[[ ${1-} != --slurm-task ]] || run_array_task "$2"

names=() extra_flags=() gpus=() given_seeds=() mode=run
declare -A option=()  # its name without the dashes -> value
while (($#)); do
  [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
  case $1 in
    -h | --help) sed -n '3,/^set /{s/^# \{0,1\}//;/^set /d;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    --dry-run | --status | --report | --slurm) mode=${1#--} ;;
    --jobs | --gpus | --seeds | --sbatch | --export | --axis)
      [[ ${2-} ]] || die "$1 needs a value"
      option[${1#--}]=$2
      shift ;;
    --) extra_flags=("${@:2}"); break ;;
    -*) die "unknown option $1; bash sweeps.sh --help lists the options, and flags of the runs come after --" ;;
    *) names+=("$1") ;;
  esac
  shift
done
((${#names[@]})) || die "no sweep is named; bash sweeps.sh all runs the plan, bash sweeps.sh --help lists the options"
for name in export axis; do
  [[ ! ${option[$name]-} || $mode == report ]] || die "--$name needs --report"
done
[[ ${option[axis]-decisions} =~ ^(decisions|updates|seconds)$ ]] ||
  die "--axis must be decisions, updates or seconds, not '${option[axis]}'"
[[ ${option[jobs]-1} =~ ^[1-9][0-9]*$ ]] || die "--jobs must be a whole number above 0, not '${option[jobs]}'"
split_list gpus "${option[gpus]-}" '[^, ]+' || die "--gpus must be a list such as 0,1, not '${option[gpus]}'"
split_list given_seeds "${option[seeds]-}" '(0|[1-9][0-9]*)' ||
  die "--seeds must be a list such as 1,2,3, not '${option[seeds]}'"
if [[ $mode == slurm ]]; then
  ((${#gpus[@]} == 0)) || die '--gpus is for this machine; with --slurm use --sbatch "--gres=gpu:1"'
  type -P sbatch >/dev/null || die "there is no sbatch here, which --slurm needs; without --slurm the runs start here"
fi
[[ ! $(flag_value 'seed|(run|exp)[-_]name' "${extra_flags[@]}") ]] ||
  die "the sweeps set --seed, --run-name and --exp-name; for other seeds use --seeds 1,2,3 before --"

folders=()
for name in "${names[@]}"; do find_sweep "$name"; done

python=${PYTHON:-python}
if [[ ! ${PYTHON-} ]] && ! type -P python >/dev/null && type -P python3 >/dev/null; then python=python3; fi
[[ $mode == dry-run ]] || check_python

script_dir=''  # of the scripts in the commands; empty: the current directory
[[ $project_dir -ef $PWD ]] || script_dir=$project_dir/
# A sweep.sh that assigns one of these fails
readonly mode python script_dir folders names extra_flags gpus given_seeds option
records=()                # one per run: the fields that `run` writes, separated by tabs
declare -A command_of=()  # task, seed and run name -> command
for folder in "${folders[@]}"; do
  group=${folder%/*}
  common_flags=()
  seed_list=("${given_seeds[@]}")
  [[ ! -e $group/settings.sh ]] || source "$group/settings.sh"
  [[ $mode != report || ! -e $group/1_test ]] || read_sweep "$group/1_test/sweep.sh"  # the baseline of the comparisons
  read_sweep "$folder/sweep.sh"
done
((${#records[@]})) || die "${names[*]}: no runs; add a line 'run SCRIPT CONFIGURATION FLAG...' to the sweep.sh"

case $mode in
  dry-run) printf '%s\n' "${records[@]##*$'\t'}" ;;
  status) report --status ;;
  report) report ${option[export]+--export "${option[export]}"} --axis "${option[axis]-decisions}" ;;
  run | slurm)
    mkdir -p runs/logs
    due=$(report --due)
    [[ $due ]] || exit_with_counts
    readarray -t unfinished <<<"$due"
    if [[ $mode == slurm ]]; then submit_array; else run_here; fi ;;
esac
