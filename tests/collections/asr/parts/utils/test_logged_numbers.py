# SPDX-License-Identifier: Apache-2.0
import torch

from nemo.collections.asr.parts.utils.logged_numbers import cpu_scalars


def test_numbers_become_float32_tensors_of_the_host_whatever_the_default_and_tensors_stay():
    loss, before = torch.zeros((), device='meta'), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        found = cpu_scalars({'step': 100001, 'rate': 0.5, 'loss': loss})
    finally:
        torch.set_default_dtype(before)
    assert found['loss'] is loss and (found['step'].item(), found['rate'].item()) == (100001, 0.5)
    assert found['rate'].device.type == 'cpu' and found['rate'].dtype == torch.float32
