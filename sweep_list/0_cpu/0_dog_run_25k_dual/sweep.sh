# shellcheck shell=bash
# The third part of the experiment registered in 0_dog_run_25k: dual_policy, with the flags of the plan's sweep 2h.
question "Does a second policy for exploration help on dog-run, with small networks?"
seeds {21..28}
flags --task dog-run --steps 25000 --eval-freq 5000 --eval-episodes 4
flags --num-samples 64 --num-elites 8 --num-pi-trajs 4 --iterations 4

reanalyze=(--reanalyze-batch-size 5)
baseline=0_dog_run_25k
run bmpc_dual_policy.py dual_policy "${reanalyze[@]}" \
  --planner-num-dynamics-heads 2 --ensemble-lr-scaling --planner-value-std-coef-train 1 \
  --local-td-bootstrap --dual-policy-enabled

question "What does BMPC reach on dog-run, with small networks?"
sweep=$baseline run bmpc.py baseline "${reanalyze[@]}" # the same runs
