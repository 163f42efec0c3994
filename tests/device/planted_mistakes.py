# SPDX-License-Identifier: Apache-2.0
"""Mistakes that work on a CPU, planted in memory, each with the scenario that must find it.

python planted_mistakes.py       # in a process of its own; prints JSON: what was found of each
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple
from unittest import mock

import torch
from device import fake_device
from device.allowed_waits import not_allowed
from device.place import Place
from device.run_scenarios import run

from nemo.collections.asr.losses.ssl_losses import mlm, next_token
from nemo.collections.asr.models import ssl_models
from nemo.collections.asr.modules import conformer_encoder
from nemo.collections.asr.modules.ssl_modules import masking, multi_softmax_decoder, quantizers
from nemo.collections.asr.parts.att_context import blockwise
from nemo.collections.asr.parts.objectives import base, targets
from nemo.collections.asr.parts.ssl_reports import audit, codebook_use, fixed_masks, model_reports
from nemo.collections.asr.parts.utils import nonfinite_guard


class Mistake(NamedTuple):
    """A mistake, and where it must show."""

    scenario: str
    plant: Callable[[], AbstractContextManager]


class _Forgetful:
    """Stands in for ``torch`` in a module: one of its functions makes its tensor on the default device."""

    def __init__(self, function: str):
        self._function = function

    def __getattr__(self, name):
        found = getattr(torch, name)
        return (lambda *args, device=None, **kwargs: found(*args, **kwargs)) if name == self._function else found


def forgets(module, function: str) -> Callable[[], AbstractContextManager]:
    """A function that makes tensors is not told the device."""
    return lambda: mock.patch.object(module, 'torch', _Forgetful(function))


def instead(owner, name: str, make: Callable) -> Callable[[], AbstractContextManager]:
    """A function is replaced by ``make(function)``."""
    return lambda: mock.patch.object(owner, name, make(getattr(owner, name)))


def and_looks(look: Callable) -> Callable:
    """Let a function look at its result, too."""

    def make(function):
        def looking(*args, **kwargs):
            result = function(*args, **kwargs)
            look(result)
            return result

        return looking

    return make


def _and_reads_lengths(forward):
    def reading(self, audio_signal, length, *args, **kwargs):
        assert max(length.tolist()) <= audio_signal.shape[-1]
        return forward(self, audio_signal, length, *args, **kwargs)

    return reading


def _with_a_constant(of_frames):
    def weighted(self, log_probs, targets, reduction='mean'):
        return of_frames(self, log_probs, targets, reduction) * torch.tensor(1.0, device=log_probs.device)

    return weighted


def _with_a_constant_of_the_host(standardize):
    return lambda features, lengths: standardize(features, lengths) + torch.zeros(features.shape[1], 1)


def _by_masks(select):
    def selecting(frames, targets, counted):
        rows = torch.arange(counted.shape[0], device=counted.device).unsqueeze(1).expand_as(counted)
        return base.LossPositions(frames[counted], targets[counted], rows[counted])

    return selecting


def _one_by_one(check):
    return lambda weights: all(bool(weight.grad.isfinite().all()) for weight in weights if weight.grad is not None)


def _element_by_element(mask_one_by_one):
    def masking_rows(self, feats, lengths):
        return mask_one_by_one(self, feats, torch.stack([lengths.new_tensor(int(length)) for length in lengths]))

    return masking_rows


MISTAKES = {
    'masking: frames numbered on the default device': Mistake('masking', forgets(masking, 'arange')),
    'masking: chances drawn on the default device': Mistake('masking', forgets(masking, 'rand')),
    'blocks: frames numbered on the default device': Mistake(
        'encoder, regular, block by block', forgets(blockwise, 'arange')
    ),
    'blocks: a mask on the default device': Mistake('encoder, chunked, block by block', forgets(blockwise, 'zeros')),
    'quantizer: codebooks numbered on the default device': Mistake(
        'quantizer, cosine, two codebooks', forgets(quantizers, 'arange')
    ),
    'masked loss: frames numbered on the default device': Mistake('masked loss', forgets(mlm, 'arange')),
    'next-token loss: frames numbered on the default device': Mistake(
        'next-token loss', forgets(next_token, 'arange')
    ),
    'use of the codebook: counts on the default device': Mistake('training, masked', forgets(codebook_use, 'zeros')),
    'audit: lengths of runs on the default device': Mistake('training, masked', forgets(audit, 'arange')),
    'targets: a constant of the host': Mistake(
        'training, masked', instead(targets, 'standardize_per_feature', _with_a_constant_of_the_host)
    ),
    'masked loss: an item()': Mistake(
        'masked loss', instead(mlm.MLMLoss, 'of_frames', and_looks(lambda loss: loss.sum().item()))
    ),
    'masked loss: a constant copied in each step': Mistake(
        'training, masked', instead(mlm.MLMLoss, 'of_frames', _with_a_constant)
    ),
    'decoder: a look for NaN': Mistake(
        'decoder',
        instead(
            multi_softmax_decoder.MultiSoftmaxDecoder, 'forward', and_looks(lambda found: bool(found.isnan().any()))
        ),
    ),
    'encoder: lengths read': Mistake(
        'encoder, regular', instead(conformer_encoder.ConformerEncoder, 'forward_internal', _and_reads_lengths)
    ),
    'masked frames: selected by a mask, three times': Mistake(
        'decoder, masked frames only', instead(base, 'gather_loss_positions', _by_masks)
    ),
    'gradients: looked at one by one': Mistake(
        'training, masked', instead(nonfinite_guard, 'gradients_are_finite', _one_by_one)
    ),
    'logs: a number read in each step': Mistake(
        'training, masked',
        instead(model_reports.ModelReports, 'of_pass', and_looks(lambda logs: float(logs['masked_share']))),
    ),
    'logs: plain numbers given to the trainer': Mistake(
        'run of the trainer', instead(ssl_models, 'numbers_on_the_host', lambda function: lambda logs: logs)
    ),
    'validation: lengths read one by one': Mistake(
        'validation in contexts', instead(fixed_masks.FixedMasks, '_mask_one_by_one', _element_by_element)
    ),
}


def found_of(mistake: Mistake, place: Place) -> list[str]:
    """Plant a mistake, run its scenario, and return what the device tests say of it; nothing: it was not found."""
    with mistake.plant():
        result = run(mistake.scenario, place)
    if result['error']:
        return [result['error'].splitlines()[0]]
    return not_allowed(mistake.scenario, list(result['traffic'].items()))


def main() -> None:
    """Plant one after the other."""
    reason = fake_device.why_not()
    if reason is not None:
        print(json.dumps({'why_not': reason}))
        return
    place = Place(fake_device.install())
    print(json.dumps({name: found_of(mistake, place) for name, mistake in MISTAKES.items()}))


if __name__ == '__main__':
    main()
