"""The nodes in the real ComfyUI, on the CPU, with the tiny model of random weights. By hand, not in CI.

    git clone https://github.com/comfyanonymous/ComfyUI /tmp/comfy/ComfyUI
    python -m venv /tmp/comfyvenv && . /tmp/comfyvenv/bin/activate
    pip install -r /tmp/comfy/ComfyUI/requirements.txt playwright -e '.[build]'
    python tests/comfyui_by_hand.py /tmp/comfy/ComfyUI --pictures /tmp/pictures

Installs the folder and starts ComfyUI. In Debian's Chromium, opens the example from the template browser
and runs it with the button. Then by ComfyUI's API: an interrupt, a second run on the open model, a process
that is killed, "free memory", and at last ComfyUI is killed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import av
import psutil
from playwright.sync_api import Page, sync_playwright

PORT = 8199
ADDRESS = f"http://127.0.0.1:{PORT}"
SLOW = 300  # seconds
EXAMPLE = "Try it with random weights"


def call(path: str, data: Any = None) -> Any:
    body = None if data is None else json.dumps(data).encode()
    with urlopen(Request(ADDRESS + path, body, {"Content-Type": "application/json"}), timeout=60) as answer:
        text = answer.read()
    return json.loads(text) if text else None


def until(what: str, found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + SLOW
    while time.monotonic() < deadline:
        with suppress(OSError, psutil.Error):
            if value := found():
                return value
        time.sleep(0.1)
    sys.exit(f"{what}: not within {SLOW} s")


def say(text: str) -> None:
    print(f"ok: {text}", flush=True)


class ComfyUi:
    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log
        command = [sys.executable, "main.py", "--cpu", "--port", str(PORT), "--disable-auto-launch"]
        self.popen = subprocess.Popen(command, cwd=folder, stdout=log.open("w"), stderr=subprocess.STDOUT)
        until("ComfyUI starts", lambda: call("/queue"))

    def computing(self) -> list[psutil.Process]:
        """Our processes among its children."""
        children = psutil.Process(self.popen.pid).children()
        return [child for child in children if "trt_wan.comfyui.child" in child.cmdline()]

    def end_of(self, prompt: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """The last message about a prompt, its data, and the prompt's outputs."""
        entry = until("a prompt ends", lambda: call(f"/history/{prompt}"))[prompt]
        name, data = entry["status"]["messages"][-1]
        return name, data, entry["outputs"]

    def run(self, prompt: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
        return self.end_of(call("/prompt", {"prompt": prompt})["prompt_id"])


def open_example(page: Page, pictures: Path) -> None:
    page.set_default_timeout(SLOW * 1000)
    page.goto(ADDRESS)
    page.wait_for_function("window.app && window.app.graph")
    page.wait_for_timeout(5000)
    if not page.get_by_text("Custom Nodes", exact=True).count():  # a new ComfyUI shows the templates
        page.get_by_text("Templates", exact=True).first.click()
    page.get_by_text("trt-wan", exact=True).last.click()
    page.get_by_text(EXAMPLE).first.wait_for()
    page.wait_for_timeout(2000)
    page.screenshot(path=pictures / "templates.png")
    page.get_by_text(EXAMPLE).first.click()
    page.wait_for_function("window.app.graph.nodes.some(node => node.type == 'TrtWanAnimate')")
    page.wait_for_timeout(3000)
    page.screenshot(path=pictures / "graph.png")
    say(f"{EXAMPLE!r} opens from the template browser")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    chosen = parser.parse_args()
    chosen.pictures.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "trt_wan", "comfyui", "install", str(chosen.comfyui)]
    subprocess.run(command, check=True)
    comfyui = ComfyUi(chosen.comfyui, chosen.pictures / "comfyui.log")
    try:
        check(comfyui, chosen.pictures, chosen.chromium)
    finally:
        comfyui.popen.kill()


def check(comfyui: ComfyUi, pictures: Path, chromium: str) -> None:
    lines = [line for line in comfyui.log.read_text().splitlines() if "trt" in line.lower()]
    assert all("seconds:" in line for line in lines), lines
    info = call("/object_info")
    names = [name for name in info if name.startswith("TrtWan")]
    say(f"{', '.join(names)} are loaded without a warning")

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1600, "height": 960})
        open_example(page, pictures)
        start = time.monotonic()
        page.get_by_text("Run", exact=True).first.click()
        prompt = until("the prompt is queued", lambda: call("/history") or None)
        (id,) = prompt
        name, data, outputs = comfyui.end_of(id)
        assert name == "execution_success", data
        page.wait_for_timeout(3000)
        page.screenshot(path=pictures / "result.png")
        browser.close()
    (video,) = (made for output in outputs.values() for made in output["images"])
    with av.open(str(comfyui.folder / "output" / video["subfolder"] / video["filename"])) as container:
        frames = sum(1 for _ in container.decode(video=0))
    assert frames == 20, frames
    say(f"its button made {video['filename']} of {frames} frames in {time.monotonic() - start:.1f} s")

    job = call(f"/history/{id}")[id]["prompt"][2]
    (animate,) = (one for one in job.values() if one["class_type"] == "TrtWanAnimate")
    (process,) = comfyui.computing()

    animate["inputs"] |= {"steps": 900, "seed": 1}
    id = call("/prompt", {"prompt": job})["prompt_id"]
    time.sleep(5)
    start = time.monotonic()
    call("/interrupt", {})
    name, _, _ = comfyui.end_of(id)
    assert name == "execution_interrupted" and comfyui.computing() == [process], name
    say(f"an interrupt ends the run in {time.monotonic() - start:.2f} s; the model stays open")

    animate["inputs"] |= {"steps": 4, "seed": 2}
    start = time.monotonic()
    assert comfyui.run(job)[0] == "execution_success" and comfyui.computing() == [process]
    say(f"a second run on the open model: {time.monotonic() - start:.1f} s")

    animate["inputs"] |= {"steps": 900, "seed": 3}
    id = call("/prompt", {"prompt": job})["prompt_id"]
    time.sleep(5)
    process.kill()
    name, data, _ = comfyui.end_of(id)
    assert name == "execution_error" and "was killed" in data["exception_message"], data
    animate["inputs"] |= {"steps": 4, "seed": 4}
    assert comfyui.run(job)[0] == "execution_success"
    say(f"a killed process: {data['exception_message'].splitlines()[0]} The next run starts another")

    (process,) = comfyui.computing()
    call("/free", {"unload_models": True, "free_memory": True})
    until("the process ends", lambda: not comfyui.computing())
    say("'free memory' ends the process")

    animate["inputs"] |= {"seed": 5}
    assert comfyui.run(job)[0] == "execution_success"
    (process,) = comfyui.computing()
    folder = Path(process.cmdline()[-1])
    comfyui.popen.kill()
    until("the process ends with ComfyUI", lambda: not process.is_running() and not folder.exists())
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("psm_")]
    say("the process ends with ComfyUI; nothing is left in /tmp or /dev/shm")


if __name__ == "__main__":
    main()
