# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import soundfile
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tiny_nest import CONFIGS, tiny_config

from nemo.collections.asr.models import EncDecCTCModel

LABELS = [' ', 'a', 'b', 'e']
BLANK = len(LABELS)


@pytest.fixture(scope='module')
def recogniser(load_example):
    return load_example('demo_recogniser')


@pytest.fixture(scope='module')
def model():
    """A CTC model of the tiny encoder, with random weights."""
    torch.manual_seed(0)
    with initialize_config_dir(str(CONFIGS.parents[1] / 'ssl/finetune'), version_base=None):
        cfg = compose('streaming_ctc_tiny').model
    OmegaConf.set_struct(cfg, False)
    pretrained = tiny_config()
    cfg.labels, cfg.preprocessor, cfg.encoder = LABELS, pretrained.model.preprocessor, pretrained.model.encoder
    del cfg.train_ds, cfg.validation_ds, cfg.optim
    return EncDecCTCModel(cfg).eval()


def write_manifest(path, *entries):
    path.write_text(''.join(json.dumps(entry) + '\n' for entry in entries))
    return str(path)


def entry(name, duration, **more):
    return {'audio_filepath': name, 'duration': duration, **more}


def test_the_first_minutes_that_have_a_text_are_taken(recogniser, tmp_path):
    entries = [entry('1.wav', 30, text='one'), entry('2.wav', 30), entry('/3.wav', 30, text='three')]
    entries += [entry('4.wav', 1, text=' '), entry('5.wav', 20, text='five'), entry('6.wav', 1, text='six')]
    path = write_manifest(tmp_path / 'manifest.json', *entries)
    found = [(item['text'], item['audio_filepath']) for item in recogniser.transcribed(path, minutes=1.2)]
    assert found == [('one', f'{tmp_path}/1.wav'), ('three', '/3.wav')]
    assert [item['text'] for item in recogniser.transcribed(path)] == ['one', 'three', 'five', 'six']


@pytest.mark.parametrize('role', ['train', 'validation'])
def test_without_texts_the_recogniser_is_left_out_and_that_is_said(recogniser, tmp_path, capsys, role):
    data = {name: write_manifest(tmp_path / f'{name}.json', entry('a.wav', 1, text='a')) for name in ROLES}
    assert recogniser.write_transcripts(data, tmp_path / 'with').keys() == {'train', 'validation'}
    write_manifest(tmp_path / f'{role}.json', entry('a.wav', 1))
    assert recogniser.compare(data, tmp_path / 'without', tmp_path / 'model.nemo', 3, console=None) is None
    assert 'The recogniser is left out: no entry of the manifests has a text' in capsys.readouterr().out
    assert not (tmp_path / 'without').exists()


ROLES = ('train', 'validation')


def test_a_recogniser_that_is_there_is_not_made_again(recogniser, tmp_path, capsys):
    (tmp_path / 'scratch.nemo').touch()
    assert recogniser.fine_tune('scratch', None, {}, tmp_path, 3) == tmp_path / 'scratch.nemo'
    assert 'no fine-tuning' in capsys.readouterr().out


@pytest.mark.parametrize(
    'path, text',
    [
        ([], ''),
        ([BLANK, BLANK], ''),
        ([2, 2, 3, BLANK, 3, 3, 0, 1], 'bee a'),
        ([1, BLANK, BLANK, 1], 'aa'),
    ],
)
def test_a_path_is_spelled_without_blanks_and_repetitions(recogniser, path, text):
    assert recogniser.spell(path, LABELS) == text


@pytest.fixture
def samples(speech_corpus):
    found, _ = soundfile.read(speech_corpus / 'audio/validation-00000.wav', dtype='float32')
    return found[:32000]


def test_the_words_that_come_are_those_of_offline(recogniser, model, samples):
    for context in ([10, 0], [40, 0]):
        shown = list(recogniser.words_as_they_come(model, samples, context))
        assert shown[-1] == (2.0, recogniser.recognise(model, samples, context))
        assert [seconds for seconds, _ in shown] == sorted(seconds for seconds, _ in shown)
        for (_, text), (_, longer) in zip(shown, shown[1:]):
            assert longer.startswith(text)


def test_error_rates_are_those_of_all_characters_in_each_context(recogniser, model, speech_corpus, monkeypatch):
    manifest = speech_corpus / 'validation_manifest.json'
    monkeypatch.setattr(recogniser, 'recognise', lambda model, samples, context: 'a' if context == [10, 0] else '')
    rates = recogniser.error_rates(model, manifest)
    texts = [item['text'] for item in recogniser.transcribed(str(manifest))]
    characters = sum(map(len, texts))
    assert rates['20_0'] == rates['40_0'] == rates['unlimited_0'] == 1.0
    assert rates['10_0'] == pytest.approx(1 - sum('a' in text for text in texts) / characters)


def test_the_table_says_how_many_errors_fewer(recogniser):
    rates = {'pretrained': {'40_0': 0.3, '10_0': 0.0}, 'scratch': {'40_0': 0.4, '10_0': 0.0}}
    table = recogniser.error_table(rates, 4.9)
    assert '4.9 minutes' in table.title
    assert [list(column.cells) for column in table.columns] == [
        ['40, 0', '10, 0'],
        ['30.0%', '0.0%'],
        ['40.0%', '0.0%'],
        ['25%', '-'],
    ]
