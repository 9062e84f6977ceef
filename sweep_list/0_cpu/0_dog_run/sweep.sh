# shellcheck shell=bash
# The default task at a small size. Random actions earn about 5.
question "Does the small baseline begin to learn dog-run?"
seeds 1 2
flags --task dog-run --steps 20000 --eval-episodes 3 --reanalyze-batch-size 5
flags --num-samples 64 --num-elites 8 --num-pi-trajs 4 --iterations 4

run bmpc.py baseline
