#!/bin/bash
#SBATCH --job-name=tiny
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=12
#SBATCH --account=team
#SBATCH --partition=gpu
#SBATCH --time=1-04:00:00
#SBATCH --segment=2
#SBATCH --output=/runs/tiny/logs/%j.log
#SBATCH --signal=B:TERM@600
#SBATCH --exclusive
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --qos=high
#SBATCH '--comment=it'"'"'s a run'

set -eo pipefail
module load cuda
set -u

export NCCL_DEBUG=WARN
export NOTE='it'"'"'s "quoted" $HOME'

command=(
  fairseq-train '/data/my text'
  --user-dir fairseq_moe
  --adam-betas '(0.9, 0.98)'
)

saved() { stat --format='%i %y' /runs/tiny/checkpoints/checkpoint_last.pt 2> /dev/null || echo none; }

stopped= interrupted= saved_before=
on_term() {
  interrupted=1
  [[ -z "$stopped" ]] || return 0
  stopped=1
  saved_before=$(saved)
  # To the ranks, not to srun: srun answers TERM by killing them.
  scancel --signal=TERM "$SLURM_JOB_ID" || echo "job.sh: scancel could not tell the ranks to save" >&2
}
trap on_term TERM

srun --cpus-per-task=12 --cpu-bind=cores \
    "${command[@]}" &
ranks=$!
while :; do
  interrupted= status=0
  wait "$ranks" || status=$?
  [[ -n "$interrupted" ]] || break
done

if [[ -n "$stopped" && "$status" == 0 && "$(saved)" == "$saved_before" ]]; then
  echo "job.sh: TERM came, and no checkpoint was written after it; the job has failed" >&2
  status=1
fi

if [[ -n "$stopped" && "$status" == 0 ]]; then
  restarts=${SLURM_RESTART_COUNT:-0}
  if ((restarts >= 3)); then
    echo "job.sh: saved, and not queued again: started again $restarts times already, and 3 is the most" >&2
  elif [[ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" == RUNNING ]]; then
    echo "job.sh: saved, and queued again"
    scontrol requeue "$SLURM_JOB_ID"
    exit
  fi
fi

if [[ "$status" == 0 ]]; then
  srun --nodes=1 --ntasks=1 --ntasks-per-node=1 \
    python -m fairseq_moe.launch.measured /runs/tiny || echo "job.sh: measured.json was not written" >&2
fi
exit "$status"
