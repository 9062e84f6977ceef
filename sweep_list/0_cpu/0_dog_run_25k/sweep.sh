# shellcheck shell=bash
# The plan's task, dog-run, with networks of 128 units: does BMPC learn it faster than TD-MPC2? Registered before its
# first run, with seeds that no run had used before.
#
# - Size: an earlier run of 20 000 decisions at this size, of another seed, had returns of 8 after 5 000, 29 after 10 000,
#   33 after 15 000 and 59 after 20 000; random actions earn 5. A run takes 15 to 50 minutes of one core.
# - 50 000 decisions (then 0_dog_run_50k, seeds 11 to 18) were registered first, and dropped when the first run of
#   baseline and tdmpc2 had made 8 000: at 9 decisions a second the machine at hand would have taken 90 minutes a run.
#   Only their evaluations at 5 000 had been seen, 14.7 and 4.9. New seeds are used here.
# - Measure: the area under the planner's curve decides. The policy's area and the final return are reported beside it.
# - Order and seeds: eight of baseline and of tdmpc2 first. With the standard deviation s of the eight baselines, in % of
#   their mean, both get n seeds, the smallest n from 8 to 12 for which Welch's test tells a difference of 30 % with a
#   power of 0.8. Then utd_ratio_4 with n seeds, its baseline and dual_policy with 8. If time is short, the last arms
#   are dropped, never seeds of the first two.
# - The last two arms are sweeps of their own, 0_dog_run_25k_utd and 0_dog_run_25k_dual.
# - All runs count.
seeds {21..28}
flags --task dog-run --steps 25000 --eval-freq 5000 --eval-episodes 4
flags --num-samples 64 --num-elites 8 --num-pi-trajs 4 --iterations 4

question "Does BMPC learn dog-run faster than TD-MPC2, with small networks?"
reanalyze=(--reanalyze-batch-size 5) # unknown to tdmpc2.py
run bmpc.py baseline "${reanalyze[@]}"
run tdmpc2.py tdmpc2
