# SPDX-License-Identifier: Apache-2.0
"""The config keys of this project, each declared once: default, meaning, allowed values and page.

Parsing, errors and ``docs/configuration.md`` follow from the declarations. This module imports the standard library alone.
"""

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, NamedTuple


class Allowed(NamedTuple):
    """The values that a key may have."""

    text: str
    test: Callable[[Any], bool]


def one_of(*values: str) -> Allowed:
    """Allow some values."""
    return Allowed(f"one of {', '.join(values)}", lambda value: value in values)


def number(text: str, test: Callable[[float], bool], kinds: tuple[type, ...] = (int, float)) -> Allowed:
    """Allow finite numbers for which a test holds."""
    is_number = lambda value: isinstance(value, kinds) and not isinstance(value, bool)
    return Allowed(text, lambda value: is_number(value) and math.isfinite(value) and test(value))


def whole_number(lowest: int) -> Allowed:
    """Allow whole numbers from a lowest one on."""
    return number(f'a whole number of {lowest} or more', lambda value: value >= lowest, (int,))


def bounds(lowest: int, unit: str) -> Allowed:
    """Allow two whole numbers from a lowest one on, of which the second is no smaller."""
    text, whole = f'[low, high] in {unit}, whole numbers of {lowest} or more', whole_number(lowest).test
    is_pair = lambda value: isinstance(value, Sequence) and len(value) == 2
    return Allowed(text, lambda value: is_pair(value) and all(map(whole, value)) and value[0] <= value[1])


ANYTHING = Allowed('', lambda value: True)
"""Left to the code that uses the key."""
INTEGER = number('a whole number', lambda value: True, (int,))
PROBABILITY = number('a number from 0 to 1', lambda value: 0 <= value <= 1)
FLAG = Allowed('true or false', lambda value: isinstance(value, bool))
ABOVE_0 = number('a number above 0', lambda value: value > 0)
LOGGED_NUMBERS, BY_LAYER = 'scale#logged-numbers', 'contexts#contexts-by-layer'  # pages


def key(default, meaning: str, allowed: Allowed = ANYTHING, page: str = '') -> Any:
    """Declare a key: default (``MISSING``: required; None: null), meaning (Markdown), allowed values.

    ``page`` of ``docs/``, with the heading where there is one, stands where it is not the section's.
    """
    if default is None and allowed is not ANYTHING:
        text, test = allowed
        allowed = Allowed(f'null or {text}', lambda value: value is None or test(value))
    return field(default=default, metadata={'meaning': meaning, 'allowed': allowed} | ({'page': page} if page else {}))


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of a config; its fields are its keys. One that is not closed has keys of NeMo's, too."""

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
        """Read a section; None takes the defaults. ValueError names key, value and what is allowed.

        ``name`` is for errors, where it is not the section's.
        """
        name, section, given = name or cls.name, {} if section is None else section, {}
        if not isinstance(section, Mapping):
            raise ValueError(f"{name} is {section!r}; it must be a section with {', '.join(cls.keys())}, or null")
        if cls.closed:
            check_known(name, section, cls.keys())
        for each in fields(cls):
            value, allowed = section.get(each.name), each.metadata['allowed']
            if each.name in section:
                given[each.name] = value
                if not allowed.test(value):
                    raise ValueError(f"{name}.{each.name} is {value!r}; it must be {allowed.text}")
            elif each.default is MISSING:
                raise ValueError(f"{name} is {dict(section)}; it must have {each.name}")
        return cls(**given)


class Model(Section, name='model', page='reports#validation-in-every-context', closed=False):
    objective: str = key('masked', 'What the encoder predicts.', one_of('masked', 'next_token', 'both'), 'objectives')
    target_normalize: str | None = key(
        None, "Normalisation for the targets; `null`: the encoder's.", one_of('NA', 'per_feature'), 'pretraining'
    )
    loss_over: str = key('rank', 'Mean over the tokens of a rank, or all.', one_of('rank', 'global'), LOGGED_NUMBERS)
    log_peak_flops: float | None = key(None, 'FLOP/s of a device, for `model_flops_share`.', ABOVE_0, LOGGED_NUMBERS)
    validate_contexts: object = key(None, 'Contexts to validate in: `all`, the `first`, or a list; `null`: as NeMo.')
    audit_every_n_batches: int | None = key(
        None, 'Batches from one audit of the masks to the next.', whole_number(1), 'reports#audit-of-the-masking'
    )
    log_figures: bool | None = key(None, 'Whether to write pictures to TensorBoard.', FLAG, 'reports#figures')


class NextToken(Section, name='model.next_token', page='objectives#which-tokens-are-next'):
    horizons: int = key(4, 'Number of next tokens that each frame predicts.', whole_number(1))
    positions: str = key('all', 'Frames that predict: all, or the last of a chunk.', one_of('all', 'chunk_end'))
    weight: float = key(1.0, 'Weight of the next-token loss, with `both`.', ABOVE_0)


class Preprocessor(Section, name='model.preprocessor', page='pretraining', closed=False):
    normalize: object = key('per_feature', 'A value of NeMo, or for streams a file of `compute_feature_stats.py`.')


class ValidationMasks(Section, name='model.validation_masks', page='reports#validation-in-every-context'):
    seed: int = key(0, 'Seed of the masks of validation; they are the same each time.', whole_number(0))
    left_context: int | None = key(None, 'Their left context; `null`: the smallest one validated.', whole_number(-1))


class Probe(Section, name='model.probe', page='reports#frozen-probe'):
    train_manifest: str = key(MISSING, 'Manifest of some minutes of transcribed speech to train the probe on.')
    test_manifest: str = key(MISSING, 'Manifest of other utterances to test the probe on.')
    every_n_validations: int = key(1, 'Validations from one probe to the next.', whole_number(1))
    steps: int = key(300, 'Training steps of a probe.', whole_number(1))
    labels: str = key('text', 'What to recognise: characters of `text`, or `phones`.', one_of('text', 'phones'))


class Data(Section, name='model.train_ds', page='faults', closed=False):
    skip_bad_audio: bool = key(False, 'Whether to leave bad audio out, or to end the run; in each data section.')


class SyncedContexts(
    Section, name='model.train_ds.synced_contexts', page='contexts#contexts-that-come-with-the-batches'
):
    context_options: list = key(MISSING, 'Contexts to draw one from for each batch, the same on all ranks.')
    context_probs: list | None = key(None, 'Their probabilities; the sum is 1. `null`: all equal.')
    seed: int = key(0, 'Seed of the draw.')


class Resumable(Section, name='model.train_ds.resumable', page='faults#exact-resume'):
    seed: int = key(0, 'Seed of the order of the data and of the noise; `resumable: null`: no exact resume.', INTEGER)


class Masking(Section, name='model.masking', page='contexts#what-is-masked-in-each-context', closed=False):
    causal: bool = key(False, 'Whether masks keep a frame at the start visible if the left context is unlimited.')
    left_context_size: int = key(-1, 'Largest left context that masks use, in attention frames; -1: no limit.')
    follow_context: bool = key(True, "Whether masks use the context and the settings above; `false`: stock's masks.")
    subsampling_factor: int = key(1, 'Mask frames in one attention frame; the model sets it.')


class Quantizer(Section, name='model.quantizer', page='objectives#targets-from-principal-components', closed=False):
    projection: str = key('random', 'Projection of the features; `pca` needs a file.', one_of('random', 'pca'))
    projection_file: str | None = key(None, 'File of `compute_feature_stats.py --pca`, for training.')


class Encoder(Section, name='model.encoder', page='contexts', closed=False):
    att_context_seed: int = key(0, 'Seed of the draw of the context; the draw depends on it and the step only.')
    att_context_shared: bool = key(True, 'Whether all ranks draw the same context in a step.', FLAG)
    layer_att_context_size: object = key(
        None, 'A list with a context for each layer, `[[first layer, context], ...]`, or a mapping.', page=BY_LAYER
    )
    activation_checkpointing: str = key(
        'none', 'Layers to recompute: `none`, `layers` (all), `every_2`.', page='scale#what-a-step-takes'
    )
    blockwise_attention: str = key('auto', 'Whether attention runs in blocks: `auto`, `on`, `off`.', page='blockwise')


class ContextSampler(Section, name='model.encoder.att_context_sampler', page='contexts#dynamic-chunks'):
    full_prob: float = key(MISSING, 'Probability that a batch has the context `[-1, -1]`.', PROBABILITY)
    chunk_size: list = key(MISSING, 'Smallest and largest chunk.', bounds(1, 'attention frames'))
    left_chunks: list | None = key(None, 'Smallest and largest limited left context.', bounds(0, 'chunks'))
    left_limited_prob: float = key(0.0, 'Probability that a batch of chunks has a limited left context.', PROBABILITY)


class LayerContexts(Section, name='model.encoder.layer_att_context_size', page=BY_LAYER):
    anchors: list = key(MISSING, 'In the mapping: `[[first layer, [left, right]], ...]`.')
    interpolate: str = key('step', 'In the mapping: contexts between anchors, `step` or `linear`.')


class Loss(Section, name='model.loss', page='patches#where-results-differ-from-stocks-on-purpose', closed=False):
    decoder_offset: int = key(0, 'Token i is predicted from decoder frame i plus this; 1 with causal subsampling.')


class Curriculum(Section, name='curriculum', page='contexts#curriculum'):
    milestones: list | None = key(None, 'Widest context from each step on: `[[step, [left, right]], ...]`.')
    interpolate: str = key('step', 'Ceilings between milestones: `step` or `linear`.')
    start: list | None = key(None, 'First ceiling of a linear increase, in place of `milestones`.')
    end: list | None = key(None, 'Last ceiling of the linear increase.')
    warmup_steps: int | None = key(None, 'Steps from `start` to `end`.')


class Streaming(Section, name='streaming', page='nemo_pipelines', closed=False):
    live: object = key('auto', 'Whether a session computes the encoder, equal to offline: `auto`, `true`, `false`.')


SECTIONS = [dataclass(frozen=True, kw_only=True)(section) for section in Section.__subclasses__()]
CONFIG_KEYS: dict[str, dict[str, Any]] = {
    f'{section.name}.{each.name}': {'page': section.page, 'default': each.default, **each.metadata}
    for section in SECTIONS
    for each in fields(section)
}


def check_known(section: str, keys: Iterable[str], known: Collection[str], likeness: float | None = None) -> None:
    """Check that a section (full name) has known keys only; ValueError names the nearest key, or all.

    With ``likeness``, from 0 to 1, it may have others, but none that is more like a known one.
    """
    prefix = f'{section}.' if section else ''
    for each in [each for each in keys if each not in known]:
        nearest = difflib.get_close_matches(str(each), known, n=1, cutoff=likeness or 0.6)
        if nearest:
            raise ValueError(f"{prefix}{each} is not known; did you mean {prefix}{nearest[0]}?")
        if likeness is None:
            raise ValueError(f"{prefix}{each} is not known; {section} takes {', '.join(sorted(known))}")


def where_to_read(text: str) -> str:
    """Return the page of the first key of this project that an error names, to append to it; or ''.

    The keys in the text may lack the ``model.`` in front, and be those of ``validation_ds`` or ``test_ds``.
    """
    text = re.sub('(validation|test)_ds', 'train_ds', text)
    places = [
        (text.index(name), -len(name), declared['page'])
        for full, declared in CONFIG_KEYS.items()
        for name in (full, full.removeprefix('model.'), full.removeprefix('model.').rpartition('.')[0])
        if re.search('[._]', name) and name in text  # a plain word may mean anything
    ]
    page, _, heading = min(places)[2].partition('#') if places else ('', '', '')
    return page and f"\nSee docs/{page}.md{heading and f'#{heading}'} (python -m nemo_streaming_ssl docs {page})"
