"""Bytes of published sizes by hand; ``tests/distributed/test_bytes_sent.py`` counts what ranks send."""

from fairseq_moe.parallel.traffic import ExpertRows, SplitPass, gathered_bytes, shared_bytes, summed_bytes

MIB = 2**20


def test_a_sum_is_sent_as_a_share_and_a_gather_of_shares() -> None:
    assert summed_bytes(4096, 4) == shared_bytes(4096, 4) + gathered_bytes(1024, 4) == 6144
    assert gathered_bytes(10, 1) == shared_bytes(10, 1) == summed_bytes(10, 1) == 0


def test_rows_of_mixtral_on_8_ranks_are_56_mib_in_each_of_four_passes() -> None:
    rows = ExpertRows(tokens=4096, top_k=2, dim=4096, value_bytes=2, expert=8)
    assert rows.sent() == 4 * 56 * MIB
    again = ExpertRows(tokens=4096, top_k=2, dim=4096, value_bytes=2, expert=8, forwards=2)
    assert again.sent() == 6 * 56 * MIB


def test_parts_of_experts_get_a_copy_of_each_row() -> None:
    rows = ExpertRows(tokens=64, top_k=2, dim=16, value_bytes=2, expert=2, expert_tensor=4)
    assert rows.ranks == 8
    assert rows.sent() == 4 * (64 * 2 * 4 * 16 * 2) * 7 // 8


def test_keys_and_values_are_sent_three_times_as_by_a_ring() -> None:
    """A ring sends two tensors forward, and twice as much backward: Megatron-LM's context parallelism."""
    split = SplitPass(tokens=1024, value_bytes=2, context=4)
    assert split.keys(2 * 128) == 3 * (2 * 1024 * 128 * 2) * 3
    assert split.block(gathered=512, scattered=512) == 0  # one tensor rank


def test_attention_over_tensor_gathers_and_scatters_twice() -> None:
    split = SplitPass(tokens=1024, value_bytes=2, tensor=4)
    assert split.block(gathered=512, scattered=512) == 4 * (1024 * 512 * 2) * 3 // 4
    assert split.wide_bytes == 4
