"""``python -m fairseq_moe.inspect``: the documented name of ``expert_load.command``."""

from fairseq_moe.expert_load.command import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
