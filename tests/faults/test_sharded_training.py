# SPDX-License-Identifier: Apache-2.0
"""From manifests to shards to a training run on two ranks of two workers each, which is killed and goes on.

On synthetic speech or, where the environment variable ``NEMO_STREAMING_SSL_SPEECH`` names a manifest, on that.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from corpus import first_entries, write_manifest
from fresh_process import run_python
from shared_results import shared_folder
from tiny_nest import restored_weights as weights

pytestmark = pytest.mark.integration
SCRIPT = Path(__file__).resolve().with_name('sharded_training.py')
PREPARE = Path(__file__).resolve().parents[2] / 'examples/asr/speech_pretraining/prepare_shards.py'
STRIKE, STEPS = 5, 9
OWN_STORE = {'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}  # of each start of the ranks, see docs/scale.md


@pytest.fixture(scope='module')
def data(tmp_path_factory, speech_corpus):
    """Shards of speech, real where a manifest is named, and of noise; and a manifest to validate on."""

    def make(folder):
        source = os.environ.get('NEMO_STREAMING_SSL_SPEECH') or speech_corpus / 'train_manifest.json'
        write_manifest(first_entries(Path(source), 30), folder / 'train.json')
        write_manifest(first_entries(speech_corpus / 'noise_manifest.json', 3), folder / 'noise.json')
        write_manifest(first_entries(speech_corpus / 'validation_manifest.json', 4), folder / 'validation.json')
        for name in ('train', 'noise'):
            words = ['--manifest', folder / f'{name}.json', '--output', folder / name, '--shard_size=8', '--workers=2']
            done = run_python(PREPARE, *words)
            assert done.returncode == 0, done.stderr[-3000:]

    return shared_folder(tmp_path_factory, 'shards_of_speech', make)


def launch(folder, data, restarts, *strike):
    folder.mkdir()
    return run_python(SCRIPT, folder, data, restarts, *strike, timeout=600, **OWN_STORE)


@pytest.fixture(scope='module')
def runs(tmp_path_factory, data):
    """A run without a fault, and one whose ranks are started again after one was killed."""

    def make(folder):
        for name, strike in (('whole', []), ('killed', [STRIKE])):
            done = launch(folder / name, data, 1, *strike)
            assert done.returncode == 0, done.stderr[-5000:]

    return shared_folder(tmp_path_factory, 'sharded_runs', make)


def steps(folder, rank):
    """Step -> loss, context and utterances; of a step that was repeated, both must be the same."""
    record = {}
    for step, *rest in map(json.loads, Path(folder, f'steps-{rank}.jsonl').read_text().splitlines()):
        assert record.setdefault(step, rest) == rest, f'step {step} differs'
    return record


def test_a_rank_that_is_killed_is_started_again_and_nothing_differs(runs):
    starts = [json.loads((runs / name / 'metrics.json').read_text())['restarts'] for name in ('whole', 'killed')]
    assert starts == [0, 1]
    for rank in (0, 1):
        whole, killed = steps(runs / 'whole', rank), steps(runs / 'killed', rank)
        assert list(whole) == list(range(1, STEPS + 1)) and whole == killed
    expected, found = weights(runs / 'whole/trained.nemo'), weights(runs / 'killed/trained.nemo')
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_validates_in_each_context_and_logs_the_wait_for_data(runs):
    metrics = json.loads((runs / 'whole/metrics.json').read_text())
    assert {f'val_loss/ctx_{context}' for context in ('10_0', '20_0', 'unlimited_0')} <= set(metrics)
    assert 0 <= metrics['data_wait_share'] <= 1


def test_without_restarts_a_killed_rank_ends_the_job_with_a_message(tmp_path, data):
    done = launch(tmp_path / 'ended', data, 0, STRIKE)
    # The agent reports the rank whose end it sees first: the killed one, or the one that lost its peer.
    assert done.returncode != 0 and 'ChildFailedError' in done.stderr and 'exitcode  : ' in done.stderr
    assert not (tmp_path / 'ended/trained.nemo').exists()
