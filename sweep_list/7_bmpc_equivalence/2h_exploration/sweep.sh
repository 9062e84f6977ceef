# shellcheck shell=bash
# A second, optimistic policy explores. The first, pessimistic one is evaluated and gives the value targets.
question "Does an explicit exploration policy help?"

run bmpc_dual_policy.py dual_policy \
  --planner-num-dynamics-heads 2 --ensemble-lr-scaling --planner-value-std-coef-train 1 \
  --local-td-bootstrap --dual-policy-enabled
