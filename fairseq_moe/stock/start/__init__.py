"""How does a command start, and how does it end when something is wrong?"""

from fairseq_moe.stock.start import ending, launch, objects, parsing, text  # noqa: F401  (declare their seams)
