"""CPU time that the host took from a measured process: one reason why the same work takes longer next time.

A container's quota stops its threads for the rest of a period (throttled). A hypervisor runs other machines
on the CPUs of this one (stolen). Both are read before and after, for all processes of this machine.
"""

from dataclasses import dataclass
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # a container sees its own group there
# Version 2 has microseconds in cpu.stat, version 1 nanoseconds in cpu/cpu.stat.
THROTTLED = (("cpu.stat", "throttled_usec", 1e-6), ("cpu/cpu.stat", "throttled_time", 1e-9))


@dataclass(frozen=True)
class HostUse:
    """Seconds since the system or the container started. None if the system does not count them."""

    throttled_seconds: float | None  # summed over all threads stopped by the quota
    stolen_seconds: float | None  # summed over all CPUs

    def since(self, before: "HostUse") -> "HostUse":
        def less(now: float | None, then: float | None) -> float | None:
            return None if now is None or then is None else now - then

        return HostUse(
            less(self.throttled_seconds, before.throttled_seconds),
            less(self.stolen_seconds, before.stolen_seconds),
        )


def host_use() -> HostUse:
    import psutil

    stolen = getattr(psutil.cpu_times(), "steal", None)  # only on Linux
    return HostUse(_throttled(), None if stolen is None else float(stolen))


def cpu_quota(cgroup: Path = CGROUP) -> float | None:
    """Returns the number of CPUs whose time this container may use; None without a limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = (
                (cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        except OSError:
            return None
    return None if quota == "max" or int(quota) < 0 else int(quota) / int(period)


def _throttled(cgroup: Path = CGROUP) -> float | None:
    for name, key, unit in THROTTLED:
        try:
            rows = dict(line.split() for line in (cgroup / name).read_text().splitlines())
        except (OSError, ValueError):
            continue
        if key in rows:
            return int(rows[key]) * unit
    return None
