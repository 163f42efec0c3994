# SPDX-License-Identifier: Apache-2.0
"""Pre-train the encoder of one arm, kind of contexts and seed on cached features; resumable.

Shapes: B batch, D features, T feature frames, A attention frames.
"""

import copy
import math
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from arms import ARMS, KINDS, MASKED_SHARE, SHORT, overrides
from data import Speech
from finetune import ctc_loss
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from phones import PHONES

from nemo.collections.asr.models.ssl_models import EncDecMaskedTokenPredModel
from nemo.collections.asr.parts.objectives.base import BatchInputs
from nemo.utils.atomic_files import replacing

EXAMPLES = Path(__file__).resolve().parents[2] / 'examples/asr'
CONFIG = 'nest_fast-conformer_streaming_tiny'
FACTOR = 8  # feature frames of an attention frame
QUANTIZER_SEED = 99  # the pilot's: the targets are the same for all seeds
FULLY_MASKED = 0.8  # share of its feature frames above which a masked attention frame is a loss position


@dataclass(frozen=True)
class Recipe:
    """Sizes and optimizer, the same for all arms."""

    layers: int = 5
    width: int = 128
    classes: int = 512
    steps: int = 3000
    crops: int = 4
    """Of a step."""
    crop_frames: int = 800
    """Feature frames of a crop."""
    dropout: float = 0.1
    """Of layers, attention, positions and the subsampled features."""
    learning_rate: float = 1.5e-3
    warmup_steps: int = 300
    hold: float = 0.4
    """Share of the steps with the whole learning rate; then it falls by a cosine to 0."""
    saved: tuple = (0.25, 0.5, 1.0)
    """Shares of the steps after which the encoder is kept."""

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step."""
        after = max(0.0, (step - self.hold * steps) / ((1 - self.hold) * steps))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * 0.5 * (1 + math.cos(math.pi * after))


def build(name: str, kind: str, seed: int, recipe: Recipe) -> EncDecMaskedTokenPredModel:
    """Build the model of an arm; a seed sets the first weights, and all models share one quantizer."""
    arm = ARMS[name]
    with initialize_config_dir(str(EXAMPLES / 'conf/ssl/nest'), version_base=None):
        made = overrides(name, kind, recipe)
        cfg = compose(CONFIG, overrides=['~model.train_ds', '~model.validation_ds', *made])
    OmegaConf.resolve(cfg)
    pl.seed_everything(seed, workers=False, verbose=False)
    model = EncDecMaskedTokenPredModel(cfg.model)
    with torch.random.fork_rng():
        torch.manual_seed(QUANTIZER_SEED)
        model.quantizer.load_state_dict(model.from_config_dict(cfg.model.quantizer).state_dict())
    if arm.objective == 'ctc':
        model.phones = torch.nn.Linear(recipe.width, len(PHONES) + 1)
    return model


@torch.no_grad()
def measured_masks(model, kind: str, frames: int, number: int = 16) -> tuple[float, float]:
    """Return the masked share of feature frames and the mean masked run, over the contexts."""
    masked, runs, positions = 0.0, 0, 0
    state = torch.get_rng_state()
    for index, context in enumerate(KINDS[kind].contexts):
        torch.manual_seed(index)
        with model.encoder.using_att_context_size(context):
            lengths = torch.full((number,), frames)
            _, masks = model.masking_in_context()(input_feats=torch.zeros(number, 80, frames), input_lengths=lengths)
        masked += masks[:, 0].float().mean().item() / len(KINDS[kind].contexts)
        lost = masks[:, 0, : frames // FACTOR * FACTOR].unflatten(1, (-1, FACTOR)).float().mean(dim=2) > FULLY_MASKED
        positions += lost.sum().item()
        runs += (lost[:, 1:] & ~lost[:, :-1]).sum().item() + lost[:, 0].sum().item()
    torch.set_rng_state(state)
    return masked, positions / max(1, runs)


def calibrate_masks(model, kind: str, frames: int, block: int) -> tuple[float, float]:
    """Set block size and ``mask_prob`` so that ``MASKED_SHARE`` is masked; return :func:`measured_masks`."""
    masking, low, high = model.mask_processor, 1e-4, 0.3
    masking.block_size = block
    for _ in range(12):
        masking.mask_prob = math.sqrt(low * high)
        share, run = measured_masks(model, kind, frames)
        low, high = (masking.mask_prob, high) if share < MASKED_SHARE else (low, masking.mask_prob)
    return share, run


def set_masks(model, name: str, kind: str, seed: int, recipe: Recipe) -> dict[str, float]:
    """Give the model the masks of its arm; return the block size and what was measured of them."""
    arm = ARMS[name]
    if arm.follow is None:
        return {}
    if arm.block != SHORT:
        share, run = calibrate_masks(model, kind, recipe.crop_frames, arm.block)
        return {'block': arm.block, 'masked_share': share, 'mean_run': run}
    following = build('following-40', kind, seed, recipe)
    _, wanted = calibrate_masks(following, kind, recipe.crop_frames, 40)
    low, high = FACTOR, 40
    while high - low > 1:
        middle = (low + high) // 2
        _, run = calibrate_masks(model, kind, recipe.crop_frames, middle)
        low, high = (middle, high) if run < wanted else (low, middle)
    share, run = calibrate_masks(model, kind, recipe.crop_frames, high)
    return {'block': high, 'masked_share': share, 'mean_run': run}


def loss_of(model, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return the loss of a batch by the model's objective, in its present context."""
    inputs = BatchInputs((features, lengths), (features, lengths))
    return model.objectives.loss(model.encode(inputs, model.masking_in_context())).loss


def supervised_loss(model, speech: Speech, seed: int, step: int) -> torch.Tensor:
    """Return the CTC loss of a batch of the probe's transcribed utterances, as long as a batch of crops."""
    chosen = random.Random(f'ctc {seed} {step}').sample(speech.probe, min(5, len(speech.probe)))
    features, lengths = speech.batch([utterance.features for utterance in chosen])
    encoded, encoded_lengths = model.encoder(audio_signal=features, length=lengths)
    return ctc_loss(model.phones(encoded.transpose(1, 2)).log_softmax(dim=-1), encoded_lengths, chosen)


@torch.no_grad()
def validation_loss(model, speech: Speech, kind: str) -> float:
    """Return the mean loss over contexts and validation utterances, with the same masks each time."""
    model.eval()
    losses = []
    for context in KINDS[kind].contexts:
        with model.encoder.using_att_context_size(model.encoder.att_context_size if is_offline(model) else context):
            torch.manual_seed(0)
            losses += [loss_of(model, *batch).item() for batch in speech.batches(speech.validation, size=5)]
    model.train()
    return sum(losses) / len(losses)


def is_offline(model) -> bool:
    """Whether the encoder is pre-trained on whole utterances."""
    return list(model.encoder.att_context_size) == [-1, -1]


def converted(model, kind: str):
    """Turn an offline model into a streaming one, as ``convert_to_streaming.py`` does."""
    sys.path.append(str(EXAMPLES / 'speech_pretraining'))
    from nemo.collections.asr.models.streaming_conversion import build as build_streaming
    from nemo.collections.asr.models.streaming_conversion import convert_weights, streaming_config

    cfg = copy.deepcopy(model.cfg)
    OmegaConf.update(cfg, 'target', f'{type(model).__module__}.{type(model).__name__}', force_add=True)
    contexts = [list(context) for context in KINDS[kind].contexts]
    streaming = build_streaming(streaming_config(cfg, contexts, KINDS[kind].style, None))
    convert_weights(model, streaming)
    return streaming


def pretrain(name: str, kind: str, seed: int, speech: Speech, recipe: Recipe, folder: Path) -> dict:
    """Train an arm, or continue it; write ``encoder-STEP.pt`` files and return what was logged.

    Batches, contexts, masks and dropout of a step are functions of seed and step, so an interrupted run loses nothing.
    """
    arm, path = ARMS[name], folder / 'state.pt'
    model = build(name, kind, seed, recipe)
    log = {'recipe': asdict(recipe), **set_masks(model, name, kind, seed, recipe), 'loss': [], 'validation': {}}
    steps = 0 if arm.objective is None else recipe.steps * arm.longer
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, weight_decay=1e-3, betas=(0.9, 0.98), fused=True
    )
    first, seconds = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=False)
        model.load_state_dict(state['model'])
        optimizer.load_state_dict(state['optimizer'])
        first, log, seconds = state['step'], state['log'], state['log'].get('seconds', 0.0)
    saved = {max(1, round(share * steps)) for share in recipe.saved} if steps else {0}
    started, recent = time.process_time(), []
    model.train()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group['lr'] = recipe.rate(step, steps)
        recent.append(_step(model, name, kind, seed, step, speech, recipe, optimizer, parameters))
        done = step + 1
        if done % 100 == 0 or done in saved:
            log['loss'].append((done, sum(recent) / len(recent)))
            recent, log['seconds'] = [], seconds + time.process_time() - started
            print(f'{kind} {name} {seed}: step {done}, loss {log["loss"][-1][1]:.3f}', flush=True)
        if done in saved and arm.objective != 'ctc':
            log['validation'][done] = validation_loss(model, speech, kind)
        if done in saved:
            encoder = (converted(model, kind) if arm.offline else model).encoder
            _save(encoder.state_dict(), folder / f'encoder-{done}.pt')
        if done % 250 == 0 or done in saved:
            state = {'step': done, 'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'log': log}
            _save(state, path)
    if not steps:
        _save(model.encoder.state_dict(), folder / 'encoder-0.pt')
    if path.exists():
        path.rename(folder / 'final.pt')  # with decoders and quantizer, for the loss by distance
    return log


def _step(model, name, kind, seed, step, speech, recipe, optimizer, parameters) -> float:
    context = random.Random(f'context {seed} {step}').choice(KINDS[kind].contexts)
    torch.manual_seed(1_000_003 * seed + step)
    with model.encoder.using_att_context_size(model.encoder.att_context_size if is_offline(model) else context):
        if ARMS[name].objective == 'ctc':
            loss = supervised_loss(model, speech, seed, step)
        else:
            loss = loss_of(model, *speech.crops(seed, step, recipe.crops, recipe.crop_frames))
        loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _save(value, path: Path) -> None:
    with replacing(path) as partial:
        torch.save(value, partial)
