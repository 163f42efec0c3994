# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""What a model has learned of masked speech, per attention context, on its validation data."""

import torch
from omegaconf import OmegaConf
from rich.table import Table
from tqdm import tqdm

from nemo.collections.asr.parts.att_context.codebook_use import CodebookUse


def evaluate(model, seed: int = 0) -> dict:
    """Predict the masked tokens of the validation data in each of the encoder's contexts, with the same masks' seed.

    Args:
        model: an ``EncDecDenoiseMaskedTokenPredModel`` with ``validation_ds`` in its config and one codebook.
        seed: of the masks.

    Returns:
        ``contexts``: per context label ``loss`` (nats per masked frame), ``accuracy`` and ``commonest`` (the accuracy
        of always guessing the commonest token of these very frames); ``codebook``: use by all targets.
    """
    model.eval()
    model.setup_validation_data(OmegaConf.create(OmegaConf.to_container(model.cfg.validation_ds, resolve=True)))
    use = CodebookUse(model.quantizer.num_classes, model.quantizer.num_books, window=len(model.val_dataloader()))
    contexts = {}
    for sizes in model.encoder.att_context_size_all:
        torch.manual_seed(seed)
        with model.encoder.using_att_context_size(sizes) as context, torch.inference_mode():
            contexts[context.label] = _evaluate_context(model, use if not contexts else None)
    statistics = {name: value.item() for name, value in use.statistics()._asdict().items()}
    return {'contexts': contexts, 'codebook': {**statistics, 'classes': model.quantizer.num_classes}}


def _evaluate_context(model, use) -> dict:
    loss = correct = frames = 0
    guesses = torch.zeros(model.quantizer.num_classes, dtype=torch.long)
    for batch in tqdm(model.val_dataloader(), desc=f'context {model.encoder.att_context_size}'):
        log_probs, lengths, masks, tokens = model(
            input_signal=batch.audio,
            input_signal_length=batch.audio_len,
            noisy_input_signal=batch.noisy_audio,
            noisy_input_signal_length=batch.noisy_audio_len,
            apply_mask=True,
        )
        if use is not None:
            use.update(tokens, model.last_batch.token_lengths)
        log_probs, tokens = (x.squeeze(-1) if x.dim() > y else x for x, y in ((log_probs, 3), (tokens, 2)))
        log_probs, tokens, counted = getattr(model.loss, 'mlm_loss', model.loss).align(
            log_probs, tokens, masks, lengths
        )
        log_probs, tokens = log_probs[counted], tokens[counted]
        loss -= log_probs.gather(1, tokens.unsqueeze(1)).sum().item()
        correct += (log_probs.argmax(dim=1) == tokens).sum().item()
        frames += tokens.numel()
        guesses += torch.bincount(tokens, minlength=guesses.numel())
    frames = max(frames, 1)
    return {
        'loss': loss / frames,
        'accuracy': correct / frames,
        'commonest': guesses.max().item() / frames,
        'masked_frames': frames,
    }


def learning_table(results: dict) -> Table:
    """Lay out :func:`evaluate`'s results at the ``start`` and the ``end`` of a training run."""
    use = results['end']['codebook']
    table = Table(
        title='What was learned, on masked frames of the validation data',
        caption=f"targets: {use['codes_used']} of {use['classes']} codes used, perplexity {use['perplexity']:.0f}, "
        f"the commonest for {use['top_share']:.1%} of the frames",
    )
    table.add_column('context')
    for name in ('loss at start', 'at end', 'accuracy at start', 'at end', 'always the commonest'):
        table.add_column(name, justify='right')
    for label, end in results['end']['contexts'].items():
        start = results['start']['contexts'][label]
        losses = [f"{start['loss']:.3f}", f"{end['loss']:.3f}"]
        accuracies = [f"{value:.2%}" for value in (start['accuracy'], end['accuracy'], end['commonest'])]
        table.add_row(label.replace('_', ', '), *losses, *accuracies)
    return table
