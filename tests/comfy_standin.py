"""The parts of ComfyUI that our nodes use (0.3.64), as strict about their arguments: comfy_api.latest,
folder_paths, comfy.utils and comfy.model_management. tests/comfyui_by_hand.py runs the real one.
"""

import inspect
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


class InterruptProcessingException(Exception):
    pass


@dataclass(kw_only=True)
class Input:
    id: str
    kind: str = ""
    display_name: str | None = None
    optional: bool = False
    tooltip: str | None = None
    lazy: bool | None = None


@dataclass(kw_only=True)
class Widget(Input):
    default: Any = None
    socketless: bool | None = None


@dataclass(kw_only=True)
class Number(Widget):
    min: float
    max: float
    step: float = 1
    control_after_generate: bool | None = None


@dataclass(kw_only=True)
class Text(Widget):
    multiline: bool = False
    placeholder: str | None = None


@dataclass(kw_only=True)
class Choice(Widget):
    options: list[str]


@dataclass(kw_only=True)
class Output:
    kind: str
    display_name: str | None = None
    tooltip: str | None = None


def _type(kind: str, made: type[Input]) -> Any:
    return SimpleNamespace(
        Input=lambda id, **given: made(id=id, kind=kind, **given),
        Output=lambda **given: Output(kind=kind, **given),
    )


@dataclass(kw_only=True)
class Schema:
    node_id: str
    display_name: str
    category: str
    description: str
    inputs: list[Input]
    outputs: list[Output]
    is_output_node: bool = False


class ComfyNode:
    @classmethod
    def define_schema(cls) -> Schema:
        raise NotImplementedError

    @classmethod
    def checked_schema(cls) -> Schema:
        """Raises AssertionError for a schema that ComfyUI would refuse, or that `execute` does not take."""
        schema = cls.define_schema()
        names = [given.id for given in schema.inputs]
        assert len(set(names)) == len(names), f"{schema.node_id} has an input twice"
        for given in schema.inputs:
            if isinstance(given, Choice):
                assert given.options, f"{given.id} has no options"
                assert given.default is None or given.default in given.options, given.id
            if isinstance(given, Number):
                assert given.min <= given.default <= given.max, given.id
        wanted = inspect.signature(cls.execute).parameters  # type: ignore[attr-defined]
        rest = any(parameter.kind is parameter.VAR_KEYWORD for parameter in wanted.values())
        own = {name: p for name, p in wanted.items() if p.kind is not p.VAR_KEYWORD}
        assert own.keys() <= set(names) and (rest or own.keys() == set(names)), schema.node_id
        for given in schema.inputs:
            if given.optional and given.id in own:
                assert own[given.id].default is not inspect.Parameter.empty, given.id
        return schema

    @classmethod
    def run(cls, **given: Any) -> Any:
        """Executes the node as ComfyUI does: widgets that are not given have their defaults."""
        schema = cls.checked_schema()
        values = {
            one.id: _default(one) for one in schema.inputs if isinstance(one, Widget) and not one.optional
        }
        assert given.keys() <= {one.id for one in schema.inputs}, given.keys()
        missing = [one.id for one in schema.inputs if not one.optional and one.id not in values | given]
        assert not missing, f"{schema.node_id} lacks {missing}"
        made = cls.execute(**values | given)  # type: ignore[attr-defined]
        assert len(made.args) == len(schema.outputs)
        return made


def _default(widget: Widget) -> Any:
    if isinstance(widget, Choice) and widget.default is None:
        return widget.options[0]
    return widget.default


class NodeOutput:
    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args, self.ui = args, ui


class ComfyExtension:
    pass


@dataclass
class PreviewText:
    value: str


@dataclass
class Comfy:
    """The state of this ComfyUI. `models` has its model folders."""

    models: Path
    interrupted: bool = False
    freed: list[float] = field(default_factory=list)
    shown: list[tuple[float, float]] = field(default_factory=list)  # by progress bars
    interrupt_at: int | None = None  # after so many updates of progress bars

    def modules(self) -> dict[str, ModuleType]:
        comfy = self

        class ProgressBar:
            def __init__(self, total: int) -> None:
                self.total = total

            def update_absolute(self, value: int, total: int | None = None) -> None:
                """ComfyUI's hook raises after an interrupt."""
                comfy.shown.append((value, total or self.total))
                if comfy.interrupt_at is not None and len(comfy.shown) >= comfy.interrupt_at:
                    comfy.interrupt_at, comfy.interrupted = None, False
                    raise InterruptProcessingException()

        def interrupt(value: bool = True) -> None:
            comfy.interrupted = value

        io = SimpleNamespace(
            Boolean=_type("BOOLEAN", Widget),
            Int=_type("INT", Number),
            Float=_type("FLOAT", Number),
            String=_type("STRING", Text),
            Combo=_type("COMBO", Choice),
            Image=_type("IMAGE", Input),
            Mask=_type("MASK", Input),
            Custom=lambda kind: _type(kind, Input),
            Schema=Schema,
            ComfyNode=ComfyNode,
            NodeOutput=NodeOutput,
        )
        latest = {"io": io, "ui": SimpleNamespace(PreviewText=PreviewText), "ComfyExtension": ComfyExtension}
        management = {
            "InterruptProcessingException": InterruptProcessingException,
            "processing_interrupted": lambda: comfy.interrupted,
            "interrupt_current_processing": interrupt,
            "get_torch_device": lambda: "cuda:0",
            "free_memory": lambda size, device: comfy.freed.append(size),
            "soft_empty_cache": lambda: None,
        }
        folders = {
            "models_dir": str(self.models),
            "get_filename_list": self._list,
            "get_full_path": self._full_path,
            "get_folder_paths": lambda name: [str(self.models / name)],
            "add_model_folder_path": lambda name, path: Path(path).mkdir(exist_ok=True),
        }
        made = {
            "comfy": {},
            "comfy.utils": {"ProgressBar": ProgressBar},
            "comfy.model_management": management,
            "comfy_api": {},
            "comfy_api.latest": latest,
            "folder_paths": folders,
        }
        modules = {name: ModuleType(name) for name in made}
        for name, module in modules.items():
            vars(module).update(made[name])
            parent, _, last = name.rpartition(".")
            if parent:
                setattr(modules[parent], last, module)
        return modules

    def install(self) -> None:
        sys.modules.update(self.modules())

    def _list(self, folder: str) -> list[str]:
        root = self.models / folder
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())

    def _full_path(self, folder: str, name: str) -> str | None:
        path = self.models / folder / name
        return str(path) if path.is_file() else None
