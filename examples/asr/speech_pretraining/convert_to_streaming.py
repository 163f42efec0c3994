# SPDX-License-Identifier: Apache-2.0
r"""Convert an offline NEST model to a streaming one, for further training.

    python convert_to_streaming.py --model offline.nemo --output streaming.nemo --stats stats.yaml \
        [--contexts "[[80,0],[160,0],[320,0],[-1,0]]"] [--style regular] [--overwrite]
    ... --contexts "[[70,13],[70,6],[70,1],[70,0]]" --style chunked_limited    # with look-ahead, in chunks

The new config has causal convolutions and subsampling, layer_norm, features normalised by the statistics of
compute_feature_stats.py (or not at all), limited attention contexts, targets normalised per utterance, as those of the
offline model, and ``decoder_offset: 1``. Every weight that fits is kept, including the quantizer, so the tokens do not
change; the script lists the others. It checks that the new model streams equal to its own offline forward. The weights
were trained for another encoder, so train the model with pretrain.py and ``+init_from_nemo_model=streaming.nemo``, or
fine-tune it.
"""

from script_tools import report_error, require_patches

require_patches(__file__)

import argparse
import json
import pickle
import sys
from pathlib import Path

from nemo.collections.asr.models import ssl_models
from nemo.collections.asr.models.streaming_conversion import (
    KEPT,
    build,
    check_convertible,
    check_streams,
    convert_weights,
    streaming_config,
)
from nemo.collections.asr.parts.att_context import AttContext
from nemo.collections.asr.parts.preprocessing.features import load_fixed_statistics
from nemo.collections.asr.parts.ssl_reports.figures import look_ahead_title

CONTEXTS = '[[80,0],[160,0],[320,0],[-1,0]]'


def convert(options) -> dict[str, str]:
    """Convert a model by the command line; write the file in one step; return what became of each weight.

    Raises:
        ValueError: naming what cannot be converted, or a file that exists already.
        OSError: if a file cannot be read or written.
    """
    source, output = Path(options.model), Path(options.output)
    if not source.is_file():
        raise ValueError(f"--model {source}: there is no such file")
    if output.suffix != '.nemo' or not output.absolute().parent.is_dir():
        raise ValueError(f"--output {output}: it must be a .nemo file in a folder that is there")
    if output.exists() and (not options.overwrite or output.samefile(source)):
        raise ValueError(f"--output {output} is there already; --overwrite replaces it, if it is another model")
    contexts = _parsed_contexts(options.contexts)
    statistics = None if options.stats is None else load_fixed_statistics(options.stats)
    cfg = ssl_models.SpeechEncDecSelfSupervisedModel.restore_from(str(source), return_config=True)
    try:
        check_convertible(cfg)
        model_class = getattr(ssl_models, str(cfg.target).rpartition('.')[2])
        offline = model_class.restore_from(str(source), map_location='cpu')
        model = build(streaming_config(cfg, contexts, options.style, statistics))
        converted = convert_weights(offline, model)
        print(f"streamed against offline: {check_streams(model):.1e}")
        for context in model.encoder.att_context_size_all:
            print(f"context {look_ahead_title(model, context)}")
    except ValueError as error:
        raise ValueError(f"{source} cannot be converted: {error}") from error
    model.save_to(str(output))
    return converted


def _parsed_contexts(text: str) -> list:
    try:
        contexts = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--contexts {text}: it is no list: {error}") from error
    if not isinstance(contexts, list) or not contexts:
        raise ValueError(f"--contexts {text}: it must be a pair [left, right], or a list of pairs")
    for context in contexts if isinstance(contexts[0], list) else [contexts]:
        AttContext.parse(context, field='--contexts')
    return contexts


def arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', required=True, help='the offline model, a .nemo file')
    parser.add_argument('--output', required=True, help='the .nemo file to write')
    parser.add_argument(
        '--stats', help='yaml file of compute_feature_stats.py; without it features are not normalised'
    )
    parser.add_argument('--contexts', default=CONTEXTS, help=f'[left, right] in attention frames; default {CONTEXTS}')
    parser.add_argument('--style', default='regular', choices=('regular', 'chunked_limited'), help='attention style')
    parser.add_argument('--overwrite', action='store_true', help='replace an existing output file')
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """Run the command line; return the exit status."""
    options = arguments(argv)
    try:
        converted = convert(options)
    except (ValueError, OSError, pickle.UnpicklingError) as error:
        return report_error(__file__, error)
    print(f"{sum(result == KEPT for result in converted.values())} weights kept as they are")
    for name, result in converted.items():
        if result != KEPT:
            print(f"{name}: {result}")
    print(f"{options.output}: train it before you use it: its weights are those of an offline model")
    if options.stats is None:
        print("note: without --stats its features have another scale than those of the offline model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
