# SPDX-License-Identifier: Apache-2.0
"""Live streams through a model, equal to its offline forward. NeMo has no such package."""
