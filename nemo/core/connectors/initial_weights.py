# SPDX-License-Identifier: Apache-2.0
"""Read the weights of ``init_from_*``, load them, and log what was loaded. New in this project."""

import difflib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from omegaconf import DictConfig

from nemo.utils import logging, torch_files

PLACES = {'init_from_nemo_model': 'path', 'init_from_pretrained_model': 'name', 'init_from_ptl_ckpt': 'path'}
"""The three keys, and the option that names the weights where the value is a mapping of sources."""
FILES_OF = {'.nemo': 'init_from_nemo_model', '.ckpt': 'init_from_ptl_ckpt'}
SHAPING_KEYS = (  # of model.encoder; the shapes and names of its tensors follow from them
    *('causal_downsampling', 'conv_norm_type', 'd_model', 'n_layers', 'n_heads', 'feat_in', 'feat_out', 'subsampling'),
    *('subsampling_factor', 'subsampling_conv_channels', 'ff_expansion_factor', 'conv_kernel_size'),
    *('self_attention_model', 'untie_biases', 'use_bias'),
)


@dataclass
class Source:
    """Weights of another model: a file, or the name of a pre-trained model.

    A tensor is loaded if its name contains one of ``include`` and none of ``exclude``.
    """

    kind: str  # one of PLACES
    key: str  # in the config
    place: str
    include: Sequence[str] = ('',)
    exclude: Sequence[str] = ()

    def takes(self, name: str) -> bool:
        """Return whether a tensor is loaded."""
        return any(part in name for part in self.include) and not any(part in name for part in self.exclude)

    def read(self, model, map_location='cpu', strict: bool = True) -> tuple:
        """Return config or None, and state dict, by a ModelPT or its class; ValueError for a broken file."""
        if self.kind != 'init_from_ptl_ckpt':
            restored = self._open(model, map_location=map_location, strict=strict)
            return restored.cfg, restored.state_dict()
        checkpoint = self._open(model, map_location=map_location)
        if not isinstance(checkpoint, dict) or 'state_dict' not in checkpoint:
            raise ValueError(f"{self.key}: {self.place} has no state_dict; a Lightning checkpoint is needed")
        parameters = checkpoint.get('hyper_parameters') or {}
        return parameters.get('cfg', parameters) or None, checkpoint['state_dict']

    def read_config(self, model) -> DictConfig:
        """Return the model config alone."""
        config = self.read(model)[0] if self.kind == 'init_from_ptl_ckpt' else self._open(model, return_config=True)
        if config is None:
            raise ValueError(f"{self.key}: {self.place} has no model config")
        return config

    def _open(self, model, **options):
        readers = dict(zip(PLACES, (model.restore_from, model.from_pretrained, torch_files.load)))
        try:
            return readers[self.kind](os.path.expanduser(self.place), **options)
        except (OSError, KeyError, ValueError) as error:
            right = FILES_OF.get(os.path.splitext(self.place)[1], self.kind)
            hint = '' if right == self.kind else f'; for such a file set {right}'
            raise ValueError(f"{self.key}: {error}{hint}") from error


def sources_of(cfg) -> list[Source]:
    """Return the sources of ``init_from_*``; ValueError for two keys, unknown options or a missing value."""
    kinds = [kind for kind in cfg if str(kind).startswith('init_from_') and cfg.get(kind) is not None]
    for kind in kinds:
        if kind not in PLACES:
            raise ValueError(f"{kind} is not known;{_hint(kind, PLACES)} weights are named by {', '.join(PLACES)}")
    if len(kinds) > 1:
        raise ValueError(f"{' and '.join(kinds)} are both set; set one")
    if not kinds:
        return []
    kind, value = kinds[0], cfg[kinds[0]]
    if isinstance(value, str):
        return [Source(kind, kind, value)]
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"{kind} is {value!r}; it must be a file or name, or a mapping of sources")
    return [_source(kind, f'{kind}.{name}', options) for name, options in value.items()]


def _source(kind: str, key: str, options) -> Source:
    known = (PLACES[kind], 'include', 'exclude')
    if not isinstance(options, Mapping):
        raise ValueError(f"{key} is {options!r}; it must be a mapping with {', '.join(known)}")
    for option in map(str, options):
        if option not in known:
            raise ValueError(f"{key}.{option} is not known;{_hint(option, known)} {key} takes {', '.join(known)}")
    if not options.get(known[0]):
        raise ValueError(f"{key}.{known[0]} is {options.get(known[0])!r}; it must name the weights")
    patterns = {option: options[option] for option in known[1:] if options.get(option) is not None}
    for option, value in patterns.items():
        patterns[option] = parts = [value] if isinstance(value, str) else value
        if not isinstance(parts, Sequence) or not all(part and isinstance(part, str) for part in parts):
            raise ValueError(f"{key}.{option} is {value!r}; it must be a list of parts of tensor names")
    return Source(kind, f'{key}.{known[0]}', str(options[known[0]]), **patterns)


def load_weights(model, source: Source, config, weights: dict) -> set[str]:
    """Load weights into a model and log a table; return the names of the tensors that were loaded.

    Raises:
        ValueError: if a pattern matches no tensor, or a tensor has another shape in the model.
    """
    _check_patterns(source, weights)
    chosen = {name: tensor for name, tensor in weights.items() if source.takes(name)}
    own = {name: value for name, value in model.state_dict().items() if hasattr(value, 'shape')}
    try:
        missing, unused = model.load_state_dict(chosen, strict=False)
    except RuntimeError as error:  # torch's, for tensors of another shape
        raise ValueError(_why_shapes_differ(model, source, config, own, chosen)) from error
    left_out, loaded = weights.keys() - chosen.keys(), own.keys() - set(missing) if chosen else set()
    columns = {
        'loaded': loaded,
        'left out by pattern': left_out,
        'missing in the file': (own.keys() - loaded) - left_out,
        'unknown to the model': set(unused),
    }
    logging.info(f"{source.key}: {source.place}\n{_table(own, columns)}")
    contexts = _differences(model, config, ['layer_att_context_size'])
    if contexts and 'encoder' in map(_part, loaded):
        logging.warning(f"{source.key}: the weights were trained with other contexts of layers: {contexts}")
    if unused := [name for name in unused if _part(name) == 'encoder']:
        lacking = f"the model has no place for {len(unused)} encoder tensors of {source.place}, such as {unused[0]}"
        logging.warning(f"{source.key}: {lacking}. {_differences(model, config)}")
    return loaded


def check_encoder_was_loaded(model, sources: list[Source], loaded: set[str]) -> None:
    """Raise ValueError if no tensor of the encoder was loaded; ``include: []`` allows that."""
    wanted = [source.key for source in sources if source.include]
    encoder = [name for name in model.state_dict() if _part(name) == 'encoder']
    if wanted and encoder and not loaded.intersection(encoder):
        raise ValueError(
            f"{', '.join(wanted)}: 0 of {len(encoder)} encoder tensors were loaded; check include and exclude, or set "
            "include: [] to load no weights"
        )


def _check_patterns(source: Source, weights: dict) -> None:
    for option in ('include', 'exclude'):
        for pattern in filter(None, getattr(source, option)):
            if not any(pattern in name for name in weights):
                hint = _hint(pattern, {part for name in weights for part in name.split('.')})
                raise ValueError(
                    f"{source.key.rpartition('.')[0]}.{option}: no tensor of {source.place} contains {pattern!r};{hint} "
                    f"its modules are {', '.join(sorted({name.partition('.')[0] for name in weights}))}"
                )


def _hint(word: str, known) -> str:
    near = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    return f" did you mean {near[0]}?" if near else ''


def _part(name: str) -> str:
    top = name.partition('.')[0]
    return 'encoder' if top == 'encoder' else 'decoder' if 'decoder' in top or top == 'joint' else 'other'


def _table(own: dict, columns: dict[str, set[str]]) -> str:
    """Return a row for each part of the model, with the number of its tensors in each column."""
    total, *counts = (Counter(map(_part, names)) for names in (own, *columns.values()))
    rows = [['tensors', *columns]]
    for part in ('encoder', 'decoder', 'other'):
        loaded, *others = (str(count[part]) for count in counts)
        rows.append([part, f'{loaded} of {total[part]}', *others])
    return '\n'.join(f'{first:<10}' + ''.join(f'{cell:>22}' for cell in cells) for first, *cells in rows)


def _why_shapes_differ(model, source: Source, config, own: dict, chosen: dict) -> str:
    differing = [name for name in chosen if name in own and own[name].shape != chosen[name].shape]
    counts = ', '.join(f'{count} {part}' for part, count in Counter(map(_part, differing)).items())
    shapes = [f"{name} {list(chosen[name].shape)} in the file, {list(own[name].shape)} here" for name in differing[:3]]
    what = f"{len(differing)} tensors of {source.place} have another shape ({counts}): {'; '.join(shapes)}"
    settings, advice = _differences(model, config) if 'encoder' in counts else '', 'exclude leaves them out'
    if 'causal_downsampling' in settings or 'conv_norm_type' in settings:
        advice = 'convert_to_streaming.py makes a streaming model of an offline one'
    return f"{source.key}: {what}. {settings and f'{settings}. '}{advice}"


def _differences(model, config, keys=SHAPING_KEYS) -> str:
    """Return the settings of the two encoders that differ, by default those that shape their tensors."""
    theirs, ours = ((cfg or {}).get('encoder') or {} for cfg in (config, model.cfg))
    different = [key for key in keys if theirs and ours and theirs.get(key) != ours.get(key)]
    return ', '.join(
        f"model.encoder.{key} is {theirs.get(key)} in the file and {ours.get(key)} in the model" for key in different
    )
