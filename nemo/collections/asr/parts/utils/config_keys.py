# SPDX-License-Identifier: Apache-2.0
"""Every config key that only this project knows: its default, what it means, and the page that explains it.

``docs/configuration.md`` is written from this table, and errors take their pages from it. New in this project.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ConfigKey:
    """One key of a config."""

    name: str
    """From the top of the config, such as ``model.train_ds.resumable.seed``."""
    default: str
    """As it would stand in a config; ``required`` where its section needs it."""
    meaning: str
    """In a sentence, with the unit and what is allowed. Markdown."""
    page: str
    """Of ``docs/``, with the heading where there is one: ``contexts#who-wins``."""


_CURRICULUM_PATH = 'instead of `milestones`: one straight path'

CONFIG_KEYS = (
    ConfigKey(
        'model.objective',
        'masked',
        'What is predicted: `masked` tokens, the `next_token` of every frame, or `both`.',
        'objectives',
    ),
    ConfigKey(
        'model.next_token.horizons',
        '4',
        'How many coming tokens each frame predicts, 1 or more; with `next_token` and `both`.',
        'objectives#which-tokens-are-next',
    ),
    ConfigKey(
        'model.next_token.positions',
        'all',
        'Which frames predict next tokens: `all`, or `chunk_end`, the last `horizons` frames of each chunk, for the tokens '
        'right after the chunk; outside `chunked_limited` the two are the same.',
        'objectives#which-tokens-are-next',
    ),
    ConfigKey(
        'model.next_token.weight',
        '1.0',
        'Weight of the next tokens beside the masked ones, above 0; with `both`.',
        'objectives',
    ),
    ConfigKey(
        'model.target_normalize',
        'null',
        'How the features are normalised that targets are made of, as `preprocessor.normalize` (`per_feature`, a file of '
        'statistics, `NA`); `null`: the same features as the encoder has. Targets exist in training only, so the whole '
        'utterance may be looked at.',
        'pretraining',
    ),
    ConfigKey(
        'model.preprocessor.normalize',
        'as in NeMo',
        'Besides the values of NeMo the path of a file of `compute_feature_stats.py`: the mean and deviation of each '
        'feature over a corpus, which need no future.',
        'pretraining',
    ),
    ConfigKey(
        'model.validate_contexts',
        'null',
        'Contexts in which each validation runs: `all` of the config, the `first`, or a list such as `[[40, 0], low]`; `null`: '
        'one, as in NeMo.',
        'reports#validation-in-every-context',
    ),
    ConfigKey(
        'model.validation_masks.seed',
        '0',
        'Seed of the masks of validation, which are the same each time.',
        'reports#validation-in-every-context',
    ),
    ConfigKey(
        'model.validation_masks.left_context',
        'null',
        'Left context in frames that the masks of validation are answerable in; `null`: the tightest of those validated.',
        'reports#validation-in-every-context',
    ),
    ConfigKey(
        'model.probe.train_manifest',
        'required',
        'Manifest of some minutes of transcribed speech. After validations a small CTC probe is fitted to the frozen encoder on it.',
        'reports#frozen-probe',
    ),
    ConfigKey(
        'model.probe.test_manifest',
        'required',
        'Manifest of other utterances, in which the errors of the probe are counted.',
        'reports#frozen-probe',
    ),
    ConfigKey(
        'model.probe.every_n_validations',
        '1',
        'How many validations lie between two probes, 1 or more.',
        'reports#frozen-probe',
    ),
    ConfigKey('model.probe.steps', '300', 'Steps of fitting a probe, 1 or more.', 'reports#frozen-probe'),
    ConfigKey(
        'model.probe.labels',
        'text',
        'What a probe recognises: the characters of `text`, or the words of `phones`.',
        'reports#frozen-probe',
    ),
    ConfigKey(
        'model.audit_every_n_batches',
        'null',
        'Every so many training batches an audit logs what masking asked of each layer; `null`: never.',
        'reports#audit-of-the-masking',
    ),
    ConfigKey(
        'model.log_figures', 'false', 'Whether each validation draws pictures for TensorBoard.', 'reports#pictures'
    ),
    ConfigKey(
        'model.train_ds.synced_contexts.context_options',
        'required',
        'Contexts of which the loader draws one for each batch; every rank and worker draws the same.',
        'contexts#contexts-that-come-with-the-batches',
    ),
    ConfigKey(
        'model.train_ds.synced_contexts.context_probs',
        'null',
        'Their probabilities, with the sum 1; `null`: all alike.',
        'contexts#contexts-that-come-with-the-batches',
    ),
    ConfigKey(
        'model.train_ds.synced_contexts.seed',
        '0',
        'Seed of that draw, a function of which, the epoch and the batch it is.',
        'contexts#contexts-that-come-with-the-batches',
    ),
    ConfigKey(
        'model.train_ds.skip_bad_audio',
        'false',
        'Whether audio that cannot be read, or holds what is no number, is left out with a warning and counted; `false`: it '
        'ends the run with the name of the file. In `validation_ds` and `test_ds`, too.',
        'faults',
    ),
    ConfigKey(
        'model.train_ds.resumable.seed',
        '0',
        'Seed of the order of the data and of the noise; with the section `resumable` a run that was interrupted goes on '
        'at the next batch, exactly. `resumable: null` turns it off.',
        'faults#going-on-exactly',
    ),
    ConfigKey(
        'model.masking.causal',
        'false',
        'Whether each masked frame must be answerable where the left context is unlimited, too: at the beginning, where there '
        'is little past.',
        'contexts#what-is-masked-in-each-context',
    ),
    ConfigKey(
        'model.masking.left_context_size',
        '-1',
        'Left context in attention frames that masks are kept answerable in at all events; -1: only what attention says.',
        'contexts#what-is-masked-in-each-context',
    ),
    ConfigKey(
        'model.masking.follow_context',
        'true',
        "Whether masks follow the attention context. `false`: stock's masks; `causal` and `left_context_size` are ignored.",
        'contexts#what-is-masked-in-each-context',
    ),
    ConfigKey(
        'model.masking.subsampling_factor',
        '1',
        'Frames that are masked for one attention frame; the model sets that of its encoder.',
        'contexts#what-is-masked-in-each-context',
    ),
    ConfigKey(
        'model.quantizer.projection',
        'random',
        '`random`, as in NeMo, or `pca`: principal components of the speech, of `compute_feature_stats.py --pca`.',
        'objectives#targets-from-principal-components-and-codebooks-that-follow-the-frames',
    ),
    ConfigKey(
        'model.quantizer.projection_file',
        'null',
        'The file with the components; needed by `pca`, until it is in the checkpoint.',
        'objectives#targets-from-principal-components-and-codebooks-that-follow-the-frames',
    ),
    ConfigKey(
        'model.quantizer.refine.every_n_steps',
        'required',
        'Training steps from one refinement of the codebooks to the next.',
        'objectives#targets-from-principal-components-and-codebooks-that-follow-the-frames',
    ),
    ConfigKey(
        'model.quantizer.refine.until_step',
        'required',
        'The last step at which they are refined.',
        'objectives#targets-from-principal-components-and-codebooks-that-follow-the-frames',
    ),
    ConfigKey(
        'model.quantizer.refine.decay',
        '0.0',
        'By how much the weight of earlier frames shrinks at each refinement, from 0 on and below 1.',
        'objectives#targets-from-principal-components-and-codebooks-that-follow-the-frames',
    ),
    ConfigKey(
        'model.encoder.att_context_seed',
        '0',
        'Seed of the draw of a context for each batch from `att_context_size`, a function of it and the step.',
        'contexts',
    ),
    ConfigKey(
        'model.encoder.att_context_sampler.full_prob',
        'required',
        'Probability that a batch sees the whole utterance.',
        'contexts#dynamic-chunks',
    ),
    ConfigKey(
        'model.encoder.att_context_sampler.chunk_size',
        'required',
        'The smallest and the largest chunk that is drawn, in attention frames.',
        'contexts#dynamic-chunks',
    ),
    ConfigKey(
        'model.encoder.att_context_sampler.left_chunks',
        'null',
        'The fewest and the most chunks of the past where it is limited; comes with `left_limited_prob`.',
        'contexts#dynamic-chunks',
    ),
    ConfigKey(
        'model.encoder.att_context_sampler.left_limited_prob',
        '0.0',
        'Probability that the past of a batch with chunks is limited.',
        'contexts#dynamic-chunks',
    ),
    ConfigKey(
        'model.encoder.layer_att_context_size',
        'null',
        'Contexts of layers: `[[0, [40, 0]], [6, [80, 0]]]` from layer 0 and from layer 6 on, a list with one for each layer, or '
        'a mapping with `anchors` and `interpolate`; `null`: one for all.',
        'contexts#contexts-by-layer',
    ),
    ConfigKey(
        'model.encoder.layer_att_context_size.anchors',
        'required',
        'In the mapping: `[[layer, [left, right]], ...]`.',
        'contexts#contexts-by-layer',
    ),
    ConfigKey(
        'model.encoder.layer_att_context_size.interpolate',
        'step',
        'In the mapping: how layers between anchors get theirs, `step` or `linear`.',
        'contexts#contexts-by-layer',
    ),
    ConfigKey(
        'model.encoder.blockwise_attention',
        'auto',
        'Whether layers with a limited context attend block by block, at linear cost: `auto` (where it is faster), `on`, '
        '`off`.',
        'performance#block-wise-attention',
    ),
    ConfigKey(
        'model.loss.decoder_offset',
        '0',
        'From how many decoder frames later a token is predicted; 1 with causal subsampling, whose frame i ends where '
        'target i begins.',
        'patches#where-results-differ-from-stocks-on-purpose',
    ),
    ConfigKey(
        'curriculum.milestones',
        'null',
        'A ceiling on contexts that rises with the steps: `[[step, [left, right]], ...]`.',
        'contexts#a-curriculum',
    ),
    ConfigKey('curriculum.interpolate', 'step', 'Between milestones: `step` or `linear`.', 'contexts#a-curriculum'),
    ConfigKey('curriculum.start', 'null', f'The first ceiling, {_CURRICULUM_PATH}.', 'contexts#a-curriculum'),
    ConfigKey('curriculum.end', 'null', f'The last ceiling, {_CURRICULUM_PATH}.', 'contexts#a-curriculum'),
    ConfigKey(
        'curriculum.warmup_steps',
        'null',
        f'Steps from the first to the last, {_CURRICULUM_PATH}.',
        'contexts#a-curriculum',
    ),
    ConfigKey(
        'streaming.live',
        'auto',
        'In the configs of streaming pipelines of NeMo 3: whether streams are live ones, equal to offline: `auto`, `true`, '
        '`false`.',
        'streaming#nemos-streaming-pipelines',
    ),
)


def keys_below(section: str) -> tuple[str, ...]:
    """Return the last parts of the keys directly in a section, such as ``model.train_ds.resumable``; sections, too."""
    inside = [key.name.removeprefix(f'{section}.') for key in CONFIG_KEYS if key.name.startswith(f'{section}.')]
    return tuple(dict.fromkeys(name.partition('.')[0] for name in inside))


def page_of(text: str) -> str | None:
    """Return the page about the first key of this project that a text names, None if it names none.

    Args:
        text: of an error; keys may lack the ``model.`` in front, and be those of ``validation_ds`` or ``test_ds``.
    """
    text = text.replace('validation_ds.', 'train_ds.').replace('test_ds.', 'train_ds.')
    places = []
    for page, names in _names_by_page().items():
        places += [(text.index(name), -len(name), page) for name in names if name in text]
    return min(places)[2] if places else None


def _names_by_page() -> dict[str, set[str]]:
    """Return for each page the names that texts have for its keys and for their sections."""
    found: dict[str, set[str]] = {}
    for key in CONFIG_KEYS:
        short = key.name.removeprefix('model.')
        sections = {short.rpartition('.')[0]} if short.count('.') > 1 else set()
        telling = {name for name in {short, *sections} if '.' in name or '_' in name}  # a plain word may mean anything
        found.setdefault(key.page, set()).update({key.name, *telling})
    return found
