# SPDX-License-Identifier: Apache-2.0
"""Pre-train as hierarchical_streaming_nest.py does, with masks that ignore the attention's context; run.py calls it.

NeMo makes what a config names from its own modules only, so the masking is put into the model once that is built.
"""

import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / 'examples/asr/speech_pretraining'
sys.path.append(str(SCRIPTS))

import hierarchical_streaming_nest as pretraining
from context_free_masking import ContextFreeMasking
from omegaconf import DictConfig
from script_tools import fit_or_exit

from nemo.core.config import hydra_runner


def build(cfg: DictConfig):
    """Make trainer and model as the script does, and replace the masking; arguments and errors are the script's."""
    trainer, model = pretraining.build(cfg)
    model.mask_processor = ContextFreeMasking.of_model(model)
    return trainer, model


@hydra_runner(config_path='../../examples/asr/conf/ssl/nest', config_name='nest_fast-conformer_streaming_tiny')
def main(cfg: DictConfig) -> None:
    """Pre-train as the config says."""
    fit_or_exit(__file__, pretraining.PATCHES_IN_USE, cfg, pretraining.prepare, build)


if __name__ == '__main__':
    main()  # noqa: Hydra supplies the config
