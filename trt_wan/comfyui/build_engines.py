"""TrtWan Build: graphs and engines of a size, ahead of the first video."""

from comfy_api.latest import io, ui

from trt_wan.comfyui.asking import CATEGORY, MODEL, MOST_SIZE, ChosenModel, TrtWanModel, ask, make_room, told
from trt_wan.comfyui.messages import Build
from trt_wan.comfyui.process import Process
from trt_wan.runtime.events import CandidateReady, EngineReady, EngineStep, GraphExported


class BuildEngines(io.ComfyNode):  # type: ignore[misc]
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrtWanBuild",
            display_name="TrtWan Build",
            category=CATEGORY,
            description="Exports the graphs of a size and, on a GPU, builds and measures its engines, ahead "
            "of the first video. The open model is closed, for a build needs the memory.",
            inputs=[
                TrtWanModel.Input("model"),
                io.Int.Input("width", default=832, min=16, max=MOST_SIZE, step=16),
                io.Int.Input("height", default=480, min=16, max=MOST_SIZE, step=16),
                io.Int.Input("window", default=77, min=5, max=10000, step=4, tooltip="Frames, 4k+1."),
            ],
            outputs=[TrtWanModel.Output(display_name="model")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: ChosenModel, width: int, height: int, window: int) -> io.NodeOutput:
        with told():
            MODEL.close()
            make_room(1e30)
            request = Build(model.name, (width, height), window, model.choice.settings.get("precision"))
            with Process(grace=0) as process:
                text = ask(process, request, GraphExported, EngineStep, EngineReady, CandidateReady)
            return io.NodeOutput(model, ui=ui.PreviewText(text))
