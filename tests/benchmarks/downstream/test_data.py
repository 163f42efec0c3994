# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import soundfile


@pytest.fixture(scope='module')
def data(load):
    return load('data')


def said(**lengths):
    """Entries of speakers that take turns: ``said(a=[1, 2], b=[3])`` is a 1, b 3, a 2."""
    longest = max(map(len, lengths.values()))
    turns = [(speaker, index) for index in range(longest) for speaker in lengths if index < len(lengths[speaker])]
    return [
        {'speaker': speaker, 'duration': lengths[speaker][index], 'audio_filepath': f'{speaker}{index}'}
        for speaker, index in turns
    ]


def names(groups):
    return [' '.join(entry['audio_filepath'] for entry in group) for group in groups]


def test_utterances_of_one_speaker_are_joined_in_their_order_until_they_are_long_enough(data):
    entries = said(a=[4, 6, 5, 5, 1], b=[12, 3], c=[7])
    assert names(data.grouped(entries, 10)) == ['a0 a1', 'a2 a3 a4', 'b0 b1', 'c0']


def test_all_speech_is_used_once_and_nobody_with_enough_of_it_is_left_short(data):
    entries = said(a=[3.0, 2.5, 4.1, 0.7] * 9, b=[1.3] * 20, c=[16.0], d=[15.9])
    groups = data.grouped(entries, 16)
    used = [entry['audio_filepath'] for group in groups for entry in group]
    assert sorted(used) == sorted(entry['audio_filepath'] for entry in entries)
    assert all(len({entry['speaker'] for entry in group}) == 1 for group in groups)
    lengths = {group[0]['speaker']: sum(entry['duration'] for entry in group) for group in groups}
    assert all(length >= 16 for speaker, length in lengths.items() if speaker != 'd') and lengths['d'] == 15.9


def test_joined_audio_and_phones_follow_each_other(data, load, make_manifest, tmp_path):
    manifest = make_manifest(tmp_path / 'raw', ['x', 'y'], [0.5, 0.75])
    entries = data.write_joined([manifest], tmp_path, 'test', 1.0)
    assert [entry['speaker'] for entry in entries] == ['x', 'y']
    assert [entry['text'] for entry in entries] == [load('phones').spell('AH B K AH B K')] * 2
    parts = [soundfile.read(tmp_path / 'raw' / f'x-{index}.wav', dtype='int16')[0].tolist() for index in range(2)]
    whole, rate = soundfile.read(entries[0]['audio_filepath'], dtype='int16')
    assert rate == 16000 and abs(whole - (parts[0] + parts[1])).max() <= 1 and entries[0]['duration'] == 1.25


def test_joining_twice_gives_the_same_files_and_joining_again_leaves_them_alone(data, make_manifest, tmp_path):
    manifest = make_manifest(tmp_path / 'raw', ['x', 'y'], [0.5, 0.75])
    for folder in ('one', 'two'):
        data.write_joined([manifest], tmp_path / folder, 'test', 1.0)
    files = [sorted(path for path in (tmp_path / folder).rglob('*') if path.is_file()) for folder in ('one', 'two')]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    before = [path.stat().st_mtime_ns for path in files[0]]
    data.write_joined([manifest], tmp_path / 'one', 'test', 1.0)
    assert [path.stat().st_mtime_ns for path in files[0]] == before
    other = make_manifest(tmp_path / 'raw', ['x', 'z'], [0.5, 0.75], prefix='other-')
    with pytest.raises(ValueError, match='test.json was joined of other utterances than --test'):
        data.write_joined([other], tmp_path / 'one', 'test', 1.0)


def test_digests_tell_data_apart(data):
    entries = [{'utterance': 'a', 'duration': 1.0, 'text': 'x', 'audio_filepath': 'here'}]
    assert data.digest(entries) == data.digest([{**entries[0], 'audio_filepath': 'there'}])
    assert data.digest(entries) != data.digest([{**entries[0], 'text': 'y'}])


def test_a_speaker_of_the_test_that_is_trained_on_is_refused(data, make_manifest, tmp_path):
    trained = make_manifest(tmp_path, ['x', 'y'], [1.0])
    tested = make_manifest(tmp_path, ['y', 'z'], [1.0], prefix='test-')
    sources = dict(pretraining=[trained], validation=[trained], tuning=[trained], test=[tested])
    with pytest.raises(ValueError, match='heard in training, too: y'):
        data.prepare(sources, tmp_path / 'data', 1.0, 1.0)


def test_speech_without_phones_is_refused_where_phones_are_recognised(data, make_manifest, tmp_path):
    trained = make_manifest(tmp_path, ['x'], [1.0], phones=None)
    tested = make_manifest(tmp_path, ['z'], [1.0], prefix='test-')
    sources = dict(pretraining=[trained], validation=[trained], tuning=[trained], test=[tested])
    with pytest.raises(ValueError, match='tuning: .*x-0.wav has no phones'):
        data.prepare(sources, tmp_path / 'data', 1.0, 1.0)


def test_a_smaller_subset_begins_a_larger_one_and_both_have_many_speakers(data):
    ordered = data.in_turn(said(a=[20, 20, 20], b=[30, 30], c=[10]))
    assert [entry['audio_filepath'] for entry in ordered] == ['a0', 'b0', 'c0', 'a1', 'b1', 'a2']
    assert data.subset(ordered, 1.0) == ordered[:3] and data.subset(ordered, 1.1) == ordered[:4]
    with pytest.raises(ValueError, match='minutes is 3; there are 2.17'):
        data.subset(ordered, 3)


def test_the_order_of_fine_tuning_depends_on_the_seed_and_goes_through_all_before_any_comes_again(data):
    entries = [{'name': name} for name in 'abcde']
    order = data.epochs(entries, 12, seed=0)
    assert order == data.epochs(entries, 12, seed=0) != data.epochs(entries, 12, seed=1)
    assert len(order) == 12 and order[:5] != order[5:10]
    for epoch in (order[:5], order[5:10]):
        assert sorted(entry['name'] for entry in epoch) == list('abcde')


def test_a_manifest_without_speakers_is_refused_by_its_name(data, tmp_path):
    path = tmp_path / 'm.json'
    path.write_text(json.dumps({'audio_filepath': 'a.wav', 'duration': 1}) + '\n')
    with pytest.raises(ValueError, match='m.json, entry 1 has no speaker'):
        data.read_manifest(path)
