# SPDX-License-Identifier: Apache-2.0
"""run.py: the order of the grid, and all of its code in miniature."""

import json

import numpy as np
import pytest
import soundfile

RATE = 16000


@pytest.fixture(scope='module')
def run(load):
    return load('run')


@pytest.fixture(scope='module')
def manifests(tmp_path_factory):
    """A folder with the four manifests, of noise."""
    folder, generator = tmp_path_factory.mktemp('speech'), np.random.default_rng(0)
    speakers = {'train': 'ab', 'validation': 'c', 'speechocean762_train': 'defg', 'speechocean762_test': 'hi'}
    for role, names in speakers.items():
        lines = []
        for name in names:
            soundfile.write(folder / f'{name}.wav', 0.1 * generator.standard_normal(2 * RATE), RATE)
            lines.append({'audio_filepath': f'{name}.wav', 'duration': 2.0, 'speaker': name, 'phones': 'AH B K'})
        (folder / f'{role}_manifest.json').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return folder


def test_the_grid_is_whole_and_begins_with_what_decides_most(run):
    cells = run.order()
    plain = [cell for cell in cells if not cell.noise]
    assert len(set(plain)) == len(plain) == 2 * 3 * (len(run.RUNNABLE) - 1) + 1
    assert {cell.seed for cell in cells[:10]} == {0} and {cell.kind for cell in cells[:5]} == {'causal'}


def test_quick_runs_all_of_it_once(run, manifests, tmp_path, capsys):
    words = ['--speech', str(manifests), '--work', str(tmp_path / 'work'), '--results', str(tmp_path / 'results')]
    words += ['--quick', '--tune', '--kind', 'causal', '--seed', '0', '--arm', 'next', 'mel']
    assert run.main(words) == 0
    rows = run.rows_of(tmp_path / 'results/probe.csv')
    assert [row['arm'] for row in rows[:2]] == ['(phones)', '(speakers)'] and rows[0]['errors'] == '3 3'
    judged = {(row['arm'], row['step'], row['context'], row['probe_seed']) for row in rows[2:]}
    ends = {('next', '4', context, seed) for context in ('5 0', '-1 0') for seed in '012'}
    earlier = {('next', step, context, '0') for context in ('5 0', '-1 0') for step in '12'}
    assert judged == ends | earlier | {('mel', '0', '5 0', '0')} and len(judged) == len(rows) - 2
    sizes = {path.name: path.stat().st_size for path in (tmp_path / 'results').glob('*.csv')}
    assert set(sizes) == {'probe.csv', 'pretraining.csv', 'distance.csv', 'finetuning.csv'}
    for work in ('work', 'of another machine'):  # all of it is there
        words[3] = str(tmp_path / work)
        assert run.main(words) == 0
        assert sizes == {path.name: path.stat().st_size for path in (tmp_path / 'results').glob('*.csv')}
    assert not list((tmp_path / work).glob('*/*.pt'))

    def half(lines):
        return [line for line in lines if ',-1 0,' not in line]

    probes = tmp_path / 'results/probe.csv'
    whole = probes.read_text().splitlines()
    probes.write_text('\n'.join(half(whole)) + '\n')  # the other machine was lost before it had judged this context
    words[3] = str(tmp_path / 'a third')
    assert run.main(words) == 0
    assert sorted(half(probes.read_text().splitlines())) == sorted(half(whole))
    assert len(probes.read_text().splitlines()) == len(whole)
    assert sizes['pretraining.csv'] == (tmp_path / 'results/pretraining.csv').stat().st_size
