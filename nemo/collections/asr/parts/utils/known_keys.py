# SPDX-License-Identifier: Apache-2.0
"""The config keys that only this project knows, and the one check for keys that nobody knows. New in this project."""

import difflib
from collections.abc import Iterable

from nemo.collections.asr.parts.utils.config_keys import keys_below, page_of

# Sections of the model's config, and those of them that a model may do without.
SECTIONS = ('train_ds', 'preprocessor', 'masking', 'quantizer', 'encoder', 'decoder', 'loss')
OPTIONAL_SECTIONS = ('validation_ds', 'test_ds', 'spec_augment', 'optim')
DATA_SECTIONS = ('train_ds', 'validation_ds', 'test_ds')

REPORT_KEYS = ('validate_contexts', 'validation_masks', 'audit_every_n_batches', 'log_figures')
MODEL_KEYS = (
    'objective',
    'next_token',
    'probe',
    'target_normalize',
    'mask_position',
    'num_classes',
    'num_books',
    'code_dim',
    'squeeze_single',
    'skip_nan_grad',
    *REPORT_KEYS,
)
LOADER_KEYS = ('synced_contexts', 'skip_bad_audio', 'resumable')  # which NeMo's data loaders do not know
DATA_KEYS = (
    'manifest_filepath',
    'noise_manifest',
    'batch_size',
    'num_workers',
    'min_duration',
    'max_duration',
    'shuffle',
    *LOADER_KEYS,
)
TOP_LEVEL_KEYS = (
    'name',
    'seed',
    'model',
    'trainer',
    'exp_manager',
    'curriculum',
    'init_from_nemo_model',
    'init_from_pretrained_model',
    'init_from_ptl_ckpt',
)
OBJECTIVES = ('masked', 'next_token', 'both')
# Sections that only this project has; in a data section the first two are model.train_ds.synced_contexts and so on.
SYNCED_CONTEXT_KEYS = keys_below('model.train_ds.synced_contexts')
RESUMABLE_KEYS = keys_below('model.train_ds.resumable')
NEXT_TOKEN_KEYS = keys_below('model.next_token')
VALIDATION_MASK_KEYS = keys_below('model.validation_masks')
PROBE_KEYS = keys_below('model.probe')
SCHEDULE_KEYS = keys_below('model.encoder.layer_att_context_size')
REFINE_KEYS = keys_below('model.quantizer.refine')
ATT_CONTEXT_SAMPLER_KEYS = keys_below('model.encoder.att_context_sampler')


def check_known(section: str, keys: Iterable[str], known: Iterable[str]) -> None:
    """Check that a section of a config has only keys that are known.

    Args:
        section: its full name, such as ``model.train_ds.resumable``.
        keys: those that it has.
        known: those that it may have.

    Raises:
        ValueError: naming the first unknown key, and the nearest known one or, if none is near, all of them.
    """
    known = sorted(known)
    for key in keys:
        if key not in known:
            nearest = nearest_key(key, known, likeness=0.6)
            hint = f"did you mean {section}.{nearest}?" if nearest else f"{section} takes {', '.join(known)}"
            raise ValueError(f"{section}.{key} is not known; {hint}{where_to_read(f'{section}.')}")


def check_spelling(section: str, keys: Iterable[str], known: Iterable[str], likeness: float) -> None:
    """Check a section that may have other keys, too: none may look like a slip in one that is known.

    Args:
        section: its full name; '' at the top level.
        keys: those that it has.
        known: those that are known.
        likeness: from 0 to 1; a key that is more like a known one than this counts as a slip.

    Raises:
        ValueError: naming the first such key, and the nearest known one.
    """
    known = sorted(known)
    prefix = f'{section}.' if section else ''
    for key in keys:
        nearest = None if key in known else nearest_key(key, known, likeness)
        if nearest:
            meant = f'{prefix}{nearest}'
            raise ValueError(f"{prefix}{key} is not known; did you mean {meant}?{where_to_read(meant)}")


def where_to_read(text: str) -> str:
    """Return where the first key of this project that a text names is explained, to stand behind an error; or ''."""
    page = page_of(text)
    if page is None:
        return ''
    name, _, heading = page.partition('#')
    return f"\nSee docs/{name}.md{heading and f'#{heading}'} (python -m nemo_streaming_ssl docs {name})"


def nearest_key(key, known: Iterable[str], likeness: float) -> str | None:
    """Return the known key that is most like this one, None if none is like it enough (from 0 to 1)."""
    found = difflib.get_close_matches(str(key), list(known), n=1, cutoff=likeness)
    return found[0] if found else None
