# SPDX-License-Identifier: Apache-2.0
"""The arms of the comparison and the contexts that they are trained and judged in; see protocol.md."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """Attention contexts that one encoder is trained in."""

    contexts: tuple
    """[left, right] in attention frames of 80 ms; each batch has one of them."""
    style: str
    """``att_context_style``."""

    @property
    def judged(self) -> tuple:
        """The first and the last context, in which probes are fitted."""
        return self.contexts[0], self.contexts[-1]


KINDS = {
    'causal': Kind(((5, 0), (10, 0), (20, 0), (-1, 0)), 'regular'),
    'chunks': Kind(((70, 13), (70, 6), (70, 1), (70, 0)), 'chunked_limited'),
}
SEEDS = (0, 1, 2)
MASKED_SHARE = 0.3  # of the feature frames, in every arm that masks
SHORT = 'run length'  # as a block: stock's blocks with the mean run of following masks in blocks of 40
OFFLINE = (
    'model.encoder.att_context_style=regular',
    'model.encoder.att_context_size=[-1,-1]',
    'model.encoder.causal_downsampling=false',
    'model.encoder.conv_context_size=null',
    'model.encoder.conv_norm_type=batch_norm',
    'model.loss.decoder_offset=0',
)


@dataclass(frozen=True)
class Arm:
    """One way to obtain an encoder."""

    what: str
    """In a few words, for tables and figures."""
    objective: str | None = 'masked'
    """``model.objective``, ``ctc`` for a supervised encoder, None for one that is not trained."""
    follow: bool | None = None
    """Whether masks follow the context; None: nothing is masked."""
    block: int | str = 40
    """Feature frames of a masked block, or ``SHORT``."""
    offline: bool = False
    """Whether it is pre-trained offline and converted."""
    refined: bool = False
    """Whether the targets were refined in the first third of the steps, which the project can no longer do."""
    longer: int = 1
    """Times the steps of the other arms."""


FEATURES = 'mel'
ARMS = {
    FEATURES: Arm('mel features', None),
    'random': Arm('random encoder', None),
    'stock-40': Arm("stock's masks, blocks of 40", follow=False),
    'following-40': Arm('following masks, blocks of 40', follow=True),
    'next': Arm('next tokens', 'next_token'),
    'supervised': Arm('supervised encoder', 'ctc'),
    'stock-16': Arm("stock's masks, blocks of 16", follow=False, block=16),
    'following-16': Arm('following masks, blocks of 16', follow=True, block=16),
    'stock-short': Arm("stock's masks, run length of following", follow=False, block=SHORT),
    'stock-8': Arm("stock's masks, blocks of 8", follow=False, block=8),
    'following-8': Arm('following masks, blocks of 8', follow=True, block=8),
    'both': Arm('following masks and next tokens', 'both', follow=True),
    'offline': Arm('offline, then converted', follow=False, offline=True),
    'following-refined': Arm('following masks, refined targets', follow=True, refined=True),
    'next-refined': Arm('next tokens, refined targets', 'next_token', refined=True),
    'stock-40-long': Arm("stock's masks, twice the steps", follow=False, longer=2),
    'following-40-long': Arm('following masks, twice the steps', follow=True, longer=2),
    'next-long': Arm('next tokens, twice the steps', 'next_token', longer=2),
}
RUNNABLE = [name for name, arm in ARMS.items() if not arm.refined]
# First minus second, where below 0 is better for the first, by the questions of the protocol.
COMPARED = {
    'Does pre-training help?': (('stock-40', 'random'), ('following-40', 'random'), ('next', 'random')),
    'Do masks that follow the context help?': (
        ('following-40', 'stock-40'),
        ('following-40', 'stock-short'),
        ('following-16', 'stock-16'),
        ('following-8', 'stock-8'),
    ),
    'Are shorter blocks better?': (('following-16', 'following-40'), ('following-8', 'following-40')),
    'Are next tokens better than masked ones, or both together?': (
        ('next', 'following-40'),
        ('next', 'stock-40'),
        ('both', 'next'),
        ('both', 'following-40'),
    ),
    'Is an encoder trained offline and then converted better?': (('offline', 'following-40'),),
    'Do refined targets help?': (('following-refined', 'following-40'), ('next-refined', 'next')),
    'Does twice the training change the order?': (
        ('following-40-long', 'stock-40-long'),
        ('next-long', 'following-40-long'),
    ),
}


def overrides(name: str, kind: str, recipe) -> list[str]:
    """Return the overrides of the tiny streaming config for an arm, in the sizes of a recipe."""
    arm, contexts = ARMS[name], KINDS[kind]
    made = [
        f'model.encoder.n_layers={recipe.layers}',
        f'model.encoder.d_model={recipe.width}',
        f'model.num_classes={recipe.classes}',
        *(
            f'model.encoder.{key}={recipe.dropout}'
            for key in ('dropout', 'dropout_att', 'dropout_emb', 'dropout_pre_encoder')
        ),
        f'model.encoder.att_context_style={contexts.style}',
        f'model.encoder.att_context_size={[list(context) for context in contexts.contexts]}',
    ]
    if arm.objective in ('next_token', 'both'):
        made += [f'+model.objective={arm.objective}', '+model.next_token.positions=chunk_end']
    if arm.follow is False:
        made += ['+model.masking.follow_context=false', 'model.masking.causal=false']
    return made + list(OFFLINE if arm.offline else ())
