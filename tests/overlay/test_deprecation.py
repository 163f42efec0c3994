# SPDX-License-Identifier: Apache-2.0
import pytest

from nemo_streaming_ssl.deprecation import renamed


def test_an_old_name_works_and_warns_with_the_new_one():
    def new_name(value, scale=1):
        return value * scale

    with pytest.warns(FutureWarning, match=r'old_name is now .*new_name'):
        assert renamed('old_name', new_name)(3, scale=2) == 6
