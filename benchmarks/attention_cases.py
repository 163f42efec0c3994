# SPDX-License-Identifier: Apache-2.0
"""What ``attention.py`` times: an encoder or one attention module, by stock NeMo or block by block.

``attention.py`` runs it in processes of its own, one for each way, with the overlay off for stock NeMo.
"""

from collections.abc import Callable
from functools import partial

import torch
from measure import serve

from nemo.collections.asr.modules import ConformerEncoder
from nemo.collections.asr.parts.submodules.multi_head_attention import (
    MultiHeadAttention,
    RelPositionMultiHeadAttention,
)

FEATURES = 80
FRAMES_PER_MINUTE = 6000  # feature frames, every 10 ms
FACTOR = 8  # feature frames of an attention frame
HIERARCHICAL = 'hierarchical'  # 40, 120 and 320 frames in the thirds of the stack, as in the hierarchical config


def build(case: dict) -> Callable[[], None]:
    """Build a case and return what runs it: forward and backward, or forward only."""
    torch.set_num_threads(case['threads'])
    torch.manual_seed(0)
    return encoder(case) if case['part'] == 'encoder' else attention(case)


def encoder(case: dict) -> Callable[[], None]:
    """Return a run of the whole encoder, in training."""
    hierarchical = case['context'] == HIERARCHICAL
    own = {} if case['stock'] or not hierarchical else dict(layer_att_context_size=schedule(case['layers']))
    module = ConformerEncoder(
        feat_in=FEATURES,
        n_layers=case['layers'],
        d_model=case['d_model'],
        n_heads=case['heads'],
        subsampling='dw_striding',
        subsampling_factor=FACTOR,
        subsampling_conv_channels=256,
        causal_downsampling=True,
        conv_kernel_size=9,
        conv_norm_type='layer_norm',
        conv_context_size='causal',
        use_pytorch_sdpa=case['sdpa'],
        dropout=case['dropout'],
        dropout_pre_encoder=case['dropout'],
        dropout_emb=0.0,
        dropout_att=case['dropout'],
        att_context_size=[320 if hierarchical else int(case['context']), 0],
        **own,
    ).to(case['device'])
    assert case['stock'] != hasattr(module, 'blockwise_attention'), 'the overlay is not as it should be'
    frames = int(case['minutes'] * FRAMES_PER_MINUTE)
    features = torch.randn(case['batch_size'], FEATURES, frames, device=case['device'])
    lengths = torch.full((case['batch_size'],), frames, device=case['device'])
    module.update_max_seq_length(frames, features.device)  # positions are computed once, not in each run

    def run() -> None:
        module.zero_grad()
        with torch.set_grad_enabled(not case['forward_only']):
            encoded, _ = module(audio_signal=features, length=lengths)
        if not case['forward_only']:
            encoded.square().mean().backward()

    return run


def schedule(layers: int) -> list:
    """The schedule of ``nest_hierarchical_streaming.yaml``, stretched or squeezed to a number of layers."""
    return [[index * layers // 3, [left, 0]] for index, left in enumerate((40, 120, 320))]


def attention(case: dict) -> Callable[[], None]:
    """Return a run of one attention module of a layer, its mask included."""
    frames = case.get('frames') or int(case['minutes'] * FRAMES_PER_MINUTE / FACTOR)
    positions, left = case.get('positions', True), int(case['context'])
    cls = partial(RelPositionMultiHeadAttention, pos_bias_u=None, pos_bias_v=None) if positions else MultiHeadAttention
    sizes = dict(n_head=case['heads'], n_feat=case['d_model'], dropout_rate=case['dropout'])
    module = cls(**sizes, use_pytorch_sdpa=case['sdpa']).to(case['device'])
    shape = case['batch_size'], frames, case['d_model']
    values, weights = torch.randn(2, *shape, device=case['device'])
    values.requires_grad_()
    pos_emb = torch.randn(1, 2 * frames - 1, case['d_model'], device=case['device']) if positions else None
    make_mask = _all_pairs if case['stock'] else _blocks

    def run() -> None:
        module.zero_grad()
        with torch.set_grad_enabled(not case['forward_only']):
            attended = module(values, values, values, make_mask(left, values), pos_emb=pos_emb)
        if not case['forward_only']:
            (attended * weights).sum().backward()

    return run


def _all_pairs(left: int, values: torch.Tensor) -> torch.Tensor:
    """NeMo's mask [B, T, T] bool, True = hidden."""
    batch, frames, _ = values.shape
    return ~torch.ones(batch, frames, frames, dtype=torch.bool, device=values.device).triu(-left).tril()


def _blocks(left: int, values: torch.Tensor):
    from nemo.collections.asr.parts.att_context.blockwise import BlockwiseMask
    from nemo.collections.asr.parts.att_context.context import AttContext
    from nemo.collections.asr.parts.att_context.windows import Window

    padding = torch.zeros(values.shape[:2], dtype=torch.bool, device=values.device)
    return BlockwiseMask(Window(AttContext(left, 0)), padding)


if __name__ == '__main__':
    serve(build)
