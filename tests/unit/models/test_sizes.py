"""The branch's two README commands describe models of exactly its sizes, built here on the meta device."""

import pytest
import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from fairseq_moe.distributed import ParallelMesh
from fairseq_moe.models import decoder
from fairseq_moe.parallel.experts import ExpertLayout
from fairseq_moe.parallel.placement import is_expert

COMMON = (
    "--ddp-backend fully_sharded --memory-efficient-fp16 --checkpoint-activations --task dummy_lm "
    "--arch transformer_lm_gpt --share-decoder-input-output-embed --moe-freq 2 --moe-gating-use-fp32 "
    "--moe-second-expert-policy all --moe-normalize-expert-grad sqrt_world_size "
    "--moe-eval-capacity-token-fraction -1.0 --max-sentences-valid 1 --num-workers-valid 0 "
    "--criterion moe_cross_entropy --moe-gate-loss-wt 0.01 --moe-gate-loss-combine-method sum "
    "--optimizer adam --fp16-adam-stats --adam-betas (0.9,0.98) --clip-norm 0.0 --lr 0.0005 "
    "--warmup-updates 750 --dropout 0.1 --attention-dropout 0.1 --update-freq 1 --max-update 250 "
    "--disable-validation --log-format json --log-interval 10 --tokens-per-sample 1024 "
    "--decoder-attention-heads 32"
)
COMMANDS = {
    "8 GPUs": "--decoder-layers 24 --decoder-embed-dim 2048 --decoder-ffn-embed-dim 8192 --batch-size 8 "
    "--moe-expert-count 8",
    "64 GPUs": "--decoder-layers 32 --decoder-embed-dim 4096 --decoder-ffn-embed-dim 16384 --batch-size 12 "
    "--moe-expert-count 64",
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # fairseq's use of hydra
@pytest.mark.parametrize(
    ("command", "world_size", "num_shared", "num_expert"),
    [("8 GPUs", 8, 908_423_168, 402_776_064), ("64 GPUs", 64, 4_505_346_048, 2_147_811_328)],
)
def test_readme_models(
    command: str, world_size: int, num_shared: int, num_expert: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mesh_of_one_rank(num_experts: int, ep_size: int | None = None) -> ParallelMesh:
        assert ep_size is None
        layout = ExpertLayout(num_experts=num_experts, world_size=world_size)
        return ParallelMesh(layout=layout, rank=world_size - 1)

    monkeypatch.setattr(decoder, "parallel_mesh", mesh_of_one_rank)
    args = options.parse_args_and_arch(
        options.get_training_parser(), [*COMMON.split(), *COMMANDS[command].split()]
    )
    cfg = convert_namespace_to_omegaconf(args)
    task = tasks.setup_task(cfg.task)
    with torch.device("meta"):
        model = task.build_model(cfg.model)
    sizes = {True: 0, False: 0}
    for parameter in model.parameters():
        assert is_expert(parameter) == hasattr(parameter, "expert")
        sizes[is_expert(parameter)] += parameter.numel()
    assert sizes == {False: num_shared, True: num_expert}
