# SPDX-License-Identifier: Apache-2.0
"""Run ``pretrain.py`` with ``nest_hierarchical_streaming``: layer contexts and a curriculum.

python hierarchical_streaming_nest.py model.train_ds.manifest_filepath=train.json ...
"""

import runpy
import sys
from pathlib import Path

from script_tools import require_patches, show_help

show_help(__doc__)


def main() -> None:
    """Pre-train by the config."""
    require_patches(__file__)
    if not any(argument.startswith(('--config-name', '-cn')) for argument in sys.argv):
        sys.argv.insert(1, '--config-name=nest_hierarchical_streaming')
    runpy.run_path(
        str(Path(__file__).with_name('pretrain.py')), run_name='__main__'
    )  # Hydra looks beside it for configs


if __name__ == "__main__":
    main()
