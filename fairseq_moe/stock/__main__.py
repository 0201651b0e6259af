"""``python -m fairseq_moe.stock``: print the adapter's tables, as README.md and CONTRIBUTING.md show them."""

from fairseq_moe.stock.tables import flags_table, own_flags_table, seams_table

if __name__ == "__main__":
    print(seams_table(), own_flags_table(), flags_table(), sep="\n\n")
