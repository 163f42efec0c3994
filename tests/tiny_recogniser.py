# SPDX-License-Identifier: Apache-2.0
"""Recognisers of random weights in a size for tests, with the encoder of ``tiny_nest``."""

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tiny_nest import CONFIGS, tiny_config

from nemo.collections.asr.models import (
    EncDecCTCModel,
    EncDecCTCModelBPE,
    EncDecHybridRNNTCTCBPEModel,
    EncDecHybridRNNTCTCModel,
    EncDecRNNTBPEModel,
    EncDecRNNTModel,
)

LABELS = [' ', 'a', 'b', 'e', 'n']
MODELS = {'ctc': EncDecCTCModel, 'rnnt': EncDecRNNTModel, 'hybrid': EncDecHybridRNNTCTCModel}
OF_PIECES = {'ctc': EncDecCTCModelBPE, 'rnnt': EncDecRNNTBPEModel, 'hybrid': EncDecHybridRNNTCTCBPEModel}
SMALL = {'enc_hidden': 16, 'pred_hidden': 8, 'joint_hidden': 8}


def tiny_recogniser(kind: str, *overrides: str, tokenizer=None):
    """Build a model of ``streaming_KIND``, of 16 numbers in a frame, which says something although it was not trained.

    Args:
        kind: ``ctc``, ``rnnt`` or ``hybrid``.
        overrides: of the encoder's config of pre-training.
        tokenizer: the folder of one; None: the model says characters.
    """
    with initialize_config_dir(str(CONFIGS.parents[1] / 'ssl/finetune'), version_base=None):
        cfg = compose(f'streaming_{kind}').model
    OmegaConf.set_struct(cfg, False)
    pretrained = tiny_config('model.encoder.n_layers=2', *overrides)
    cfg.labels, cfg.preprocessor, cfg.encoder = LABELS, pretrained.model.preprocessor, pretrained.model.encoder
    if tokenizer is not None:
        del cfg.labels
        cfg.tokenizer = {'dir': str(tokenizer), 'type': 'bpe'}
        for decoder in (cfg.decoder, cfg.get('aux_ctc', {}).get('decoder', {})):
            if 'num_classes' in decoder:
                decoder.num_classes, decoder.vocabulary = -1, []
    if 'model_defaults' in cfg:
        cfg.model_defaults.update(SMALL)
    for name in ('train_ds', 'validation_ds', 'optim'):
        cfg.pop(name, None)
    torch.manual_seed(0)
    model = (OF_PIECES if tokenizer else MODELS)[kind](cfg).eval()
    with torch.no_grad():  # of blank: a model that is silent shows nothing
        if kind != 'rnnt':
            last = getattr(model, 'ctc_decoder', model.decoder).decoder_layers[-1]
            last.weight.mul_(30.0)
            frames = model.encoder(audio_signal=torch.randn(1, 80, 800), length=torch.tensor([800]))[0]
            last.bias.copy_(-last.weight[:, :, 0] @ frames[0].mean(dim=1))  # no class is the likeliest everywhere
        if kind != 'ctc':
            model.joint.joint_net[-1].bias[-1] -= 1.0
    return model
