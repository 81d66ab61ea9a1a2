"""Jobs and files as clients see them."""

from typing import Any

from trt_wan.serve.database import File, Job
from trt_wan.serve.live import Progress
from trt_wan.serve.orders import PREPARED
from trt_wan.serve.store import Store

SHOWN_STEPS = (
    "stage",
    "window",
    "windows",
    "step",
    "steps",
    "seconds_per_step",
    "eta",
    "frames_done",
    "progress",
)


def view(job: Job, store: Store, progress: Progress | None, model: str) -> dict[str, Any]:
    request, facts = job.request, {**job.request["facts"], **job.result}
    shown: dict[str, Any] = {
        "id": job.id,
        "object": job.kind,
        "status": job.status,
        "progress": 100 if job.status == "completed" else 0,
        "stage": "",
        "cancelling": job.cancelling and not job.has_ended,
        "queue_position": store.database.place(job) + 1 if job.status == "queued" else None,
        "created_at": int(job.created_at),
        "started_at": _whole(job.started_at),
        "completed_at": _whole(job.completed_at),
        "error": job.error,
        "notes": job.notes,
        "width": job.result.get("width"),
        "height": job.result.get("height"),
        "frames": facts.get("frames"),
        "fps": facts.get("fps"),
        "settings": {**request["options"], "loras": request["loras"]},
        "names": request["names"],
        "uploads": request["uploads"],
        "source": request["source"],
        "redo": request["redo"],
    }
    if job.kind == "video":
        shown |= _of_a_video(job, facts, model)
    else:
        folder = store.folder(job) / PREPARED
        shown["files"] = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if progress is not None and job.status == "in_progress":
        shown |= {name: value for name, value in progress.as_fields().items() if name in SHOWN_STEPS}
    return shown


def _of_a_video(job: Job, facts: dict[str, Any], model: str) -> dict[str, Any]:
    options = job.request["options"]
    seconds = facts["frames"] / facts["fps"] if facts.get("frames") and facts.get("fps") else None
    size = (
        f"{job.result['width']}x{job.result['height']}" if "width" in job.result else options.get("size", "")
    )
    return {
        **dict.fromkeys(("window", "step", "steps", "frames_done"), 0),
        "windows": job.result.get("windows", 0),
        **dict.fromkeys(("seconds_per_step", "eta", "expires_at", "remixed_from_video_id"), None),
        "model": model,
        "prompt": options.get("prompt"),
        "seed": options.get("seed", 0),
        "seconds": "" if seconds is None else f"{seconds:.3g}",
        "size": size,
        "preparation": job.request["preparation"],
    }


def file_view(file: File) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "created_at": int(file.created_at),
        "filename": file.filename,
        "purpose": file.purpose,
        **{name: value for name, value in file.facts.items() if name != "suffix"},
    }


def _whole(time: float | None) -> int | None:
    return None if time is None else int(time)
