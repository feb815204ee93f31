"""What every patched rank needs, imported once in the fork server of `tests/_distributed.py`.

Its trap: it runs before any test code, so it must import nothing that a test may want to import itself.
"""

from megatron_patches import apply_patches

apply_patches("cpu")

import megatron.core.dist_checkpointing.strategies.torch  # noqa: E402
import megatron.core.models.gpt.gpt_layer_specs  # noqa: E402
import megatron.core.models.gpt.gpt_model  # noqa: E402
import megatron.core.optimizer  # noqa: E402
import megatron.core.pipeline_parallel  # noqa: E402, F401

import metis.training.loop  # noqa: E402, F401
