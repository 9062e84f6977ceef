# shellcheck shell=bash
# The plan's next step at the size of 0_ablations, chosen by the rewritten rule in its folder. (By the first rule it
# would have been utd_ratio_4 alone, with nothing to combine.) After eight seeds utd_ratio_4 alone was "better". From
# each other question the configuration with the highest estimate is added, if the estimate is above 0 and it costs
# less than a tenth of the speed:
# - replay_true (2e) and coef_0.1__tau_0.01 (2g) are added;
# - those of 2b, 2c, 2d and 2h cost more, and 2f's estimate is below 0.
question "Do four updates a decision and what costs little add up?"
seeds {1..10}
flags --task cartpole-swingup --steps 10000 --learning-starts 1000 --eval-freq 1000 --eval-episodes 2 --num-q 5
flags --num-samples 64 --num-elites 8 --num-pi-trajs 4 --iterations 4 --batch-size 64 --reanalyze-batch-size 5

baseline=0_ablations__1_test
run bmpc.py combined --utd-ratio 4 --imagine-initial-source replay_true \
  --td-target-use-ema-policy --policy-trust-region-coef 0.1 --policy-ema-tau 0.01

question "What does the baseline reach?"
sweep=$baseline run bmpc.py baseline # the same runs
