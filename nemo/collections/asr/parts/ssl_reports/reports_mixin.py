# SPDX-License-Identifier: Apache-2.0
"""The hooks of a model's validation, its test and the end of its training."""

import torch

from nemo.collections.asr.parts.ssl_reports.validation_probe import ValidationProbe


class ReportsMixin:
    """Mixin for a model with ``reports``, before NeMo's class: reduces, logs and draws what they gathered."""

    _validation_losses = ()  # of the manifests of one validation

    def configure_callbacks(self) -> list:
        """Add the probe of ``model.probe``, if the config has one."""
        probe = self.cfg.get('probe')
        return [*super().configure_callbacks(), *([ValidationProbe(**probe)] if probe else [])]

    def on_train_end(self) -> None:
        """Check the use of the codebook once more."""
        super().on_train_end()
        self.reports.end_of_training()

    def on_validation_epoch_start(self) -> None:
        """Start the validation in contexts."""
        super().on_validation_epoch_start()
        self._start(self.trainer.num_val_batches)

    def on_test_epoch_start(self) -> None:
        """Start the test in contexts."""
        super().on_test_epoch_start()
        self._start(self.trainer.num_test_batches)

    def on_validation_epoch_end(self, *args, **kwargs):
        """Reduce the results over the ranks, log them as NeMo does, and draw."""
        self._finish('val')
        self._validation_losses = ()
        logged = super().on_validation_epoch_end(*args, **kwargs)
        if len(self._validation_losses) > 1:  # NeMo's val_loss is that of the first manifest
            self.log('val_loss_mean', torch.stack(self._validation_losses).mean(), sync_dist=True)
        if self.reports.figures is not None:
            self.reports.figures.log(self)
        return logged

    def on_test_epoch_end(self, *args, **kwargs):
        """Reduce the results over the ranks, and log them as NeMo does."""
        self._finish('test')
        return super().on_test_epoch_end(*args, **kwargs)

    def test_step(self, batch, batch_idx=0, dataloader_idx=0):
        """Compute a test batch's metrics; stock files them under validation, where no test looks for them."""
        metrics = self.inference_pass(batch, batch_idx, dataloader_idx, mode='test', apply_mask=True)
        outputs = self.test_step_outputs
        if isinstance(self.trainer.test_dataloaders, list) and len(self.trainer.test_dataloaders) > 1:
            outputs = outputs[dataloader_idx]
        outputs.append(metrics)
        return metrics

    def multi_validation_epoch_end(self, outputs: list, dataloader_idx: int = 0):
        """Return the results in contexts, else NeMo's ``val_loss`` and the means of the other metrics."""
        if self.reports.validation is not None:
            metrics = self.reports.validation.summary('val', dataloader_idx)
        else:
            metrics = _with_means(super().multi_validation_epoch_end(outputs, dataloader_idx), outputs)
        if metrics:
            self._validation_losses = [*self._validation_losses, torch.as_tensor(metrics['val_loss'])]
        return metrics

    def multi_test_epoch_end(self, outputs: list, dataloader_idx: int = 0):
        """Return the results in contexts, else NeMo's ``test_loss`` and the means of the other metrics."""
        if self.reports.validation is not None:
            return self.reports.validation.summary('test', dataloader_idx)
        return _with_means(super().multi_test_epoch_end(outputs, dataloader_idx), outputs)

    def _start(self, batches: list) -> None:
        if self.reports.validation is not None:
            self.reports.validation.start(self, len(batches))

    def _finish(self, mode: str) -> None:
        if self.reports.validation is not None:
            self.reports.validation.finish(mode)


def _with_means(averaged: dict | None, outputs: list) -> dict | None:
    """Add to NeMo's averages and their ``log`` the mean of every other metric."""
    if averaged:
        for name in outputs[0].keys() - averaged.keys():
            mean = torch.stack([torch.as_tensor(output[name], dtype=torch.float32) for output in outputs]).mean()
            averaged[name] = averaged['log'][name] = mean
    return averaged
