# SPDX-License-Identifier: Apache-2.0
"""``model.probe``: fit a frozen probe after validations, log its error rates. New in this project."""

import time

import torch
from lightning.pytorch.callbacks import Callback

from nemo.collections.asr.data.audio_files import audio_entries, read_entry
from nemo.collections.asr.parts.att_context.context import context_label
from nemo.collections.asr.parts.ssl_reports.probe import ProbeSettings, layer_outputs, probe_errors
from nemo.collections.asr.parts.utils.config_keys import Probe

BATCH = 16  # utterances that are encoded at a time


class ValidationProbe(Callback):
    """Fit a probe every n validations; log ``probe/error_rate/ctx_...`` and ``probe/seconds``.

    Takes ``model.probe`` of a config. Every rank fits the same probe, for with sharded weights all must run the encoder.

    Raises:
        ValueError: naming the config key, its value and what is allowed.
    """

    def __init__(self, section):
        super().__init__()
        options = Probe.parse(section)
        self.every, self.settings, self.validations = options.every_n_validations, ProbeSettings(options.steps), 0
        paths = {'train': options.train_manifest, 'test': options.test_manifest}
        parts = {part: _read(f'model.probe.{part}_manifest', path, options.labels) for part, path in paths.items()}
        names = sorted({name for _, spoken in parts['train'] for name in spoken})
        index = {name: label for label, name in enumerate(names)}
        self.classes, self.audio = len(names), {part: [entry for entry, _ in rows] for part, rows in parts.items()}
        unknown = len(names) + 1  # a label that is not in the training part: no probe recognises it
        self.labels = {
            part: [[index.get(name, unknown) for name in spoken] for _, spoken in rows] for part, rows in parts.items()
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
            padded = torch.nn.utils.rnn.pad_sequence(signals, batch_first=True).to(model.device)
            with torch.no_grad():
                yield model.preprocessor(input_signal=padded, length=lengths)

    def state_dict(self) -> dict:
        """Return how many validations there were."""
        return {'validations': self.validations}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore the count."""
        self.validations = state_dict['validations']


def _read(key: str, path, labels: str) -> list[tuple[dict, list[str]]]:
    """Return entry, with its audio's path, and transcript of each utterance; ValueError names the key."""
    try:
        entries = audio_entries([], path, must_exist=True)
    except ValueError as error:
        raise ValueError(f"{key} is {path}: {error}") from error
    spoken = [entry.get(labels) or '' for entry in entries]
    if not all(isinstance(text, str) and text.strip() for text in spoken):
        raise ValueError(f"{key} is {path}; each of its utterances must have {labels}")
    return list(zip(entries, (text.split() if labels == 'phones' else list(text) for text in spoken)))
