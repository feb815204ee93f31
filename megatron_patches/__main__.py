"""`python -m megatron_patches`: print what is patched, why, and when each patch can go."""

import sys

from megatron_patches import documentation

sys.stdout.write(documentation() + "\n")
