"""fairseq criterions."""

from fairseq_moe.criterions.moe_cross_entropy import MoECrossEntropyCriterion

__all__ = ["MoECrossEntropyCriterion"]
