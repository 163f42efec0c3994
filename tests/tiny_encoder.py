# SPDX-License-Identifier: Apache-2.0
"""A causal streaming encoder in a size for tests, with weights that let every dependence show."""

import torch

from nemo.collections.asr.modules.conformer_encoder import ConformerEncoder

KERNEL = 3  # of the convolutions: each layer sees two frames back
TINY_ENCODER = dict(
    feat_in=8,
    n_layers=4,
    d_model=16,
    n_heads=2,
    ff_expansion_factor=2,
    subsampling='dw_striding',
    subsampling_factor=8,
    subsampling_conv_channels=4,
    causal_downsampling=True,
    conv_kernel_size=KERNEL,
    conv_norm_type='layer_norm',
    conv_context_size='causal',
    pos_emb_max_len=64,
)
WITHOUT_DROPOUT = dict(dropout=0.0, dropout_pre_encoder=0.0, dropout_emb=0.0, dropout_att=0.0)


def tiny_encoder(seed: int = 0, std: float = 0.4, kind=ConformerEncoder, **changes) -> ConformerEncoder:
    """Build the encoder, in eval mode; the same weights for the same seed."""
    torch.manual_seed(seed)
    encoder = kind(**{**TINY_ENCODER, **changes}).eval()
    for parameter in encoder.parameters():  # biases of 0 and small weights hide dependences
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=std)
    return encoder


def encode(encoder, frames, lengths=None):
    """Run the layers alone on frames [B, A, d_model]; returns [B, A, d_model]."""
    lengths = torch.full(frames.shape[:1], frames.shape[1]) if lengths is None else lengths
    return encoder(audio_signal=frames, length=lengths, bypass_pre_encode=True)[0].transpose(1, 2)


def with_adapter(encoder, adapter):
    """Add an adapter that shows: NeMo's begin as nothing."""
    encoder.add_adapter('added', adapter)
    encoder.set_enabled_adapters('added', enabled=True)
    torch.manual_seed(1)
    for name, parameter in encoder.named_parameters():
        if 'adapter_layer' in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return encoder
