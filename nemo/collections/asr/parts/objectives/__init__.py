# SPDX-License-Identifier: Apache-2.0
"""What a model predicts: masked tokens (NEST), next tokens (NEST-RQ), or both."""
