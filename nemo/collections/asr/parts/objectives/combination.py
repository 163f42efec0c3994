# SPDX-License-Identifier: Apache-2.0
"""The objectives of a model, with their weights."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from nemo.collections.asr.parts.objectives.base import BatchRecord, FrameScores, Logs, Objective
from nemo.collections.asr.parts.objectives.masked_tokens import MaskedTokens
from nemo.collections.asr.parts.objectives.next_tokens import NextTokens
from nemo.collections.asr.parts.utils.config_keys import Model, NextToken
from nemo.utils import logging

NORMS_OF_WHOLE_UTTERANCES = ('per_feature', 'all_features')


class StepLosses(NamedTuple):
    """The loss of a batch, the scalar to minimise, and its parts."""

    loss: torch.Tensor
    parts: Logs  # nats per frame, without gradient: next_0 and so on, masked and next where there are both


class Objectives(dict[Objective, float]):
    """One objective or several, with their weights: their losses are added by these."""

    @classmethod
    def of(cls, model: Any) -> 'Objectives':
        """Make the objectives of a model's config, and their decoders; see :func:`check_objective`."""
        objective, options = check_objective(model.cfg)
        weights: dict[Objective, float] = {} if objective == 'next_token' else {MaskedTokens(model): 1.0}
        if objective != 'masked':
            weights[NextTokens(model, options)] = options.weight
        return cls(weights)

    @property
    def masks(self) -> bool:
        """Whether the encoder's input is masked."""
        return any(objective.masks for objective in self)

    @property
    def decoder(self) -> torch.nn.Module:
        """The decoder that ``model.forward`` runs: that of the first objective."""
        return next(iter(self)).decoder

    def name_of(self, objective: Objective) -> str | None:
        """Return what the figures of one of several objectives are filed under; None for the only one."""
        return objective.name if len(self) > 1 else None

    def weighted(self, losses: dict[Objective, torch.Tensor]) -> torch.Tensor:
        """Return the weighted sum of losses."""
        return sum(weight * losses[objective] for objective, weight in self.items())

    def loss(self, record: BatchRecord) -> StepLosses:
        """Return the loss of a forward pass, within its context."""
        losses: dict[Objective, torch.Tensor] = {}
        parts: Logs = {}
        for objective in self:
            losses[objective], of_parts = objective.loss(record)
            if name := self.name_of(objective):
                parts[name] = losses[objective].detach()
            parts.update(of_parts)
        return StepLosses(self.weighted(losses), parts)

    def scores(self, record: BatchRecord) -> dict[Objective, dict[str, FrameScores]]:
        """Score a forward pass by every objective and part, within its context; synchronises host and device."""
        return {objective: objective.scores(record) for objective in self}

    def find(self, kind: type[Objective]) -> Any:
        """Return the objective of a class, for what it alone can do; None: there is none."""
        return next((objective for objective in self if isinstance(objective, kind)), None)

    def offset(self) -> int | None:
        """Return how many tokens after its own a frame predicts first (``next_token_offset``), or None."""
        following = self.find(NextTokens)
        return None if following is None else following.offset()


def check_objective(model_cfg: Mapping[str, Any]) -> tuple[str, NextToken]:
    """Return the objective of a model's config, and the options of next tokens; ValueError naming the key."""
    objective, options = Model.parse(model_cfg).objective, NextToken.parse(model_cfg.get('next_token'))
    if objective == 'masked':
        if model_cfg.get('next_token') is not None:
            logging.info("model.objective is masked: model.next_token is ignored")
        return objective, options
    if objective == 'next_token' and options.weight != 1:
        raise ValueError(
            f"model.next_token.weight is {options.weight} with model.objective next_token; it must be 1.0, for there is "
            "no other loss to weigh against"
        )
    normalize = (model_cfg.get('preprocessor') or {}).get('normalize')
    if normalize in NORMS_OF_WHOLE_UTTERANCES:
        raise ValueError(
            f"model.preprocessor.normalize is {normalize}; with model.objective {objective} it must be NA or fixed "
            "statistics (see compute_feature_stats.py): those of the whole utterance depend on the next tokens"
        )
    return objective, options
