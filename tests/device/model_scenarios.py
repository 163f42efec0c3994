# SPDX-License-Identifier: Apache-2.0
"""Scenarios of whole models: training steps of every objective, validation, live streams."""

from types import SimpleNamespace

import torch
from device.host_traffic import unrecorded
from device.place import Place
from live_streams import noise
from tiny_nest import POST_CONV, noise_batch, tiny_config

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel
from nemo.collections.asr.parts.streaming.session import StreamingSession

PLAIN = (
    'model.encoder.att_context_size=[[10,0],[20,0]]',
    'model.masking.mask_prob=0.1',  # so that something is masked in a second of audio
    'model.preprocessor.dither=0',
    'model.encoder.dropout=0',
    'model.encoder.dropout_pre_encoder=0',
    'model.encoder.dropout_att=0',
)
OBJECTIVES = {
    'masked': (),
    'next_token': ('+model.objective=next_token', '+model.next_token.horizons=2'),
    'both': ('+model.objective=both', '+model.next_token.horizons=2'),
}


@unrecorded()
def model_at(place: Place, *overrides: str):
    """Build a tiny model at a place, with as much of a trainer as a step needs."""
    torch.manual_seed(0)
    model = place.put(EncDecDenoiseMaskedTokenPredModel(tiny_config(*PLAIN, *overrides).model))
    plugin = SimpleNamespace(scaler=None)
    trainer = dict(global_step=0, loggers=[], validating=True)
    model._trainer = SimpleNamespace(**trainer, precision_plugin=plugin, state=None)
    model.logged = {}
    model.log = model.logged.__setitem__
    model.log_dict = lambda values, **kwargs: model.logged.update(values)
    return model


def batch_at(place: Place, seed: int = 0):
    """A batch of noise at a place, as a loader gives it."""
    return place.put(noise_batch((1.6, 0.9), seed))


def training(place: Place, *overrides: str) -> list:
    """Whole steps: forward, loss, logs, audit, backward, the check of the gradients, the optimizer."""
    model = model_at(place, 'model.audit_every_n_batches=1', *overrides).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    model._optimizer = optimizer = torch.optim.AdamW(weights, lr=1e-3, eps=1e-4)  # float16 has no 1e-8
    found = []
    for step in range(2):
        batch = batch_at(place, seed=step)
        with place.autocast():
            output = model.training_step(batch, step)
        output['loss'].backward()
        model.on_before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        model._trainer.global_step += 1
        found += [output['loss'], *(value for _, value in sorted(model.logged.items()))]
    return [*found, *weights]


def validation(place: Place, *overrides: str) -> list:
    """A validation batch in every context, and the summary."""
    model = model_at(place, *overrides).eval()
    with torch.no_grad():
        with place.autocast():
            model.inference_pass(batch_at(place), 0, 0, mode='val', apply_mask=True)
        model.reports.validation.finish(model, 'val')
    return list(model.reports.validation.summary('val', 0)['log'].values())


def live_streams(place: Place, *overrides: str, **asked) -> list:
    """Two live streams, in step, for a second, and their end."""
    model = model_at(place, *overrides).eval()
    samples, found = place.put(noise(2, 12000)), []
    with torch.no_grad(), place.autocast():
        session = StreamingSession(model, 2, [10, 0], **asked)
        outputs = [session.step(samples[:, start : start + 4000]) for start in range(0, 12000, 4000)]
        outputs.append(session.finish())
    for output in outputs:
        found += [output.encoded, output.lengths]
    return found


def _with(function, *overrides, **kwargs):
    return lambda place: function(place, *overrides, **kwargs)


SAMPLED = (
    'model.encoder.att_context_style=chunked_limited',
    'model.encoder.att_context_size=[[8,3]]',
    '+model.encoder.att_context_sampler={full_prob: 0.1, chunk_size: [1, 4], left_chunks: [2, 8], left_limited_prob: 0.9}',
)
MODELS = {
    **{f'training, {name}': _with(training, *overrides) for name, overrides in OBJECTIVES.items()},
    'training, masked, post_conv': _with(training, *POST_CONV),
    'training, masked, block by block': _with(training, 'model.encoder.blockwise_attention=on'),
    'training, masked, contexts by a sampler': _with(training, *SAMPLED),
    'validation in contexts': validation,
    'validation in contexts, post_conv': _with(validation, *POST_CONV),
    'validation in contexts, both': _with(validation, *OBJECTIVES['both']),
    'live streams': live_streams,
    'live streams, masked': _with(live_streams, apply_mask=True),
    'live streams, surprise': _with(live_streams, *OBJECTIVES['next_token'], return_surprise=True),
}
