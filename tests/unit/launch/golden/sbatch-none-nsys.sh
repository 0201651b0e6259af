#!/bin/bash
#SBATCH --job-name=tiny
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=12
#SBATCH --account=team
#SBATCH --partition=gpu
#SBATCH --segment=2
#SBATCH --output=/runs/tiny/logs/%j.log
#SBATCH --signal=B:TERM@600
#SBATCH --exclusive
#SBATCH --open-mode=append
#SBATCH --no-requeue
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
    bash -c 'if command -v nsys > /dev/null; then
  case $SLURM_PROCID in
    0 | 5)
      set -- nsys profile -t cuda,nvtx --capture-range=cudaProfilerApi --capture-range-end=stop --force-overwrite=true -o /runs/tiny/profile/rank-$SLURM_PROCID "$@"
      ;;
  esac
else
  [ $SLURM_PROCID != 0 ] || echo "profile: nsys is not found; torch profiles instead" >&2
  set -- "$@" --use-pytorch-profiler
fi
exec "$@"' rank \
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

if [[ "$status" == 0 ]]; then
  srun --nodes=1 --ntasks=1 --ntasks-per-node=1 \
    python -m fairseq_moe.launch.measured /runs/tiny || echo "job.sh: measured.json was not written" >&2
fi
exit "$status"
