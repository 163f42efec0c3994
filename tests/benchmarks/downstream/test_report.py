# SPDX-License-Identifier: Apache-2.0
"""The report of a small set of results whose figures are easy to work out."""

import json

import pytest

SEEDS = (0, 1, 2)
CONTEXTS = ('5_0', '10_0', '20_0', '-1_0')
PHONES = [50, 50, 100, 50]
MASKS = dict(block_size=40, mask_prob=0.01, masked_share=0.33, counted_share=0.3, mean_run=4.1, unanswerable_share=0.0)
RATES = """
| arm | seeds | `[5, 0]` | `[10, 0]` | `[20, 0]` | `[-1, 0]` |
| --- | --- | ---: | ---: | ---: | ---: |
| `scratch` | 3 | 60.0 (60.0 to 60.0) | 60.0 (60.0 to 60.0) | 60.0 (60.0 to 60.0) | 60.0 (60.0 to 60.0) |
| `stock` | 3 | 50.0 (50.0 to 50.0) | 50.0 (50.0 to 50.0) | 50.0 (50.0 to 50.0) | 50.0 (50.0 to 50.0) |
| `synchronised` | 1 | 40.0 (40.0 to 40.0) | 40.0 (40.0 to 40.0) | 40.0 (40.0 to 40.0) | 50.0 (50.0 to 50.0) |
"""
DIFFERENCES = """
| arms | seeds | `[5, 0]` | `[10, 0]` | `[20, 0]` | `[-1, 0]` |
| --- | --- | ---: | ---: | ---: | ---: |
| `stock` against `scratch` | 3 | -10.0 (-10.0 to -10.0)* | -10.0 (-10.0 to -10.0)* | -10.0 (-10.0 to -10.0)* | -10.0 (-10.0 to -10.0)* |
| `synchronised` against `scratch` | 1 | -20.0 (-20.0 to -20.0)* | -20.0 (-20.0 to -20.0)* | -20.0 (-20.0 to -20.0)* | -10.0 (-10.0 to -10.0)* |
| `synchronised` against `stock` | 1 | -10.0 (-10.0 to -10.0)* | -10.0 (-10.0 to -10.0)* | -10.0 (-10.0 to -10.0)* | +0.0 (+0.0 to +0.0) |
"""
VERDICTS = """
| arms | verdict | with speakers drawn, not utterances |
| --- | --- | --- |
| `stock` against `scratch` | helps | helps |
| `synchronised` against `scratch` | open: seeds are missing | open: seeds are missing |
| `synchronised` against `stock` | open: seeds are missing | open: seeds are missing |
"""
RUNS = """
| arm | 60 minutes, seed 0 | 60 minutes, seed 1 | 60 minutes, seed 2 | 10 minutes, seed 0 | 10 minutes, seed 1 | 10 minutes, seed 2 | last validation loss |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| `scratch` | 60.0 | 60.0 | 60.0 | 60.0 | 60.0 | 60.0 | -, -, - |
| `stock` | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 | 4.50, 4.50, 4.50 |
| `synchronised` | 40.0 | - | - | 40.0 | - | - | 4.50 |
"""
MASKS_TABLE = """
| arm | block (frames of 10 ms) | mask_prob | masked in training | masked | asked for | mean run (80 ms) | unanswerable | validation loss |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| `scratch` | - | - | - | - | - | - | - | - |
| `stock` | 40 | 0.0100 | 31.5% | 33.0% | 30.0% | 4.10 | 0.0% | 6.00 to 4.50 |
| `synchronised` | 40 | 0.0100 | 31.0% | 33.0% | 30.0% | 4.10 | 0.0% | 6.00 to 4.50 |
"""


def result(arm, seed, shares):
    """A result whose errors are these shares of the phones, by context, with both amounts of speech."""
    errors = {context: [round(share * count) for count in PHONES] for context, share in zip(CONTEXTS, shares)}
    logged = {'audit/masked_share': 0.31 + 0.005 * seed, 'val_loss': [6.0, 4.5]}
    live = {'errors': 3, 'errors_offline': 3, 'same_texts': 2}
    return {
        'arm': arm,
        'seed': seed,
        'settings': {'layers': 5},
        'data': {'tuning': 'abc'},
        'test': {'utterances': list('abcd'), 'speakers': ['x', 'x', 'y', 'z'], 'phones': PHONES},
        'errors': {'60': errors, '10': errors},
        'live': {'utterances': [0, 2], 'contexts': {context: live for context in CONTEXTS}},
        'masks': None if arm == 'scratch' else MASKS,
        'pretraining': None if arm == 'scratch' else logged,
    }


def seeds_of(arm, shares):
    return [result(arm, seed, shares) for seed in SEEDS]


@pytest.fixture(scope='module')
def report(load):
    return load('report')


def write(folder, *results):
    folder.mkdir(exist_ok=True)
    for found in results:
        (folder / f"{found['arm']}-{found['seed']}.json").write_text(json.dumps(found))
    return folder


@pytest.fixture
def folder(tmp_path):
    """Seven results of three arms; scratch 60 %, stock 50 %, synchronised 40 % but in the last context."""
    results = seeds_of('scratch', [0.6] * 4) + seeds_of('stock', [0.5] * 4)
    return write(tmp_path / 'results', *results, result('synchronised', 0, [0.4, 0.4, 0.4, 0.5]))


def test_the_tables_are_those_worked_out_by_hand(report, folder):
    results = report.Results(folder)
    assert report.rates_table(results, '60') == RATES.strip()
    assert report.differences_table(results, '10') == DIFFERENCES.strip()
    assert report.verdicts_table(results) == VERDICTS.strip()
    assert report.seeds_table(results) == RUNS.strip()
    assert report.masks_table(results) == MASKS_TABLE.strip()
    assert report.live_sentence(results).startswith('Streamed live, 56 of 56 utterances')


def test_what_is_missing_is_said(report, folder):
    text = report.figures(report.Results(folder))
    assert '**Not all runs are done.** Missing: offline-0, offline-1, ' in text
    assert 'synchronised-1, synchronised-2' in text and 'both-refined' not in text


@pytest.mark.parametrize(
    'shares, word',
    [
        ([0.4, 0.4, 0.4, 0.4], 'helps'),
        ([0.4, 0.4, 0.5, 0.5], 'not shown'),  # in two contexts only
        ([0.4, 0.4, 0.4, 0.6], 'not shown'),  # worse in the fourth
        ([0.6, 0.5, 0.6, 0.6], 'hurts'),
    ],
)
def test_verdicts_need_three_contexts_and_none_against(report, tmp_path, shares, word):
    folder = write(tmp_path / 'results', *seeds_of('stock', [0.5] * 4), *seeds_of('synchronised', shares))
    assert report.verdict(report.Results(folder), 'stock', 'synchronised') == word


def test_verdicts_need_both_amounts_of_speech(report, tmp_path):
    alike, better = seeds_of('stock', [0.5] * 4), seeds_of('synchronised', [0.4] * 4)
    for found in better:
        found['errors']['10'] = alike[0]['errors']['10']
    results = report.Results(write(tmp_path / 'results', *alike, *better))
    assert report.verdict(results, 'stock', 'synchronised') == 'not shown'


def test_the_page_keeps_peoples_words_and_is_checked(report, folder, tmp_path, capsys):
    page, plot, figures = tmp_path / 'evidence.md', tmp_path / 'plot.png', tmp_path / 'figures.json'
    words = ['--results', str(folder), '--page', str(page), '--plot', str(plot), '--json', str(figures)]
    assert report.main([*words, '--check']) == 1 and not page.exists()
    page.write_text(f'# Ours\n\nBefore.\n\n{report.BEGIN}\nold\n{report.END}\n\nAfter.\n')
    assert report.main(words) == 0
    text = page.read_text()
    assert text.startswith('# Ours\n\nBefore.\n') and text.endswith('\n\nAfter.\n')
    assert RATES.strip() in text and 'old' not in text and plot.read_bytes().startswith(b'\x89PNG')
    difference = json.loads(figures.read_text())['differences'][0]
    assert (difference['second'], difference['verdict'], difference['seeds']) == ('stock', 'helps', [0, 1, 2])
    assert difference['points']['60']['5_0']['value'] == pytest.approx(-0.1)
    assert report.main([*words, '--check']) == 0
    write(folder, result('synchronised', 1, [0.3] * 4))
    assert report.main([*words, '--check']) == 1 and page.read_text() == text


def test_without_results_it_says_so(report, tmp_path):
    (tmp_path / 'results').mkdir()
    assert report.figures(report.Results(tmp_path / 'results')).startswith(
        'There are no results yet. Missing: scratch-0'
    )


def test_results_that_do_not_compare_are_refused(report, folder):
    other = result('both', 0, [0.5] * 4)
    write(folder, {**other, 'settings': {'layers': 4}})
    with pytest.raises(ValueError, match='layers is 5, and 4 elsewhere|layers is 4, and 5 elsewhere'):
        report.Results(folder)
    write(folder, {**other, 'test': {**other['test'], 'phones': [1, 2, 3, 4]}})
    with pytest.raises(ValueError, match='json: test is not that of the first'):
        report.Results(folder)
    (folder / 'both-0.json').write_text('{')
    with pytest.raises(ValueError, match='both-0.json is no result of run.py'):
        report.Results(folder)


def test_the_committed_page_says_what_the_committed_results_do(report):
    if not any((report.HERE / 'results').glob('*.json')):
        pytest.skip('no result is committed yet')
    assert report.main(['--check']) == 0
