# SPDX-License-Identifier: Apache-2.0
"""What a model is asked for: masked tokens (NEST), the next ones (NEST-RQ), or both. New in this project."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from nemo.collections.asr.losses.ssl_losses.next_token import NextTokenLoss
from nemo.collections.asr.modules.ssl_modules.quantizers import check_projection
from nemo.collections.asr.parts.att_context.next_token_offset import next_token_offset
from nemo.collections.asr.parts.att_context.receptive_field import chunk_end_look_ahead
from nemo.collections.asr.parts.utils.known_keys import NEXT_TOKEN_KEYS, OBJECTIVES, check_known
from nemo.collections.asr.parts.utils.masked_frames import why_not_frame_by_frame
from nemo.collections.asr.parts.utils.next_token_frames import NextTokenFrames, of_horizons, select_next_token_frames
from nemo.utils import logging

POSITIONS = ('all', 'chunk_end')
HEADS = 'next_token_decoders.'  # their names in a state dict begin so
NORMS_OF_WHOLE_UTTERANCES = ('per_feature', 'all_features')


class NextTokenOptions(NamedTuple):
    """The section ``model.next_token`` of a config."""

    horizons: int = 4
    """How many tokens each frame is asked for."""
    positions: str = 'all'
    """Which frames predict: ``all``, or those at the end of each chunk, ``chunk_end``."""
    weight: float = 1.0
    """Of the loss beside that of masked tokens; for the objective ``both``."""

    @classmethod
    def parse(cls, section, objective: str) -> 'NextTokenOptions':
        """Read the section; None takes the defaults.

        Raises:
            ValueError: naming the key, its value and what is allowed.
        """
        section = dict(section or {})
        check_known('model.next_token', section, NEXT_TOKEN_KEYS)
        options = cls(**section)
        if isinstance(options.horizons, bool) or not isinstance(options.horizons, int) or options.horizons < 1:
            raise ValueError(f"model.next_token.horizons is {options.horizons!r}; it must be 1 token or more")
        if options.positions not in POSITIONS:
            raise ValueError(f"model.next_token.positions is {options.positions!r}; it must be one of {POSITIONS}")
        number = isinstance(options.weight, (int, float)) and not isinstance(options.weight, bool)
        if not number or not 0 < options.weight < float('inf'):
            raise ValueError(f"model.next_token.weight is {options.weight!r}; it must be a number above 0")
        if objective == 'next_token' and options.weight != 1:
            raise ValueError(
                f"model.next_token.weight is {options.weight} with model.objective next_token; it weighs against the "
                "loss of masked tokens, which there is none of: leave it at 1.0"
            )
        return options


class StepLosses(NamedTuple):
    """The loss of a batch, and what it is made of."""

    loss: torch.Tensor
    """The scalar to minimise."""
    parts: dict[str, torch.Tensor]
    """Nats per frame, without gradient: ``next_0`` and so on, ``masked`` beside them; empty for masked tokens alone."""


class ObjectiveMixin:
    """Mixin for a model of masked token prediction: asks it for the next tokens, too, or for them alone.

    Config: ``objective``, ``masked`` (default), ``next_token`` or ``both``, and ``next_token`` with ``horizons`` and
    ``weight``. Each horizon has a decoder of its own, made from ``cfg.decoder``. With ``next_token`` nothing is
    masked, and the decoder of masked tokens stays in the model, without being trained.
    """

    objective: str = 'masked'
    next_token_loss: NextTokenLoss | None
    next_token_decoders: torch.nn.ModuleList | None
    next_token_weight: float = 1.0
    next_token_positions: str = 'all'
    _observes_targets = False  # within a training step whose targets are refined

    def _setup_objective(self) -> None:
        """Make the decoders of the next tokens, and check what can be checked without a trainer.

        Raises:
            ValueError: naming the config key, its value and what is allowed.
        """
        self.objective = check_objective(self.cfg)
        normalized = 'per_feature' in (self.target_normalize, self.cfg.preprocessor.get('normalize'))
        position = self.cfg.get('mask_position', 'pre_conv')
        check_projection(self.quantizer, position, 'per_feature' if normalized else 'NA')
        options = NextTokenOptions.parse(self.cfg.get('next_token'), self.objective)
        self.next_token_loss = self.next_token_decoders = None
        if not self.predicts_next_tokens:
            return
        reason = why_not_frame_by_frame(self.decoder, self.loss)
        if self.forward_of_its_own:
            reason = f"{type(self).__name__} has a forward of its own"
        if reason is not None:
            raise ValueError(f"model.objective is {self.objective}, which decodes frame by frame: {reason}")
        books = dict(num_decoders=self.decoder.num_decoders, squeeze_single=self.decoder.squeeze_single)
        self.next_token_loss = NextTokenLoss(options.horizons, **books)
        self.next_token_weight, self.next_token_positions = options.weight, options.positions
        self.next_token_decoders = torch.nn.ModuleList(
            self.from_config_dict(self.cfg.decoder) for _ in range(options.horizons)
        )
        if not self.predicts_masked_tokens:  # DistributedDataParallel wants no parameter that gets no gradient
            self.decoder.requires_grad_(False)
            self.mask_processor.requires_grad_(False)

    @property
    def predicts_masked_tokens(self) -> bool:
        """Whether the objective masks."""
        return self.objective != 'next_token'

    @property
    def predicts_next_tokens(self) -> bool:
        """Whether the objective asks for the tokens that come next."""
        return self.objective != 'masked'

    def next_token_offset(self) -> int | None:
        """Return how many tokens after its own a frame is asked for in the present context; None: it is not asked.

        Raises:
            ValueError: with the reason, if the encoder's output hears the whole utterance.
        """
        if not self.predicts_next_tokens:
            return None
        at_chunk_end = self.next_token_positions == 'chunk_end'
        return next_token_offset(self.encoder, self.pre_encoder is not None, at_chunk_end=at_chunk_end)

    def next_token_chunk(self) -> int:
        """Return the frames of a chunk at whose end next tokens are predicted in the present context; 1: every frame."""
        if not self.predicts_next_tokens or self.next_token_positions == 'all':
            return 1
        return chunk_end_look_ahead(self.encoder)[0]

    def check_next_tokens_are_unheard(self) -> None:
        """Check that in every context that a batch can have there are tokens that a frame has not heard.

        Raises:
            ValueError: naming the context, or the config key, and the reason.
        """
        if not self.predicts_next_tokens:
            return
        combined, factor = getattr(self.quantizer, 'combine_time_steps', 1), self.mask_frames_per_attention_frame
        if combined != factor:
            raise ValueError(
                f"model.quantizer.combine_time_steps is {combined}; with model.objective {self.objective} it must be "
                f"{factor}, the feature frames of an encoder frame"
            )
        if not self._encoder_follows_contexts():
            self.next_token_offset()  # raises
        by_hand, sampler = self.encoder.att_context_by_hand, getattr(self.encoder, 'att_context_sampler', None)
        if by_hand is None and sampler is not None and sampler.full_prob > 0:
            raise ValueError(
                f"model.encoder.att_context_sampler.full_prob is {sampler.full_prob}; with model.objective "
                f"{self.objective} it must be 0, for an output that hears the whole utterance has no next token"
            )
        validation = self.reports.validation
        validated = [] if validation is None else validation.contexts
        trained = [*self.encoder.att_context_size_all, *self._synced_contexts()] if by_hand is None else [by_hand]
        for context in [*trained, *validated]:
            with self.encoder.using_att_context_size(context):
                self.next_token_offset()

    def _synced_contexts(self) -> list:
        """Return the contexts that come with the batches of the config's training data."""
        synced = (self.cfg.get('train_ds') or {}).get('synced_contexts') or {}
        return list(synced.get('context_options') or ())

    def check_decoder_offset(self) -> None:
        """Compare the loss's ``decoder_offset`` with what an encoder frame has heard of its target.

        Raises:
            ValueError: if targets made after the subsampling are predicted from another frame than their own.
        """
        offset = getattr(getattr(self.loss, 'mlm_loss', self.loss), 'decoder_offset', None)
        if self.pre_encoder is not None:
            if offset:
                raise ValueError(
                    f"model.loss.decoder_offset is {offset} with mask_position post_conv; it must be 0, for target i "
                    "is made of encoder frame i"
                )
        elif offset == 0 and self.cfg.encoder.get('causal_downsampling', False):
            logging.warning(
                "model.loss.decoder_offset is 0 with causal_downsampling: encoder frame i has heard no more than the "
                "beginning of target i, and is to predict it all the same. Set model.loss.decoder_offset=1."
            )

    def next_token_frames(self, record) -> NextTokenFrames:
        """Return the frames of a forward pass that have a next token, and those tokens; waits for the device once.

        Args:
            record: a ``BatchRecord`` of this model.
        """
        return select_next_token_frames(
            self.next_token_loss,
            record.encoded,
            record.tokens,
            record.next_token_offset,
            record.encoded_lengths,
            record.token_lengths,
            record.next_token_chunk,
        )

    def losses_of(self, record) -> StepLosses:
        """Return the loss of a forward pass by the model's objective, within its context.

        Args:
            record: a ``BatchRecord`` of this model, of a pass that was masked unless the objective is ``next_token``.
        """
        parts = {}
        if self.predicts_masked_tokens:
            parts['masked'] = self.loss.of_frames(*self.predictions_of(record)[:2])
        if not self.predicts_next_tokens:
            return StepLosses(parts['masked'], {})
        horizons = of_horizons(self.next_token_decoders, self.next_token_loss, self.next_token_frames(record))
        loss = self.combined_loss(parts.get('masked'), horizons.mean)
        return StepLosses(loss, {**{name: part.detach() for name, part in parts.items()}, **horizons.logs()})

    @contextmanager
    def refining_targets(self) -> Iterator[dict[str, torch.Tensor]]:
        """Refine the quantizer's codebooks if that is due at this step, and let it see the step's targets.

        For a training step, on every rank; yields what to log of the refinement.
        """
        if getattr(self.quantizer, 'refinement', None) is None:
            yield {}
            return
        logs = self.quantizer.refine_if_due(self.trainer.global_step)
        if logs:
            self.reports.targets_were_refined()
        self._observes_targets = True
        try:
            yield logs
        finally:
            self._observes_targets = False

    def combined_loss(self, masked: torch.Tensor | None, next_token: torch.Tensor) -> torch.Tensor:
        """Return the objective's loss from its parts; ``masked`` is None where nothing is masked."""
        return next_token if masked is None else masked + self.next_token_weight * next_token

    def load_state_dict(self, state_dict, strict: bool = True, **kwargs):
        """Load weights; those of another objective, too: decoders that it lacks stay as they are, others are left out.

        Arguments and results are those of ``torch.nn.Module``.
        """
        own = {name: value for name, value in self.state_dict().items() if name.startswith(HEADS)}
        theirs = {name for name in state_dict if name.startswith(HEADS)}
        if own.keys() != theirs:
            _tell_other_heads(len(own.keys() - theirs), len(theirs - own.keys()))
            kept = {name: value for name, value in state_dict.items() if name not in theirs - own.keys()}
            state_dict = {**own, **kept}
        return super().load_state_dict(state_dict, strict=strict, **kwargs)

    def on_load_checkpoint(self, checkpoint) -> None:
        """Refuse to go on with a training run that had another objective.

        Raises:
            ValueError: naming the key, and what to do instead.
        """
        super().on_load_checkpoint(checkpoint)
        fitting = self._trainer is not None and self._trainer.state.fn == 'fit'
        theirs = [name for name in checkpoint.get('state_dict', {}) if name.startswith(HEADS)]
        own = [name for name in self.state_dict() if name.startswith(HEADS)]
        if fitting and checkpoint.get('optimizer_states') and set(theirs) != set(own):
            raise ValueError(
                f"model.objective is {self.objective} with {len(self.next_token_decoders or [])} horizons; the "
                "checkpoint to go on with is of a run with another objective or number of horizons. Begin a run of "
                "its own from those weights, with init_from_ptl_ckpt or init_from_nemo_model"
            )


def hide_nothing(input_feats: torch.Tensor, input_lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask nothing; arguments and results are those of a masking module."""
    return input_feats, torch.zeros_like(input_feats)


def check_objective(model_cfg) -> str:
    """Return the objective of a model's config.

    Raises:
        ValueError: if it is unknown, or the features that the encoder sees are normalised by what is to be predicted.
    """
    objective = model_cfg.get('objective', 'masked')
    if objective not in OBJECTIVES:
        raise ValueError(f"model.objective is {objective!r}; it must be one of {OBJECTIVES}")
    if 'next_token' in model_cfg and objective == 'masked' and model_cfg.next_token is not None:
        logging.info("model.objective is masked: model.next_token is for another")
    normalize = (model_cfg.get('preprocessor') or {}).get('normalize')
    if objective != 'masked' and normalize in NORMS_OF_WHOLE_UTTERANCES:
        raise ValueError(
            f"model.preprocessor.normalize is {normalize}; with model.objective {objective} it must be NA or fixed "
            "statistics (see compute_feature_stats.py): those of the whole utterance tell of what is to be predicted"
        )
    return objective


def _tell_other_heads(fresh: int, left_out: int) -> None:
    if fresh:
        logging.info(f"The weights are of another objective: {fresh} tensors of next_token_decoders begin anew.")
    if left_out:
        logging.info(f"The weights are of another objective: {left_out} tensors of next_token_decoders are left out.")
