# SPDX-License-Identifier: Apache-2.0
"""Pre-train as ``pretrain.py`` does, with contexts by layer and a curriculum: the config ``nest_hierarchical_streaming``.

python hierarchical_streaming_nest.py model.train_ds.manifest_filepath=train.json ...
"""

import sys

from script_tools import require_patches, show_help

show_help(__doc__)


def main() -> None:
    """Pre-train as the config says."""
    require_patches(__file__)
    from pretrain import main as pretrain

    if not any(argument.startswith(('--config-name', '-cn')) for argument in sys.argv):
        sys.argv.insert(1, '--config-name=nest_hierarchical_streaming')
    pretrain()


if __name__ == "__main__":
    main()
