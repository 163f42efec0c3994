# SPDX-License-Identifier: Apache-2.0
"""From the pre-training script's .nemo to a model that recognises speech, streamed."""

import json
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import soundfile
import torch
from fresh_process import run_python
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tiny_nest import POST_CONV, SMALL, tiny_model, trainer
from word_pieces import make_tokenizer

from nemo.collections.asr.data.audio_to_text_lhotse import LhotseSpeechToTextBpeDataset
from nemo.collections.asr.models import (
    EncDecCTCModel,
    EncDecCTCModelBPE,
    EncDecHybridRNNTCTCBPEModel,
    EncDecHybridRNNTCTCModel,
    EncDecRNNTBPEModel,
    EncDecRNNTModel,
)
from nemo.collections.asr.parts.att_context import AttContextCurriculum, StreamingSession
from nemo.collections.asr.parts.streaming.session import StreamingOutput
from nemo.collections.common.parts.preprocessing.parsers import make_parser

EXAMPLES = Path(__file__).resolve().parents[4] / 'examples/asr'
LAYERS = ['model.encoder.n_layers=2', 'model.encoder.layer_att_context_size=[[0,[10,0]],[1,[20,0]]]']
STATISTICS = '{fixed_mean: [%s], fixed_std: [%s]}' % (','.join(['-8.0'] * 80), ','.join(['4.0'] * 80))


@pytest.fixture(scope='module')
def script(load_example):
    return load_example('finetune_streaming')


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    """A pre-trained model with contexts of the layers' own and fixed statistics."""
    path = tmp_path_factory.mktemp('pretrained') / 'model.nemo'
    layers, contexts = LAYERS
    tiny_model(layers, f'+{contexts}', f'model.preprocessor.normalize={STATISTICS}').save_to(str(path))
    return path


def config(name, pretrained, corpus, *overrides):
    """Compose a shipped config in a size for tests."""
    with initialize_config_dir(str(EXAMPLES / 'conf/ssl/finetune'), version_base=None):
        return compose(name, overrides=settings(name, pretrained, corpus, *overrides))


def settings(name, pretrained, corpus, *overrides):
    transducer = ['model.model_defaults.pred_hidden=8', 'model.model_defaults.joint_hidden=8']
    transducer += ['model.decoding.greedy.max_symbols=1']  # what knows nothing says as much as it may
    return [
        f'init_from_nemo_model.pretrained.path={pretrained}',
        f'model.train_ds.manifest_filepath={corpus}/train_manifest.json',
        f'model.validation_ds.manifest_filepath={corpus}/validation_manifest.json',
        *(f'++model.{section}.{key}' for section in ('train_ds', 'validation_ds') for key in LOADER),
        'model.train_ds.max_duration=3.5',  # an epoch of two steps
        *(
            'trainer.accelerator=cpu',
            'trainer.devices=1',
            'trainer.max_steps=3',
            'model.optim.sched.warmup_steps=1',
        ),
        *(transducer if name != 'streaming_ctc' else []),
        *overrides,
    ]


LOADER = ['batch_size=2', 'num_workers=0', 'pin_memory=false']


def utterance(corpus):
    """The samples [1, N] of the shortest utterance of validation."""
    entries = [json.loads(line) for line in (corpus / 'validation_manifest.json').read_text().splitlines()]
    shortest = min(entries, key=lambda entry: entry['duration'])
    samples, _ = soundfile.read(corpus / shortest['audio_filepath'], dtype='float32')
    return torch.from_numpy(samples).unsqueeze(0)


def stream(model, samples, **options):
    """Stream in pieces of 100 ms; returns the outputs of the steps, the last of them by ``finish``."""
    session = StreamingSession(model, **options)
    return [session.step(piece) for piece in samples.split(1600, dim=1)] + [session.finish()]


@torch.no_grad()
def encode(model, samples):
    length = torch.tensor([samples.shape[1]])
    encoded, lengths = model(input_signal=samples, input_signal_length=length)[:2]
    return encoded, lengths


def assert_starts_from(model, pretrained_path):
    """The encoder has the pre-trained weights and contexts, and hears what it heard."""
    from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel

    pretrained = EncDecDenoiseMaskedTokenPredModel.restore_from(str(pretrained_path), map_location='cpu')
    for part in ('encoder', 'preprocessor'):
        expected = {name: weight for name, weight in getattr(pretrained, part).state_dict().items()}
        found = getattr(model, part).state_dict()
        assert [name for name, weight in found.items() if not torch.equal(weight, expected[name])] == []
    assert model.encoder.layer_att_contexts() == pretrained.encoder.layer_att_contexts()
    assert model.encoder.att_context_size_all == pretrained.encoder.att_context_size_all


def test_skip_bad_audio_is_set_where_the_data_can_skip(script):
    dataset = LhotseSpeechToTextBpeDataset(tokenizer=make_parser(['a']))
    cfg = OmegaConf.create({'train_ds': {'skip_bad_audio': True}, 'validation_ds': {'skip_bad_audio': False}})
    loader = SimpleNamespace(dataset=dataset)
    model = SimpleNamespace(cfg=cfg, _train_dl=loader, _validation_dl=[SimpleNamespace(dataset=[])], _test_dl=None)
    script.skip_bad_audio(model)
    assert dataset.skip_bad_audio is True
    loader.dataset = []
    with pytest.raises(ValueError, match='model.train_ds.skip_bad_audio is true'):
        script.skip_bad_audio(model)


@pytest.mark.parametrize('kind', ['ctc', 'rnnt'])
def test_fine_tuned_in_a_few_steps_the_model_streams_what_it_says_offline(
    script, kind, pretrained, speech_corpus, tmp_path
):
    torch.manual_seed(0)
    name = f'streaming_{kind}'
    cfg = script.prepare(config(name, pretrained, speech_corpus, 'exp_manager=null'))
    assert cfg.model.labels == sorted(cfg.model.labels) and {'a', 'e', ' '} < set(cfg.model.labels)
    run, model = script.build(cfg)
    assert type(model) is {'ctc': EncDecCTCModel, 'rnnt': EncDecRNNTModel}[kind]
    assert_starts_from(model, pretrained)
    before = [weight.clone() for weight in model.encoder.parameters()]
    run.limit_val_batches = 1
    run.fit(model)
    assert run.global_step == 3 and 'val_wer' in run.callback_metrics
    changed = [not torch.equal(*pair) for pair in zip(before, model.encoder.parameters())]
    assert sum(changed) > len(changed) / 2

    model.save_to(str(tmp_path / 'tuned.nemo'))
    tuned = type(model).restore_from(str(tmp_path / 'tuned.nemo')).eval()
    assert [context.as_list() for context in tuned.encoder.layer_att_contexts()] == [[10, 0], [20, 0]]
    check = {'ctc': check_ctc_stream, 'rnnt': check_rnnt_stream}[kind]
    check(tuned, utterance(speech_corpus))


CHUNKS = [
    'model.encoder.n_layers=2',
    'model.encoder.att_context_style=chunked_limited',
    'model.encoder.att_context_size=[[28,13],[28,6],[28,0]]',
    '+model.encoder.att_context_sampler={full_prob: 0.2, chunk_size: [1, 14], left_chunks: [2, 28], '
    'left_limited_prob: 0.7}',
]


@pytest.fixture(scope='module')
def pretrained_in_chunks(tmp_path_factory):
    """A pre-trained model with look-ahead, which draws its chunks in training."""
    path = tmp_path_factory.mktemp('chunks') / 'model.nemo'
    tiny_model(*CHUNKS, f'model.preprocessor.normalize={STATISTICS}').save_to(str(path))
    return path


@pytest.mark.parametrize('kind', ['ctc', 'rnnt', 'hybrid'])
def test_contexts_with_look_ahead_are_fine_tuned_and_streamed(
    script, kind, pretrained_in_chunks, speech_corpus, tmp_path
):
    torch.manual_seed(0)
    cfg = script.prepare(config(f'streaming_{kind}', pretrained_in_chunks, speech_corpus, 'exp_manager=null'))
    run, model = script.build(cfg)
    assert type(model) is {'ctc': EncDecCTCModel, 'rnnt': EncDecRNNTModel, 'hybrid': EncDecHybridRNNTCTCModel}[kind]
    sampler, seen = model.encoder.att_context_policy.sampler, []
    model.encoder.layers[0].register_forward_pre_hook(
        lambda layer, *_: seen.append(list(model.encoder.att_context_size)) if layer.training else None
    )
    run.limit_val_batches = 1
    run.fit(model)
    assert seen == [sampler.draw(0, step).as_list() for step in range(3)] and 'val_wer' in run.callback_metrics
    model.save_to(str(tmp_path / 'tuned.nemo'))
    tuned = type(model).restore_from(str(tmp_path / 'tuned.nemo')).eval()
    for context in tuned.encoder.att_context_size_all:
        tuned.encoder.set_att_context_size(context)
        {'ctc': check_ctc_stream}.get(kind, check_encoded_stream)(tuned, utterance(speech_corpus))


def test_the_look_ahead_of_each_context_is_told(script, pretrained_in_chunks, speech_corpus, monkeypatch):
    told = []
    monkeypatch.setattr(script.logging, 'info', lambda message, *_: told.append(message))
    script.build(script.prepare(config('streaming_ctc', pretrained_in_chunks, speech_corpus, 'exp_manager=null')))
    (line,) = [message for message in told if 'Attention contexts: ' in message]
    assert '[28, 13], look-ahead 1040 ms; [28, 6], look-ahead 480 ms; [28, 0], look-ahead 0 ms' in line


def check_encoded_stream(model, samples):
    with torch.no_grad():
        length = torch.tensor([samples.shape[1]])
        encoded, lengths = model(input_signal=samples, input_signal_length=length)[:2]
    streamed = StreamingOutput.concatenate(stream(model, samples))
    torch.testing.assert_close(streamed.encoded, encoded[:, :, : int(lengths)], atol=1e-4, rtol=0)


def check_ctc_stream(model, samples):
    log_probs, lengths = encode(model, samples)
    log_probs = log_probs[:, : int(lengths)]  # behind them may be a frame of padding
    streamed = StreamingOutput.concatenate(stream(model, samples, return_log_probs=True, return_tokens=True))
    assert torch.equal(streamed.lengths, lengths)
    torch.testing.assert_close(streamed.log_probs, log_probs, atol=1e-4, rtol=0)
    assert torch.equal(streamed.tokens, log_probs.argmax(dim=2))


def check_rnnt_stream(model, samples):
    encoded, lengths = encode(model, samples)
    outputs = stream(model, samples)
    streamed = StreamingOutput.concatenate(outputs)
    assert torch.equal(streamed.lengths, lengths)
    encoded = encoded[:, :, : int(lengths)]  # behind them may be a frame of padding
    torch.testing.assert_close(streamed.encoded, encoded, atol=1e-4, rtol=0)
    with torch.no_grad():
        model.joint.joint_net[-1].bias[-1] -= 3.0  # of blank: a model that is silent shows nothing
        offline = model.decoding.rnnt_decoder_predictions_tensor(encoded, lengths, return_hypotheses=True)
        spoken = None
        for output in outputs:
            if output.encoded.shape[2]:  # each step goes on from the words before
                spoken = model.decoding.rnnt_decoder_predictions_tensor(
                    output.encoded, output.lengths, return_hypotheses=True, partial_hypotheses=spoken
                )
    offline, spoken = (list(hypotheses[0].y_sequence) for hypotheses in (offline, spoken))
    assert len(offline) > 5 and [int(label) for label in spoken] == [int(label) for label in offline]


def test_weights_pretrained_with_post_conv_masking_arrive(script, speech_corpus, tmp_path):
    from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel

    masked = tiny_model(*POST_CONV)
    masked.save_to(str(tmp_path / 'post.nemo'))
    model = script.build(
        script.prepare(config('streaming_ctc', tmp_path / 'post.nemo', speech_corpus, 'exp_manager=null'))
    )[1]
    expected = EncDecDenoiseMaskedTokenPredModel.restore_from(str(tmp_path / 'post.nemo')).pre_encoder.pre_encode
    weights = model.encoder.pre_encode.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in expected.state_dict().items())


def test_a_curriculum_narrows_fine_tuning_too(script, pretrained, speech_corpus):
    overrides = ['exp_manager=null', 'trainer.max_steps=2', '+trainer.limit_val_batches=0']
    cfg = script.prepare(config('streaming_ctc', pretrained, speech_corpus, *overrides))
    curriculum = AttContextCurriculum(milestones=[[0, [4, 0]], [100, [10, 0]]])
    run = pl.Trainer(**cfg.trainer, callbacks=[curriculum])
    model = EncDecCTCModel(cfg=cfg.model, trainer=run)
    model.maybe_init_from_pretrained_checkpoint(cfg)
    seen = []
    model.encoder.layers[0].register_forward_pre_hook(
        lambda layer, *_: seen.append(model.encoder.tightest_left_context())
    )
    run.fit(model)
    assert seen == [4, 4]


@pytest.mark.parametrize(
    'overrides, message',
    [
        (['init_from_nemo_model.pretrained.path=nowhere.nemo'], 'pretrained.path: no file nowhere.nemo'),
        (['model.train_ds.manifest_filepath=nowhere.json'], 'model.train_ds.manifest_filepath: no file nowhere.json'),
        (['+model.encoder.conv_context_size=[4,4]'], 'conv_context_size: causal'),
        (['+model.encoder.att_contxt_size=[10,0]'], 'did you mean att_context_size'),
    ],
)
def test_what_cannot_work_is_refused_by_name(script, pretrained, speech_corpus, overrides, message):
    cfg = config('streaming_ctc', pretrained, speech_corpus, 'exp_manager=null', *overrides)
    with pytest.raises(ValueError, match=message):
        script.build(script.prepare(cfg))


def test_a_file_that_is_no_model_is_refused(script, speech_corpus, tmp_path):
    (tmp_path / 'text.nemo').write_text('no archive')
    cfg = config('streaming_ctc', tmp_path / 'text.nemo', speech_corpus, 'exp_manager=null')
    with pytest.raises(ValueError, match='pretrained.path: .*text.nemo'):
        script.prepare(cfg)


def test_a_checkpoint_of_the_pretraining_is_taken_as_well(script, speech_corpus, tmp_path):
    pretrained = tiny_model(seed=1)
    run = trainer(1)
    pretrained.set_trainer(run)
    run.strategy.connect(pretrained)
    run.save_checkpoint(tmp_path / 'last.ckpt')
    cfg = config('streaming_ctc', '???', speech_corpus, 'exp_manager=null', f'init_from_ptl_ckpt={tmp_path}/last.ckpt')
    model = script.build(script.prepare(cfg))[1]
    expected = pretrained.encoder.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in model.encoder.state_dict().items())


@pytest.mark.integration
def test_from_the_pretraining_script_to_a_stream_by_commands_alone(tmp_path, speech_corpus):
    data = [
        f'model.train_ds.manifest_filepath={speech_corpus}/train_manifest.json',
        f'model.validation_ds.manifest_filepath={speech_corpus}/validation_manifest.json',
    ]
    small = [override for override in SMALL if not override.endswith('=null')]
    tiny = ['--config-name', 'nest_hierarchical_streaming_tiny', *small, *data, *LAYERS, '~curriculum']
    tiny += [f'model.train_ds.noise_manifest={speech_corpus}/noise_manifest.json', 'model.train_ds.max_duration=3.5']
    tiny += ['trainer.max_steps=2', '+trainer.limit_val_batches=1', 'trainer.num_sanity_val_steps=0']
    tiny += ['model.log_figures=false', 'model.validate_contexts=first']
    run(tmp_path, 'hierarchical_streaming_nest.py', *tiny, f'+exp_manager.explicit_log_dir={tmp_path}/pretrained')
    pretrained = next((tmp_path / 'pretrained/checkpoints').glob('*.nemo'))
    arguments = settings('streaming_ctc', pretrained, speech_corpus, f'+exp_manager.explicit_log_dir={tmp_path}/tuned')
    run(tmp_path, 'finetune_streaming.py', '--config-name', 'streaming_ctc', *arguments, 'trainer.max_steps=2')
    tuned = next((tmp_path / 'tuned/checkpoints').glob('*.nemo'))
    check_ctc_stream(EncDecCTCModel.restore_from(str(tuned), map_location='cpu').eval(), utterance(speech_corpus))


def run(folder, script, *arguments):
    done = run_python(EXAMPLES / 'speech_pretraining' / script, *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    'kind, made',
    [('ctc', EncDecCTCModelBPE), ('rnnt', EncDecRNNTBPEModel), ('hybrid', EncDecHybridRNNTCTCBPEModel)],
)
def test_word_pieces_of_a_tokenizer_are_recognised(script, kind, made, pretrained, speech_corpus, tmp_path):
    tokenizer = f"model.tokenizer={{dir: '{make_tokenizer(tmp_path)}', type: bpe}}"
    name = f'streaming_{kind}'
    run, model = script.build(script.prepare(config(name, pretrained, speech_corpus, tokenizer, 'exp_manager=null')))
    assert type(model) is made and len(model.tokenizer.vocab) == 64
    assert_starts_from(model, pretrained)
    run.limit_val_batches = 1
    run.fit(model)
    assert run.global_step == 3 and 'val_wer' in run.callback_metrics
    model.save_to(str(tmp_path / 'tuned.nemo'))
    restored = made.restore_from(str(tmp_path / 'tuned.nemo'), map_location='cpu').eval()
    assert stream(restored, utterance(speech_corpus), return_text=True)[-1].text[0].partial is None


def test_a_tokenizer_that_is_not_there_or_not_alone_is_refused(script, pretrained, speech_corpus, tmp_path):
    def prepared(*overrides):
        return script.prepare(config('streaming_ctc', pretrained, speech_corpus, *overrides))

    with pytest.raises(ValueError, match='model.tokenizer.dir is /nowhere; it must be the folder of a tokenizer'):
        prepared('model.tokenizer={dir: /nowhere, type: bpe}')
    with pytest.raises(ValueError, match='model.labels and model.tokenizer are both given'):
        prepared(f"model.tokenizer={{dir: '{tmp_path}', type: bpe}}", 'model.labels=[a,b]')
