# shellcheck shell=bash
# The plan's eight questions at a size that two CPU cores carry: the baseline and all 23 configurations.
#
# Chosen before any of these runs:
# - Task: cheetah-run. Of the small baselines its seeds differ least: 7 % of the final return after 12 500 decisions,
#   against 13 to 50 % on the others; the screening's twelve runs differ by 12 % in the area under their curves.
# - Length: 5 000 decisions, of which 1 000 random. There the curve is steep (6 at 1 500, 150 at 6 000 in the screening),
#   so what learns faster or slower shows in the area. An evaluation every 1 000 decisions: two episodes, since those
#   of one evaluation differ less than seeds do, and a planner's episode costs as much as an eighth of the learning.
# - Measure: the area under the planner's curve decides. Final return and the policy's area stand beside it.
# - Seeds: 1 to 10 of the baseline, 1 to 6 of a configuration. If seeds differ by 12 %, a difference has a standard error
#   of 12 % sqrt(1/10 + 1/6) = 6.2 %, and an interval of +- 13 % (14 degrees of freedom): below 15 %. To be told after
#   Holm's correction over 23, the first has to be about 23 %. Six pairs alone could never be: their smallest p is 1/32.
# - All runs count; no configuration gets more seeds than the others, and nothing is changed after a look at them.
seeds 1 2 3 4 5 6
flags --task cheetah-run --steps 5000 --learning-starts 1000 --eval-freq 1000 --eval-episodes 2

include 7_bmpc_equivalence
seeds 7 8 9 10
include 7_bmpc_equivalence 1_test
