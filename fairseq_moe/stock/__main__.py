"""``python -m fairseq_moe.stock``: print the tables of docs/seams.md, docs/flags.md and docs/reliability.md."""

from fairseq_moe.stock.tables import own_flags_tables, resume_table, seams_table, stock_flags_table

if __name__ == "__main__":
    print(seams_table(), own_flags_tables(), stock_flags_table(), resume_table(), sep="\n\n")
