# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""What is measured of a model that learns without labels: masks, targets, validation, pictures. NeMo has no such package."""
