"""What a run has done so far, as plain values: the counters that decide data order, learning rate and log
lines.

One idea: the position of a run is these numbers plus weights, optimizer and random state. Everything
else (the place in the data above all) is derived from them, so a checkpoint needs no further bookkeeping.

Trap: the values are Python's own and equal on all ranks; nothing here may become a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields


@dataclass
class TrainState:
    """Progress of one training run.

    Fields: `iteration`, completed optimizer steps, skipped ones included; `consumed_train_samples` and
    `consumed_valid_samples`, sequences read over all data-parallel ranks; `skipped_train_samples`, the part
    of the training samples that `--iterations-to-skip` passed over; `skipped_iterations`, steps whose update
    was not applied; `num_floating_point_operations`, model FLOPs of all ranks together; `data_order`, a
    digest of the samples that the training data begins with.
    """

    iteration: int = 0
    consumed_train_samples: int = 0
    consumed_valid_samples: int = 0
    skipped_train_samples: int = 0
    skipped_iterations: int = 0
    num_floating_point_operations: float = 0.0
    data_order: str = ""

    def to_dict(self) -> dict[str, int | float | str]:
        """Return the values as a plain dict, the form in which checkpoints keep them."""
        return asdict(self)

    def restore(self, stored: Mapping[str, int | float | str]) -> None:
        """Overwrite the values named in `stored` in place; names that this version does not know are
        ignored.
        """
        for field in fields(self):
            if field.name in stored:
                setattr(self, field.name, type(getattr(self, field.name))(stored[field.name]))
