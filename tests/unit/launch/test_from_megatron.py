"""docs/from-megatron.md has every argument of both guides' scripts, and names nothing that is not there."""

import re
from typing import Any

import pytest

from fairseq_moe.launch.settings import MAPS, SETTINGS
from tests.helpers.ranks import REPOSITORY, run_ranks

# Of the Megatron-Core MoE guide: its table of arguments, its tips and its Mixtral script.
GUIDE = """
    num-experts expert-model-parallel-size moe-ffn-hidden-size expert-tensor-parallel-size moe-layer-freq
    moe-grouped-gemm moe-router-load-balancing-type moe-router-dtype moe-router-topk moe-router-score-function
    moe-router-pre-softmax moe-router-num-groups moe-router-group-topk moe-router-topk-scaling-factor
    moe-router-enable-expert-bias moe-router-bias-update-rate moe-router-force-load-balancing
    moe-aux-loss-coeff moe-z-loss-coeff moe-input-jitter-eps moe-token-dispatcher-type moe-enable-deepep
    moe-per-layer-logging moe-expert-capacity-factor moe-token-dropping moe-pad-expert-input-to-capacity
    moe-token-drop-policy moe-layer-recompute moe-permute-fusion moe-use-upcycling
    moe-shared-expert-intermediate-size moe-shared-expert-overlap moe-extended-tp moe-token-capacity-factor
    ckpt-format auto-detect-ckpt-format use-dist-ckpt recompute-granularity recompute-modules
    enable-cuda-graph external-cuda-graph cuda-graph-scope nproc_per_node nnodes node_rank master_addr
    master_port disable-bias-linear seq-length max-position-embeddings num-layers hidden-size ffn-hidden-size
    num-attention-heads init-method-std attention-dropout hidden-dropout normalization position-embedding-type
    swiglu untie-embeddings-and-output-weights group-query-attention num-query-groups no-masked-softmax-fusion
    no-position-embedding tokenizer-type tokenizer-model data-path split micro-batch-size global-batch-size lr
    train-iters lr-decay-iters lr-decay-style min-lr weight-decay lr-warmup-iters clip-grad bf16
    overlap-grad-reduce overlap-param-gather tensor-model-parallel-size pipeline-model-parallel-size
    num-layers-per-virtual-pipeline-stage sequence-parallel use-distributed-optimizer tp-comm-overlap
    log-interval save-interval eval-interval eval-iters save load tensorboard-dir no-load-optim no-load-rng
    wandb-project wandb-exp-name context-parallel-size
"""
# Of ModelZoo's files for DeepSeek-V3 and Mixtral 8x22B, what its launcher adds, and Qwen2's bias.
MODELZOO = """
    distributed-timeout-minutes use-mcore-models use-flash-attn train-samples exit-duration-in-mins
    no-save-optim no-check-for-nan-in-loss-and-grad cross-entropy-loss-fusion cross-entropy-fusion-impl
    manual-gc manual-gc-interval transformer-impl data-cache-path no-mmap-bin-files
    no-create-attention-mask-in-dataloader num-workers kv-channels rotary-base rotary-percent
    make-vocab-size-divisible-by norm-epsilon multi-latent-attention qk-layernorm lr-decay-samples
    lr-warmup-samples lr-warmup-init adam-beta1 adam-beta2 moe-router-fusion q-lora-rank kv-lora-rank
    qk-head-dim qk-pos-emb-head-dim v-head-dim rotary-scaling-factor mscale mscale-all-dim delay-wgrad-compute
    overlap-moe-expert-parallel-comm mtp-num-layers mtp-loss-scaling-factor finetune dist-ckpt-strictness
    no-ckpt-fully-parallel-save log-timers-to-tensorboard log-memory-to-tensorboard log-num-zeros-in-grad
    log-params-norm log-validation-ppl-to-tensorboard log-throughput logging-level enable-experimental
    add-qkv-bias num-virtual-stages-per-pipeline-rank decoder-first-pipeline-num-layers
    decoder-last-pipeline-num-layers optimizer-cpu-offload overlap-cpu-optimizer-d2h-h2d
    moe-flex-dispatcher-backend moe-hybridep-num-sms fp8-recipe fp8-format fp8-param-gather
    use-precision-aware-optimizer main-grads-dtype main-params-dtype exp-avg-dtype exp-avg-sq-dtype
    moe-router-padding-for-fp8 reuse-grad-buf-for-mxfp8-param-ag moe-router-padding-for-quantization profile
    profile-step-start profile-step-end profile-ranks use-pytorch-profiler
"""
PAGE = (REPOSITORY / "docs" / "from-megatron.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (`--[^|]*) \| ([^|]*) \|$", PAGE, re.MULTILINE)
_FLAG = r"`(--[\w-]+)[^`]*`"


def parsed_flags(rank: int) -> set[str]:
    """All flags that fairseq-train takes for a language model of ours."""
    from fairseq import options
    from fairseq.dataclass.utils import gen_parser_from_dataclass
    from fairseq.models import ARCH_MODEL_REGISTRY
    from fairseq.registry import REGISTRIES
    from fairseq.tasks import TASK_REGISTRY

    import fairseq_moe  # noqa: F401

    parser = options.get_training_parser()
    ARCH_MODEL_REGISTRY["transformer_lm"].add_args(parser)
    TASK_REGISTRY["language_modeling"].add_args(parser)
    for registry, name in (("optimizer", "adam"), ("lr_scheduler", "cosine"), ("bpe", "hf_tokenizers")):
        gen_parser_from_dataclass(parser, REGISTRIES[registry]["dataclass_registry"][name]())
    return set(parser._option_string_actions)


@pytest.fixture(scope="module")
def known() -> set[str]:
    found: set[str] = run_ranks(parsed_flags, 1)[0]
    return found


def test_every_argument_has_a_row() -> None:
    rows = [flag.removeprefix("--") for left, _ in ROWS for flag in re.findall(_FLAG, left)]
    wanted = {*GUIDE.split(), *MODELZOO.split()}
    assert wanted - set(rows) == set()
    assert sorted(rows) == sorted(set(rows)), "an argument has two rows"
    assert set(rows) <= wanted, "a row is of no argument of the guides"


def test_every_flag_and_key_of_a_row_is_there(known: set[str]) -> None:
    for left, right in ROWS:
        flags: list[Any] = re.findall(_FLAG, right)
        if right.startswith("the same"):
            flags += re.findall(_FLAG, left)
        keys = re.findall(r"\*(\w+)\*", right)
        assert (
            flags or keys or right.startswith(("not needed: ", "not there: ", "variables", "`fairseq-moe-"))
        ), left
        assert [flag for flag in flags if flag not in known] == [], left
        assert [key for key in keys if key not in {*SETTINGS, *MAPS}] == [], left


def test_what_is_not_needed_is_not_taken(known: set[str]) -> None:
    """A flag that exists here under the same name is said to be the same."""
    for left, right in ROWS:
        for flag in re.findall(_FLAG, left):
            if flag in known and not right.startswith("the same"):
                assert flag in right or flag == "--profile", flag
