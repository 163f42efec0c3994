# SPDX-License-Identifier: Apache-2.0
"""An unmodified NeMo script, which imports from NeMo's packages, gets the patched classes."""

import importlib
import inspect

import pytest

from nemo_streaming_ssl import patch_tree

PUBLIC = [
    ('nemo.collections.asr.losses', 'MLMLoss'),
    ('nemo.collections.asr.losses', 'MultiMLMLoss'),
    ('nemo.collections.asr.models', 'EncDecDenoiseMaskedTokenPredModel'),
    ('nemo.collections.asr.models', 'EncDecMaskedTokenPredModel'),
    ('nemo.collections.asr.modules', 'ConformerEncoder'),
    ('nemo.collections.asr.modules', 'ConformerEncoderAdapter'),
    ('nemo.collections.asr.modules', 'RandomBlockMasking'),
    ('nemo.collections.asr.modules.ssl_modules', 'ConvFeatureMaksingWrapper'),
    ('nemo.collections.asr.modules', 'MultiSoftmaxDecoder'),
    ('nemo.collections.asr.modules', 'RandomProjectionVectorQuantizer'),
    ('nemo.collections.asr.modules.ssl_modules', 'RandomBlockMasking'),
]


@pytest.mark.parametrize('package, name', PUBLIC)
def test_a_public_name_is_the_patched_class(package, name):
    cls = getattr(importlib.import_module(package), name, None)
    if cls is None:
        pytest.skip(f'this NeMo has no {package}.{name}')
    functions = [value for base in cls.__mro__ for value in vars(base).values() if inspect.isfunction(value)]
    assert any(function.__code__.co_filename.startswith(f'{patch_tree()}/nemo/') for function in functions)
