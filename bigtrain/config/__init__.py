"""The settings of a run: what there is (schema), what is wrong with them (check), what follows from them (derive).

Nothing here imports torch. Ranks read the frozen file and nothing else: ``config = bigtrain.config.load(run_dir)``.
"""

from bigtrain.config.errors import UserError
from bigtrain.config.frozen import load, save, to_yaml
from bigtrain.config.schema import Config

__all__ = ["Config", "UserError", "load", "save", "to_yaml"]
