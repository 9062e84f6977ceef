# shellcheck shell=bash
# The plan's eight questions at a size that two CPU cores carry: the baseline and all 23 configurations.
#
# Chosen before any of these runs:
# - Task: cheetah-run. Its small baseline's final return differs least between seeds: 7 % after 12 500 decisions, against
#   9, 13, 40 and 51 % on the other four (three seeds each).
# - Length: 4 000 decisions, of which 1 000 random. There the curve is steep (in the screening 6 at 1 500, 75 at 3 000,
#   120 at 4 500), so what learns faster or slower shows in the area. Evaluations every 1 000 decisions, of two episodes.
# - Five value heads, as in the plan: --ensemble-lr-scaling then leaves their learning rate as it is there.
# - Measure: the area under the planner's curve decides. Final return and the policy's area stand beside it.
# - Seeds: 1 to 10 of the baseline, 1 to 6 of a configuration. Where seeds differ by s, a difference has a standard error
#   of s sqrt(1/10 + 1/6), and a 95 % interval of +- 1.1 s (14 degrees of freedom): below 15 % if s is below 13 %. In the
#   screening, twelve runs with other flags each, s was 12 % up to 7 500 decisions and 17 % up to 4 500. After Holm's
#   correction a single difference has to be seen as 1.9 s. Six pairs alone could never be told: their smallest p is 1/32.
# - All runs count; no configuration gets more seeds than the others, and nothing is changed after a look at them.
seeds 1 2 3 4 5 6
flags --task cheetah-run --steps 4000 --learning-starts 1000 --eval-freq 1000 --eval-episodes 2 --num-q 5

include 7_bmpc_equivalence
seeds 7 8 9 10
include 7_bmpc_equivalence 1_test
