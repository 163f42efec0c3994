# SPDX-License-Identifier: Apache-2.0
import errno
import os

import pytest
import torch

from nemo.utils import torch_files


def test_saves_what_torch_loads(tmp_path):
    torch_files.save({'weight': torch.arange(5)}, tmp_path / 'a.ckpt')
    assert torch.load(tmp_path / 'a.ckpt')['weight'].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_a_full_disk_is_the_error():
    with pytest.raises(OSError, match='No space left on device') as error:
        torch_files.save({'weight': torch.zeros(100_000)}, '/dev/full')
    assert error.value.errno == errno.ENOSPC
