"""``LastSnapshot``: when the state of a lane is written again."""

from __future__ import annotations

import attrs

# What a snapshot costs, against the work that it saves from being done again.
COST = 20


@attrs.define(eq=False)
class LastSnapshot:
    """What is known of a lane's last snapshot.

    Args:
        device: seconds of the device that the lane had had before it.
        seconds: what writing it took.
        number: of the last request that it includes; -1 without one.
    """

    device: float = 0.0
    seconds: float = 0.0
    number: int = -1

    def due(self, device: float, least: float) -> bool:
        """Whether the work since then would be worse to lose than writing is.

        Args:
            device: seconds of the device that the lane has had.
            least: seconds of the device between two snapshots, at least.
        """
        return device - self.device >= max(least, COST * self.seconds)
