# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Live streams through a model, equal to its offline forward. NeMo has no such package."""
