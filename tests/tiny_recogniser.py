# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Recognisers of random weights in a size for tests, with the encoder of ``tiny_nest``."""

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tiny_nest import CONFIGS, tiny_config

from nemo.collections.asr.models import EncDecCTCModel, EncDecHybridRNNTCTCModel, EncDecRNNTModel

LABELS = [' ', 'a', 'b', 'e', 'n']
MODELS = {'ctc': EncDecCTCModel, 'rnnt': EncDecRNNTModel, 'hybrid': EncDecHybridRNNTCTCModel}
SMALL = {'enc_hidden': 16, 'pred_hidden': 8, 'joint_hidden': 8}


def tiny_recogniser(kind: str, *overrides: str):
    """Build a model of ``streaming_KIND``, of 16 numbers in a frame, which says something although it was not trained."""
    with initialize_config_dir(str(CONFIGS.parents[1] / 'ssl/finetune'), version_base=None):
        cfg = compose(f'streaming_{kind}').model
    OmegaConf.set_struct(cfg, False)
    pretrained = tiny_config('model.encoder.n_layers=2', *overrides)
    cfg.labels, cfg.preprocessor, cfg.encoder = LABELS, pretrained.model.preprocessor, pretrained.model.encoder
    if 'model_defaults' in cfg:
        cfg.model_defaults.update(SMALL)
    for name in ('train_ds', 'validation_ds', 'optim'):
        cfg.pop(name, None)
    torch.manual_seed(0)
    model = MODELS[kind](cfg).eval()
    with torch.no_grad():  # of blank: a model that is silent shows nothing
        if kind != 'rnnt':
            last = getattr(model, 'ctc_decoder', model.decoder).decoder_layers[-1]
            last.weight.mul_(30.0)
            frames = model.encoder(audio_signal=torch.randn(1, 80, 800), length=torch.tensor([800]))[0]
            last.bias.copy_(-last.weight[:, :, 0] @ frames[0].mean(dim=1))  # no class is the likeliest everywhere
        if kind != 'ctc':
            model.joint.joint_net[-1].bias[-1] -= 1.0
    return model
