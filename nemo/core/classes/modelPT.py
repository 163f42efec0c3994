# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``modelPT.py``: ``init_from_*`` checks what it is given and logs what was loaded.

Data workers can be spawned: NeMo's ``collate_fn`` is decorated with wrapt, whose methods pickle refuses.
"""

import copyreg

import wrapt

from nemo.core.connectors.initial_weights import check_encoder_was_loaded, load_weights, sources_of
from nemo.utils.get_rank import is_global_rank_zero
from nemo_streaming_ssl import upstream

_up = upstream(globals())


class ModelPT(_up.ModelPT):
    """NeMo's base class of models."""

    def maybe_init_from_pretrained_checkpoint(self, cfg, map_location: str = 'cpu'):
        """Load the weights that one of the config's ``init_from_*`` names; the forms are NeMo's.

        Every rank reads files. A pre-trained model is downloaded by the first rank alone, as in NeMo.

        Raises:
            ValueError: naming the key, if weights cannot be read, a pattern matches no tensor, a tensor has another
                shape, or nothing is loaded into the encoder.
        """
        sources, loaded = sources_of(cfg), set()
        if cfg.get('init_from_pretrained_model') is not None and not is_global_rank_zero():
            return
        for source in sources:
            loaded |= load_weights(self, source, *source.read(self, map_location, strict=cfg.get('init_strict', True)))
        check_encoder_was_loaded(self, sources, loaded)


copyreg.pickle(wrapt.BoundFunctionWrapper, lambda method: (getattr, (method._self_instance, method.__name__)))
