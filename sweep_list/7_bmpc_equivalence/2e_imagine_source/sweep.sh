# shellcheck shell=bash
# The states at which values are predicted in the value loss: those of the rollout in the baseline, encoded observations
# here.
question "True or rollout states for imagination?"

run bmpc.py replay_true --imagine-initial-source replay_true
