"""Write what a rank does before it becomes the training command: its number, and the profiler around it."""

from fairseq_moe.launch.job import Job
from fairseq_moe.launch.render.words import quoted

__all__ = ["has_gpus", "in_rank", "profile_without_gpus"]

# All ranks get it, because they must agree about flags; --profile-ranks says which of them write.
_TORCH_PROFILER = "--use-pytorch-profiler"
# Inside a container there is no scontrol, by which ranks of a SLURM step find each other.
_AS_TORCHRUN = "export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS"


def has_gpus(job: Job) -> bool:
    """Tell whether ranks compute on GPUs."""
    return job.mode != "local" and job.cluster.gpus_per_node > 0


def in_rank(job: Job) -> str | None:
    """Write a script that a rank runs with the training command as its arguments; None where none is needed.

    It ends in ``exec``: SLURM and torchrun signal the process that they have started, and no child of it.
    """
    in_step = job.mode == "sbatch"
    lines = [_AS_TORCHRUN] if in_step and job.container.kind != "none" else []
    if job.profile.profiler == "nsys" and has_gpus(job):
        lines += _nsys(job, "$SLURM_PROCID" if in_step else "$RANK")
    return "\n".join([*lines, 'exec "$@"']) if lines else None


def profile_without_gpus(job: Job) -> list[str]:
    """Write lines that ask torch for the profile instead of nsys, on CPUs; none where none are needed."""
    if job.profile.profiler != "nsys" or has_gpus(job):
        return []
    sentence = "profile: nsys watches GPUs, and there are none; torch profiles instead"
    return [f'echo "{sentence}" >&2', f"command+=({_TORCH_PROFILER})", ""]


def _nsys(job: Job, rank: str) -> list[str]:
    words = [
        "nsys",
        "profile",
        "-t",
        "cuda,nvtx",
        "--capture-range=cudaProfilerApi",
        "--capture-range-end=stop",
    ]
    words += ["--force-overwrite=true", "-o", f"{job.run_dir}/profile/rank-"]
    ranks = job.profile.ranks
    sentence = 'echo "profile: nsys is not found; torch profiles instead" >&2'
    return [
        "if command -v nsys > /dev/null; then",
        f"  case {rank} in",
        f"    {' | '.join(map(str, ranks))})",
        f'      set -- {quoted(words)}{rank} "$@"',
        "      ;;",
        "  esac",
        "else",
        f"  [ {rank} != {ranks[0]} ] || {sentence}",
        f'  set -- "$@" {_TORCH_PROFILER}',
        "fi",
    ]
