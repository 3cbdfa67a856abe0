#!/usr/bin/env bash
#SBATCH --job-name=loratool
#SBATCH --array=0-7
#SBATCH --cpus-per-task=4
#SBATCH --mem=4G
#SBATCH --time=02:00:00
#SBATCH --requeue
#
# Compress a folder of adapters, one slice per task of a Slurm array:
#
#     sbatch examples/slurm_array.sh ADAPTERS OUT
#
# Task 3 of 8 takes every eighth adapter from the fourth on and puts the results into OUT/3/.  A task
# that was killed goes on when it is given again: what it has written stays.
set -euo pipefail
adapters=${1:?ADAPTERS, a folder} out=${2:?OUT, a folder}
task=${SLURM_ARRAY_TASK_ID:-0} tasks=${SLURM_ARRAY_TASK_COUNT:-1}

slice=() number=0
for adapter in "$adapters"/*; do
  if ((number % tasks == task)); then slice+=("$adapter"); fi
  number=$((number + 1))
done
if ((${#slice[@]} == 0)); then exit 0; fi

mkdir -p "$out"
loratool compress "${slice[@]}" --rank 8 -o "$out/$task/" --threads "${SLURM_CPUS_PER_TASK:-2}"
