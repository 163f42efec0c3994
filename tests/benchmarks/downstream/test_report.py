# SPDX-License-Identifier: Apache-2.0
"""report.py: rates and verdicts from the CSV files, and the committed page."""

import numpy as np
import pytest

STEPS = range(100, 1100, 100)


@pytest.fixture(scope='module')
def report(load):
    return load('report')


def write(folder, rows, phones='10 10', speakers='a b'):
    """Write probe.csv from tuples of arm, seed, probe seed and errors, the same in both causal contexts."""
    lines = ['kind,arm,seed,step,context,probe_seed,errors', f',(phones),,,,,{phones}', f',(speakers),,,,,{speakers}']
    for arm, seed, probe, errors in rows:
        step = 0 if arm == 'random' else 8
        lines += [f'causal,{arm},{seed},{step},{context},{probe},{errors}' for context in ('5 0', '-1 0')]
    (folder / 'probe.csv').write_text('\n'.join(lines) + '\n')


def test_rates_and_differences_by_hand(report, tmp_path):
    write(tmp_path, [('next', 0, 0, '2 4'), ('next', 1, 0, '4 6'), ('random', 0, 0, '8 8'), ('random', 1, 0, '9 9')])
    results = report.Results(tmp_path)
    assert results.seeds('causal', 'next', 'random') == [0, 1]
    assert results.rate('causal', 'next', (5, 0)).value == pytest.approx(16 / 40)
    assert results.difference('causal', 'next', 'random', (-1, 0)).value == pytest.approx(-18 / 40)
    assert report.missing(results) == '4 of 91 runs are done.'


def test_an_arm_is_better_only_with_all_seeds_and_beyond_the_noise_of_probes(report, tmp_path):
    rows = [(arm, seed, 0, errors) for seed in range(3) for arm, errors in (('next', '2 3'), ('random', '8 9'))]
    write(tmp_path, rows)
    assert report.Results(tmp_path).verdict('causal', 'next', 'random') == 'open'  # the noise is not known
    write(tmp_path, [*rows, ('next', 0, 1, '2 4')])
    results = report.Results(tmp_path)
    assert results.probe_deviation() == pytest.approx(np.std([25, 30], ddof=1))
    assert results.verdict('causal', 'next', 'random') == 'better'
    assert results.verdict('causal', 'random', 'next') == 'worse'
    write(tmp_path, [*rows, ('next', 0, 1, '9 9')])
    assert report.Results(tmp_path).verdict('causal', 'next', 'random') == 'not shown'
    write(tmp_path, [*rows[:-1], ('next', 0, 1, '2 4')])
    assert report.Results(tmp_path).verdict('causal', 'next', 'random') == 'open'


def test_how_much_a_loss_still_falls_is_the_mean_over_seeds(report, tmp_path):
    write(tmp_path, [])
    rows = [f'causal,next,{seed},{step},{4 - step * fall},' for seed, fall in ((0, 1e-4), (1, 3e-4)) for step in STEPS]
    (tmp_path / 'pretraining.csv').write_text(
        '\n'.join(['kind,arm,seed,step,train_loss,validation_loss', *rows]) + '\n'
    )
    (line,) = report.last_losses(report.Results(tmp_path))
    assert '`next` -0.10' in line  # 500 steps apart


def test_what_fine_tuning_gave_is_listed_with_its_steps(report, tmp_path):
    write(tmp_path, [])
    (tmp_path / 'finetuning.csv').write_text('kind,arm,seed,step,context,errors\ncausal,next,0,750,5 0,2 4\n')
    (line,) = report.tunings(report.Results(tmp_path))
    assert '[5, 0]' in line and '`next` 30.0 after 750 steps (seed 0)' in line


def test_the_committed_page_has_the_figures_of_the_committed_results(report):
    assert report.main(['--check']) == 0
