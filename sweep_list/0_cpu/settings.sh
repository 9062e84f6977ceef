# shellcheck shell=bash
# A small configuration that two CPU cores train in minutes. Its numbers compare with each other, not with full-size runs.
seeds 1 2 3
flags --steps 12500 --eval-freq 2500 --eval-episodes 5                            # 25 000 env steps, six evaluations
flags --model-size 1 --enc-dim 128 --mlp-dim 128 --latent-dim 128 --num-q 2       # narrow layers, two value heads
flags --num-samples 128 --num-elites 16 --num-pi-trajs 8 --batch-size 128         # a quarter of the candidates
flags --reanalyze-batch-size 10                                                   # the same share of a batch
