"""``python -m fairseq_moe.stock``: print the tables of docs/seams.md and docs/flags.md."""

from fairseq_moe.stock.tables import own_flags_tables, seams_table, stock_flags_table

if __name__ == "__main__":
    print(seams_table(), own_flags_tables(), stock_flags_table(), sep="\n\n")
