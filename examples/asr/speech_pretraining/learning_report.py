# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""A table of what a training run has learned of masked speech, per attention context."""

from evaluate_contexts import with_interval
from rich.table import Table


def learning_table(start: dict, end: dict) -> Table:
    """Lay out the results of ``evaluate_contexts.evaluate_models`` for a model before and after its training."""
    use = end['codebook']
    table = Table(
        title='What was learned, on masked frames of the validation data',
        caption=f"in brackets: 95% intervals over {end['contexts'][0]['utterances']} utterances; targets: "
        f"{use['codes_used']:.0f} of {use['classes']} codes used, perplexity {use['perplexity']:.0f}, the commonest "
        f"for {use['top_share']:.1%} of the frames",
    )
    table.add_column('context')
    for name in (
        'loss at start',
        'at end',
        'accuracy at start',
        'at end',
        'perplexity at end',
        'always the commonest',
    ):
        table.add_column(name, justify='right')
    for before, after in zip(start['contexts'], end['contexts'], strict=True):
        cells = [f"{before['loss']:.3f}", with_interval(after, 'loss', '{:.3f}')]
        cells += [f"{before['accuracy']:.2%}", with_interval(after, 'accuracy', '{:.2%}')]
        cells += [f"{after['perplexity']:.1f}", f"{after['commonest']:.2%}"]
        table.add_row(', '.join(map(str, after['context'])), *cells)
    return table
