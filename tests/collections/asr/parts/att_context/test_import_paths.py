# SPDX-License-Identifier: Apache-2.0
"""Everything that people import from the paths of version 0.1, and from NeMo's, is there."""

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo.collections.asr.parts import att_context

ROOT = Path(__file__).resolve().parents[5]
ASR = 'nemo.collections.asr'
LATER = f'{ASR}.inference'  # a package that only later NeMo has; 2.5.3 has not
# What scripts can have imported: in version 0.1 these were the public names of the paths that its pages told of.
PATHS = {
    f'{ASR}.parts.att_context': [
        'AttContext',
        'AttContextCurriculum',
        'ContextSchedule',
        'DynamicContextModel',
        'EnhancedDynamicContextModel',
        'LayerAttentionMasks',
        'PRESETS',
        'ReceptiveField',
        'StreamingOutput',
        'StreamingSession',
        'UNLIMITED',
        'context_table',
        'create_synced_context_collate',
        'draw_index',
        'intersect_in_style',
        'parse_layer_contexts',
        'receptive_field',
        'set_dynamic_context',
        'sync_masking_to_attention',
        'tightest',
    ],
    f'{ASR}.parts.att_context.audit': [
        'LAYERS',
        'STACK',
        'MaskAudit',
        'TrainingAudit',
        'Window',
        'audit_masking',
        'audit_masks',
        'layer_windows_of',
        'windows_of',
    ],
    f'{ASR}.parts.att_context.context': [
        'AttContext',
        'PRESETS',
        'UNLIMITED',
        'context_label',
        'draw_index',
        'tightest',
    ],
    f'{ASR}.parts.att_context.curriculum': ['AttContextCurriculum'],
    f'{ASR}.parts.att_context.streaming': ['StreamingOutput', 'StreamingSession'],
    f'{ASR}.parts.att_context.synced_collate': [
        'ContextDraw',
        'SyncedBatch',
        'SyncedContextCollate',
        'create_synced_context_collate',
    ],
    f'{ASR}.losses': ['ContrastiveLoss', 'MLMLoss', 'MultiMLMLoss'],
    f'{ASR}.models': [
        'EncDecDenoiseMaskedTokenPredModel',
        'EncDecMaskedTokenPredModel',
        'SpeechEncDecSelfSupervisedModel',
    ],
    f'{ASR}.modules': ['ConformerEncoder', 'MultiSoftmaxDecoder', 'RandomBlockMasking'],
}
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]


def imports_of(text):
    """Module and name of each ``from nemo... import ...`` in a text."""
    lines = re.findall(r'^\s*from (nemo[\w.]*) import ([\w, ]+)', text, flags=re.MULTILINE)
    return [(module, name.strip()) for module, names in lines for name in names.split(',')]


@pytest.mark.parametrize('path, name', [(path, name) for path, names in PATHS.items() for name in names])
def test_an_import_path_holds(path, name):
    assert hasattr(importlib.import_module(path), name)


def test_the_package_says_what_people_import_from_it():
    assert set(PATHS[f'{ASR}.parts.att_context']) <= set(att_context.__all__)
    assert all(getattr(att_context, name) is not None for name in att_context.__all__)


def test_the_old_paths_pass_on_what_is_in_the_new_ones():
    for old, new in (('att_context.streaming', 'streaming.session'), ('att_context.audit', 'ssl_reports.audit')):
        old, new = f'{ASR}.parts.{old}', f'{ASR}.parts.{new}'
        names = PATHS[old]
        passed_on, defined = importlib.import_module(old), importlib.import_module(new)
        assert all(getattr(passed_on, name) is getattr(defined, name) for name in names)


def test_what_the_pages_import_is_there():
    found = {pair for page in PAGES for pair in imports_of(page.read_text())}
    assert len(found) > 5
    there = [pair for pair in found if importlib.util.find_spec(LATER) or not pair[0].startswith(f'{LATER}.')]
    missing = [pair for pair in there if not hasattr(importlib.import_module(pair[0]), pair[1])]
    assert not missing


@pytest.mark.integration
def test_a_path_can_be_the_first_import_of_a_process():
    """No room needs another one to be imported before it.

    One process shows it for all paths: whichever comes first, Python imports ``nemo.collections.asr`` before it, and
    with it the whole collection.
    """
    paths = [f'{ASR}.parts.{path}' for path in ('att_context', 'att_context.streaming', 'streaming.session')]
    code = '; '.join([*(f'from {path} import *' for path in paths), 'assert StreamingSession and StreamingOutput'])
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
