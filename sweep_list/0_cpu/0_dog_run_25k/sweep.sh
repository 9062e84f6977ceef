# shellcheck shell=bash
# The plan's task, dog-run, with networks of 128 units: does BMPC learn it faster than TD-MPC2? Registered on
# 30 November 2026 at 04:13, before its first run at 04:46, with seeds that no run had used before.
#
# - Size: an earlier run of 20 000 decisions at this size, of another seed, had returns of 8 after 5 000, 29 after 10 000,
#   33 after 15 000 and 59 after 20 000 (a second one, in results/dog_run/ too, 3, 24, 45 and 34); random actions earn 5.
#   A run was expected to take 15 to 50 minutes of one core; those of the first seeds took 55 and more.
# - 50 000 decisions (then 0_dog_run_50k, seeds 11 to 18) were registered first, and dropped when the first run of
#   baseline and tdmpc2 had made 8 000: at 9 decisions a second the machine at hand would have taken 90 minutes a run.
#   Only their evaluations at 5 000 had been seen, 14.7 and 4.9. New seeds are used here.
# - Measure: the area under the planner's curve decides. The policy's area and the final return are reported beside it.
# - Order and seeds: eight of baseline and of tdmpc2 first. With the standard deviation s of the eight baselines, in % of
#   their mean, both get n seeds, the smallest n from 8 to 12 for which Welch's test tells a difference of 30 % with a
#   power of 0.8. Then utd_ratio_4 with n seeds; then, with eight seeds each, a longer baseline for the comparison at
#   equal compute, and dual_policy. If time is short, the last arms are dropped, never seeds of the first two.
# - Changed at 10:07, when seed 21 of both scripts was finished and baseline 22 was at 11 000 decisions: the last arms
#   became sweeps of their own, 0_dog_run_25k_utd and 0_dog_run_25k_dual. Over decisions, utd_ratio_4 was to be compared
#   with the baseline of this folder; now with the first 25 000 decisions of the longer baseline, whose seeds and
#   algorithm are the same. Each sweep is one comparison: the experiment has three tests, whose p are not corrected.
# - Looked at when three, five and six seeds of each script were finished. No number of seeds was changed. The standard
#   deviation of the baselines is 10.6 % of their mean, so n is 8 (results/README.md).
# - All runs of these seeds count.
seeds {21..28}
flags --task dog-run --steps 25000 --eval-freq 5000 --eval-episodes 4
flags --num-samples 64 --num-elites 8 --num-pi-trajs 4 --iterations 4

question "Does BMPC learn dog-run faster than TD-MPC2, with small networks?"
reanalyze=(--reanalyze-batch-size 5) # unknown to tdmpc2.py
run bmpc.py baseline "${reanalyze[@]}"
run tdmpc2.py tdmpc2
