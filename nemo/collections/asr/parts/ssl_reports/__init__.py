# SPDX-License-Identifier: Apache-2.0
"""What is measured of a model that learns without labels: masks, targets, validation, pictures. NeMo has no such package."""
