# SPDX-License-Identifier: Apache-2.0
"""The pages' links lead to files, their Python runs, and what they name exists."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tiny_nest import POSITIONS, PRESETS, noise_batch, tiny_config, tiny_model

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel
from nemo_streaming_ssl.report import patched_modules
from nemo_streaming_ssl.versions import supported_range

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *(ROOT / 'docs').glob('*.md')])
MADE_BY_THE_SITE = ('tutorial.ipynb', 'api/')


def snippets(page, language):
    return re.findall(rf'```{language}\n(.*?)```', (ROOT / page).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize('page', PAGES, ids=[page.stem for page in PAGES])
def test_links_lead_to_files_and_configs_are_yaml(page):
    links = re.findall(r'\]\(((?!http)[^)#\s]+)', page.read_text())
    links = [link for link in links if not link.startswith(MADE_BY_THE_SITE)]
    assert not [link for link in links if not (page.parent / link).exists()]
    for snippet in snippets(page, 'yaml'):
        OmegaConf.create(snippet)


def test_the_code_of_the_readme_runs(monkeypatch):
    model = EncDecDenoiseMaskedTokenPredModel(tiny_config('model.encoder.n_layers=3').model)
    monkeypatch.setattr(EncDecDenoiseMaskedTokenPredModel, 'restore_from', lambda path: model)
    samples = torch.randn(1, 32000)
    names = {'audio': samples, 'lengths': torch.tensor([32000]), 'samples': samples}
    for snippet in snippets('README.md', 'python'):
        exec(snippet, names)
    assert names['output'].encoded.shape[2] > 0


@POSITIONS
def test_the_code_about_contexts_runs_and_leaves_the_model_as_it_was(position):
    model = tiny_model(PRESETS, *position)
    names = {
        'model': model,
        'audio': noise_batch().audio,
        'lengths': noise_batch().audio_len,
        'dataset': [noise_batch(seed=seed) for seed in range(4)],
        'base_collate_fn': lambda samples: samples[0],
    }
    for snippet in snippets('docs/contexts.md', 'python'):
        exec(snippet, names)
        assert model.encoder.att_context_size == [80, 0]


def test_the_modules_of_the_architecture_exist():
    names = set(re.findall(r'`(nemo(?:\.[a-z_]+)+)`', (ROOT / 'docs/architecture.md').read_text()))
    assert names and not [name for name in names if importlib.util.find_spec(name) is None]


def test_the_table_of_patches_has_every_patched_module_and_no_other():
    rows = re.findall(r'^\| `([\w.]+)` \|', (ROOT / 'docs/patches.md').read_text(), flags=re.MULTILINE)
    named = {name if name.startswith('nemo.') else f'nemo.collections.asr.{name}' for name in rows}
    assert named == {module.name for module in patched_modules() if module.kind == 'patched'}


@pytest.mark.parametrize('page', ['README.md', 'docs/index.md'])
def test_the_range_of_nemo_is_that_of_the_metadata(page):
    (first, last) = re.search(r'`nemo_toolkit` ([\d.]+) to ([\d.]+)x', (ROOT / page).read_text()).groups()
    begin, beyond = supported_range()
    assert first == begin and tuple(map(int, last.strip('.').split('.'))) < tuple(map(int, beyond.split('.')))
