# shellcheck shell=bash
# TD-MPC2 beside BMPC at the sizes of --preset small, on five tasks. Each script has its own number of value heads: five
# Q heads in tdmpc2.py, two V heads in bmpc.py. Everything else that has a size is the same.
#
# Sizes and seeds were fixed before the first run; the rest of this plan was written on 30 November 2026 at 22:47. By
# then these had been seen: on cartpole-swingup, five seeds of the baseline and one of tdmpc2; on cheetah-run and
# walker-walk, one seed of tdmpc2 each; and, of an earlier commit, seeds 1 to 3 of the baseline on each task
# (results/baseline/).
#
# - All 50 runs are made at commit 9a8cee5. The number of seeds stays five, whatever is seen on the way.
# - On each task the area under the planner's curve decides, by Welch's test with Holm's correction for five tasks.
#   (Where Student's interval contains 0 all the same, the report says that the answer depends on the test.)
# - Over all tasks the probability of improvement decides: tdmpc2 learns less if its 95 % bootstrap interval lies below
#   0.5, more if it lies above. Tasks count equally. IQM, final return and the policy's area are reported beside it.
question "Does TD-MPC2 learn less than BMPC at a small size?"
seeds {1..5}
flags --steps 12500 # 25 000 env steps

baseline=0_baseline
tasks=(cartpole-swingup cheetah-run walker-walk finger-spin reacher-easy)
for task in "${tasks[@]}"; do
  run tdmpc2.py tdmpc2 --task "$task"
done

question "What does BMPC reach?"
for task in "${tasks[@]}"; do
  sweep=$baseline run bmpc.py baseline --task "$task" # the runs of 0_baseline, with two more seeds
done
