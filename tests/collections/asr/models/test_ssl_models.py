# SPDX-License-Identifier: Apache-2.0
import json
import sys
from collections import Counter

import pytest
import torch
from fresh_process import run_python
from omegaconf import OmegaConf
from spies import recording_contexts
from tiny_nest import (
    POSITIONS,
    POST_CONV,
    STOCK_OFFLINE,
    batches,
    fit,
    noise_batch,
    signals,
    tiny_config,
    tiny_model,
    trainer,
)

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel, EncDecMaskedTokenPredModel
from nemo.collections.asr.parts.ssl_reports.codebook_use import statistics_of

NOT_CAUSAL = 'model.encoder.causal_downsampling=false', 'model.encoder.conv_context_size=null'
MODELS = pytest.mark.parametrize('cls', [EncDecMaskedTokenPredModel, EncDecDenoiseMaskedTokenPredModel])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def forward_arguments(model, batch):
    if isinstance(model, EncDecDenoiseMaskedTokenPredModel):
        return signals(batch)
    return {'input_signal': batch.audio, 'input_signal_length': batch.audio_len}


@pytest.mark.integration
@POSITIONS
def test_masking_attention_and_log_share_one_context_in_every_batch(position):
    model = tiny_model('model.encoder.att_context_probs=[0.1,0.2,0.3,0.4]', *position)
    with recording_contexts(model) as spy:
        logged = fit(model, batches(10), max_steps=80, max_epochs=-1).logger

    lefts = [int(left) for left in logged.column('att_context_left')]
    assert len(lefts) == len(spy.masking) == 80
    assert spy.masking == lefts
    assert spy.attention == [[left, 0] for left in lefts]
    expected = {10: 8, 20: 16, 40: 24, -1: 32}  # of 80
    counts = Counter(lefts)
    assert all(abs(counts[left] - number) < 3 * number**0.5 for left, number in expected.items())


@MODELS
@POSITIONS
def test_forward_outside_a_step_pins_one_context_and_leaves_nothing_behind(cls, position):
    model = tiny_model(*position, cls=cls).train()
    before = model.encoder.att_context_size

    with recording_contexts(model) as spy:
        for _ in range(8):
            model(**forward_arguments(model, noise_batch()), apply_mask=True)

    assert spy.masking == [context[0] for context in spy.attention]
    assert len(set(spy.masking)) > 1
    assert model.encoder.att_context_size == before


@MODELS
@POSITIONS
@pytest.mark.parametrize('as_tensor', [False, True])
def test_current_frame_bounds_the_mask(cls, position, as_tensor):
    model = tiny_model(*position, cls=cls).eval()
    factor = 1 if position else 8
    current = 20 * factor
    given = torch.tensor([current, current]) if as_tensor else current
    with model.encoder.using_att_context_size([10, 0]):
        for seed in range(10):
            arguments = forward_arguments(model, noise_batch((3.0, 2.0), seed))
            masks = model(**arguments, apply_mask=True, current_frame=given)[2][:, 0]
            assert not masks[:, current:].any() and not masks[:, : current - 10 * factor].any()


@MODELS
def test_per_feature_targets_are_those_of_a_model_that_normalises_its_features(cls):
    raw = tiny_model(cls=cls).eval()
    normalised = tiny_model('model.preprocessor.normalize=per_feature', 'model.target_normalize=NA', cls=cls).eval()
    batch = noise_batch((3.0, 2.0))
    with torch.no_grad():
        raw_tokens = raw(**forward_arguments(raw, batch))[3]
        normalised_tokens = normalised(**forward_arguments(normalised, batch))[3]
    # Past an utterance's end the features differ; whole target frames before it must not.
    for row, frames in enumerate((300 // 8, 200 // 8)):
        assert torch.equal(raw_tokens[row, :frames], normalised_tokens[row, :frames])


def test_features_and_samples_exclude_each_other():
    model = tiny_model().eval()
    batch = noise_batch()
    with pytest.raises(ValueError, match='either input_signal'):
        model(noisy_input_signal=batch.noisy_audio, noisy_input_signal_length=batch.noisy_audio_len)
    features, lengths = model.preprocessor(input_signal=batch.audio, length=batch.audio_len)
    of_features = dict(
        processed_signal=features,
        processed_signal_length=lengths,
        processed_noisy_input_signal=features,
        processed_noisy_input_signal_length=lengths,
    )
    arguments = {**forward_arguments(model, batch), 'noisy_input_signal': batch.audio}
    torch.testing.assert_close(model(**of_features)[0], model(**arguments)[0])
    for name in ('processed_signal', 'processed_noisy_input_signal'):
        with pytest.raises(TypeError, match=f'shape mismatch occured for {name} '):
            model(**{**of_features, name: features[0]})


def test_a_masking_module_without_contexts_still_masks(monkeypatch, warnings):
    class OwnMasking(torch.nn.Module):
        def __init__(self, feat_in):
            super().__init__()

        def forward(self, input_feats, input_lengths):
            masks = torch.zeros_like(input_feats)
            masks[:, :, 8:24] = 1
            return input_feats * (1 - masks), masks

    # NeMo 3.0 instantiates nothing from outside known packages.
    monkeypatch.setattr(sys.modules['nemo.collections.asr.modules'], 'OwnMasking', OwnMasking, raising=False)
    cfg = tiny_config().model
    cfg.masking = {'_target_': 'nemo.collections.asr.modules.OwnMasking', 'feat_in': 80}
    model = EncDecDenoiseMaskedTokenPredModel(cfg)

    assert any('OwnMasking takes no attention context' in message for message in warnings)
    assert model(**forward_arguments(model, noise_batch()), apply_mask=True)[2].sum() == 2 * 80 * 16
    with pytest.raises(ValueError, match='current_frame'):
        model(**forward_arguments(model, noise_batch()), apply_mask=True, current_frame=8)


def test_a_post_conv_model_keeps_its_block_size_through_saving_and_restoring(tmp_path):
    model = tiny_model(*POST_CONV)
    assert model.mask_processor.block_size == 16 // 8
    for generation in range(3):
        model.save_to(str(tmp_path / f'{generation}.nemo'))
        model = type(model).restore_from(str(tmp_path / f'{generation}.nemo'))
        assert model.mask_processor.block_size == 16 // 8


@POSITIONS
@pytest.mark.parametrize('from_features', [False, True])
def test_where_nothing_is_masked_the_clean_signal_may_come_alone(position, from_features):
    model, batch = tiny_model(*position).eval(), noise_batch()
    clean = {'input_signal': batch.audio, 'input_signal_length': batch.audio_len}
    noisy = {'noisy_input_signal': batch.audio, 'noisy_input_signal_length': batch.audio_len}
    if from_features:
        features, lengths = model.preprocessor(input_signal=batch.audio, length=batch.audio_len)
        clean = {'processed_signal': features, 'processed_signal_length': lengths}
        noisy = {'processed_noisy_input_signal': features, 'processed_noisy_input_signal_length': lengths}
    alone, both = model(**clean, apply_mask=False), model(**clean, **noisy, apply_mask=False)
    assert all(torch.equal(*pair) for pair in zip(alone, both)) and not alone[2].any()
    assert torch.equal(model(**clean)[0], alone[0])  # masking is off where nobody asks for it
    with pytest.raises(ValueError, match='noisy_input_signal and noisy_input_signal_length'):
        model(**clean, apply_mask=True)
    for name, half in noisy.items():
        with pytest.raises(ValueError, match='noisy_input_signal and noisy_input_signal_length'):
            model(**clean, **{name: half}, apply_mask=False)


@pytest.mark.parametrize(
    'overrides, warns',
    [
        ((), False),
        (POST_CONV, False),
        (('model.loss.decoder_offset=0', 'model.squeeze_single=true'), True),
        (('model.loss.decoder_offset=0', *NOT_CAUSAL), False),
    ],
)
def test_training_warns_of_an_encoder_that_has_not_heard_its_targets(overrides, warns, warnings):
    fit(tiny_model(*overrides), batches(1), max_steps=1)
    told = [message for message in warnings if 'decoder_offset is 0 with causal_downsampling' in message]
    assert len(told) == warns


@pytest.mark.integration
@MODELS
def test_validation_and_test_run_in_the_default_context_and_report_it(cls):
    model = tiny_model('model.validate_contexts=null', cls=cls)
    loader = batches(2, seconds=(3.0, 2.0), as_tuples=cls is EncDecMaskedTokenPredModel)
    run = trainer(1)
    model.set_trainer(run)
    with recording_contexts(model) as spy:
        validated = run.validate(model, dataloaders=loader, verbose=False)[0]
        tested = run.test(model, dataloaders=loader, verbose=False)[0]
    for mode, metrics in (('val', validated), ('test', tested)):
        assert metrics[f'{mode}_loss'] > 0
        assert 0 < metrics[f'{mode}_masked_share'] < 0.8
        assert metrics[f'{mode}_att_context_left'] == 10
    assert spy.attention == [[10, 0]] * 4 and spy.masking == [10] * 4


@pytest.mark.integration
def test_targets_collapse_without_normalisation_and_streaming_ones_use_the_codebook_as_stocks(speech_corpus, warnings):
    stocks = 'model.preprocessor.normalize=per_feature', 'model.target_normalize=null'
    perplexities = []
    for overrides, collapses in ((), False), (stocks, False), (('model.target_normalize=NA',), True):
        model = speech_model(*overrides)
        for features, lengths in speech_features(model, speech_corpus):
            model.reports.codebook_use.update(*model.targets.of(features, lengths))
        model.reports.codebook_use.check()
        assert any('targets have collapsed' in message for message in warnings) == collapses
        perplexities.append(statistics_of(model.reports.codebook_use.counts)['perplexity'].item())
    assert perplexities[0] >= perplexities[1] * (1 - 1e-3) and perplexities[0] > 100


def speech_model(*overrides):
    return tiny_model('model.num_classes=8192', *overrides, cls=EncDecMaskedTokenPredModel).eval()


def speech_features(model, corpus):
    """Features of the corpus's train speech, utterance by utterance."""
    from nemo.collections.asr.parts.preprocessing.segment import AudioSegment

    manifest = corpus / 'train_manifest.json'
    for line in manifest.read_text().splitlines():
        segment = AudioSegment.from_file(str(corpus / json.loads(line)['audio_filepath']), target_sr=16000)
        audio = torch.tensor(segment.samples, dtype=torch.float32).unsqueeze(0)
        with torch.no_grad():
            yield model.preprocessor(input_signal=audio, length=torch.tensor([audio.shape[1]]))


# What stock NeMo and the patched modules compute from the same weights, masks and audio. Runs in either.
COMPUTE = """
import sys, json, torch
from omegaconf import OmegaConf
import lightning.pytorch as pl
from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel as Model
nemo_file, config_file, batch_file = sys.argv[1:]
batch = torch.load(batch_file)
if config_file != '-':
    torch.manual_seed(0)
    Model(OmegaConf.load(config_file)).save_to(nemo_file)
model = Model.restore_from(nemo_file)
masks = torch.zeros(2, 80, batch['masks'].shape[-1]) + batch['masks']
def masking(input_feats, input_lengths, **context):
    fixed = masks[..., : input_feats.shape[-1]]
    return input_feats * (1 - fixed), fixed
model.mask_processor.forward = masking
model.train()
for module in model.modules():
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.0
model.preprocessor.featurizer.dither = 0.0
lp, lengths, m, tokens = model(input_signal=batch['audio'], input_signal_length=batch['lengths'],
    noisy_input_signal=batch['noisy'], noisy_input_signal_length=batch['lengths'], apply_mask=True)
loss = model.loss(masks=m, decoder_outputs=lp, targets=tokens, decoder_lengths=lengths)
loss.backward()
gradient = sum(p.grad.double().pow(2).sum() for p in model.parameters() if p.grad is not None).sqrt()
print('RESULT' + json.dumps(dict(loss=loss.item(), gradient=gradient.item(), tokens=tokens.flatten().tolist(),
    lengths=lengths.tolist(), log_probs=lp.double().sum().item(), file=sys.modules[Model.__module__].__file__)))
"""


@pytest.mark.integration
def test_a_stock_checkpoint_and_a_stock_config_give_stocks_results(tmp_path):
    OmegaConf.save(tiny_config(*STOCK_OFFLINE).model, tmp_path / 'stock.yaml')
    batch = noise_batch((3.2, 2.0))
    masks = torch.zeros(2, 1, 336)
    masks[0, :, 40:120] = masks[1, :, 100:160] = 1
    saved = {'audio': batch.audio, 'noisy': batch.noisy_audio, 'lengths': batch.audio_len, 'masks': masks}
    torch.save(saved, tmp_path / 'batch.pt')

    def compute(config, patched):
        done = run_python('-c', COMPUTE, tmp_path / 'stock.nemo', config, tmp_path / 'batch.pt', patched=patched)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.partition('RESULT')[2].splitlines()[0])

    stock = compute(tmp_path / 'stock.yaml', patched=False)
    patched = compute('-', patched=True)
    assert 'site-packages' in stock.pop('file') and stock != patched.pop('file')
    assert patched['tokens'] == stock['tokens'] and patched['lengths'] == stock['lengths']
    for name in ('loss', 'gradient', 'log_probs'):
        assert patched[name] == pytest.approx(stock[name], rel=1e-6)

    model = EncDecDenoiseMaskedTokenPredModel.restore_from(str(tmp_path / 'stock.nemo'))
    model.setup_optimization(OmegaConf.create({'name': 'adamw', 'lr': 1e-3}))
    losses = fit(model, batches(2, seconds=(3.0, 2.0)), max_steps=30, max_epochs=-1).logger.column('train_loss')
    assert all(torch.isfinite(torch.tensor(losses))) and sum(losses[-5:]) < sum(losses[:5])
