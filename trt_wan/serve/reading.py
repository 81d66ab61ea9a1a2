"""The fields and files of a request: a form (multipart or urlencoded) or JSON."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from trt_wan.errors import UsageError, shown
from trt_wan.serve.guard import Refused

MOST_FIELDS, MOST_FILES = 50, 16
MOST_FIELD = 1_000_000  # bytes of a field that is no file
MOST_JSON = 64_000_000  # bytes; with data: URLs
MOST_VALUES = 100_000  # in JSON; 64 MB of empty lists would take gigabytes
DEEPEST = 20  # levels of JSON


@asynccontextmanager
async def read(request: Request) -> AsyncIterator[tuple[dict[str, Any], dict[str, UploadFile]]]:
    """Values and uploads by field. Raises UsageError, Refused."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        yield await _json(request), {}
        return
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise Refused(
            415,
            "media_type",
            f"The content type {shown(kind)!r} is no form and no JSON.",
            "Send multipart/form-data.",
        )
    try:
        form = await request.form(max_files=MOST_FILES, max_fields=MOST_FIELDS, max_part_size=MOST_FIELD)
    except HTTPException as error:
        raise UsageError("The form cannot be read.", str(error.detail)) from error
    try:
        values: dict[str, Any] = {}
        files: dict[str, UploadFile] = {}
        for name, value in form.multi_items():
            key, bracket, inner = name.removesuffix("]").partition("[")
            if bracket and isinstance(value, str):  # lists and objects of OpenAI's client
                _add(values, key, inner, value)
                continue
            if name in values or name in files:
                raise UsageError(f"{shown(name)} is given twice.", "Give it once.")
            if isinstance(value, UploadFile):
                files[name] = value
            else:
                values[name] = value
        yield values, files
    finally:
        await form.close()


def _add(values: dict[str, Any], name: str, inner: str, value: str) -> None:
    """`name[]=value` to a list, `name[inner]=value` to an object."""
    made = values.setdefault(name, {} if inner else [])
    if isinstance(made, dict) and inner and inner not in made:
        made[inner] = value
    elif isinstance(made, list) and not inner:
        made.append(value)
    else:
        raise UsageError(f"{shown(name)} is given twice.", "Give it once.")


async def _json(request: Request) -> dict[str, Any]:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_JSON:
            raise Refused(
                413,
                "too_large",
                f"JSON has at most {MOST_JSON / 1e6:g} MB here.",
                "Upload files to /v1/files.",
            )
    if sum(map(body.count, (b",", b":", b"[", b"{"))) > MOST_VALUES:
        raise UsageError(f"JSON has at most {MOST_VALUES} values here.", "Send fewer.")
    try:
        values = json.loads(bytes(body), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UsageError("The body is not JSON.", "Correct it.") from error
    if not isinstance(values, dict):
        raise UsageError("The body is no object of JSON.", 'Such as {"prompt": "he dances"}.')
    _require_shallow(values, DEEPEST)
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _require_shallow(value: Any, levels: int) -> None:
    if levels == 0:
        raise UsageError("The JSON is nested too deeply.", "Correct it.")
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _require_shallow(one, levels - 1)
