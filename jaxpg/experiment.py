"""Names under which scripts and notebooks import parts of `jaxpg.runs`."""

import sys

from jaxpg.runs.config import presets
from jaxpg.runs.play import playback
from jaxpg.runs.plot import command as pictures
from jaxpg.runs.store import artifacts
from jaxpg.runs.train import run

__all__ = ["artifacts", "pictures", "playback", "presets", "run"]
__path__ = []  # a package, whose modules are these
for _name in __all__:
    sys.modules[f"{__name__}.{_name}"] = globals()[_name]
