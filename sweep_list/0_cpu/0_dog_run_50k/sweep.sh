# shellcheck shell=bash
# The plan's task, dog-run, with networks of 128 units: does BMPC learn it faster than TD-MPC2? Registered before its
# first run, with seeds that no run had used before.
#
# - Size: one earlier run at this size, of another seed, had returns of 59 after 20 000 decisions, 76 after 40 000, 124
#   after 60 000 and 148 after 100 000; random actions earn 5. At 50 000 decisions the curve is steep, and a run takes
#   about half an hour of one core.
# - Measure: the area under the planner's curve decides. The policy's area and the final return are reported beside it.
# - Order and seeds: eight of baseline and of tdmpc2 first. With the standard deviation s of the eight baselines, in % of
#   their mean, both get n seeds, the smallest n from 8 to 12 for which Welch's test tells a difference of 30 % with a
#   power of 0.8. Then utd_ratio_4 with n seeds, equal_compute and dual_policy with 8. If time is short, the last arms
#   are dropped, never seeds of the first two.
# - utd_ratio_4 is compared with the baseline over decisions, and with equal_compute over seconds: the baseline for 3.2
#   times the decisions, since four updates per decision took about 3.2 times as long on cartpole-swingup.
# - All runs count.
seeds {11..18}
flags --task dog-run --steps 50000 --eval-freq 5000 --eval-episodes 4
flags --num-samples 64 --num-elites 8 --num-pi-trajs 4 --iterations 4

question "Does BMPC learn dog-run faster than TD-MPC2, with small networks?"
reanalyze=(--reanalyze-batch-size 5) # unknown to tdmpc2.py
run bmpc.py baseline "${reanalyze[@]}"
run tdmpc2.py tdmpc2

question "Are four updates per decision better, at equal decisions and at equal compute?"
run bmpc.py utd_ratio_4 "${reanalyze[@]}" --utd-ratio 4
run bmpc.py equal_compute "${reanalyze[@]}" --steps 160000

question "Does a second policy for exploration help?"
run bmpc_dual_policy.py dual_policy "${reanalyze[@]}" \
  --planner-num-dynamics-heads 2 --ensemble-lr-scaling --planner-value-std-coef-train 1 \
  --local-td-bootstrap --dual-policy-enabled
