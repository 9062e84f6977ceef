# shellcheck shell=bash
# A rehearsal of the whole plan, baseline included, at a tiny size. It shows that every configuration runs and is
# reported; it says hardly anything about what the configurations change.
seeds 1 2
flags --task cartpole-swingup --steps 1200 --learning-starts 400 --eval-freq 400 --eval-episodes 2 --log-freq 200
flags --enc-dim 64 --mlp-dim 64 --latent-dim 64 --batch-size 64 --reanalyze-batch-size 5
flags --num-samples 64 --num-elites 8 --num-pi-trajs 4 --iterations 3 --no-compile # a minute of compiling would not pay

include 7_bmpc_equivalence '[12]*'
