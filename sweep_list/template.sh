# shellcheck shell=bash
# A template: how promising configurations are combined, once the plan's single sweeps have been read.
#
# Copy it to sweep_list/7_bmpc_equivalence/3a_combined/sweep.sh. That is all: bash sweeps.sh 3a runs it, --report compares
# it with the baseline, and `all` takes it in with the rest of the plan. A sweep that needs another task, length or seeds
# goes into a folder of its own, sweep_list/9_mine/1_first/sweep.sh, with a settings.sh beside the plan's as a model.
#
# The heading under which the report answers.
question "Do two heads and a trust region add up?"

# What each run of this sweep shares, beyond the settings. Other seeds than theirs: `seeds 1 2 3 4` here, or for the
# baseline too, bash sweeps.sh 3a 1_test --seeds 1,2,3,4
flags --planner-num-dynamics-heads 2 --ensemble-lr-scaling --local-td-bootstrap

# run SCRIPT CONFIGURATION FLAGS...: one run for each seed. The script is the smallest one that has the flags: bmpc.py,
# bmpc_multihead.py (which has all of it) or bmpc_dual_policy.py (which has all of both). The name is made of letters,
# digits, `_`, `.` and `-`; it tells the configurations of this sweep apart and is part of the run's directory.
# `switch FLAG on` and `switch FLAG off` stand for --FLAG and --no-FLAG.
for std_coef in 0.3 1; do
  for ema in on off; do
    run bmpc_multihead.py "std_coef_${std_coef}__trust_region_0.1__ema_targets_$ema" \
      --planner-value-std-coef-train "$std_coef" \
      --policy-trust-region-coef 0.1 "$(switch td-target-use-ema-policy "$ema")"
  done
done
