# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``ema.py``: a run with ``exp_manager.ema`` can be resumed.

NeMo 3.0.0 reads the averages with ``torch.load``, which refuses the config beside them. All versions restore them as
parameters that require gradients, and fail when they are next saved.
"""

from unittest import mock

import torch

from nemo.utils import torch_files
from nemo_streaming_ssl import upstream

_up = upstream(globals())


class EMA(_up.EMA):
    """NeMo's exponential moving average of the weights."""

    def on_load_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        """Load the averages, which are beside the checkpoint."""
        with mock.patch.object(torch, 'load', lambda path, **_: torch_files.load(path)):
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
        for state in checkpoint['optimizer_states']:
            if isinstance(state, dict) and 'ema' in state:
                state['ema'] = [average.detach() for average in state['ema']]
