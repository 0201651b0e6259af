"""Lets fairseq-hydra-train compose a configuration with the expert flags (``model.moe_freq=2``).

fairseq imports ``common.user_dir`` after hydra has composed the configuration, which is too late for new
model fields. Hydra asks the plugins of this namespace package for additions to its search path before it
composes; that is the moment to import fairseq_moe. Hydra loads this plugin for every application of the
environment, so it acts for fairseq's own command only.
"""

import sys
from pathlib import PurePath

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

__all__ = ["FairseqMoEPlugin"]

# The console command, the script by path and ``python -m fairseq_cli.hydra_train``.
_FAIRSEQ_COMMANDS = ("fairseq-hydra-train", "hydra_train")


class FairseqMoEPlugin(SearchPathPlugin):  # type: ignore[misc]
    """Imports fairseq_moe while fairseq-hydra-train sets its search path up; adds nothing to the path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Register the models, criterions and tasks, and install the adapter."""
        if PurePath(sys.argv[0]).stem in _FAIRSEQ_COMMANDS:
            import fairseq_moe  # noqa: F401
