"""Start fairseq-hydra-train on a tiny model with experts."""

from pathlib import Path

from tests.helpers.ranks import CommandResult, run_cli

__all__ = ["MODEL", "TRAINING", "hydra_train"]

MODEL = [
    *("model=transformer_lm", "model.decoder_layers=2", "model.decoder_embed_dim=16"),
    *("model.decoder_input_dim=16", "model.decoder_output_dim=16", "model.decoder_ffn_embed_dim=32"),
    *("model.decoder_attention_heads=2", "model.moe_freq=2", "model.moe_expert_count=4"),
    "criterion.moe_gate_loss_wt=0.01",
]
TRAINING = [
    *("criterion=moe_cross_entropy", "optimizer=adam"),
    *("lr_scheduler=fixed", "optimization.lr=[0.01]", "optimization.max_update=3", "dataset.batch_size=4"),
    *("dataset.num_workers=0", "dataset.disable_validation=true", "common.cpu=true"),
    *("common.log_format=json", "common.log_interval=1", "common.user_dir=fairseq_moe"),
]


def hydra_train(
    start: str, data: Path, folder: Path, *more: str, world_size: int = 1, model: list[str] = MODEL
) -> CommandResult:
    task = ["task=language_modeling", f"task.data={data}", "task.tokens_per_sample=32"]
    paths = [f"hydra.run.dir={folder / 'run'}", f"checkpoint.save_dir={folder / 'save'}"]
    argv = ["fairseq_cli.hydra_train", *task, "task.sample_break_mode=none", *paths, *model, *TRAINING]
    return run_cli("tests.e2e.starts", [*argv, *more], world_size=world_size, cwd=folder, function=start)
