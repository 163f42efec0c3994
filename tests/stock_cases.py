# SPDX-License-Identifier: Apache-2.0
"""What must come out the same from stock NeMo and from the patched modules, computed by whichever is in use.

    NEMO_STREAMING_SSL=0 python stock_cases.py FILE     # stock: saves {case: {name: tensor}}

Seeds are fixed. What the versions draw differently on purpose (masks, negatives) is given. Nothing here may ask for
more than stock NeMo knows.

Shapes: B batch, F features, T feature frames, A attention frames.
"""

import inspect
import itertools
import json
import random
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import OmegaConf

FEATURES = 16  # mel bands
FRAMES = 200  # feature frames of the longest utterance: more than a chunk of attention in every subsampling
SAMPLES = 15840  # of the longest utterance: 100 feature frames, for stock's losses want a multiple of 4

ENCODER = dict(
    feat_in=FEATURES,
    n_layers=3,
    d_model=16,
    n_heads=2,
    ff_expansion_factor=2,
    subsampling='dw_striding',
    subsampling_factor=4,
    subsampling_conv_channels=8,
    conv_kernel_size=5,
    pos_emb_max_len=64,
    dropout=0.15,
    dropout_pre_encoder=0.2,
    dropout_emb=0.05,
)
STREAMING = dict(
    causal_downsampling=True, conv_context_size='causal', conv_norm_type='layer_norm', dropout_pre_encoder=0.0
)

# One entry for each value of an argument; every argument of the class has one.
ENCODER_OPTIONS = {
    'default': {},
    'no subsampling': dict(subsampling=None, subsampling_factor=1),
    'vggnet': dict(subsampling='vggnet'),
    'striding': dict(subsampling='striding'),
    'striding 8': dict(subsampling='striding', subsampling_factor=8),
    'striding_conv1d': dict(subsampling='striding_conv1d'),
    'dw_striding_conv1d': dict(subsampling='dw_striding_conv1d'),
    'stacking': dict(subsampling='stacking'),
    'stacking_norm': dict(subsampling='stacking_norm'),
    'chunked subsampling': dict(subsampling_conv_chunking_factor=2),
    'unchunked subsampling': dict(subsampling_conv_chunking_factor=-1),
    'all channels': dict(subsampling_conv_channels=-1),
    'causal downsampling': dict(causal_downsampling=True, subsampling_factor=8),
    'pooling': dict(reduction='pooling', reduction_position=1, reduction_factor=2),
    'striding reduction': dict(reduction='striding', reduction_position=-1, reduction_factor=2),
    'limited pooling': dict(
        reduction='pooling', reduction_position=0, reduction_factor=2, att_context_size=[6, 4], dropout_att=0.0
    ),
    'abs_pos': dict(self_attention_model='abs_pos'),
    'abs_pos limited': dict(self_attention_model='abs_pos', att_context_size=[8, 2]),
    'local': dict(self_attention_model='rel_pos_local_attn', att_context_size=[8, 8]),
    'local with global tokens': dict(
        self_attention_model='rel_pos_local_attn',
        att_context_size=[8, 8],
        global_tokens=2,
        global_tokens_spacing=3,
        global_attn_separate=True,
    ),
    'sdpa': dict(use_pytorch_sdpa=True),
    'sdpa math': dict(use_pytorch_sdpa=True, use_pytorch_sdpa_backends=['MATH']),
    'sdpa abs_pos': dict(use_pytorch_sdpa=True, self_attention_model='abs_pos', att_context_size=[8, 0]),
    'sdpa limited': dict(use_pytorch_sdpa=True, att_context_size=[8, 2]),
    'left': dict(att_context_size=[8, -1]),
    'right': dict(att_context_size=[-1, 3]),
    'past': dict(att_context_size=[-1, 0]),
    'limited': dict(att_context_size=[10, 4]),
    'narrow': dict(att_context_size=[1, 0]),
    'chunked': dict(att_context_style='chunked_limited', att_context_size=[8, 3]),
    'chunked, all of the past': dict(att_context_style='chunked_limited', att_context_size=[-1, 3]),
    'with rc': dict(att_context_style='chunked_limited_with_rc', att_chunk_context_size=[[8], [4], [2]]),
    'one of several': dict(att_context_size=[[8, 2], [4, 0]], att_context_probs=[1.0, 0.0]),
    'tied biases': dict(untie_biases=False),
    'unscaled': dict(xscaling=False),
    'long positions': dict(pos_emb_max_len=512),
    'no biases': dict(use_bias=False),
    'projected': dict(feat_out=12),
    'layer_norm': dict(conv_norm_type='layer_norm'),
    'instance_norm': dict(conv_norm_type='instance_norm'),
    'group_norm': dict(conv_norm_type='group_norm4'),
    'fused_batch_norm': dict(conv_norm_type='fused_batch_norm'),
    'causal convolutions': dict(conv_context_size='causal'),
    'lopsided convolutions': dict(conv_context_size=[3, 1]),
    'dcc': dict(conv_context_style='dcc'),
    'attention dropout': dict(dropout_att=0.2),
    'linear stochastic depth': dict(stochastic_depth_drop_prob=0.5),
    'uniform stochastic depth': dict(
        stochastic_depth_drop_prob=0.5, stochastic_depth_mode='uniform', stochastic_depth_start_layer=2
    ),
    'unsynchronised': dict(sync_max_audio_length=False),
    'streaming': dict(STREAMING, subsampling_factor=8, att_context_size=[8, 0]),
}
KINDS = ('encoder', 'encoder in use')
STREAMED = {
    'regular': dict(att_context_size=[6, 0]),
    'look-ahead': dict(att_context_size=[6, 1]),
    'chunked': dict(att_context_style='chunked_limited', att_context_size=[8, 3]),
    'sdpa': dict(att_context_style='chunked_limited', att_context_size=[8, 3], use_pytorch_sdpa=True),
    'all of the past': dict(att_context_style='chunked_limited', att_context_size=[-1, 1], pos_emb_max_len=256),
}


def is_computed_alike(case: str) -> bool:
    """Whether a case must be the same bit for bit: no limited context, for which attention sums in another order."""
    kind, _, name = case.partition(': ')
    return kind in KINDS and 'att_context_size' not in ENCODER_OPTIONS.get(name, {'att_context_size': None})


def compute_all() -> dict:
    """Compute every case; returns {case: {name: tensor}}."""
    torch.set_num_threads(1)
    results = {}
    for name, case in itertools.chain(_encoder_cases(), _model_cases()):
        torch.manual_seed(1)
        random.seed(1)  # NeMo's augmentation draws from Python's generator
        try:
            results[name] = {key: torch.as_tensor(value).detach() for key, value in case().items()}
        except Exception as error:  # whatever stock fails with, the patched modules must fail with
            results[name] = {f'fails: {type(error).__name__}: {error}': torch.zeros(0)}
    return results


def _encoder_class():
    from nemo.collections.asr.modules.conformer_encoder import ConformerEncoder

    return ConformerEncoder


def _encoder_arguments() -> dict:
    """Arguments of NeMo's class and their defaults."""
    stock = next(cls for cls in _encoder_class().__mro__ if 'feat_in' in inspect.signature(cls.__init__).parameters)
    parameters = inspect.signature(stock.__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != 'self'}


def _encoder_cases():
    known = _encoder_arguments()
    for name, options in ENCODER_OPTIONS.items():
        if set(options) <= set(known):
            yield f'{KINDS[0]}: {name}', lambda options=options: _train(_make_encoder(**options))
            yield f'{KINDS[1]}: {name}', lambda options=options: _use(_make_encoder(**options))
    for name, options in STREAMED.items():
        settings = {**STREAMING, 'subsampling_factor': 8, **options}
        yield f'encoder streamed: {name}', lambda settings=settings: _stream(_make_encoder(**settings))
    yield 'encoder: bypass_pre_encode', _bypass
    yield 'encoder: bfloat16', lambda: _in_bfloat16(_make_encoder())
    yield 'encoder: exchanged attention', _exchange
    yield 'encoder: context set', lambda: _set_context(_make_encoder(att_context_size=[[8, 2], [4, 0]]))
    yield 'encoder: linear adapter', lambda: _adapt(_linear_adapter())
    yield 'encoder: attention adapter', lambda: _adapt(_attention_adapter(), att_context_size=[8, 2])
    yield 'encoder: layers extracted', _extract


def _make_encoder(cls=None, **options):
    torch.manual_seed(0)
    return _randomised((cls or _encoder_class())(**{**ENCODER, **options}))


def _randomised(module):
    """Give biases and the last layers of adapters, which begin at zero, values that show."""
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def _features(batch: int = 3, frames: int = FRAMES):
    """Features [B, F, T] and lengths [B]."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(batch, FEATURES, frames, generator=generator)
    return features, torch.tensor([frames, frames * 3 // 4, frames // 3][:batch])


def _loss_of(encoded):
    generator = torch.Generator().manual_seed(4)
    return (encoded.float() * torch.randn(encoded.shape, generator=generator)).sum() / encoded.numel() ** 0.5


def _gradients(module) -> dict:
    found = {f'gradient of {name}': weight.grad for name, weight in module.named_parameters()}
    assert any(gradient is not None for gradient in found.values())
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def _train(encoder) -> dict:
    """Two passes in training mode, dropout included, and the gradient of both."""
    encoder.train()
    features, lengths = _features()
    outputs = {}
    for number in range(2):
        encoded, encoded_lengths = encoder(audio_signal=features + number, length=lengths)
        _loss_of(encoded).backward()
        outputs.update({f'encoded {number}': encoded, f'lengths {number}': encoded_lengths})
    statistics = {name: buffer for name, buffer in encoder.named_buffers() if 'running' in name}
    return {**outputs, **statistics, **_gradients(encoder), 'random state': torch.rand(1)}


@torch.no_grad()
def _use(encoder) -> dict:
    encoder.eval()
    encoded, lengths = encoder(audio_signal=_features()[0], length=_features()[1])
    return {'encoded': encoded, 'lengths': lengths}


@torch.no_grad()
def _stream(encoder) -> dict:
    """Cache-aware streaming, as NeMo's examples do it: the first window is padded with zeros to the others' size."""
    encoder.eval()
    encoder.setup_streaming_params(max_context=64)
    settings = encoder.streaming_cfg
    before, size, shift = settings.pre_encode_cache_size[1], settings.chunk_size[1], settings.shift_size[1]
    signal = torch.nn.functional.pad(_features(2)[0], (before, 0))
    caches, outputs = encoder.get_initial_cache_state(batch_size=2), []
    for start in range(0, signal.shape[2] - before - size + 1, shift):
        window = signal[:, :, start : start + before + size]
        encoded, length, *caches = encoder.cache_aware_stream_step(
            processed_signal=window,
            processed_signal_length=torch.full((2,), window.shape[2]),
            cache_last_channel=caches[0],
            cache_last_time=caches[1],
            cache_last_channel_len=caches[2],
            keep_all_outputs=False,
        )
        outputs.append(encoded)
    names = ('last channel', 'last time', 'last channel length')
    return {'encoded': torch.cat(outputs, dim=2), **dict(zip(names, caches))}


@torch.no_grad()
def _bypass() -> dict:
    encoder = _make_encoder().eval()
    frames = torch.randn(2, 30, ENCODER['d_model'])
    encoded, lengths = encoder(audio_signal=frames, length=torch.tensor([30, 11]), bypass_pre_encode=True)
    return {'encoded': encoded, 'lengths': lengths}


def _in_bfloat16(encoder) -> dict:
    with torch.autocast('cpu', torch.bfloat16):
        return _train(encoder)


def _exchange() -> dict:
    encoder = _make_encoder()
    encoder._cfg = OmegaConf.create({**_encoder_arguments(), **ENCODER})
    encoder.change_attention_model('rel_pos_local_attn', att_context_size=[8, 8], update_config=False)
    before = _use(encoder)
    encoder.change_attention_model('rel_pos', att_context_size=[-1, -1], update_config=False)
    return {**_use(encoder), 'local': before['encoded']}


def _set_context(encoder) -> dict:
    outputs = _use(encoder)
    encoder.set_default_att_context_size([4, 0])
    return {**outputs, 'narrower': _use(encoder)['encoded']}


def _linear_adapter():
    from nemo.collections.common.parts.adapter_modules import LinearAdapterConfig

    return LinearAdapterConfig(in_features=ENCODER['d_model'], dim=4)


def _attention_adapter():
    from nemo.collections.asr.parts.submodules.adapters.multi_head_attention_adapter_module import (
        RelPositionMultiHeadAttentionAdapterConfig,
    )

    return RelPositionMultiHeadAttentionAdapterConfig(n_head=2, n_feat=ENCODER['d_model'])


def _adapt(adapter, **options) -> dict:
    from nemo.collections.asr.modules.conformer_encoder import ConformerEncoderAdapter

    encoder = _make_encoder(ConformerEncoderAdapter, **options)
    encoder.add_adapter('adapter', adapter)
    encoder.set_enabled_adapters('adapter', enabled=True)
    return _train(_randomised(encoder))


@torch.no_grad()
def _extract() -> dict:
    from nemo.collections.asr.modules.conformer_encoder import ConformerMultiLayerFeatureExtractor

    extractor = ConformerMultiLayerFeatureExtractor(_make_encoder(feat_out=12).eval(), [0, 2])
    outputs, lengths = extractor(*_features())
    return {f'layer {index}': output for index, output in enumerate([*outputs, *lengths])}


def _model_cases():
    from tiny_nest import STOCK, STOCK_OFFLINE

    chunks = 'model.encoder.att_context_style=chunked_limited', 'model.encoder.att_context_size=[8,3]'
    for kind in ('ctc', 'rnnt', 'hybrid'):
        yield kind, lambda kind=kind: _train_asr(kind, *STOCK_OFFLINE)
    yield 'ctc, streaming', lambda: _train_asr('ctc', *STOCK, 'model.encoder.att_context_size=[8,0]')
    yield 'rnnt, streaming', lambda: _train_asr('rnnt', *STOCK, *chunks)
    yield 'contrastive', _train_contrastive
    yield 'contrastive and masked', lambda: _train_contrastive(_several_losses())
    for name, position in itertools.product(
        ('EncDecMaskedTokenPredModel', 'EncDecDenoiseMaskedTokenPredModel'), POSITIONS
    ):
        yield f'{name}, {position}', lambda name=name, position=position: _train_masked(name, position)


POSITIONS = ('pre_conv', 'post_conv')


def _target(module: str, **arguments) -> dict:
    return {'_target_': f'nemo.collections.asr.{module}', **arguments}


def _preprocessor() -> dict:
    settings = dict(normalize='per_feature', window_size=0.025, window_stride=0.01, dither=0.0, pad_to=0)
    return _target('modules.AudioToMelSpectrogramPreprocessor', sample_rate=16000, features=FEATURES, **settings)


def _build(cls, config):
    torch.manual_seed(0)
    return _randomised(cls(cfg=OmegaConf.create(config)))


def _audio(batch: int = 2):
    """Samples [B, N] of coloured noise, and lengths [B]."""
    generator = torch.Generator().manual_seed(5)
    audio = torch.randn(batch, SAMPLES, generator=generator).cumsum(dim=1) * 0.01
    return audio, torch.tensor([SAMPLES, SAMPLES * 3 // 4][:batch])


def _train_asr(kind: str, *overrides: str) -> dict:
    """Two steps of training of a recogniser, then what it recognises."""
    from tiny_recogniser import tiny_recogniser

    model = _randomised(tiny_recogniser(kind, *overrides))
    audio, lengths = _audio()
    words, word_lengths = torch.tensor([[1, 0, 2, 2], [3, 4, 0, 0]]), torch.tensor([4, 2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    outputs = {}
    model.train()
    for step in range(2):
        optimizer.zero_grad()
        loss = _asr_loss(model, audio, lengths, words, word_lengths)
        loss.backward()
        optimizer.step()
        outputs[f'loss {step}'] = loss
    model.eval()
    with torch.no_grad():
        outputs['encoded'] = model(input_signal=audio, input_signal_length=lengths)[0]
    outputs['text'] = _characters(model.transcribe(list(audio.numpy()), batch_size=2, verbose=False))
    return {**outputs, **_gradients(model)}


def _asr_loss(model, audio, lengths, words, word_lengths):
    outputs = model(input_signal=audio, input_signal_length=lengths)
    if not hasattr(model, 'joint'):
        return model.loss(log_probs=outputs[0], targets=words, input_lengths=outputs[1], target_lengths=word_lengths)
    encoded, encoded_lengths = outputs[:2]
    decoded, target_lengths, _ = model.decoder(targets=words, target_length=word_lengths)
    joint = model.joint(encoder_outputs=encoded, decoder_outputs=decoded)
    targets = dict(targets=words, target_lengths=target_lengths)
    loss = model.loss(log_probs=joint, input_lengths=encoded_lengths, **targets)
    if hasattr(model, 'ctc_decoder'):
        log_probs = model.ctc_decoder(encoder_output=encoded)
        loss = loss + model.ctc_loss(log_probs=log_probs, input_lengths=encoded_lengths, **targets)
    return loss


def _characters(recognised) -> list:
    """Return what ``transcribe`` gives, in whatever wrapping, as numbers of characters; -1 ends an utterance."""
    recognised = recognised[0] if isinstance(recognised, tuple) else recognised
    texts = [getattr(text, 'text', text) for text in recognised]
    return [ord(character) for text in texts for character in text + '\uffff']


def _contrastive_loss(**options) -> dict:
    settings = dict(in_dim=FEATURES, proj_dim=8, combine_time_steps=4, num_negatives=5)
    return _target('losses.ContrastiveLoss', **{**settings, 'quantized_targets': True, 'codebook_size': 8, **options})


def _reconstruction() -> dict:
    return _target('modules.ConvASRDecoderReconstruction', feat_in=16, feat_hidden=16, feat_out=8)


def _ssl_config() -> dict:
    patches = _target('modules.MaskedPatchAugmentation', freq_masks=1, freq_width=3, patch_size=16, mask_patches=2)
    return dict(
        sample_rate=16000,
        preprocessor=_preprocessor(),
        spec_augment=patches,
        encoder=_target('modules.ConformerEncoder', **ENCODER, dropout_att=0.1),
    )


def _several_losses() -> dict:
    masked = dict(
        decoder=_target('modules.ConvASRDecoder', feat_in=16, num_classes=64),
        loss=_target('losses.MLMLoss', combine_time_steps=4),
        targets_from_loss='contrastive',
        loss_alpha=0.5,
    )
    return {'loss_list': {'contrastive': dict(decoder=_reconstruction(), loss=_contrastive_loss()), 'mlm': masked}}


def _train_contrastive(losses=None) -> dict:
    """The base class with NeMo's contrastive loss; the versions draw negatives in another order, so they are given."""
    from nemo.collections.asr.models.ssl_models import SpeechEncDecSelfSupervisedModel

    losses = losses or {'decoder': _reconstruction(), 'loss': _contrastive_loss()}
    model = _build(SpeechEncDecSelfSupervisedModel, {**_ssl_config(), **losses}).train()
    for module in model.modules():
        if hasattr(module, 'sample_negatives'):
            module.sample_negatives = lambda candidates, wanted: _given_negatives(candidates, wanted, 5)
    audio = _audio()[0]
    spectrograms, masks, encoded, encoded_lengths = model(
        input_signal=audio, input_signal_length=torch.full((2,), SAMPLES)
    )
    loss, parts = model.decoder_loss_step(spectrograms, masks, encoded, encoded_lengths)
    loss.sum().backward()
    return {'loss': loss, **parts, 'masks': masks, 'encoded': encoded, **_gradients(model)}


def _given_negatives(candidates, wanted: int, number: int):
    indices = (torch.arange(wanted)[:, None] + 1 + torch.arange(number)) % len(candidates)
    return candidates[indices].transpose(0, 1), indices


@contextmanager
def _given_masks(masking):
    """Let a masking module mask the middle third of each utterance."""
    stock = masking.forward

    def forward(input_feats, input_lengths, **context):
        frames = torch.arange(input_feats.shape[2])
        third = (input_lengths // 3)[:, None]
        masked = ((frames >= third) & (frames < 2 * third)).to(input_feats)[:, None].expand_as(input_feats)
        return input_feats * (1 - masked) + 0.3 * masked, masked.clone()

    masking.forward = forward
    yield
    masking.forward = stock


def _train_masked(name: str, position: str) -> dict:
    """BEST-RQ and NEST with given masks: two steps, then a validation pass."""
    from tiny_nest import STOCK_OFFLINE, tiny_model

    from nemo.collections.asr.models import ssl_models

    post = ['model.mask_position=post_conv', 'model.quantizer.combine_time_steps=1'] * (position == 'post_conv')
    model = _randomised(tiny_model(*STOCK_OFFLINE, *post, cls=getattr(ssl_models, name)))
    audio, lengths = _audio()
    signals = dict(input_signal=audio, input_signal_length=lengths)
    if 'Denoise' in name:
        noisy = audio + 0.01 * torch.randn(audio.shape, generator=torch.Generator().manual_seed(6))
        signals.update(noisy_input_signal=noisy, noisy_input_signal_length=lengths)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.01)
    outputs = {}
    with _given_masks(model.mask_processor):
        for step, training in enumerate((True, True, False)):
            model.train(training)
            optimizer.zero_grad()
            log_probs, encoded_lengths, masks, tokens = model(**signals, apply_mask=True)
            loss = model.loss(masks=masks, decoder_outputs=log_probs, targets=tokens, decoder_lengths=encoded_lengths)
            loss.backward()
            optimizer.step()
            results = dict(loss=loss, log_probs=log_probs, masks=masks, tokens=tokens, lengths=encoded_lengths)
            outputs.update({f'{key} {step}': value for key, value in results.items()})
    return {**outputs, **_gradients(model)}


def main(path: str) -> None:
    """Save all cases, and beside them where the encoder's class came from."""
    from nemo.utils import logging

    logging.setLevel(logging.ERROR)
    torch.save(compute_all(), path)
    source = sys.modules[_encoder_class().__module__].__file__
    Path(f'{path}.json').write_text(json.dumps({'encoder': source}))


if __name__ == '__main__':
    main(sys.argv[1])
