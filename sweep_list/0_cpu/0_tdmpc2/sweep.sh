# shellcheck shell=bash
# TD-MPC2 beside BMPC at the sizes of --preset small, on five tasks. Each script has its own number of value heads: five
# Q heads in tdmpc2.py, two V heads in bmpc.py. Everything else that has a size is the same.
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
