# SPDX-License-Identifier: Apache-2.0
"""The tested range, and the one warning outside it."""

import pytest

from nemo_streaming_ssl import versions


@pytest.mark.parametrize(
    "version", ["2.5.3", "2.5.3.post1", "2.6.0rc1", "2.10", "3.0.0rc1", "3.0", "3.0.7+cu12", "v3.0.0"]
)
def test_inside_the_tested_range(version):
    assert versions.in_tested_range(version)


@pytest.mark.parametrize(
    "version", ["2.5.2", "2.5.3rc0", "2.5.3.dev1", "2.5", "3.1", "3.1.0rc1", "3.1.dev0", "10.0", "main", ""]
)
def test_outside_the_tested_range(version):
    assert not versions.in_tested_range(version)


def test_untested_version_warns_once_on_the_first_patched_import(stand_in):
    stand_in.add_nemo({"__init__.py": "__version__ = '9.8.7'\n", "plain.py": "", "tools/__init__.py": ""})
    stand_in.python("""
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            import nemo.plain, nemo.tools.nail
            assert caught == []
            import nemo.tools.saw
            assert len(caught) == 1
            import nemo.tools.plane
        assert len(caught) == 1 and 'found 9.8.7' in str(caught[0].message), caught
        assert 'NEMO_STREAMING_SSL=0' in str(caught[0].message)
        """)
