# SPDX-License-Identifier: Apache-2.0
"""From a pre-trained .nemo to a model that recognises speech, streamed."""

import json
import tarfile
from pathlib import Path

import pytest
import soundfile
import torch
from fresh_process import run_python
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tiny_nest import POST_CONV, SMALL, tiny_model, trainer
from tiny_recogniser import MODELS, OF_PIECES
from word_pieces import make_tokenizer

from nemo.collections.asr.models import EncDecCTCModel
from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel
from nemo.collections.asr.parts.streaming.session import StreamingOutput, StreamingSession
from nemo.collections.common.data.lhotse.nemo_adapters import NO_MEMBER
from nemo.utils.left_out import OUTSIDE_LIMITS

EXAMPLES = Path(__file__).resolve().parents[4] / 'examples/asr'
LAYERS = ['model.encoder.n_layers=2', 'model.encoder.layer_att_context_size=[[0,[10,0]],[1,[20,0]]]']
CHUNKS = [
    'model.encoder.n_layers=2',
    'model.encoder.att_context_style=chunked_limited',
    'model.encoder.att_context_size=[[28,13],[28,6],[28,0]]',
    '+model.encoder.att_context_sampler={full_prob: 0.2, chunk_size: [1, 14], left_chunks: [2, 28], '
    'left_limited_prob: 0.7}',
]
STATISTICS = '{fixed_mean: [%s], fixed_std: [%s]}' % (','.join(['-8.0'] * 80), ','.join(['4.0'] * 80))


@pytest.fixture(scope='module')
def script(load_example):
    return load_example('finetune_streaming')


def saved(folder, *overrides):
    """Save a pre-trained model with fixed statistics; returns the file."""
    tiny_model(*overrides, f'model.preprocessor.normalize={STATISTICS}').save_to(str(folder / 'model.nemo'))
    return folder / 'model.nemo'


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    """A pre-trained model with contexts by layer."""
    return saved(tmp_path_factory.mktemp('pretrained'), LAYERS[0], f'+{LAYERS[1]}')


@pytest.fixture(scope='module')
def pretrained_in_chunks(tmp_path_factory):
    """A pre-trained model with look-ahead, which draws its chunks in training."""
    return saved(tmp_path_factory.mktemp('chunks'), *CHUNKS)


def settings(kind, pretrained, corpus, *overrides):
    """Overrides that make a shipped config one for tests."""
    loader = ['batch_size=1', 'num_workers=0', 'pin_memory=false']  # NeMo's transducer loss loops in Python
    data = {'train_ds': 'train', 'validation_ds': 'validation'}
    small = ['pred_hidden=8', 'joint_hidden=8'] if kind != 'ctc' else []
    return [
        f'init_from_nemo_model.pretrained.path={pretrained}',
        *(f'model.{section}.manifest_filepath={corpus}/{name}_manifest.json' for section, name in data.items()),
        *(f'++model.{section}.{key}' for section in data for key in loader),
        'model.train_ds.max_duration=3.5',
        '++model.validation_ds.max_duration=4.5',
        'trainer.accelerator=cpu',
        'trainer.devices=1',
        'trainer.max_steps=3',
        'model.optim.sched.warmup_steps=1',
        *(f'model.model_defaults.{key}' for key in small),
        *(['model.decoding.greedy.max_symbols=1'] if small else []),
        *overrides,
    ]


def prepared(script, kind, pretrained, corpus, *overrides):
    """Compose a shipped config in a size for tests, and prepare it."""
    with initialize_config_dir(str(EXAMPLES / 'conf/ssl/finetune'), version_base=None):
        overrides = settings(kind, pretrained, corpus, 'exp_manager=null', *overrides)
        return script.prepare(compose(f'streaming_{kind}', overrides=overrides))


def tuned(script, cfg, folder):
    """Fine-tune for three steps; returns the model before it was saved, and as it is restored, in eval mode."""
    torch.manual_seed(0)
    run, model = script.build(cfg)
    before = [weight.clone() for weight in model.encoder.parameters()]
    run.limit_val_batches = 1
    run.fit(model)
    assert run.global_step == 3 and 'val_wer' in run.callback_metrics
    changed = [not torch.equal(*pair) for pair in zip(before, model.encoder.parameters())]
    assert sum(changed) > len(changed) / 2
    model.save_to(str(folder / 'tuned.nemo'))
    return model, type(model).restore_from(str(folder / 'tuned.nemo'), map_location='cpu').eval()


def utterance(corpus):
    """The samples [1, N] of the shortest utterance of validation."""
    entries = [json.loads(line) for line in (corpus / 'validation_manifest.json').read_text().splitlines()]
    shortest = min(entries, key=lambda entry: entry['duration'])
    samples, _ = soundfile.read(corpus / shortest['audio_filepath'], dtype='float32')
    return torch.from_numpy(samples).unsqueeze(0)


def check_stream(model, samples):
    """Stream in pieces of 100 ms: frames and log-probabilities are the offline ones; returns the steps' outputs."""
    with torch.no_grad():
        length = torch.tensor([samples.shape[1]])
        expected, lengths = model(input_signal=samples, input_signal_length=length)[:2]
    ctc = isinstance(model, EncDecCTCModel)
    session = StreamingSession(model, return_log_probs=ctc, return_tokens=ctc)
    outputs = [session.step(piece) for piece in samples.split(1600, dim=1)] + [session.finish()]
    streamed = StreamingOutput.concatenate(outputs)
    assert torch.equal(streamed.lengths, lengths)
    expected = expected[:, : int(lengths)] if ctc else expected[:, :, : int(lengths)]  # behind them may be padding
    torch.testing.assert_close(streamed.log_probs if ctc else streamed.encoded, expected, atol=1e-4, rtol=0)
    if ctc:
        assert torch.equal(streamed.tokens, expected.argmax(dim=2))
    return outputs


def check_transducer(model, outputs):
    """Decode the outputs of a stream step after step: the words are those of all frames at once."""
    streamed, spoken = StreamingOutput.concatenate(outputs), None
    with torch.no_grad():
        model.joint.joint_net[-1].bias[-1] -= 3.0  # of blank: a model that is silent shows nothing
        decode = model.decoding.rnnt_decoder_predictions_tensor
        offline = decode(streamed.encoded, streamed.lengths, return_hypotheses=True)
        for output in outputs:
            if output.encoded.shape[2]:
                spoken = decode(output.encoded, output.lengths, return_hypotheses=True, partial_hypotheses=spoken)
    offline, spoken = ([int(label) for label in hypotheses[0].y_sequence] for hypotheses in (offline, spoken))
    assert len(offline) > 5 and spoken == offline


@pytest.mark.parametrize('kind', ['ctc', 'rnnt'])
def test_a_model_starts_from_the_pretrained_and_streams_as_offline(script, kind, pretrained, speech_corpus, tmp_path):
    cfg = prepared(script, kind, pretrained, speech_corpus)
    assert cfg.model.labels == sorted(cfg.model.labels) and {'a', 'e', ' '} < set(cfg.model.labels)
    model = script.build(cfg)[1]
    source = EncDecDenoiseMaskedTokenPredModel.restore_from(str(pretrained), map_location='cpu')
    for part in ('encoder', 'preprocessor'):
        expected, found = getattr(source, part).state_dict(), getattr(model, part).state_dict()
        assert all(torch.equal(weight, expected[name]) for name, weight in found.items())
    assert model.encoder.att_context_size_all == source.encoder.att_context_size_all
    model, restored = tuned(script, cfg, tmp_path)
    assert type(model) is MODELS[kind]
    assert [context.as_list() for context in restored.encoder.layer_att_contexts()] == [[10, 0], [20, 0]]
    outputs = check_stream(restored, utterance(speech_corpus))
    if kind == 'rnnt':
        check_transducer(restored, outputs)


@pytest.mark.parametrize('kind, pieces', [('hybrid', False), ('ctc', True), ('rnnt', True), ('hybrid', True)])
def test_look_ahead_and_word_pieces(script, kind, pieces, pretrained_in_chunks, speech_corpus, tmp_path):
    tokenizer = [f"model.tokenizer={{dir: '{make_tokenizer(tmp_path)}', type: bpe}}"] if pieces else []
    cfg = prepared(script, kind, pretrained_in_chunks, speech_corpus, *tokenizer)
    model, restored = tuned(script, cfg, tmp_path)
    assert type(model) is (OF_PIECES if pieces else MODELS)[kind]
    for context in restored.encoder.att_context_size_all:
        restored.encoder.set_att_context_size(context)
        check_stream(restored, utterance(speech_corpus))
    session = StreamingSession(restored, return_text=True)
    session.step(utterance(speech_corpus))
    assert session.finish().text[0].partial is None


def contexts_of_training(script, cfg):
    """Train for the config's steps; returns the context that the first layer saw in each."""
    run, model = script.build(cfg)
    run.limit_val_batches = 0
    seen = []
    model.encoder.layers[0].register_forward_pre_hook(
        lambda layer, *_: seen.append(list(model.encoder.att_context_size)) if layer.training else None
    )
    run.fit(model)
    return seen, model.encoder.att_context_policy


def test_a_curriculum_and_a_sampler_set_the_contexts(script, pretrained, pretrained_in_chunks, speech_corpus):
    curriculum = '+curriculum={milestones: [[0, [4, 0]], [100, [10, 0]]]}'
    seen, _ = contexts_of_training(script, prepared(script, 'ctc', pretrained, speech_corpus, curriculum))
    assert seen == [[4, 0]] * 3
    seen, policy = contexts_of_training(script, prepared(script, 'ctc', pretrained_in_chunks, speech_corpus))
    assert seen == [policy.sampler.draw(0, step).as_list() for step in range(3)]


def test_weights_pretrained_with_post_conv_masking_are_taken(script, speech_corpus, tmp_path):
    masked = tiny_model(*POST_CONV)
    masked.save_to(str(tmp_path / 'post.nemo'))
    model = script.build(prepared(script, 'ctc', tmp_path / 'post.nemo', speech_corpus))[1]
    weights = model.encoder.pre_encode.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in masked.pre_encoder.pre_encode.state_dict().items())


def test_a_checkpoint_of_pretraining_is_taken_as_well(script, speech_corpus, tmp_path):
    pretrained, run = tiny_model(seed=1), trainer(1)
    pretrained.set_trainer(run)
    run.strategy.connect(pretrained)
    run.save_checkpoint(tmp_path / 'last.ckpt')
    model = script.build(prepared(script, 'ctc', '???', speech_corpus, f'init_from_ptl_ckpt={tmp_path}/last.ckpt'))[1]
    expected = pretrained.encoder.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in model.encoder.state_dict().items())


@pytest.mark.parametrize(
    'overrides, message',
    [
        (['init_from_nemo_model.pretrained.path=nowhere.nemo'], "pretrained.path: Can't find .*nowhere.nemo"),
        ([f'init_from_nemo_model.pretrained.path={__file__}'], f'pretrained.path: .*{Path(__file__).name}'),
        (['model.train_ds.manifest_filepath=nowhere.json'], 'model.train_ds.manifest_filepath: no file nowhere.json'),
        (['+model.train_ds.skip_bad_audio=true'], 'model.train_ds.skip_bad_audio is true'),
        (['+model.encoder.conv_context_size=[4,4]'], 'conv_context_size is'),
        (['+model.encoder.att_contxt_size=[10,0]'], 'att_contxt_size .* did you mean .*att_context_size'),
        (['model.tokenizer={dir: /nowhere, type: bpe}'], 'model.tokenizer.dir is /nowhere'),
        (["model.tokenizer={dir: '.', type: bpe}", 'model.labels=[a,b]'], 'model.labels and model.tokenizer'),
    ],
)
def test_what_cannot_work_is_refused_by_name(script, pretrained, speech_corpus, overrides, message):
    with pytest.raises(ValueError, match=message):
        script.build(prepared(script, 'ctc', pretrained, speech_corpus, *overrides))


@pytest.mark.integration
def test_from_the_pretraining_script_to_a_stream_by_commands_alone(tmp_path, speech_corpus):
    small = [override for override in SMALL if not override.endswith('=null')]
    small += ['model.train_ds.max_duration=3.5', 'trainer.max_steps=2', '+trainer.limit_val_batches=1']
    small += ['trainer.num_sanity_val_steps=0', 'model.log_figures=false', 'model.validate_contexts=first']
    data = {'train_ds.manifest_filepath': 'train', 'validation_ds.manifest_filepath': 'validation'}
    data['train_ds.noise_manifest'] = 'noise'
    small += [f'model.{key}={speech_corpus}/{name}_manifest.json' for key, name in data.items()]
    arguments = ['--config-name', 'nest_hierarchical_streaming_tiny', *small, *LAYERS, '~curriculum']
    pretrained = by_command(tmp_path / 'pretrained', 'hierarchical_streaming_nest.py', *arguments)
    arguments = settings('ctc', pretrained, speech_corpus, 'trainer.max_steps=2')
    made = by_command(tmp_path / 'tuned', 'finetune_streaming.py', '--config-name', 'streaming_ctc', *arguments)
    check_stream(EncDecCTCModel.restore_from(str(made), map_location='cpu').eval(), utterance(speech_corpus))


def by_command(folder, script, *arguments):
    """Run a training script; returns the .nemo file that it leaves."""
    words = [EXAMPLES / 'speech_pretraining' / script, *arguments, f'+exp_manager.explicit_log_dir={folder}']
    done = run_python(*words, cwd=folder.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return next((folder / 'checkpoints').glob('*.nemo'))


@pytest.mark.parametrize('tarred', [False, True])
def test_what_nemos_own_readers_leave_out_is_counted(script, tmp_path, left_out, tarred):
    rows = [('here', 1.0), ('gone', 1.0), ('long', 9.0), ('unknown', None)]
    lines = (json.dumps({'audio_filepath': f'{name}.wav', 'duration': seconds}) for name, seconds in rows)
    (tmp_path / 'm.json').write_text('\n'.join(lines))
    section = {'manifest_filepath': str(tmp_path / 'm.json'), 'max_duration': 5.0}
    if tarred:
        with tarfile.open(tmp_path / 'audio_0.tar', 'w') as archive:
            for name in ('here', 'unknown'):
                archive.addfile(tarfile.TarInfo(f'{name}.wav'))
        section['tarred_audio_filepaths'] = str(tmp_path / 'audio_0.tar')
    script.count_left_out(section)
    assert {reason: found[0] for reason, found in left_out.reasons().items()} == {
        OUTSIDE_LIMITS: 1,
        **({NO_MEMBER: 1} if tarred else {}),
    }


def test_data_without_length_need_a_limit(script, monkeypatch):
    def model(**options):
        raise TypeError("object of type 'IterableDatasetWrapper' has no len()")

    monkeypatch.setattr(script, 'model_class', lambda cfg: model)
    with pytest.raises(ValueError, match='trainer.limit_train_batches is 1.0'):
        script.build(OmegaConf.create({'trainer': {'accelerator': 'cpu', 'logger': False}, 'model': {}}))
