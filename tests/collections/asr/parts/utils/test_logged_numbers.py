# SPDX-License-Identifier: Apache-2.0
import torch

from nemo.collections.asr.parts.utils.logged_numbers import cpu_scalars


def test_numbers_become_tensors_of_the_host_and_tensors_stay_as_they_are():
    loss = torch.zeros((), device='meta')
    found = cpu_scalars({'step': 3, 'rate': 0.5, 'loss': loss})
    assert found['loss'] is loss and {name: found[name].item() for name in ('step', 'rate')} == {
        'step': 3,
        'rate': 0.5,
    }
    assert all(found[name].device.type == 'cpu' and found[name].dtype == torch.float32 for name in ('step', 'rate'))


def test_a_number_keeps_its_precision_where_the_default_is_half():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert cpu_scalars({'global_step': 100001})['global_step'].item() == 100001
    finally:
        torch.set_default_dtype(before)
