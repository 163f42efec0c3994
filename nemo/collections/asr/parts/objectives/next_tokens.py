# SPDX-License-Identifier: Apache-2.0
"""Prediction of next tokens (NEST-RQ, arXiv 2409.08680), horizon by horizon; K of them."""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from nemo.collections.asr.losses.ssl_losses.next_token import NextTokenLoss
from nemo.collections.asr.parts.att_context.receptive_field import chunk_end_look_ahead, next_token_offset
from nemo.collections.asr.parts.objectives import base
from nemo.collections.asr.parts.objectives.base import BatchRecord, FrameScores, Logs, LossPositions
from nemo.collections.asr.parts.objectives.masked_tokens import why_all_frames
from nemo.collections.asr.parts.utils.config_keys import NextToken
from nemo.utils import logging

HEADS = 'next_token_decoders.'  # their names in a state dict begin so


class NextTokens(base.Objective):
    """Predicts tokens after each frame's receptive field; one ``model.next_token_decoders`` per horizon.

    Raises:
        ValueError: if the model's decoder or forward may need all frames.
    """

    name = 'next'

    def __init__(self, model: Any, options: NextToken) -> None:
        super().__init__(model)
        reason = why_all_frames(model.decoder, model.loss)
        if model.forward_is_overridden:
            reason = f"{type(model).__name__} has a forward of its own"
        if reason is not None:
            raise ValueError(f"model.objective is {model.objective}, which predicts frame by frame: {reason}")
        books = dict(num_decoders=model.decoder.num_decoders, squeeze_single=model.decoder.squeeze_single)
        self.token_loss = NextTokenLoss(options.horizons, **books)
        self.at_chunk_end = options.positions == 'chunk_end'
        self.parts = tuple(f'next_{horizon}' for horizon in range(options.horizons))
        decoders = (model.from_config_dict(model.cfg.decoder) for _ in range(options.horizons))
        model.next_token_decoders = torch.nn.ModuleList(decoders)

    @property
    def decoder(self) -> torch.nn.Module:
        """The decoder of the first horizon."""
        return self.model.next_token_decoders[0]

    def loss_positions(self, record: BatchRecord) -> LossPositions:
        """Return the frames of a pass with a next token, and their tokens at each horizon, -100 for none."""
        lengths = record.encoded_lengths, record.token_lengths
        encoded = record.encoded.transpose(1, 2)  # type: ignore[union-attr]
        aligned = self.token_loss.align(encoded, record.tokens, self.offset(), *lengths, self.chunk())
        return base.gather_loss_positions(*aligned)

    def loss(self, record: BatchRecord) -> tuple[torch.Tensor, Logs]:
        """Return the mean over all frames and horizons, and each horizon's; see :class:`Objective`.

        Log-probabilities of one horizon exist at a time. The backward pass recomputes them: a decoder is a small
        part of the model, its log-probabilities are a large part of a step's memory.
        """
        positions = self.loss_positions(record)

        def of_horizon(outputs: torch.Tensor, targets: torch.Tensor, decoder: torch.nn.Module) -> Any:
            return self.token_loss.of_horizon(base.decode(decoder, outputs), targets)

        # Nothing in here is random: the state of the generators need not be kept (on a GPU, that would synchronise).
        settings = dict(use_reentrant=False, preserve_rng_state=False)
        pairs = [
            checkpoint(of_horizon, positions.outputs, positions.targets[:, horizon], decoder, **settings)
            for horizon, decoder in enumerate(self.model.next_token_decoders)
        ]
        losses, predicted = (torch.stack(part) for part in zip(*pairs, strict=True))  # [K, N]
        means = losses.detach().sum(dim=1) / predicted.sum(dim=1).clamp(min=1)
        loss = self.mean_over_tokens(losses.sum(dim=0), predicted.sum(dim=0), positions.utterances)
        return loss, dict(zip(self.parts, means, strict=True))

    def scores(self, record: BatchRecord) -> dict[str, FrameScores]:
        """Score a pass at each horizon; see :class:`Objective`."""
        positions, scores = self.loss_positions(record), {}
        for horizon, (part, decoder) in enumerate(zip(self.parts, self.model.next_token_decoders, strict=True)):
            of_horizon = positions._replace(targets=positions.targets[:, horizon]).having_targets()
            scores[part] = FrameScores.of(of_horizon.decoded(decoder), self.token_loss.frame_loss)
        return scores

    def offset(self, att_context_size: Any = None) -> int:
        """Return how many tokens after its own a frame predicts first; see ``next_token_offset``."""
        after_subsampling = self.model.pre_encoder is not None
        return next_token_offset(self.model.encoder, after_subsampling, att_context_size, self.at_chunk_end)

    def chunk(self) -> int:
        """Return the frames of a chunk at whose end tokens are predicted in this context; 1: every frame."""
        return chunk_end_look_ahead(self.model.encoder)[0] if self.at_chunk_end else 1

    def check(self) -> None:
        """Check that in every context that a batch can have there are tokens beyond the receptive field."""
        model, encoder = self.model, self.model.encoder
        combined, factor = model.targets.combine_time_steps, model.mask_frames_per_attention_frame
        if combined != factor:
            raise ValueError(
                f"model.quantizer.combine_time_steps is {combined}; with model.objective {model.objective} it must be "
                f"{factor}, the feature frames of an encoder frame"
            )
        if not model._encoder_has_context():
            self.offset()  # raises
        override, sampler = model.att_context_override, encoder.att_context_policy.sampler
        if override is None and sampler is not None and sampler.full_prob > 0:
            raise ValueError(
                f"model.encoder.att_context_sampler.full_prob is {sampler.full_prob}; with model.objective "
                f"{model.objective} it must be 0: where the receptive field is the utterance there is no next token"
            )
        synced = (model.cfg.get('train_ds') or {}).get('synced_contexts') or {}
        trained = [*encoder.att_context_size_all, *(synced.get('context_options') or ())]
        validation = model.reports.validation
        for context in [*(trained if override is None else [override]), *(validation.contexts if validation else ())]:
            with encoder.using_att_context_size(context):
                self.offset()


def _heads(state_dict: dict[str, Any]) -> set[str]:
    return {name for name in state_dict if name.startswith(HEADS)}


def with_heads_of(model: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return weights for a model: heads that they lack stay as they are, others are left out."""
    state = model.state_dict()
    own, given = _heads(state), _heads(state_dict)
    if own == given:
        return state_dict
    logging.info(
        f"The weights are of another objective: {len(own - given)} tensors of next_token_decoders keep their initial "
        f"values, {len(given - own)} are left out."
    )
    fitting = {name: value for name, value in state_dict.items() if name not in given - own}
    return {**{name: state[name] for name in own}, **fitting}


def check_same_heads(model: Any, checkpoint: dict[str, Any]) -> None:
    """Raise ValueError if a training run would continue one of another objective."""
    different = _heads(checkpoint.get('state_dict', {})) != _heads(model.state_dict())
    if checkpoint.get('optimizer_states') and different:
        raise ValueError(
            f"model.objective is {model.objective} with {len(model.next_token_decoders or [])} horizons; the "
            "checkpoint to continue is of a run with another objective or number of horizons. Begin a run of "
            "its own from those weights, with init_from_ptl_ckpt or init_from_nemo_model"
        )
