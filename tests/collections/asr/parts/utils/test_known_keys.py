# SPDX-License-Identifier: Apache-2.0
"""That each section of a config is checked is tested with those who read it, mostly in ``test_pretraining_checks.py``."""

import pytest

from nemo.collections.asr.parts.utils.known_keys import RESUMABLE_KEYS, check_known, check_spelling, nearest_key


def test_a_section_that_takes_nothing_else_names_the_slip_or_all_that_it_takes():
    check_known('model.train_ds.resumable', ['seed'], RESUMABLE_KEYS)
    with pytest.raises(ValueError, match='^a.b.sed is not known; did you mean a.b.seed\\?$'):
        check_known('a.b', ['seed', 'sed'], ['seed', 'batch_size'])
    with pytest.raises(ValueError, match='^a.b.colour is not known; a.b takes batch_size, seed$'):
        check_known('a.b', ['colour'], ['seed', 'batch_size'])


def test_a_section_that_may_have_other_keys_refuses_slips_only():
    check_spelling('model', ['colour', 'seed'], ['seed'], likeness=0.8)
    with pytest.raises(ValueError, match='^model.seeds is not known; did you mean model.seed\\?$'):
        check_spelling('model', ['seeds'], ['seed'], likeness=0.8)
    with pytest.raises(ValueError, match='^seeds is not known; did you mean seed\\?$'):
        check_spelling('', ['seeds'], ['seed'], likeness=0.8)


def test_the_nearest_key():
    assert nearest_key('batchsize', ['batch_size', 'seed'], likeness=0.6) == 'batch_size'
    assert nearest_key('colour', ['batch_size', 'seed'], likeness=0.6) is None
