# shellcheck shell=bash
# At which states the values are learned. The baseline takes those of the rollout; here it is the encoded observations.
question "True or rollout states for imagination?"

run bmpc.py replay_true --imagine-initial-source replay_true
