# SPDX-License-Identifier: Apache-2.0
"""What is reported of a model of masked token prediction, and the hooks of its validation; see docs/reports.md."""

import torch

from nemo.collections.asr.parts.att_context.visible_frames import no_visible_frame_shares
from nemo.collections.asr.parts.att_context.windows import tightest_window_of
from nemo.collections.asr.parts.objectives.base import BatchRecord
from nemo.collections.asr.parts.ssl_reports.audit import TrainingAudit
from nemo.collections.asr.parts.ssl_reports.codebook_use import CodebookUse
from nemo.collections.asr.parts.ssl_reports.figures import ContextFigures, attention_frame_ms, require_matplotlib
from nemo.collections.asr.parts.ssl_reports.validation import ContextValidation
from nemo.collections.asr.parts.ssl_reports.validation_probe import ValidationProbe
from nemo.collections.asr.parts.utils.config_keys import Model
from nemo.utils import logging

Logs = dict[str, torch.Tensor]


class ModelReports:
    """Audit, use of the codebook, validation in contexts, and pictures of one model, as its config enables them.

    Raises:
        ValueError: naming the config key, its value and what is allowed.
    """

    def __init__(self, model):
        options = Model.parse(model.cfg)
        classes = getattr(model.quantizer, 'num_classes', None)
        self.codebook_use = CodebookUse(classes, getattr(model.quantizer, 'num_books', 1)) if classes else None
        self.audit = TrainingAudit(options.audit_every_n_batches) if options.audit_every_n_batches else None
        self.figures = ContextFigures() if options.log_figures else None
        self.validation: ContextValidation | None = None
        if options.validate_contexts is not None:
            if model.forward_is_overridden:
                raise ValueError(
                    f"model.validate_contexts cannot run {type(model).__name__}, which has its own forward"
                )
            self.validation = ContextValidation(model, options.validate_contexts, model.cfg.get('validation_masks'))

    def check(self) -> None:
        """Raise a ValueError before training if pictures cannot be drawn."""
        if self.figures is not None:
            require_matplotlib('model.log_figures')

    def of_training_batch(self, model, record: BatchRecord | None) -> Logs:
        """Return what to log of a training batch, within its pinned context; scalars on its device.

        The record is None where a forward of somebody's own leaves none.
        """
        if record is None:
            return {}
        logs = self.of_pass(model, record)
        if self.codebook_use is not None:
            self.codebook_use.update(record.tokens, record.token_lengths)
            if self.codebook_use.block_is_complete:
                self._warn_if_targets_collapsed()
            logs.update(self.codebook_use.logs())
        if self.audit is not None and model.objectives.masks:
            logs.update(self.audit.step(record, model.encoder, attention_frame_ms(model)))
        return logs

    def of_pass(self, model, record: BatchRecord | None, prefix: str = '') -> Logs:
        """Return the present context, and the shares of frames that are masked, and have no visible frame; scalars."""
        if record is None:
            return {}
        encoder, logs = model.encoder, {}
        if tightest_window_of(encoder) is not None:
            logs['att_context_left'], logs['att_context_right'] = map(float, encoder.att_context_size)
        if (offset := model.objectives.offset()) is not None:
            logs['next_token_offset'] = float(offset)
        if model.objectives.masks:
            masked_frames = record.masks[:, 0].sum(dtype=torch.float32)
            logs['masked_share'] = masked_frames / record.mask_lengths.sum().clamp(min=1)
            frames = record.mask_lengths // record.factor
            shares = no_visible_frame_shares(encoder, record.masked_share(), record.threshold, frames)
            logs.update({f'masking/{name}': value for name, value in shares.items()})
        return {f'{prefix}{name}': value for name, value in logs.items()}

    def _warn_if_targets_collapsed(self) -> None:
        reason = self.codebook_use.collapse()
        if reason is not None:
            logging.warning(
                f"The targets have collapsed: {reason}. The loss will fall and nothing will be learned. Set "
                "model.target_normalize: per_feature, or normalise the features (model.preprocessor.normalize)."
            )

    def targets_were_refined(self) -> None:
        """Check the counts of the targets once more and clear them: the codes have changed."""
        self.end_of_training()
        if self.codebook_use is not None:
            self.codebook_use.forget()

    def end_of_training(self) -> None:
        """Look at the targets once more: a short run may never have completed a block of batches."""
        if self.codebook_use is not None and self.codebook_use.batches and not self.codebook_use.block_is_complete:
            self._warn_if_targets_collapsed()

    def keep_for_figures(self, model, record: BatchRecord | None) -> None:
        """Draw the first utterance of a validation, within the context of the pass."""
        if self.figures is not None and record is not None and model._trainer is not None:
            self.figures.draw(model, record)


class ReportsMixin:
    """Mixin for a model with ``reports``, before NeMo's class: reduces, logs and draws what they gathered."""

    _validation_losses = ()  # of the manifests of one validation

    def configure_callbacks(self) -> list:
        """Add the probe of ``model.probe``, if the config has one."""
        probe = self.cfg.get('probe')
        return [*super().configure_callbacks(), *([ValidationProbe(probe)] if probe else [])]

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

    def _start(self, batches: list) -> None:
        if self.reports.validation is not None:
            self.reports.validation.start(self, len(batches))

    def on_validation_epoch_end(self, *args, **kwargs):
        """Reduce the results over the ranks, and log them as NeMo does."""
        self._finish('val')
        self._validation_losses = ()
        logged = super().on_validation_epoch_end(*args, **kwargs)
        if len(self._validation_losses) > 1:  # NeMo's val_loss is that of the first manifest
            self.log('val_loss_mean', torch.stack(self._validation_losses).mean(), sync_dist=True)
        return logged

    def on_test_epoch_end(self, *args, **kwargs):
        """Reduce the results over the ranks, and log them as NeMo does."""
        self._finish('test')
        return super().on_test_epoch_end(*args, **kwargs)

    def _finish(self, mode: str) -> None:
        if self.reports.validation is not None:
            self.reports.validation.finish(mode)

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
            self._validation_losses = [*self._validation_losses, torch.as_tensor(metrics['val_loss'])]
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
