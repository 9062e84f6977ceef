# shellcheck shell=bash
# The number of imagined trajectories per starting state of a value target. The baseline has one.
question "Do several rollouts reduce variance?"

run bmpc.py num_rollouts_4 --num-rollouts 4
