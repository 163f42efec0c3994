# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``cache_aware_pipeline_builder.py``: pipelines over live streams that equal offline."""

from collections.abc import Mapping

from nemo.collections.asr.inference.pipelines.live_pipelines import LiveCTCPipeline, LiveRNNTPipeline
from nemo.utils import logging
from nemo_streaming_ssl import upstream

_up = upstream(globals())


class CacheAwarePipelineBuilder(_up.CacheAwarePipelineBuilder):
    """NeMo's builder of cache-aware pipelines, with ``streaming.live: auto | true | false`` (``auto``).

    It is whether streams equal offline. ``auto`` is true for models that normalise by fixed statistics, which NeMo's own
    pipelines leave out.

    Raises:
        ValueError: if the key has another value, or is true and the model cannot stream.
    """

    @classmethod
    def build_cache_aware_ctc_pipeline(cls, cfg):
        """Build the pipeline of a CTC model."""
        return cls._build_pipeline(cfg, cls.get_ctc_decoding_cfg(), _up.CacheAwareCTCPipeline, LiveCTCPipeline)

    @classmethod
    def build_cache_aware_rnnt_pipeline(cls, cfg):
        """Build the pipeline of an RNNT model."""
        return cls._build_pipeline(cfg, cls.get_rnnt_decoding_cfg(cfg), _up.CacheAwareRNNTPipeline, LiveRNNTPipeline)

    @classmethod
    def _build_pipeline(cls, cfg, decoding_cfg, stock: type, live: type):
        choice = cfg.streaming.get('live', 'auto')
        if choice not in (True, False, 'auto'):
            raise ValueError(f"streaming.live is {choice!r}; it must be auto, true or false")
        asr_model = cls._build_asr(cfg, decoding_cfg)
        if choice == 'auto':
            choice = isinstance(asr_model.asr_model_cfg.preprocessor.get('normalize'), Mapping)
        pipeline_class = live if choice else stock
        logging.info(f"streaming.live: {choice}; the pipeline is a {pipeline_class.__name__}")
        return pipeline_class(cfg, asr_model, cls._build_itn(cfg, input_is_lower_cased=True), cls._build_nmt(cfg))
