"""Restore the format of log lines that stock's commands ask for, and that another of its modules takes from them."""

import logging
import os

__all__ = ["use_stock_log_format"]

_FORMAT = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"
_DATE_FORMAT = "%Y-%m-%d %H:%M:%S"


def use_stock_log_format() -> None:
    """Give log lines the format and level that fairseq's commands ask for, on the stream that they go to.

    Commands other than fairseq-train import fairseq before they call ``logging.basicConfig``, and an import inside it
    (``fairseq.models.wav2vec.wav2vec2_classification``) calls that first, with level DEBUG and no format. Only what
    that call leaves is changed: a program that has set up logging in another way keeps what it has.
    """
    root = logging.getLogger()
    if len(root.handlers) != 1 or root.level != logging.DEBUG:
        return
    (handler,) = root.handlers
    is_plain = type(handler) is logging.StreamHandler and handler.formatter is not None
    if not is_plain or handler.formatter._fmt != logging.BASIC_FORMAT:  # type: ignore[union-attr]
        return
    handler.setFormatter(logging.Formatter(_FORMAT, _DATE_FORMAT))
    root.setLevel(os.environ.get("LOGLEVEL", "INFO").upper())
