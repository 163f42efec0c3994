# SPDX-License-Identifier: Apache-2.0
"""Frozen probe: a small CTC recogniser on layer outputs of a frozen encoder. New in this project.

It measures what an encoder's layers hold, without fine-tuning the encoder: a softmax-weighted sum of layer-normalised
layers, one hidden layer, and CTC over phones or characters. ``model.probe`` fits one after validations.

Shapes: B batch, D features, T feature frames, A attention frames, L layers, W width of a layer, C classes.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.functional.text import edit_distance

from nemo.collections.asr.data.audio_files import audio_entries, read_entry
from nemo.collections.asr.parts.att_context.context import context_label
from nemo.collections.asr.parts.utils.config_keys import Probe

BATCH = 16  # utterances that a validation encodes at a time


@dataclass(frozen=True)
class ProbeSettings:
    """How a probe is fitted: Adam, a linear warm-up, then a cosine to 0."""

    steps: int = 3000
    batch_size: int = 24  # utterances of a step
    hidden: int = 256  # width of the hidden layer
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    seed: int = 0  # of the probe's first weights and of the order of utterances

    def rate(self, step: int) -> float:
        """Return the factor on the learning rate of a step."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))


class LayerProbe(nn.Module):
    """Log-probabilities of C CTC classes, the last one blank, from outputs of L layers of width W."""

    def __init__(self, layers: int, width: int, classes: int, hidden: int = 256):
        super().__init__()
        self.layer_weights = nn.Parameter(torch.zeros(layers))
        self.normalize = nn.LayerNorm(width, elementwise_affine=False)
        self.classify = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, classes + 1))
        self.blank = classes

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities [..., C + 1] of layer outputs [..., L, W]."""
        mixed = (self.normalize(outputs) * self.layer_weights.softmax(dim=0).unsqueeze(1)).sum(dim=-2)
        return self.classify(mixed).log_softmax(dim=-1)


@torch.no_grad()
def layer_outputs(encoder, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], context) -> list[torch.Tensor]:
    """Encode batches of features [B, D, T] and lengths [B] in one context.

    Returns the outputs of all layers of each utterance, [A, L, W] float16. The encoder's training mode is kept.
    """
    kept: list[torch.Tensor] = []
    found = []
    keep = lambda _, __, made: kept.append(made[0] if isinstance(made, tuple) else made)
    with ExitStack() as stack:
        stack.callback(encoder.train, encoder.training)
        stack.enter_context(encoder.using_att_context_size(context))
        for layer in encoder.layers:
            stack.enter_context(layer.register_forward_hook(keep))
        encoder.eval()
        for features, lengths in batches:
            kept.clear()
            _, encoded_lengths = encoder(audio_signal=features, length=lengths)
            stacked = torch.stack(kept, dim=2).half()
            found += [row[:length].clone() for row, length in zip(stacked, encoded_lengths.tolist())]
    return found


def fit_probe(
    outputs: Sequence[torch.Tensor], labels: Sequence[Sequence[int]], classes: int, settings: ProbeSettings
) -> LayerProbe:
    """Fit a probe to the layer outputs [A, L, W] of utterances and the classes of each, in order.

    The random generators of the caller stay as they were.
    """
    device, (_, layers, width) = outputs[0].device, outputs[0].shape
    with isolate_rng(), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(settings.seed)
        probe = LayerProbe(layers, width, classes, settings.hidden).to(device)
        optimizer = torch.optim.Adam(probe.parameters(), lr=settings.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.rate)
        targets = [torch.tensor(row, dtype=torch.int64, device=device) for row in labels]
        for _ in range(settings.steps):
            chosen = torch.randint(len(outputs), (settings.batch_size,)).tolist()
            loss = _ctc(probe, [outputs[index] for index in chosen], [targets[index] for index in chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return probe.eval()


def _ctc(probe: LayerProbe, outputs: list[torch.Tensor], targets: list[torch.Tensor]) -> torch.Tensor:
    """Return the mean CTC loss of some utterances, each divided by the number of its labels."""
    rows, labels = (torch.tensor([len(each) for each in group]) for group in (outputs, targets))
    log_probs = pad_sequence(probe(torch.cat(outputs).float()).split(rows.tolist()))  # padding only where CTC needs it
    return nn.functional.ctc_loss(log_probs, torch.cat(targets), rows, labels, blank=probe.blank, zero_infinity=True)


@torch.no_grad()
def transcribe(probe: LayerProbe, outputs: Iterable[torch.Tensor]) -> list[list[int]]:
    """Return the classes of the greedy CTC path of each utterance: repetitions once, without blanks."""
    paths = (probe(rows.float()).argmax(dim=1).unique_consecutive() for rows in outputs)
    return [path[path != probe.blank].tolist() for path in paths]


def count_errors(hypotheses: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> list[int]:
    """Return the substitutions, deletions and insertions of each utterance: its edit distance."""
    texts = [[''.join(chr(256 + label) for label in row) for row in rows] for rows in (hypotheses, references)]
    errors = edit_distance(*texts, reduction='none')  # a scalar of one utterance or none
    return errors.int().reshape(-1)[: len(hypotheses)].tolist()


def probe_errors(
    encode: Callable[[str], list[torch.Tensor]],
    labels: dict[str, list[list[int]]],
    classes: int,
    settings: ProbeSettings,
) -> tuple[list[int], LayerProbe]:
    """Fit a probe on part ``train``, count its errors by utterance of ``test``; ``encode`` takes a part."""
    probe = fit_probe(encode('train'), labels['train'], classes, settings)
    return count_errors(transcribe(probe, encode('test')), labels['test']), probe


class ValidationProbe(Callback):
    """Fit a probe every n validations; log ``probe/error_rate/ctx_...`` and ``probe/seconds``.

    Takes ``model.probe`` of a config; ValueError names the key, its value and what is allowed. Every rank fits the same
    probe, for with sharded weights all must run the encoder.
    """

    def __init__(self, section):
        options = Probe.parse(section)
        self.every, self.settings, self.validations = options.every_n_validations, ProbeSettings(options.steps), 0
        self.audio, spoken = {}, {}
        for part, path in {'train': options.train_manifest, 'test': options.test_manifest}.items():
            self.audio[part], spoken[part] = _read(f'model.probe.{part}_manifest', path, options.labels)
        names = sorted(set().union(*spoken['train']))
        index, self.classes = {name: label for label, name in enumerate(names)}, len(names)
        unknown = len(names) + 1  # a label that is not in the training part: no probe recognises it
        self.labels = {
            part: [[index.get(name, unknown) for name in row] for row in rows] for part, rows in spoken.items()
        }

    def on_validation_epoch_end(self, trainer, model) -> None:
        """Fit and log, if it is due."""
        if trainer.sanity_checking:
            return
        self.validations += 1
        if self.validations % self.every:
            return
        started, logs, batches = time.monotonic(), {}, {part: list(self._batches(model, part)) for part in self.audio}
        references = sum(map(len, self.labels['test']))
        for context in model.encoder.att_context_size_all:
            outputs = {part: layer_outputs(model.encoder, found, context) for part, found in batches.items()}
            errors, _ = probe_errors(outputs.__getitem__, self.labels, self.classes, self.settings)
            logs[f'probe/error_rate/ctx_{context_label(context)}'] = sum(errors) / references
        model.log_dict({**logs, 'probe/seconds': time.monotonic() - started})

    def _batches(self, model, part: str):
        """Yield the features [B, D, T] and lengths [B] of a part's utterances, as the encoder gets them."""
        rate = model.cfg.preprocessor.sample_rate
        for start in range(0, len(self.audio[part]), BATCH):
            signals = [torch.from_numpy(read_entry(entry, rate)) for entry in self.audio[part][start : start + BATCH]]
            lengths = torch.tensor([len(signal) for signal in signals], device=model.device)
            with torch.no_grad():
                padded = pad_sequence(signals, batch_first=True).to(model.device)
                yield model.preprocessor(input_signal=padded, length=lengths)

    def state_dict(self) -> dict:
        """Return how many validations there were."""
        return {'validations': self.validations}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore the count."""
        self.validations = state_dict['validations']


def _read(key: str, path, labels: str) -> tuple[list[dict], list[list[str]]]:
    """Return a manifest's entries and their transcripts; ValueError names the key."""
    try:
        entries = audio_entries([], path, must_exist=True)
    except ValueError as error:
        raise ValueError(f"{key} is {path}: {error}") from error
    spoken = [entry.get(labels) or '' for entry in entries]
    if not all(isinstance(text, str) and text.strip() for text in spoken):
        raise ValueError(f"{key} is {path}; each of its utterances must have {labels}")
    return entries, [text.split() if labels == 'phones' else list(text) for text in spoken]
