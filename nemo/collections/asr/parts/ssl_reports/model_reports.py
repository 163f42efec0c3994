# SPDX-License-Identifier: Apache-2.0
"""Reports on a model of masked token prediction, and its validation hooks; see docs/reports.md."""

import itertools

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger

from nemo.collections.asr.parts.att_context.receptive_field import look_ahead_ms
from nemo.collections.asr.parts.att_context.windows import STYLES, tightest_window_of
from nemo.collections.asr.parts.objectives.base import BatchRecord
from nemo.collections.asr.parts.ssl_reports.audit import MaskAudit, audit_pass
from nemo.collections.asr.parts.ssl_reports.codebook_use import CodebookUse, statistics_of
from nemo.collections.asr.parts.ssl_reports.figures import attention_frame_ms, attention_windows, masked_spectrogram
from nemo.collections.asr.parts.ssl_reports.probe import ValidationProbe
from nemo.collections.asr.parts.ssl_reports.validation import ContextValidation
from nemo.collections.asr.parts.utils.config_keys import Model

Logs = dict[str, float | torch.Tensor]


class ModelReports:
    """A model's audit, codebook use, validation in contexts and pictures, as its config enables them."""

    def __init__(self, model):
        options, quantizer = Model.parse(model.cfg), model.quantizer
        classes = getattr(quantizer, 'num_classes', None)
        self.codebook_use = CodebookUse(classes, getattr(quantizer, 'num_books', 1)) if classes else None
        self.audit_every_n_batches, self.log_figures = options.audit_every_n_batches, options.log_figures
        self.validation = None if options.validate_contexts is None else ContextValidation(model)
        self._batches, self._drawn_at = 0, -1
        self._empty_batches: float | torch.Tensor = 0.0

    def of_training_batch(self, model, record: BatchRecord | None) -> Logs:
        """Return what to log of a training batch, within its pinned context; scalars on its device.

        The record is None if a custom forward makes none.
        """
        if record is None:
            return {}
        if self.codebook_use is not None:
            self.codebook_use.update(record.tokens, record.token_lengths)
        audits = self.audit_every_n_batches is not None and self._batches % self.audit_every_n_batches == 0
        self._batches += 1
        audit = audit_pass(record, model.encoder, layers=audits) if model.objectives.masks else None
        logs = self._of_context(model, audit)
        if audit is not None and self.audit_every_n_batches is not None:
            self._empty_batches = self._empty_batches + (audit.frames_masked == 0)
            logs['audit/empty_batches'] = self._empty_batches
            if audits:
                logs.update(self._of_audit(model, audit))
        return logs

    def of_pass(self, model, record: BatchRecord | None, prefix: str = '') -> Logs:
        """Return the present context, the masked share, and the share without a visible frame; scalars."""
        if record is None:
            return {}
        logs = self._of_context(model, audit_pass(record, model.encoder) if model.objectives.masks else None)
        return {f'{prefix}{name}': value for name, value in logs.items()}

    def _of_context(self, model, audit: MaskAudit | None) -> Logs:
        logs: Logs = {}
        if tightest_window_of(model.encoder) is not None:
            logs['att_context_left'], logs['att_context_right'] = map(float, model.encoder.att_context_size)
        if (offset := model.objectives.offset()) is not None:
            logs['next_token_offset'] = float(offset)
        if audit is not None:
            logs['masked_share'] = audit.masked_share()
            shares = audit.no_visible_frame_share()
            for name in shares.keys() & {'window', 'stack'}:
                logs[f'masking/no_visible_frame_in_{name}'] = shares[name]
        return logs

    def _of_audit(self, model, audit: MaskAudit) -> Logs:
        logs: Logs = {'masked_share': audit.masked_share(), 'run_frames/mean': audit.mean_run()}
        logs.update({'run_frames/p90': audit.run_quantile(0.9), 'run_frames/longest': audit.run_quantile(1.0)})
        shares = audit.no_visible_frame_share()
        logs.update({f'no_visible_frame/{name}': share for name, share in shares.items() if name != 'window'})
        if 'stack' in shares:
            milliseconds = look_ahead_ms(model.encoder, None, attention_frame_ms(model))
            logs['look_ahead_ms'] = -1.0 if milliseconds is None else milliseconds
        return {f'audit/{name}': value for name, value in logs.items()}

    def draw(self, model, record: BatchRecord | None) -> None:
        """Put pictures of a validation's first utterance, in the context of the pass, into TensorBoard."""
        trainer = model._trainer
        if not self.log_figures or record is None or trainer is None or not trainer.validating:
            return
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        step, drawn = trainer.global_step, {}
        if not loggers or not trainer.is_global_zero or step == self._drawn_at:
            return
        self._drawn_at = step
        if model.objectives.masks:
            drawn['masked_spectrogram'] = masked_spectrogram(model, record, f'first validation utterance, step {step}')
        if getattr(model.encoder, 'att_context_style', None) in STYLES:
            drawn['attention_windows'] = attention_windows(model, int(record.encoded_lengths[0]))
        for logger, (name, figure) in itertools.product(loggers, drawn.items()):
            logger.experiment.add_figure(f'contexts/{name}', figure, global_step=step, close=False)


class ReportsMixin(LightningModule):
    """Mixin for a model with ``reports``, before NeMo's class: reduces, logs and draws what they gathered."""

    _validation_losses: tuple[torch.Tensor, ...] = ()  # of the manifests of one validation; their names may be alike

    def configure_callbacks(self) -> list:
        """Add the probe of ``model.probe``, if the config has one; a test needs none of its data."""
        probe = None if self._trainer is not None and self._trainer.testing else self.cfg.get('probe')
        return [*super().configure_callbacks(), *([ValidationProbe(probe)] if probe else [])]

    def _add_whole_interval(self, numbers) -> None:
        super()._add_whole_interval(numbers)
        use = self.reports.codebook_use
        if use is not None and (counts := use.counts) is not None:
            numbers.add('codebook', counts)

    def _derived(self, logs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        counts, derived = logs.pop('codebook', None), super()._derived(logs)
        if counts is not None:
            found = statistics_of(counts).items()
            derived.update({f'codebook/{name}': value.float() for name, value in found if name != 'frames'})
        return derived

    def on_train_end(self) -> None:
        """Check the targets once more: a short run may never have completed a block of batches."""
        super().on_train_end()
        if self.reports.codebook_use is not None:
            self.reports.codebook_use.check()

    def on_validation_epoch_end(self, *args, **kwargs):
        """Reduce the results over the ranks, and log them as NeMo does."""
        if self.reports.validation is not None:
            self.reports.validation.finish(self, 'val')
        self._validation_losses = ()
        logged = super().on_validation_epoch_end(*args, **kwargs)
        if len(self._validation_losses) > 1:  # NeMo's val_loss is that of the first manifest
            mean = torch.stack(self._validation_losses).mean()
            self.log('val_loss_mean', mean.to(self.device), sync_dist=True)
        return logged

    def on_test_epoch_end(self, *args, **kwargs):
        """Reduce the results over the ranks, and log them as NeMo does."""
        if self.reports.validation is not None:
            self.reports.validation.finish(self, 'test')
        return super().on_test_epoch_end(*args, **kwargs)

    def test_step(self, batch, batch_idx=0, dataloader_idx=0):
        """Compute a test batch's metrics; stock files them under validation, where no test looks for them."""
        metrics = self.inference_pass(batch, batch_idx, dataloader_idx, mode='test', apply_mask=True)
        several = isinstance(self.trainer.test_dataloaders, list) and len(self.trainer.test_dataloaders) > 1
        (self.test_step_outputs[dataloader_idx] if several else self.test_step_outputs).append(metrics)
        return metrics

    def multi_validation_epoch_end(self, outputs: list, dataloader_idx: int = 0):
        """Return the results in contexts, else NeMo's ``val_loss`` and the means of the other metrics."""
        metrics = self._summary('val', super().multi_validation_epoch_end, outputs, dataloader_idx)
        self._validation_losses += (metrics['val_loss'],) if metrics else ()
        return metrics

    def multi_test_epoch_end(self, outputs: list, dataloader_idx: int = 0):
        """Return the results in contexts, else NeMo's ``test_loss`` and the means of the other metrics."""
        return self._summary('test', super().multi_test_epoch_end, outputs, dataloader_idx)

    def _summary(self, mode: str, of_nemo, outputs: list, dataloader_idx: int) -> dict | None:
        if self.reports.validation is not None:
            return self.reports.validation.summary(mode, dataloader_idx)
        averaged = of_nemo(outputs, dataloader_idx)
        for name in outputs[0].keys() - averaged.keys() if averaged else ():
            mean = torch.stack([torch.as_tensor(output[name], dtype=torch.float32) for output in outputs]).mean()
            averaged[name] = averaged['log'][name] = mean
        return averaged
