# shellcheck shell=bash
# The default task at a small size. Random actions earn about 5.
question "Does the small baseline begin to learn dog-run?"
seeds 1
flags --task dog-run --steps 20000 --eval-freq 2500 --eval-episodes 3
flags --enc-dim 128 --mlp-dim 128 --latent-dim 128 --batch-size 128 --reanalyze-batch-size 5
flags --num-samples 64 --num-elites 8 --num-pi-trajs 4 --iterations 4

run bmpc.py baseline
