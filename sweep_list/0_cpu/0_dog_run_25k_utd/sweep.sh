# shellcheck shell=bash
# The second part of the experiment registered in 0_dog_run_25k: four updates per decision. Over decisions the runs are
# compared up to 25 000. The baseline makes 80 000, so that --axis seconds can compare them at equal compute: a run with
# four updates per decision took about three times as long on cartpole-swingup. Seconds depend on what else the machine
# does, so both configurations have to run side by side. 0_dog_run_25k needed no more than eight seeds.
question "Are four updates per decision better on dog-run, with small networks?"
seeds {21..28}
flags --task dog-run --steps 25000 --eval-freq 5000 --eval-episodes 4
flags --num-samples 64 --num-elites 8 --num-pi-trajs 4 --iterations 4 --reanalyze-batch-size 5

run bmpc.py baseline --steps 80000
run bmpc.py utd_ratio_4 --utd-ratio 4
