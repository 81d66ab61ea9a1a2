"""The parts of TensorRT that open and run an engine, without a GPU."""

from types import SimpleNamespace
from typing import Any

from trt_wan.engines.flavour import Flavour
from trt_wan.engines.store.engine_id import EngineId, Recipe


class FakeContext:
    def __init__(self, log: list[tuple[Any, ...]], works: bool) -> None:
        self.log, self.works, self.addresses = log, works, dict[str, int]()

    def set_device_memory(self, address: int, size: int) -> None:
        self.log.append(("scratch", address, size))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.log.append(("execute", dict(self.addresses), stream))
        return self.works


class FakeCache:
    def __init__(self) -> None:
        self.blob = b""

    def deserialize(self, blob: bytes) -> bool:
        self.blob = blob
        return True

    def serialize(self) -> bytes:
        return self.blob + b"kernels"


class FakeTensorRt:
    """As much of the module as the executor calls. The plan b"bad" is refused, b"fails" does not run."""

    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")

    def __init__(self, lacking: str = "") -> None:
        self.lacking = lacking  # this function returns None, as TensorRT's do without memory
        self.log: list[tuple[Any, ...]] = []
        self.caches: list[FakeCache] = []

    class Logger:
        ERROR = 1

        def __init__(self, level: int) -> None:
            pass

    def Runtime(self, logger: Any) -> Any:
        def engine(plan: bytes) -> Any:
            if plan == b"bad":
                return None
            return self._lacking(
                device_memory_size_v2=100 * len(plan),
                create_runtime_config=self._config,
                create_execution_context=lambda config: FakeContext(self.log, plan != b"fails"),
            )

        return SimpleNamespace(deserialize_cuda_engine=engine)

    def _lacking(self, **parts: Any) -> Any:
        if self.lacking in parts:
            parts[self.lacking] = lambda *_: None
        return SimpleNamespace(**parts)

    def _config(self) -> Any:
        def made() -> FakeCache:
            self.caches.append(FakeCache())
            return self.caches[-1]

        return self._lacking(
            set_execution_context_allocation_strategy=lambda s: self.log.append(("strategy", s)),
            create_runtime_cache=made,
            set_runtime_cache=lambda cache: self.log.append(("cache", cache)),
        )


def recipe(trt: FakeTensorRt, name: str, plan: bytes) -> Recipe:
    flavour = Flavour("tensorrt_rtx", "1.6.1", trt, "a test")
    about = ("wan", name, "tiny", "fp32", (), plan.hex(), "sm89", flavour, None)
    return Recipe(EngineId(*about), lambda progress: plan)  # type: ignore[arg-type]
