# shellcheck shell=bash
# A template for a new sweep: an invented example, which combines some configurations of the plan's sweeps.
#
# Copy it to sweep_list/7_bmpc_equivalence/3a_combined/sweep.sh. Nothing else is needed: bash sweeps.sh 3a runs it,
# --report compares it with the plan's baseline, and `all` includes it. A sweep for another task or length belongs to a
# group of its own, such as sweep_list/9_mine/first/sweep.sh, with a settings.sh like the plan's in 9_mine/. There,
# --report compares configurations with the one that the sweep names `baseline`.
#
# The question that the report answers; it is the heading of the sweep's section.
question "Do two heads and a trust region add up?"

# The flags of every run of this sweep, in addition to the settings. For other seeds write `seeds 1 2 3 4` here, or, for
# the baseline too, run bash sweeps.sh 3a 1_test --seeds 1,2,3,4
flags --planner-num-dynamics-heads 2 --ensemble-lr-scaling --local-td-bootstrap

# run SCRIPT CONFIGURATION FLAG... adds one run per seed. Use the smallest script that has the flags: bmpc.py,
# bmpc_multihead.py (which has all flags of bmpc.py) or bmpc_dual_policy.py (which has all flags of both). The name of
# the configuration is part of the name of the run directory, and each configuration of a sweep needs its own. It
# consists of letters, digits, `_`, `.` and `-`. `switch FLAG on` prints --FLAG, and `switch FLAG off` prints --no-FLAG.
for std_coef in 0.3 1; do
  for ema in on off; do
    run bmpc_multihead.py "std_coef_${std_coef}__trust_region_0.1__ema_targets_$ema" \
      --planner-value-std-coef-train "$std_coef" \
      --policy-trust-region-coef 0.1 "$(switch td-target-use-ema-policy "$ema")"
  done
done
