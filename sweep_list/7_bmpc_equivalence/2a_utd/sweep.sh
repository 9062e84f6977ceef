# shellcheck shell=bash
# The number of updates per decision. The baseline makes one.
question "Does more training per step help?"

for ratio in 2 4; do
  run bmpc.py "utd_ratio_$ratio" --utd-ratio "$ratio"
done
