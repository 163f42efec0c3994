# SPDX-License-Identifier: Apache-2.0
r"""Pre-train a streaming encoder to predict next tokens, masked tokens (NEST), or both.

    python pretrain.py \
        model.train_ds.manifest_filepath=train.json \
        model.validation_ds.manifest_filepath=validation.json \
        model.train_ds.noise_manifest=noise.json \
        model.preprocessor.normalize=stats.yaml \
        exp_manager.exp_dir=experiments

The default config is ``nest_next_token_streaming``; set ``--config-name`` to use another one of ``../conf/ssl/nest``.
``stats.yaml`` is a file of ``compute_feature_stats.py``. To continue an interrupted run, run the command again.
"""

from script_tools import fit_or_exit, make_trainer, require_patches, show_help

show_help(__doc__)
PATCHES_IN_USE = require_patches(__file__)

from omegaconf import DictConfig, open_dict

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel
from nemo.collections.asr.parts.att_context.receptive_field import context_table
from nemo.collections.asr.parts.preprocessing.features import load_fixed_statistics
from nemo.collections.asr.parts.ssl_reports.figures import attention_frame_ms
from nemo.collections.asr.parts.utils.pretraining_checks import check_pretraining_config
from nemo.core.config import hydra_runner
from nemo.utils import logging


def prepare(cfg: DictConfig) -> DictConfig:
    """Check the config, and replace the name of a statistics file by the statistics.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """
    check_pretraining_config(cfg)
    normalize = cfg.model.preprocessor.get('normalize')
    if isinstance(normalize, str) and normalize.endswith(('.yaml', '.yml')):
        with open_dict(cfg):
            cfg.model.preprocessor.normalize = load_fixed_statistics(normalize)
    return cfg


def build(cfg: DictConfig):
    """Make the trainer and the model of the config, in the experiment's folder; log the model's contexts.

    Raises:
        ValueError: from any of them, naming what cannot work.
    """
    trainer = make_trainer(cfg)
    model = EncDecDenoiseMaskedTokenPredModel(cfg=cfg.model, trainer=trainer)
    model.maybe_init_from_pretrained_checkpoint(cfg)
    logging.info(context_table(model.encoder, attention_frame_ms(model)))
    return trainer, model


@hydra_runner(config_path="../conf/ssl/nest", config_name="nest_next_token_streaming")
def main(cfg: DictConfig) -> None:
    """Pre-train by the config."""
    fit_or_exit(__file__, PATCHES_IN_USE, cfg, prepare, build)


if __name__ == "__main__":
    main()  # Hydra supplies the config
