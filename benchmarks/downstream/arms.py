# SPDX-License-Identifier: Apache-2.0
"""The arms of the comparison, as overrides of one config of pre-training. Nothing but what is said here differs."""

from dataclasses import dataclass

from calibration import Masks
from settings import CONTEXTS, Settings

CONFIG = 'nest_fast-conformer_streaming_tiny'
REFERENCE, SHORT = 'synchronised', 'stock-short'
REFINED = '-refined'
REFINE = '{every_n_steps: %d, until_step: %d, decay: 0.5}'
CONTEXT_FREE = ('model.masking.causal=false',)  # the rest of it is pretrain_context_free.py's
# What an encoder that is not to stream has today; convert_to_streaming.py makes it stream afterwards.
OFFLINE = (
    *CONTEXT_FREE,
    'model.encoder.att_context_size=[-1,-1]',
    'model.encoder.causal_downsampling=false',
    'model.encoder.conv_context_size=null',
    'model.encoder.conv_norm_type=batch_norm',
    'model.loss.decoder_offset=0',
    'model.preprocessor.normalize=per_feature',
    'model.target_normalize=NA',
)


@dataclass(frozen=True)
class Arm:
    """One way to pre-train."""

    what: str
    """In a few words, for tables."""
    masks: Masks | None = None
    """None: nothing is masked."""
    overrides: tuple = ()
    """Of the config of pre-training."""
    pretrained: bool = True
    converted: bool = False
    """Whether the encoder is offline, and made to stream before it is fine-tuned."""
    layered: bool = False
    """Whether layers have contexts of their own, under a ceiling that rises."""

    @property
    def ignores_context(self) -> bool:
        """Whether there are masks that take no notice of the attention's context."""
        return self.masks is not None and not self.masks.follows


FOLLOWING = Masks(CONTEXTS, follows=True)
TIGHTEST = Masks(CONTEXTS[:1], follows=True)  # the lowest layer sees no more, whatever the batch
IGNORING = Masks(CONTEXTS, follows=False)
WHOLE = Masks(((-1, -1),), follows=False)  # all of the utterance is seen
ARMS = {
    'scratch': Arm('no pre-training', pretrained=False),
    'offline': Arm('offline, stock masks, then converted', WHOLE, OFFLINE, converted=True),
    'stock': Arm('streaming, stock masks', IGNORING, CONTEXT_FREE),
    SHORT: Arm('streaming, stock masks in short blocks', IGNORING, CONTEXT_FREE),
    REFERENCE: Arm('streaming, synchronised answerable masks', FOLLOWING),
    'layers': Arm("synchronised, layers' contexts, curriculum", TIGHTEST, layered=True),
    'next_token': Arm('next tokens, no masks', overrides=('+model.objective=next_token',)),
    'both': Arm('synchronised masks and next tokens', FOLLOWING, ('+model.objective=both',)),
    'both-stock': Arm('stock masks and next tokens', IGNORING, (*CONTEXT_FREE, '+model.objective=both')),
}
MASKED = {name: arm.masks for name, arm in ARMS.items() if arm.masks is not None}
# Second minus first: what each part adds. Below 0 is better.
COMPARED = (
    *(('scratch', name) for name in ARMS if name != 'scratch'),
    ('offline', REFERENCE),
    ('stock', REFERENCE),
    (SHORT, REFERENCE),
    ('stock', SHORT),
    (REFERENCE, 'layers'),
    (REFERENCE, 'next_token'),
    (REFERENCE, 'both'),
    ('next_token', 'both'),
    ('both-stock', 'both'),
)


def find(name: str) -> Arm:
    """Return an arm, by its name or that of its version with refined targets.

    Raises:
        ValueError: if there is none, with the names that there are.
    """
    base = name.removesuffix(REFINED)
    if base not in ARMS or (base != name and not ARMS[base].pretrained):
        raise ValueError(f"--arm is {name!r}; it must be one of {', '.join(ARMS)}, or with {REFINED} behind it")
    return ARMS[base]


def order(name: str) -> tuple:
    """Return a key that sorts arms as they stand above, those with refined targets behind."""
    return name.endswith(REFINED), list(ARMS).index(name.removesuffix(REFINED))


def compared(names) -> list[tuple[str, str]]:
    """Return which arms of those given are compared, the refined ones with their own without refinement, too."""
    pairs = [*COMPARED, *((name.removesuffix(REFINED), name) for name in names if name.endswith(REFINED))]
    return [pair for pair in pairs if set(pair) <= set(names)]


def overrides(name: str, settings: Settings, seed: int, masks: dict) -> list[str]:
    """Return the overrides of an arm; those of data and folders are run.py's.

    Args:
        name: of the arm.
        settings: the sizes.
        seed: of weights, data order, contexts and masks.
        masks: what ``calibration.calibrated`` returned.
    """
    arm, contexts = find(name), [list(context) for context in CONTEXTS]
    made = [
        f'seed={seed}',
        f'model.train_ds.resumable.seed={seed}',
        f'model.encoder.att_context_seed={seed}',
        f'model.num_classes={settings.classes}',
        f'model.encoder.n_layers={settings.layers}',
        f'model.encoder.d_model={settings.width}',
        f'model.encoder.att_context_size={contexts}',
        *arm.overrides,
    ]
    own = masks.get(name.removesuffix(REFINED))
    if own is not None:
        made += [f"model.masking.block_size={own['block_size']}", f"model.masking.mask_prob={own['mask_prob']}"]
    if arm.layered:
        made += _layers(settings)
    if name.endswith(REFINED):
        steps = settings.pretraining_steps
        made.append(f'+model.quantizer.refine={REFINE % (max(1, steps // 30), max(1, steps // 3))}')
    return made


def _layers(settings: Settings) -> list[str]:
    """Return the contexts of the layers, in thirds from the lowest, and the ceiling, in thirds of the steps."""
    limited = [list(context) for context in CONTEXTS if context[0] >= 0]
    thirds = range(len(limited))
    first = sorted({-(-settings.layers * third // len(limited)): limited[third] for third in thirds}.items())
    milestones = sorted(
        {settings.pretraining_steps * third // len(limited): limited[third] for third in thirds}.items()
    )
    return [
        f'+model.encoder.layer_att_context_size={[list(anchor) for anchor in first if anchor[0] < settings.layers]}',
        f'+curriculum={{milestones: {[list(milestone) for milestone in milestones]}}}',
    ]
