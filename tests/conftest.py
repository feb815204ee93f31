"""Makes `from tests._distributed import run_ranks` work however pytest is started, and puts long files first,
so that two workers finish at about the same time.
"""

import sys
from pathlib import Path

REPOSITORY = str(Path(__file__).resolve().parent.parent)
if REPOSITORY not in sys.path:
    sys.path.insert(0, REPOSITORY)

LONG_FILES = (
    "multiproc/test_layouts.py",
    "integration/test_kill_and_resume.py",
    "multiproc/test_resume.py",
    "integration/test_recipe_schedule.py",
    "integration/test_patches.py",
    "integration/test_quantization_log.py",
    "multiproc/test_parallel_operands.py",
    "integration/test_weight_conversion.py",
    "numerics/test_fused_linear.py",
    "numerics/test_kernels.py",
)
"""Files of a minute and more, longest first."""


def pytest_collection_modifyitems(items: list) -> None:
    """Sort by file: long ones first, the others as they come."""
    rank = {name: index for index, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get("/".join(item.path.parts[-2:]), len(rank)))
