# SPDX-License-Identifier: Apache-2.0
"""Synthetic speech for the tests."""

import json
from pathlib import Path

from fresh_process import run_python
from omegaconf import OmegaConf

SCRIPT = Path(__file__).resolve().parents[1] / "examples/asr/speech_pretraining/make_speech_corpus.py"


def make_small_corpus(directory, minutes=1.5):
    """Make a corpus of synthetic speech: train of about so many minutes, 20 seconds of validation, and noise."""
    done = run_python(SCRIPT, "--output", directory, "--minutes", minutes)
    assert done.returncode == 0, done.stderr


def data_section(corpus, **options):
    """Return a section of a model's config that trains on such a corpus, with the options added or in place of its own."""
    section = {
        "manifest_filepath": str(corpus / "train_manifest.json"),
        "noise_manifest": str(corpus / "noise_manifest.json"),
        "sample_rate": 16000,
        "batch_size": 2,
        "shuffle": True,
        "num_workers": 1,
    }
    return OmegaConf.create({**section, **options})


def first_entries(manifest, count):
    """Return the first entries of a manifest, with absolute paths."""
    entries = [json.loads(line) for line in manifest.read_text().splitlines()[:count]]
    return [{**entry, "audio_filepath": str(manifest.parent / entry["audio_filepath"])} for entry in entries]


def write_manifest(entries, path):
    """Write entries as a manifest."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
