# SPDX-License-Identifier: Apache-2.0
"""Scenarios of a whole run of Lightning's trainer: what its steps ask of the host, logging included."""

from contextlib import ExitStack

import torch
from device.host_traffic import recorded, unrecorded
from device.place import Place
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny_nest import RecordingLogger, batches, fit, tiny_model

WARM_UP, STEPS = 3, 6  # the first steps make the states of the metrics and of the optimizer
WITHOUT_DROPOUT = [f'model.encoder.{kind}=0' for kind in ('dropout', 'dropout_pre_encoder', 'dropout_att')]


class FakeAccelerator(CPUAccelerator):
    """Lightning's of the CPU, for the fake device."""

    def setup_device(self, device):
        """There is nothing to set up, and the device is not a CPU."""

    @staticmethod
    def name():
        return 'fakegpu'


class WatchSteps(Callback):
    """Records the traffic of whole steps, from the end of one batch to the next; not what starts and ends a run."""

    def __init__(self, traffic):
        self._traffic, self._watching = traffic, ExitStack()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == WARM_UP - 1:
            self._watching.enter_context(recorded(self._traffic))

    def on_train_end(self, trainer, pl_module):
        self._watching.close()


def run_of_the_trainer(place: Place, *overrides: str) -> list:
    """Train for some steps under Lightning; return the logged losses and the norm of the weights."""
    with unrecorded() as traffic:
        model = tiny_model(*WITHOUT_DROPOUT, 'model.audit_every_n_batches=1', *overrides)
        settings = dict(log_every_n_steps=100, logger=RecordingLogger(), callbacks=[WatchSteps(traffic)])
        if place.device.type != 'cpu':
            settings['accelerator'] = FakeAccelerator()
            settings['strategy'] = SingleDeviceStrategy(place.device)
        if place.precision == 'autocast bfloat16':
            settings['plugins'] = [MixedPrecision('bf16-mixed', place.device.type)]
        run = fit(model, batches(STEPS), STEPS, **settings)
        weights = torch.nn.utils.parameters_to_vector(model.parameters())
        return [*run.logger.column('train_loss'), weights.norm()]  # Adam amplifies rounding in single weights


TRAINER = {
    'run of the trainer, both objectives': lambda place: run_of_the_trainer(place, '+model.objective=both'),
    'run of the trainer, bad gradients skipped': lambda place: run_of_the_trainer(place, 'model.skip_nan_grad=true'),
}
