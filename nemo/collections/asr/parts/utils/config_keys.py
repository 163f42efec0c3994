# SPDX-License-Identifier: Apache-2.0
"""The config keys of this project, each declared once: default, meaning, allowed values and page.

Parsing, errors and ``docs/configuration.md`` follow from the declarations. This module imports the standard library alone.
"""

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, NamedTuple


class Allowed(NamedTuple):
    """The values that a key may have."""

    text: str
    test: Callable[[Any], bool]

    def or_null(self) -> 'Allowed':
        """Allow null, too."""
        return Allowed(f'null or {self.text}', lambda value: value is None or self.test(value))


def one_of(*values: str) -> Allowed:
    """Allow some values."""
    return Allowed(f"one of {', '.join(values)}", lambda value: value in values)


def number(text: str, test: Callable[[float], bool], kinds: tuple[type, ...] = (int, float)) -> Allowed:
    """Allow finite numbers for which a test holds."""
    is_number = lambda value: isinstance(value, kinds) and not isinstance(value, bool)
    return Allowed(text, lambda value: is_number(value) and math.isfinite(value) and test(value))


def whole_number(lowest: int = 0) -> Allowed:
    """Allow whole numbers from a lowest one on."""
    return number(f'a whole number of {lowest} or more', lambda value: value >= lowest, (int,))


def bounds(lowest: int, unit: str) -> Allowed:
    """Allow two whole numbers from a lowest one on, of which the second is no smaller."""
    text, whole = f'[low, high] in {unit}, whole numbers of {lowest} or more', whole_number(lowest).test
    is_pair = lambda value: isinstance(value, Sequence) and len(value) == 2
    return Allowed(text, lambda value: is_pair(value) and all(map(whole, value)) and value[0] <= value[1])


PROBABILITY = number('a number from 0 to 1', lambda value: 0 <= value <= 1)
FLAG = Allowed('true or false', lambda value: isinstance(value, bool))
ABOVE_0 = number('a number above 0', lambda value: value > 0)


def key(default, meaning: str, allowed: Allowed | None = None, page: str | None = None, shown: str | None = None):
    """Declare a key of a section; its section needs one with the default ``MISSING``.

    Args:
        default: of the key; ``shown`` is how the page shows it, where it is not as in a config.
        meaning: in a sentence, with the unit; Markdown.
        allowed: checked by :meth:`Section.parse`; None: by the code that uses the key.
        page: of ``docs/``, with the heading where there is one; None: the section's.
        shown: see ``default``.
    """
    if shown is None:
        shown = 'required' if default is MISSING else 'null' if default is None else str(default)
        shown = shown.lower() if isinstance(default, bool) else shown
    return field(default=default, metadata=dict(meaning=meaning, allowed=allowed, page=page, shown=shown))


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of a config; its fields are its keys. A closed one has no others."""

    name: ClassVar[str]
    page: ClassVar[str]
    closed: ClassVar[bool]

    def __init_subclass__(cls, name: str, page: str, closed: bool = True):
        cls.name, cls.page, cls.closed = name, page, closed

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        """Return the names of the keys."""
        return tuple(each.name for each in fields(cls))

    @classmethod
    def parse(cls, section: Mapping | None, name: str | None = None):
        """Read a section of a config; None takes the defaults. ``name`` is for errors, where it is not the section's.

        Raises:
            ValueError: naming the key, its value and what is allowed.
        """
        name, section = name or cls.name, {} if section is None else section
        if not isinstance(section, Mapping):
            raise ValueError(f"{name} is {section!r}; it must be a section with {', '.join(cls.keys())}, or null")
        if cls.closed:
            check_known(name, section, cls.keys())
        given = {each: section[each] for each in cls.keys() if each in section}
        for each in fields(cls):
            if each.name not in given and each.default is MISSING:
                raise ValueError(f"{name} is {dict(section)}; it must have {each.name}")
            allowed = each.metadata['allowed']
            if allowed is not None and each.name in given and not allowed.test(given[each.name]):
                raise ValueError(f"{name}.{each.name} is {given[each.name]!r}; it must be {allowed.text}")
        return cls(**given)


class Model(Section, name='model', page='reports#validation-in-every-context', closed=False):
    """Keys beside NeMo's."""

    objective: str = key(
        'masked',
        'What is predicted: `masked` tokens, the `next_token` of every frame, or `both`.',
        one_of('masked', 'next_token', 'both'),
        page='objectives',
    )
    target_normalize: str | None = key(
        None,
        'How the features of the targets are normalised: `per_feature`; `NA`, `null`: as the preprocessor gives them.',
        one_of('NA', 'per_feature').or_null(),
        page='pretraining',
    )
    loss_over: str = key(
        'rank',
        'What the loss is a mean over: the tokens of each `rank`, as in NeMo, or of all ranks, `global`.',
        one_of('rank', 'global'),
        page='scale#logged-numbers',
    )
    log_peak_flops: float | None = key(
        None,
        'Peak operations per second of one device, such as 9.9e14; with it `model_flops_share` is logged.',
        ABOVE_0.or_null(),
        page='scale#logged-numbers',
    )
    validate_contexts: object = key(
        None, 'Contexts of each validation: `all` of the config, the `first`, or a list; `null`: one, as in NeMo.'
    )
    audit_every_n_batches: int | None = key(
        None,
        'Every so many training batches an audit of the masks is logged; `null`: never.',
        whole_number(1).or_null(),
        page='reports#audit-of-the-masking',
    )
    log_figures: bool = key(
        False, 'Whether each validation draws pictures for TensorBoard.', FLAG.or_null(), page='reports#figures'
    )


class NextToken(Section, name='model.next_token', page='objectives#which-tokens-are-next'):
    """For the objectives ``next_token`` and ``both``."""

    horizons: int = key(4, 'How many coming tokens each frame predicts, 1 or more.', whole_number(1))
    positions: str = key(
        'all',
        'Which frames predict: `all`, or `chunk_end`, the last `horizons` of each chunk, the tokens right after it.',
        one_of('all', 'chunk_end'),
    )
    weight: float = key(1.0, 'Weight of the next tokens beside the masked ones, above 0; with `both`.', ABOVE_0)


class Preprocessor(Section, name='model.preprocessor', page='pretraining', closed=False):
    """Keys beside NeMo's."""

    normalize: object = key(
        None,
        "Besides NeMo's values the file of `compute_feature_stats.py`: statistics of a corpus, which need no future.",
        shown='as in NeMo',
    )


class ValidationMasks(Section, name='model.validation_masks', page='reports#validation-in-every-context'):
    """Masks of validation in contexts."""

    seed: int = key(0, 'Seed of the masks of validation, which are the same each time.', whole_number())
    left_context: int | None = key(
        None,
        'Left context in frames that these masks are drawn for; `null`: the tightest of those validated.',
        whole_number(-1).or_null(),
    )


class Probe(Section, name='model.probe', page='reports#frozen-probe'):
    """A probe after validations."""

    train_manifest: str = key(MISSING, 'Manifest of some minutes of transcribed speech, which the probe is fitted to.')
    test_manifest: str = key(MISSING, 'Manifest of other utterances, in which the errors of the probe are counted.')
    every_n_validations: int = key(1, 'How many validations lie between two probes, 1 or more.', whole_number(1))
    steps: int = key(300, 'Steps of fitting a probe, 1 or more.', whole_number(1))
    labels: str = key(
        'text',
        'What a probe recognises: the characters of `text`, or the words of `phones`.',
        one_of('text', 'phones'),
    )


class Data(Section, name='model.train_ds', page='faults', closed=False):
    """Keys beside NeMo's."""

    skip_bad_audio: bool = key(
        False,
        'Whether audio that cannot be read or is not finite is left out and counted; `false`: it ends the run. In '
        '`validation_ds` and `test_ds`, too.',
    )


class SyncedContexts(
    Section, name='model.train_ds.synced_contexts', page='contexts#contexts-that-come-with-the-batches'
):
    """Contexts that come with the batches."""

    context_options: list = key(
        MISSING, 'Contexts of which the loader draws one for each batch; every rank and worker draws the same.'
    )
    context_probs: list | None = key(None, 'Their probabilities, with the sum 1; `null`: all alike.')
    seed: int = key(0, 'Seed of that draw, a function of which, the epoch and the batch it is.')


class Resumable(Section, name='model.train_ds.resumable', page='faults#exact-resume'):
    """Exact resume of the training data."""

    seed: int = key(
        0,
        'Seed of the order of the data and of the noise; an interrupted run goes on at the next batch, exactly. '
        '`resumable: null` turns it off.',
        whole_number(-(2**63)),
    )


class Masking(Section, name='model.masking', page='contexts#what-is-masked-in-each-context', closed=False):
    """Keys beside NeMo's."""

    causal: bool = key(False, 'Whether masks keep a past frame visible where the left context is unlimited, too.')
    left_context_size: int = key(
        -1, 'Left context in attention frames that masks keep a frame visible in, at most; -1: that of the attention.'
    )
    follow_context: bool = key(
        True,
        "Whether masks follow the attention context. `false`: stock's masks; `causal` and `left_context_size` are ignored.",
    )
    subsampling_factor: int = key(1, 'Mask frames in one attention frame; the model sets that of its encoder.')


class Quantizer(Section, name='model.quantizer', page='objectives#refined-codebooks', closed=False):
    """Keys beside NeMo's."""

    projection: str = key(
        'random', '`random`, as in NeMo, or `pca`, of `compute_feature_stats.py --pca`.', one_of('random', 'pca')
    )
    projection_file: str | None = key(None, 'File of the components of `pca`, until they are in the checkpoint.')


class Refine(Section, name='model.quantizer.refine', page=Quantizer.page):
    """Refinement of the codebooks."""

    every_n_steps: int = key(
        MISSING, 'Training steps from one refinement of the codebooks to the next.', whole_number(1)
    )
    until_step: int = key(MISSING, 'The last step at which they are refined.', whole_number(1))
    decay: float = key(
        0.0,
        'Factor on the weight of earlier frames at each refinement, from 0 on and below 1; 0 forgets them.',
        number('a number from 0 on and below 1', lambda value: 0 <= value < 1),
    )


class Encoder(Section, name='model.encoder', page='contexts', closed=False):
    """Keys beside NeMo's."""

    att_context_seed: int = key(0, 'Seed of the draw of a context for each batch, a function of it and the step.')
    att_context_shared: bool = key(
        True,
        'Whether all ranks draw the same context in a step; `false`: less gradient noise and less balanced load.',
        FLAG,
    )
    layer_att_context_size: object = key(
        None,
        'Contexts of layers: `[[0, [40, 0]], [6, [80, 0]]]` from layer 0 and from layer 6 on, one for each layer, or a '
        'mapping; `null`: one for all.',
        page='contexts#contexts-by-layer',
    )
    activation_checkpointing: str = key(
        'none',
        'Layers whose activations the backward pass computes again: `none`, `layers` (all), or `every_2` and so on.',
        page='scale#what-a-step-takes',
    )
    blockwise_attention: str = key(
        'auto',
        'Whether limited contexts attend block by block, at linear cost: `auto` (where it is faster), `on`, `off`.',
        page='blockwise',
    )


class ContextSampler(Section, name='model.encoder.att_context_sampler', page='contexts#dynamic-chunks'):
    """Dynamic chunks."""

    full_prob: float = key(MISSING, 'Probability that a batch sees the whole utterance.', PROBABILITY)
    chunk_size: list = key(
        MISSING,
        'The smallest and the largest chunk that is drawn, in attention frames.',
        bounds(1, 'attention frames'),
    )
    left_chunks: list | None = key(
        None,
        'The fewest and the most chunks of the past where it is limited; comes with `left_limited_prob`.',
        bounds(0, 'chunks').or_null(),
    )
    left_limited_prob: float = key(0.0, 'Probability that the past of a batch with chunks is limited.', PROBABILITY)


class LayerContexts(Section, name='model.encoder.layer_att_context_size', page='contexts#contexts-by-layer'):
    """The mapping; the encoder itself checks the values."""

    anchors: list = key(MISSING, 'In the mapping: `[[layer, [left, right]], ...]`.')
    interpolate: str = key('step', 'In the mapping: how layers between anchors get theirs, `step` or `linear`.')


class Loss(Section, name='model.loss', page='patches#where-results-differ-from-stocks-on-purpose', closed=False):
    """Keys beside NeMo's."""

    decoder_offset: int = key(0, 'From how many decoder frames later a token is predicted; 1 with causal subsampling.')


class Curriculum(Section, name='curriculum', page='contexts#curriculum'):
    """The arguments of ``AttContextCurriculum``, which checks the values."""

    milestones: list | None = key(
        None, 'A ceiling on contexts that rises with the steps: `[[step, [left, right]], ...]`.'
    )
    interpolate: str = key('step', 'Between milestones: `step` or `linear`.')
    start: list | None = key(None, 'The first ceiling, instead of `milestones`: one straight path.')
    end: list | None = key(None, 'The last ceiling of the path.')
    warmup_steps: int | None = key(None, 'Steps from the first to the last ceiling of the path.')


class Streaming(Section, name='streaming', page='nemo_pipelines', closed=False):
    """Keys of NeMo 3's streaming pipelines."""

    live: object = key(
        'auto', 'Whether streams are live ones, equal to offline: `auto`, `true`, `false`; in the configs of NeMo 3.'
    )


class ConfigKey(NamedTuple):
    """One key, as the page shows it."""

    name: str
    default: str
    meaning: str
    page: str


SECTIONS = [dataclass(frozen=True, kw_only=True)(section) for section in Section.__subclasses__()]
CONFIG_KEYS = tuple(
    ConfigKey(f'{section.name}.{each.name}', said['shown'], said['meaning'], said['page'] or section.page)
    for section in SECTIONS
    for each in fields(section)
    for said in [each.metadata]
)


def check_known(section: str, keys: Iterable[str], known: Collection[str]) -> None:
    """Check that a section of a config (its full name) has only known keys.

    Raises:
        ValueError: naming the first unknown key, and the nearest known one or, if none is near, all of them.
    """
    check_spelling(section, keys, known, likeness=0.6)
    for each in keys:
        if each not in known:
            takes = f"{section} takes {', '.join(sorted(known))}"
            raise ValueError(f"{section}.{each} is not known; {takes}{where_to_read(f'{section}.')}")


def check_spelling(section: str, keys: Iterable[str], known: Iterable[str], likeness: float) -> None:
    """Check a section that may have other keys: none may be more like a known one than ``likeness``, from 0 to 1.

    Raises:
        ValueError: naming the first such key, and the nearest known one.
    """
    known, prefix = sorted(known), f'{section}.' if section else ''
    for each in keys:
        nearest = [] if each in known else difflib.get_close_matches(str(each), known, n=1, cutoff=likeness)
        if nearest:
            meant = f'{prefix}{nearest[0]}'
            raise ValueError(f"{prefix}{each} is not known; did you mean {meant}?{where_to_read(meant)}")


def where_to_read(text: str) -> str:
    """Return the page of the first key of this project that an error names, to append to it; or ''.

    The keys in the text may lack the ``model.`` in front, and be those of ``validation_ds`` or ``test_ds``.
    """
    text = text.replace('validation_ds.', 'train_ds.').replace('test_ds.', 'train_ds.')
    places = []
    for each in CONFIG_KEYS:
        short = each.name.removeprefix('model.')
        names = {short, short.rpartition('.')[0] if short.count('.') > 1 else short}
        # a plain word may mean anything
        names = {each.name, *(name for name in names if '.' in name or '_' in name)}
        places += [(text.index(name), -len(name), each.page) for name in names if name in text]
    if not places:
        return ''
    page, _, heading = min(places)[2].partition('#')
    return f"\nSee docs/{page}.md{heading and f'#{heading}'} (python -m nemo_streaming_ssl docs {page})"
