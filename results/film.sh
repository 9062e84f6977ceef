#!/usr/bin/env bash
# Make results/dog.gif: film an episode of a small agent that was trained on dog-run, from the checkpoint of
#   bash sweeps.sh 0_dog_run_25k --seeds 28
# The GIF shows the first 16 seconds of the video at twice its speed, which is about the speed of the simulation.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run=runs/dog-run__bmpc__28__0_dog_run_25k__baseline
[[ -e $run/checkpoint.pt ]] || { echo "first train the agent: bash sweeps.sh 0_dog_run_25k --seeds 28" >&2; exit 2; }
python bmpc.py --evaluate $run --eval-episodes 1 --capture-video
ffmpeg=$(python -c 'import imageio_ffmpeg; print(imageio_ffmpeg.get_ffmpeg_exe())')
filter="setpts=PTS/2,fps=15,scale=240:-1,split[a][b];[a]palettegen=max_colors=64[p];[b][p]paletteuse=dither=none"
"$ffmpeg" -y -loglevel error -t 16 -i $run/videos/evaluate-25000.mp4 -vf "$filter" results/dog.gif
