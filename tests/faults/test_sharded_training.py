# SPDX-License-Identifier: Apache-2.0
"""From manifests to shards to a training run on two ranks of two workers each, which is killed and goes on.

On synthetic speech or, where the environment variable ``NEMO_STREAMING_SSL_SPEECH`` names a manifest, on that.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from corpus import first_entries, write_manifest
from fresh_process import run_python
from shared_results import shared_folder
from tiny_nest import restored_weights as weights

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCRIPT = HERE / 'sharded_training.py'
PREPARE = ROOT / 'examples/asr/speech_pretraining/prepare_shards.py'
REAL_SPEECH = 'NEMO_STREAMING_SSL_SPEECH'  # an environment variable: a manifest of real speech to train on
STRIKE, STEPS = 5, 9
OWN_STORE = {'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}  # of each start of the ranks, see docs/scale.md


@pytest.fixture(scope='module')
def data(tmp_path_factory, speech_corpus):
    """Shards of speech, real where a manifest is named, and of noise; and a manifest to validate on."""

    def make(folder):
        source = os.environ.get(REAL_SPEECH) or speech_corpus / 'train_manifest.json'
        write_manifest(first_entries(Path(source), 30), folder / 'train.json')
        write_manifest(first_entries(speech_corpus / 'noise_manifest.json', 3), folder / 'noise.json')
        write_manifest(first_entries(speech_corpus / 'validation_manifest.json', 4), folder / 'validation.json')
        for name in ('train', 'noise'):
            words = ['--manifest', folder / f'{name}.json', '--output', folder / name, '--shard_size=8', '--workers=2']
            done = run_python(PREPARE, *words)
            assert done.returncode == 0, done.stderr[-3000:]

    return shared_folder(tmp_path_factory, 'shards_of_speech', make)


def torchrun(folder, data, *options, strike=0):
    """Run the script on two ranks, for 600 seconds at most; return the ended process."""
    folder.mkdir()
    words = [folder, data / 'train/shar', data / 'noise/shar', data / 'validation.json', strike]
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone', *options, SCRIPT]
    return subprocess.run(
        [str(word) for word in [*command, *words]],
        env={**os.environ, **OWN_STORE, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def steps(folder, rank):
    """Step -> (loss, context); of a step that was repeated, both must be the same."""
    record = {}
    for line in Path(folder, f'steps-{rank}.jsonl').read_text().splitlines():
        step, loss, context, _ = json.loads(line)
        assert record.setdefault(step, (loss, tuple(context))) == (loss, tuple(context)), f'step {step} differs'
    return record


@pytest.fixture(scope='module')
def runs(tmp_path_factory, data):
    """A run without a fault, and one of which torchrun starts the ranks again after one was killed."""

    def make(folder):
        for name, options, strike in (('whole', [], 0), ('killed', ['--max-restarts=1'], STRIKE)):
            done = torchrun(folder / name, data, *options, strike=strike)
            assert done.returncode == 0, done.stderr[-5000:]
            (folder / f'{name}.log').write_text(done.stdout + done.stderr)

    return shared_folder(tmp_path_factory, 'sharded_runs', make)


@pytest.mark.integration
def test_a_rank_that_is_killed_is_started_again_and_nothing_differs(runs):
    log = (runs / 'killed.log').read_text()
    assert 'Signal 9 (SIGKILL)' in log or 'exitcode: -9' in log
    for rank in (0, 1):
        whole, killed = steps(runs / 'whole', rank), steps(runs / 'killed', rank)
        assert list(whole) == list(range(1, STEPS + 1)) and whole == killed
    expected, found = weights(runs / 'whole/trained.nemo'), weights(runs / 'killed/trained.nemo')
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.integration
def test_ranks_have_other_speech_in_the_same_contexts(runs):
    first, second = (steps(runs / 'whole', rank) for rank in (0, 1))
    assert [context for _, context in first.values()] == [context for _, context in second.values()]
    assert len({context for _, context in first.values()}) > 1
    assert all(first[step][0] != second[step][0] for step in first)


@pytest.mark.integration
def test_validates_in_each_context_and_logs_the_wait_for_data(runs):
    metrics = json.loads((runs / 'whole/validation.json').read_text())
    assert {f'val_loss/ctx_{context}' for context in ('10_0', '20_0', 'unlimited_0')} <= set(metrics)
    waits = [json.loads(line)[3] for line in (runs / 'whole/steps-0.jsonl').read_text().splitlines()]
    assert all(0 <= wait <= 1 for wait in waits if wait is not None) and any(wait is not None for wait in waits)


@pytest.mark.integration
def test_without_restarts_a_killed_rank_ends_the_job_with_a_message(tmp_path, data):
    done = torchrun(tmp_path / 'ended', data, strike=STRIKE)
    assert done.returncode != 0 and 'exitcode  : -9' in done.stderr
    assert not (tmp_path / 'ended/trained.nemo').exists()
