# SPDX-License-Identifier: Apache-2.0
"""Save the model that a pre-training begins with, for the arm that has none; run.py calls it.

python save_untrained.py --output=untrained.nemo --config=NAME OVERRIDE...
"""

import argparse
from pathlib import Path

import lightning.pytorch as pl
from hydra import compose, initialize_config_dir

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel
from nemo.collections.asr.parts.preprocessing.features import load_fixed_statistics

CONFIGS = Path(__file__).resolve().parents[2] / 'examples/asr/conf/ssl/nest'


def build(config: str, overrides: list[str]) -> EncDecDenoiseMaskedTokenPredModel:
    """Build the model as hierarchical_streaming_nest.py does, with the same first weights.

    Args:
        config: its name.
        overrides: for Hydra, a seed and a file of statistics among them.
    """
    with initialize_config_dir(str(CONFIGS), version_base=None):
        cfg = compose(config, overrides=overrides)
    if str(cfg.model.preprocessor.normalize).endswith('.yaml'):
        cfg.model.preprocessor.normalize = load_fixed_statistics(cfg.model.preprocessor.normalize)
    pl.seed_everything(cfg.seed, workers=True)
    return EncDecDenoiseMaskedTokenPredModel(cfg=cfg.model)


def main(argv=None) -> None:
    """Build and save the model."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--output', required=True)
    parser.add_argument('--config', required=True)
    parser.add_argument('overrides', nargs='*')
    options = parser.parse_args(argv)
    build(options.config, options.overrides).save_to(options.output)


if __name__ == '__main__':
    main()
