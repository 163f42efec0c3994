# SPDX-License-Identifier: Apache-2.0
"""Reports on a model of masked token prediction, and its validation hooks; see docs/reports.md."""

import torch
from lightning.pytorch import LightningModule

from nemo.collections.asr.parts.att_context.receptive_field import look_ahead_ms
from nemo.collections.asr.parts.att_context.windows import tightest_window_of
from nemo.collections.asr.parts.objectives.base import BatchRecord
from nemo.collections.asr.parts.ssl_reports.audit import STACK, WINDOW, MaskAudit, audit_pass
from nemo.collections.asr.parts.ssl_reports.codebook_use import CodebookUse, statistics_of
from nemo.collections.asr.parts.ssl_reports.figures import attention_frame_ms, draw_contexts
from nemo.collections.asr.parts.ssl_reports.validation import ContextValidation
from nemo.collections.asr.parts.ssl_reports.validation_probe import ValidationProbe
from nemo.collections.asr.parts.utils.config_keys import Model
from nemo.utils import logging

Logs = dict[str, float | torch.Tensor]


class ModelReports:
    """A model's audit, codebook use, validation in contexts and pictures, as its config enables them.

    Raises:
        ValueError: naming the config key, its value and what is allowed.
    """

    def __init__(self, model):
        options = Model.parse(model.cfg)
        classes = getattr(model.quantizer, 'num_classes', None)
        self.codebook_use = CodebookUse(classes, getattr(model.quantizer, 'num_books', 1)) if classes else None
        self.audit_every_n_batches, self.log_figures = options.audit_every_n_batches, options.log_figures
        self._batches, self._drawn_at = 0, -1
        self._empty_batches: float | torch.Tensor = 0.0
        self.validation: ContextValidation | None = None
        if options.validate_contexts is not None:
            if model.forward_is_overridden:
                raise ValueError(
                    f"model.validate_contexts cannot run {type(model).__name__}, which has its own forward"
                )
            self.validation = ContextValidation(model, options.validate_contexts, model.cfg.get('validation_masks'))

    def of_training_batch(self, model, record: BatchRecord | None) -> Logs:
        """Return what to log of a training batch, within its pinned context; scalars on its device.

        The record is None if a custom forward makes none.
        """
        if record is None:
            return {}
        if self.codebook_use is not None:
            self.codebook_use.update(record.tokens, record.token_lengths)
            if self.codebook_use.block_is_complete:
                _warn_if_collapsed(self.codebook_use)
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
            for name in shares.keys() & {WINDOW, STACK}:
                logs[f'masking/no_visible_frame_in_{name}'] = shares[name]
        return logs

    def _of_audit(self, model, audit: MaskAudit) -> Logs:
        runs = {'mean': audit.mean_run(), 'p90': audit.run_quantile(0.9), 'longest': audit.run_quantile(1.0)}
        logs: Logs = {'masked_share': audit.masked_share()}
        logs.update({f'run_frames/{name}': frames for name, frames in runs.items()})
        shares = audit.no_visible_frame_share()
        logs.update({f'no_visible_frame/{name}': share for name, share in shares.items() if name != WINDOW})
        if STACK in shares:
            milliseconds = look_ahead_ms(model.encoder, None, attention_frame_ms(model))
            logs['look_ahead_ms'] = -1.0 if milliseconds is None else milliseconds
        return {f'audit/{name}': value for name, value in logs.items()}

    def end_of_training(self) -> None:
        """Look at the targets once more: a short run may never have completed a block of batches."""
        if self.codebook_use is not None and not self.codebook_use.block_is_complete:
            _warn_if_collapsed(self.codebook_use)

    def keep_for_figures(self, model, record: BatchRecord | None) -> None:
        """Draw the first utterance of a validation, within the context of the pass."""
        trainer = model._trainer
        if not self.log_figures or record is None or trainer is None or trainer.sanity_checking or trainer.testing:
            return
        if self._drawn_at != trainer.global_step:
            self._drawn_at = trainer.global_step
            draw_contexts(model, record)


def _warn_if_collapsed(use: CodebookUse) -> None:
    reason = use.collapse()
    if reason is not None:
        logging.warning(
            f"The targets have collapsed: {reason}. The loss will fall and nothing will be learned. Set "
            "model.target_normalize: per_feature, or normalise the features (model.preprocessor.normalize)."
        )


class ReportsMixin(LightningModule):
    """Mixin for a model with ``reports``, before NeMo's class: reduces, logs and draws what they gathered."""

    _validation_losses: tuple[torch.Tensor, ...] = ()  # of the manifests of one validation

    def configure_callbacks(self) -> list:
        """Add the probe of ``model.probe``, if the config has one."""
        probe = self.cfg.get('probe')
        return [*super().configure_callbacks(), *([ValidationProbe(probe)] if probe else [])]

    def _add_whole_interval(self, numbers) -> None:
        super()._add_whole_interval(numbers)
        use = self.reports.codebook_use
        counts = None if use is None else use.counts
        if counts is not None:
            numbers.add('codebook', counts)

    def _derived(self, logs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        counts, derived = logs.pop('codebook', None), super()._derived(logs)
        if counts is not None:
            found = statistics_of(counts).items()
            derived.update({f'codebook/{name}': value.float() for name, value in found if name != 'frames'})
        return derived

    def on_train_end(self) -> None:
        """Check the use of the codebook once more."""
        super().on_train_end()
        self.reports.end_of_training()

    def on_validation_epoch_end(self, *args, **kwargs):
        """Reduce the results over the ranks, and log them as NeMo does."""
        if self.reports.validation is not None:
            self.reports.validation.finish(self, 'val')
        self._validation_losses = ()
        logged = super().on_validation_epoch_end(*args, **kwargs)
        if len(self._validation_losses) > 1:  # NeMo's val_loss is that of the first manifest
            self.log('val_loss_mean', torch.stack(self._validation_losses).mean(), sync_dist=True)
        return logged

    def on_test_epoch_end(self, *args, **kwargs):
        """Reduce the results over the ranks, and log them as NeMo does."""
        if self.reports.validation is not None:
            self.reports.validation.finish(self, 'test')
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
        metrics = self._summary('val', super().multi_validation_epoch_end, outputs, dataloader_idx)
        if metrics:
            self._validation_losses += (torch.as_tensor(metrics['val_loss'], device=self.device),)
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
