# SPDX-License-Identifier: Apache-2.0
"""Scenarios of single modules: masking, quantizer, encoder, decoder, losses.

A scenario takes a ``Place`` and returns what it computed, to be compared with the CPU's.
"""

from functools import partial
from itertools import product

import torch
from device.place import Place
from next_token_pairs import loss_of_all_pairs
from tiny_encoder import WITHOUT_DROPOUT, tiny_encoder

from nemo.collections.asr.losses.ssl_losses.mlm import MLMLoss, MultiMLMLoss
from nemo.collections.asr.modules.ssl_modules.masking import RandomBlockMasking
from nemo.collections.asr.modules.ssl_modules.multi_softmax_decoder import MultiSoftmaxDecoder
from nemo.collections.asr.modules.ssl_modules.quantizers import RandomProjectionVectorQuantizer
from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.windows import Window
from nemo.collections.asr.parts.objectives import base

FEATURES, FRAMES, FACTOR, CLASSES = 8, 160, 8, 32
LENGTHS = 160, 90


def masking(place: Place, moved: bool) -> list:
    """Mask in every mode; the module is moved to the device, or was left on the CPU."""
    features, lengths, found = place.random(2, FEATURES, FRAMES), place.whole(*LENGTHS), []
    calls = (
        {},
        {'effective_left_context': 5},
        {'effective_window': Window(AttContext(4, 3))},
        {'effective_left_context': 5, 'current_frame': 120},
        {'effective_left_context': 5, 'current_frame': place.whole(130, 70)},
        {'current_frame': lengths},
    )
    for overlap, causal, call in product((True, False), (True, False), calls):
        settings = dict(mask_prob=0.02 if overlap else 0.4, block_size=16, allow_overlap=overlap, causal=causal)
        module = RandomBlockMasking(FEATURES, subsampling_factor=FACTOR, **settings)
        module = place.put(module) if moved else module
        found += module(input_feats=features, input_lengths=lengths, **call)
    return [*found, *module.forward_causal(features, lengths)]


def masking_of_streams(place: Place) -> list:
    """Mask live streams, frame after frame."""
    module = place.put(RandomBlockMasking(FEATURES, block_size=8, allow_overlap=True, mask_prob=0.05))
    settings = dict(stream=module.new_stream(2, place.device), effective_window=Window(AttContext(5, 0)))
    return module(input_feats=place.random(2, FEATURES, 24), input_lengths=place.whole(24, 24), **settings)


def quantizer(place: Place, distance: str, books: int) -> list:
    """Find the tokens of features."""
    kind = dict(combine_time_steps=FACTOR, dist_fn=distance, squeeze_single=books == 1)
    module = place.put(RandomProjectionVectorQuantizer(FEATURES, 4, CLASSES, books, **kind))
    return list(module(input_signal=place.random(2, FEATURES, FRAMES)))


def encoder(place: Place, **settings) -> list:
    """Encode, forward and backward; gradients are compared, too."""
    module = place.put(tiny_encoder(n_layers=2, **{**WITHOUT_DROPOUT, **settings})).train()
    with place.autocast():
        encoded, lengths = module(audio_signal=place.random(2, FEATURES, FRAMES), length=place.whole(*LENGTHS))
    encoded.float().square().mean().backward()
    return [encoded, lengths, *(weight.grad for weight in module.parameters() if weight.grad is not None)]


def _masks(place: Place) -> torch.Tensor:
    """Masks [2, FEATURES, FRAMES] of every third run of 24 frames."""
    return place.put((torch.arange(FRAMES) // 24 % 3 == 0).float().expand(2, FEATURES, -1))


def decoding_of_masked_frames(place: Place) -> list:
    """Decode the frames in the loss, and no others."""
    module = place.put(MultiSoftmaxDecoder(FEATURES, CLASSES, squeeze_single=True))
    targets = place.put(torch.arange(40).view(2, 20) % CLASSES)
    frames = place.random(2, 20, FEATURES), targets, _masks(place)
    loss = MLMLoss(combine_time_steps=FACTOR)
    with place.autocast():
        found = base.gather_loss_positions(*loss.align(*frames, place.whole(20, 11))).decoded(module)
        return [*found, loss.of_frames(*found[:2])]


def masked_loss(place: Place, books: int) -> list:
    """The loss of masked tokens, with lengths and an offset."""
    tail = () if books == 1 else (books,)
    outputs = place.random(2, 20, CLASSES, *tail, requires_grad=True)
    targets = place.put(torch.arange(40 * books).view(2, 20, *tail) % CLASSES)
    kind = dict(combine_time_steps=FACTOR, decoder_offset=1)
    loss = MLMLoss(**kind) if books == 1 else MultiMLMLoss(num_decoders=books, **kind)
    named = dict(targets=targets, decoder_lengths=place.whole(20, 11), masks=_masks(place))
    return _with_gradient(loss(decoder_outputs=outputs, **named), outputs)


def next_token_loss(place: Place) -> list:
    """The loss of next tokens."""
    outputs = place.random(2, 20, 3, CLASSES, requires_grad=True)
    targets, lengths = place.put(torch.arange(40).view(2, 20) % CLASSES), place.whole(20, 11)
    return _with_gradient(loss_of_all_pairs(MLMLoss(), outputs, targets, 1, lengths, lengths), outputs)


def _with_gradient(value, inputs) -> list:
    return [value, *torch.autograd.grad(value, inputs)]


REGULAR = dict(att_context_size=[6, 0])
SDPA, ABSOLUTE = dict(use_pytorch_sdpa=True), dict(self_attention_model='abs_pos')
BOTH_WAYS = {
    'regular': REGULAR,
    'regular, SDPA': {**REGULAR, **SDPA},
    'chunked': dict(att_context_size=[8, 3], att_context_style='chunked_limited'),
    'contexts by layer': dict(att_context_size=[8, 0], layer_att_context_size=[[4, 0], [8, 0]]),
}
ENCODERS = {
    **{name: {**settings, 'blockwise_attention': 'off'} for name, settings in BOTH_WAYS.items()},
    **{f'{name}, block by block': {**kind, 'blockwise_attention': 'on'} for name, kind in BOTH_WAYS.items()},
    'abs_pos': {**REGULAR, **ABSOLUTE, 'blockwise_attention': 'off'},
    'abs_pos, SDPA, block by block': {**REGULAR, **ABSOLUTE, **SDPA, 'blockwise_attention': 'on'},
    'unlimited': dict(att_context_size=[-1, -1], conv_context_size=None, causal_downsampling=False),
}

MODULES = {
    'masking': partial(masking, moved=True),
    'masking, module not moved': partial(masking, moved=False),
    'masking of live streams': masking_of_streams,
    'quantizer': partial(quantizer, distance='l2', books=1),
    'quantizer, cosine, two codebooks': partial(quantizer, distance='cosine', books=2),
    'decoder, masked frames only': decoding_of_masked_frames,
    'masked loss': partial(masked_loss, books=1),
    'masked loss, two codebooks': partial(masked_loss, books=2),
    'next-token loss': next_token_loss,
    **{f'encoder, {name}': partial(encoder, **settings) for name, settings in ENCODERS.items()},
}
