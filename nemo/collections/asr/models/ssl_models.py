# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``ssl_models.py``: one attention context per batch, from its draw to the loss.

Shapes: B batch, D features, T feature frames, A attention frames, M mask frames (T or A, by mask position),
S target frames, C classes, H codebooks.
"""

from collections.abc import Callable
from functools import partial

import torch
from omegaconf import DictConfig, open_dict

from nemo.collections.asr.data.audio_to_text_dali import DALIOutputs
from nemo.collections.asr.data.training_data_mixin import TrainingDataMixin
from nemo.collections.asr.modules.conformer_encoder import ConformerEncoder
from nemo.collections.asr.parts.att_context.visible_frames import MASK_THRESHOLD, follows_context
from nemo.collections.asr.parts.att_context.windows import STYLES, tightest_window_of
from nemo.collections.asr.parts.mixins.att_context_mixin import AttContextMixin
from nemo.collections.asr.parts.mixins.sharded_training_mixin import ShardedTrainingMixin
from nemo.collections.asr.parts.mixins.training_numbers_mixin import TrainingNumbersMixin
from nemo.collections.asr.parts.objectives.base import BatchInputs, BatchRecord
from nemo.collections.asr.parts.objectives.combination import Objectives
from nemo.collections.asr.parts.objectives.masked_tokens import has_forward_of
from nemo.collections.asr.parts.objectives.next_tokens import check_same_heads, with_heads_of
from nemo.collections.asr.parts.objectives.targets import Targets
from nemo.collections.asr.parts.ssl_reports.model_reports import ModelReports, ReportsMixin
from nemo.collections.asr.parts.utils.logged_numbers import cpu_scalars
from nemo.collections.asr.parts.utils.nonfinite_guard import NonFiniteGuard
from nemo.core.classes.common import typecheck
from nemo.core.neural_types import NeuralType
from nemo.utils import logging
from nemo_streaming_ssl import upstream

_up = upstream(globals())


class SpeechEncDecSelfSupervisedModel(
    AttContextMixin,
    TrainingDataMixin,
    TrainingNumbersMixin,
    NonFiniteGuard,
    ShardedTrainingMixin,
    _up.SpeechEncDecSelfSupervisedModel,
):
    """NeMo's base class of SSL models, with a context that can be overridden or come with a batch.

    Besides NeMo's config it takes ``train_ds.synced_contexts``, ``train_ds.skip_bad_audio`` and ``train_ds.resumable``.
    """

    def training_step(self, batch, batch_idx=0):
        """Run NeMo's training step within one context, and log it."""
        with self._one_context(batch) as context:
            output = self._training_step(batch, batch_idx)
            if context is not None:
                label = self.encoder.att_context_policy.label(context)
                output['log'][f'train_loss/ctx_{label}'] = output['loss'].detach()
        output['loss'] = self.loss_of_valid(output['loss'])
        if 'log' in output:
            output['log'].update(self._waiting_for_data)
            output['log'] = cpu_scalars(output['log'])
            self.add_step(output['log'])
        return output

    def _training_step(self, batch, batch_idx):
        """Compute a step's loss within the pinned context; a dict as NeMo's training step returns."""
        return super().training_step(batch, batch_idx)

    def decoder_loss_step(self, spectrograms, spec_masks, encoded, encoded_len, targets=None, target_lengths=None):
        """Decode and compute the loss as NeMo does, which passes lengths to losses of a ``loss_list`` only."""
        takes_lengths = self.decoder_losses is None and 'decoder_lengths' in (self.loss.input_types or {})
        if not takes_lengths or self.loss.needs_labels or getattr(self.decoder_ssl, 'needs_labels', False):
            return super().decoder_loss_step(spectrograms, spec_masks, encoded, encoded_len, targets, target_lengths)
        given = dict(spectrograms=spectrograms, spec_masks=spec_masks, decoder_lengths=encoded_len)
        return self.loss(decoder_outputs=self.decoder_ssl(encoder_output=encoded), **given), {}


class EncDecMaskedTokenPredModel(ReportsMixin, SpeechEncDecSelfSupervisedModel, _up.EncDecMaskedTokenPredModel):
    """NeMo's masked token prediction, with attention, masking and loss on one context per batch.

    Takes NeMo's config and the keys of ``config_keys.Model``. With the objective ``next_token`` nothing is masked, and the
    decoder of masked tokens stays in the model, without being trained.
    """

    last_batch: BatchRecord | None = None  # of the last call of ``forward``, for NeMo's own step

    def __init__(self, cfg: DictConfig, trainer=None):
        _undo_earlier_post_conv_adjustment(cfg)
        super().__init__(cfg, trainer)
        if isinstance(self.encoder, ConformerEncoder):
            self.encoder._cfg = self.cfg.encoder  # contexts that layers get at run time belong into the model's config
        self._setup_masking()
        self.objective = self.cfg.get('objective', 'masked')
        self.targets = Targets(self)
        self.target_normalize = self.targets.normalize
        self.next_token_decoders = None
        self.objectives = Objectives.of(self)
        if not self.objectives.masks:  # DistributedDataParallel refuses parameters without a gradient
            self.decoder.requires_grad_(False)
            self.mask_processor.requires_grad_(False)
        self.reports = ModelReports(self)

    def _setup_masking(self) -> None:
        """Give the masking module the encoder's window and the unit of its frames; warn if it cannot use them."""
        name, encoder = type(self.mask_processor).__name__, self.encoder
        if not follows_context(self.mask_processor):
            logging.warning(f"{name} takes no attention context; its masks ignore it.")
        elif tightest_window_of(encoder) is None:
            context, style = (getattr(encoder, f'att_context_{key}', 'missing') for key in ('size', 'style'))
            logging.warning(
                f"{name} ignores the context of {type(encoder).__name__}: its att_context_size is {context}, its "
                f"att_context_style {style}; they must be the present [left, right] and one of {STYLES}."
            )
        if hasattr(self.mask_processor, 'attention_window'):
            self.mask_processor.attention_window = partial(tightest_window_of, encoder)
        if hasattr(self.mask_processor, 'subsampling_factor'):
            self.mask_processor.subsampling_factor = self.mask_frames_per_attention_frame

    @property
    def mask_frames_per_attention_frame(self) -> int:
        """Mask frames in one attention frame: 1 if masking comes after the subsampling."""
        return getattr(self.encoder, 'subsampling_factor', 1) if self.pre_encoder is None else 1

    @property
    def forward_is_overridden(self) -> bool:
        """Whether a subclass has its own ``forward``; its steps are NeMo's."""
        return not has_forward_of(self, EncDecMaskedTokenPredModel, EncDecDenoiseMaskedTokenPredModel)

    def _apply(self, fn, recurse=True):
        """Move and convert the model; what makes the targets stays float32."""
        modules = self.preprocessor, self.quantizer
        kept = {id(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}

        def convert(tensor):
            converted = fn(tensor)
            to_half = id(tensor) in kept and converted.dtype in (torch.float16, torch.bfloat16)
            return tensor.to(converted.device) if to_half else converted

        return super()._apply(convert, recurse)

    def setup(self, stage=None) -> None:
        """Keep the trainer from rounding the audio, which the targets are made of, to half precision."""
        super().setup(stage)
        if getattr(self.trainer.precision_plugin, '_desired_input_dtype', None) in (torch.float16, torch.bfloat16):
            self.trainer.precision_plugin.convert_input = lambda data: data

    def on_fit_start(self) -> None:
        """Refuse, before any work is lost, what cannot be trained."""
        for part in (self.targets, *self.objectives):
            part.check()
        super().on_fit_start()

    @property
    def input_types(self):
        """Return the definitions of the inputs."""
        return {**super().input_types, "current_frame": NeuralType(optional=True)}

    @typecheck()
    def forward(
        self,
        input_signal=None,
        input_signal_length=None,
        processed_signal=None,
        processed_signal_length=None,
        apply_mask=False,
        current_frame=None,
    ):
        """Predict tokens of samples [B, N] or features [B, D, T], in the active context or a drawn one.

        For ``current_frame`` see ``RandomBlockMasking``.

        Returns:
            log-probabilities [B, A, C] or [B, A, C, H] (of the first next token, if that alone is the objective),
            encoded lengths [B], masks [B, D, M], tokens [B, S] or [B, S, H].
        """
        features = self._features('', input_signal, input_signal_length, processed_signal, processed_signal_length)
        return self._predict(BatchInputs(features, features), apply_mask, current_frame)

    def _features(self, kind, signal, signal_length, processed, processed_length):
        """Return features [B, D, T] and lengths [B] from exactly one of samples and features."""
        has_signal = signal is not None and signal_length is not None
        has_processed = processed is not None and processed_length is not None
        if has_signal == has_processed:
            raise ValueError(
                f"{type(self).__name__}.forward takes either {kind}input_signal and {kind}input_signal_length, or "
                f"processed_{kind}{'input_' if kind else ''}signal and its length"
            )
        if has_processed:
            return processed, processed_length
        return self.preprocessor(input_signal=signal, length=signal_length)

    def _predict(self, inputs: BatchInputs, apply_mask, current_frame):
        """Encode the features of a batch, and predict their tokens; see ``forward``."""
        with self._one_context():
            record = self.encode(inputs, self.masking_in_context(current_frame) if apply_mask else None)
        self.last_batch = record._replace(encoded=None)
        log_probs = self.objectives.decoder(encoder_output=record.encoded)
        return log_probs, record.encoded_lengths, record.masks, record.tokens

    def encode_batch(self, batch, masking: Callable | None) -> BatchRecord:
        """Mask and encode a batch as the data loader gives it; see :meth:`encode`."""
        return self.encode(self.inputs_of(batch), masking)

    def inputs_of(self, batch) -> BatchInputs:
        """Return the features of a batch."""
        if isinstance(batch, DALIOutputs) and batch.has_processed_signal:
            features = batch[0], batch[1]
        else:
            features = self.preprocessor(input_signal=batch[0], length=batch[1])
        return BatchInputs(features, features)

    def encode(self, inputs: BatchInputs, masking: Callable | None) -> BatchRecord:
        """Mask and encode features within the present context; their targets are made once for all contexts.

        ``masking`` is called with ``input_feats`` and ``input_lengths``, and returns masked features and masks, [B, D, M]
        each. None masks nothing.
        """
        seen, lengths = inputs.seen
        seen = seen.to(next(self.encoder.parameters()).dtype)
        if self.pre_encoder is None:
            if masking is None:
                masks = torch.zeros_like(seen)
            else:
                seen, masks = masking(input_feats=seen, input_lengths=lengths)
            mask_lengths = lengths
            encoded, encoded_lengths = self.encoder(audio_signal=seen, length=lengths)
        else:
            self.pre_encoder.set_masking_enabled(apply_mask=masking is not None, masking=masking)
            encoded, encoded_lengths = self.encoder(audio_signal=seen, length=lengths)
            masks, mask_lengths = self.pre_encoder.get_current_mask(), encoded_lengths
        if inputs.targets is None:
            inputs.targets = self.targets.of(*inputs.clean)
        threshold = getattr(self.loss, 'mask_threshold', MASK_THRESHOLD)
        offset = getattr(self.loss, 'decoder_offset', 0)
        made = encoded, encoded_lengths, masks, mask_lengths, *inputs.targets, *inputs.clean
        return BatchRecord(*made, self.mask_frames_per_attention_frame, threshold, offset)  # type: ignore[call-arg]

    def masking_in_context(self, current_frame=None) -> Callable | None:
        """Return the masking module, bound to the present context; None if no objective masks."""
        if not self.objectives.masks:
            return None
        return partial(self.mask_processor, **self.masking_arguments(current_frame))

    def _training_step(self, batch, batch_idx):
        if self.forward_is_overridden:
            self.last_batch = None
            output, record = super()._training_step(batch, batch_idx), self.last_batch
        else:
            record = self.encode_batch(batch, self.masking_in_context())
            loss, parts = self.objectives.loss(record)
            self.add_batch(batch, record)
            logs = {'learning_rate': self._optimizer.param_groups[0]['lr'], 'train_loss': loss}
            logs.update({f'train_loss/{name}': part for name, part in parts.items()})
            output = {'loss': loss, 'log': {'global_step': self.trainer.global_step, **logs}}
        output['log'].update(self.reports.of_training_batch(self, record))
        return output

    def inference_pass(self, batch, batch_idx=0, dataloader_idx=0, mode='val', apply_mask=False):
        """Run a validation or test batch, in ``model.validate_contexts`` or in the default context."""
        if self.reports.validation is not None and apply_mask:
            validated = self.reports.validation.step(self, batch, batch_idx, dataloader_idx)
            return {f'{mode}_loss': validated}
        with self._one_context():
            if self.forward_is_overridden:
                self.last_batch = None
                metrics = super().inference_pass(batch, batch_idx, dataloader_idx, mode=mode, apply_mask=apply_mask)
                record = self.last_batch
            else:
                record = self.encode_batch(batch, self.masking_in_context() if apply_mask else None)
                loss, parts = self.objectives.loss(record)
                metrics = {f'{mode}_loss': loss, **{f'{mode}_loss/{name}': part for name, part in parts.items()}}
            metrics.update(self.reports.of_pass(self, record, prefix=f'{mode}_'))
            self.reports.draw(self, record)
        return metrics

    def load_state_dict(self, state_dict, strict: bool = True, **kwargs):
        """Load weights, also those of another objective; arguments and results as in ``torch.nn.Module``."""
        return super().load_state_dict(with_heads_of(self, state_dict), strict=strict, **kwargs)

    def on_load_checkpoint(self, checkpoint) -> None:
        """Refuse to continue a training run that had another objective."""
        super().on_load_checkpoint(checkpoint)
        if self._trainer is not None and self._trainer.state.fn == 'fit':
            check_same_heads(self, checkpoint)


class EncDecDenoiseMaskedTokenPredModel(EncDecMaskedTokenPredModel, _up.EncDecDenoiseMaskedTokenPredModel):
    """NeMo's denoising masked token prediction (NEST, arXiv 2408.13106) on one context per batch."""

    @property
    def input_types(self):
        """Return the definitions of the inputs; stock's lack some of the names that its forward takes."""
        types = super().input_types
        for name in ('processed_noise_signal', 'processed_noisy_input_signal'):
            types.update({name: types['processed_signal'], f'{name}_length': types['processed_signal_length']})
        return types

    @typecheck()
    def forward(
        self,
        input_signal=None,
        input_signal_length=None,
        processed_signal=None,
        processed_signal_length=None,
        noise_signal=None,  # noqa  as in NeMo, noise comes already mixed into the noisy signal
        noise_signal_length=None,  # noqa
        processed_noise_signal=None,  # noqa
        processed_noise_signal_length=None,  # noqa
        noisy_input_signal=None,
        noisy_input_signal_length=None,
        processed_noisy_input_signal=None,
        processed_noisy_input_signal_length=None,
        apply_mask=False,
        current_frame=None,
    ):
        """Predict the tokens of the clean signal from the noisy one or, where nothing is masked, without it."""
        clean = self._features('', input_signal, input_signal_length, processed_signal, processed_signal_length)
        noisy_signal = noisy_input_signal, noisy_input_signal_length
        noisy_features = processed_noisy_input_signal, processed_noisy_input_signal_length
        if not apply_mask and all(given is None for given in (*noisy_signal, *noisy_features)):
            return self._predict(BatchInputs(clean, clean), apply_mask, current_frame)
        noisy = self._features('noisy_', *noisy_signal, *noisy_features)
        return self._predict(BatchInputs(clean, noisy), apply_mask, current_frame)

    def inputs_of(self, batch) -> BatchInputs:
        """Return the features of the clean audio of a batch, and of the noisy one."""
        clean = self.preprocessor(input_signal=batch.audio, length=batch.audio_len)
        return BatchInputs(clean, self.preprocessor(input_signal=batch.noisy_audio, length=batch.noisy_audio_len))


def _undo_earlier_post_conv_adjustment(cfg: DictConfig) -> None:
    """Restore the block size in feature frames of a post-conv config; NeMo divides it on each restore.

    A config that it has adjusted has the two ``feat_in`` set to ``d_model`` and ``loss.combine_time_steps`` to 1.
    """
    if cfg.get('mask_position', 'pre_conv') != 'post_conv':
        return
    adjusted = cfg.masking.feat_in == cfg.quantizer.feat_in == cfg.encoder.d_model
    if adjusted and cfg.loss.get('combine_time_steps', None) == 1:
        with open_dict(cfg):
            cfg.masking.block_size = cfg.masking.block_size * cfg.encoder.subsampling_factor
