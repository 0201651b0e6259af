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
export APPTAINERENV_NCCL_DEBUG=WARN
export APPTAINERENV_NOTE='it'"'"'s "quoted" $HOME'

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 50000))
export MASTER_ADDR MASTER_PORT

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
    apptainer exec --nv --no-home --bind /outside:/in --bind /runs/tiny:/runs/tiny --pwd /in/work image \
    bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
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
    apptainer exec --nv --no-home --bind /outside:/in --bind /runs/tiny:/runs/tiny --pwd /in/work image \
    python -m fairseq_moe.launch.measured /runs/tiny || echo "job.sh: measured.json was not written" >&2
fi
exit "$status"
