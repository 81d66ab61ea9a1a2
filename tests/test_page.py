"""The page of `trt-wan serve` in a real browser, on a real server: by mouse, by touch, by keyboard alone."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx_nets
import pytest
from made_clips import write_clip, write_reference
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from serving import Server, serving, zipped
from tiny_job import PLAN, prepare, write_sound

from trt_wan.runtime.video.reader import Clip
from trt_wan.runtime.weights.tiny import write_tiny_weights

expect.set_options(timeout=30_000)  # milliseconds, on a busy machine
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt install chromium")
TOKEN = "a token of the tests"
SIZE = (160, 120)  # of the clip, in which two people stand, at the left and, smaller, at the right
LEFT, RIGHT = (10, 10, 70, 115), (100, 40, 140, 110)
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
HTML = '<img src=x onerror="document.title=1"> dances'


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """character.png, clip.mp4, clips.zip, and networks that see the two people everywhere."""
    folder = tmp_path_factory.mktemp("files")
    write_reference(folder / "character.png", SIZE)
    write_clip(folder / "clip.mp4", 20, SIZE, Fraction(12), codec="libx264", sound=True)
    clips = prepare(folder / "clips", write_sound(folder / "tone.m4a", 1))
    zipped(clips, folder / "clips.zip")
    rows = [[*(640 * np.array(box) / (*SIZE, *SIZE)), 2.0, 0] for box in (LEFT, RIGHT)]
    onnx_nets.detector(folder / "detector.onnx", np.array(rows, np.float32))
    onnx_nets.standing_pose(folder / "pose.onnx")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_home: Path, files: Path) -> Iterator[Server]:
    write_tiny_weights(files / "weights", seed=0)
    options = {"weights": files / "weights", "detector": files / "detector.onnx", "pose": files / "pose.onnx"}
    options |= {"size": f"{PLAN.width}x{PLAN.height}", "steps": 1}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    with serving(tmp_path_factory.mktemp("data"), tiny_home, *arguments, token=TOKEN) as made:
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Browser, server: Server, **options: Any) -> Iterator[Page]:
    """The page, logged in. Raises AssertionError at the end for an error of its own."""
    page = browser.new_page(**options)
    page.set_default_timeout(30_000)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "console", lambda message: wrong.append(message.text) if "Content Security" in message.text else None
    )
    page.goto(server.address)
    page.get_by_label("Token").fill(TOKEN)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading", name="New video")).to_be_visible()
    expect(page.locator("#list")).to_have_attribute("aria-busy", "false")
    yield page
    page.close()
    assert not wrong


@pytest.fixture
def desktop(browser: Browser, server: Server) -> Iterator[Page]:
    yield from opened(browser, server, viewport=DESKTOP, accept_downloads=True)


@pytest.fixture
def phone(browser: Browser, server: Server) -> Iterator[Page]:
    yield from opened(browser, server, viewport=PHONE, is_mobile=True, has_touch=True, color_scheme="dark")


def queued(page: Page, press: Callable[[], None]) -> Locator:
    """The card of the video that `press` orders."""
    before = page.locator(".video").count()
    press()
    expect(page.locator(".video")).to_have_count(before + 1)
    return page.locator(".video").first


def drop(page: Page, *paths: Path) -> None:
    """Drops the files anywhere on the page."""
    kinds = {".png": "image/png", ".mp4": "video/mp4"}
    dropped = [(path.name, kinds[path.suffix], list(path.read_bytes())) for path in paths]
    transfer = page.evaluate_handle(
        """(files) => {
          const transfer = new DataTransfer();
          for (const [name, type, bytes] of files) {
            transfer.items.add(new File([new Uint8Array(bytes)], name, { type }));
          }
          return transfer;
        }""",
        dropped,
    )
    page.dispatch_event("#job-title", "drop", {"dataTransfer": transfer})


def newest(server: Server, kind: str = "preparations") -> dict[str, Any]:
    return server.client.get(f"/v1/{kind}").json()["data"][0]  # type: ignore[no-any-return]


def prepared_file(server: Server, name: str, folder: Path) -> Path:
    path = folder / name
    path.write_bytes(server.client.get(f"/v1/preparations/{newest(server)['id']}/files/{name}").content)
    return path


def looked(page: Page, press: Callable[[], None]) -> None:
    """Waits for the preview of the preparation that `press` asks for."""
    preview = page.locator("#preview")
    before = preview.get_attribute("src") or "nothing"
    press()
    expect(preview).to_have_attribute("src", re.compile(f"^(?!{before}$)"))
    expect(page.locator("#found")).to_be_visible()


@pytest.mark.long
def test_a_wrong_token(browser: Browser, server: Server) -> None:
    page = browser.new_page()
    page.goto(server.address)
    page.get_by_label("Token").fill("another token")
    page.get_by_role("button", name="Log in").click()
    expect(page.locator("#login-error")).to_contain_text("The token is wrong.")
    expect(page.locator("#main")).to_be_hidden()
    page.close()


@pytest.mark.long
@pytest.mark.skipif(find_spec("mediapipe") is not None, reason="people can be found here")
def test_a_server_that_cannot_find_people(browser: Browser, tmp_path: Path) -> None:
    """It says so, and goes on with the sample's prepared clips."""
    with serving(tmp_path / "data", tmp_path / "home", "--demo", "--no-warm-up") as demo:
        page = browser.new_page()
        page.goto(demo.address)
        expect(page.locator("#check-about")).to_contain_text("This server has nothing to find people with.")
        expect(page.locator("#look")).to_be_hidden()
        page.get_by_role("button", name="Use the sample").click()
        expect(page.locator("#clip")).to_contain_text("prepared.zip 320×192, 21 frames")
        page.get_by_role("button", name="Make the video").click()
        page.locator(".video").get_by_role("button", name="Cancel").click()
        expect(page.locator(".video")).to_have_attribute("data-status", "cancelled")
        page.close()


@pytest.mark.long
def test_a_lost_connection(desktop: Page, server: Server, files: Path) -> None:
    """Events that are refused and torn are asked for again; what happened meanwhile is shown."""
    page = desktop
    answers = [lambda route: route.fulfill(status=503), lambda route: route.abort()]
    page.route("**/v1/events", lambda route: answers.pop()(route) if answers else route.continue_())
    page.reload()
    expect(page.locator("#connection")).to_have_text("The connection is lost. Trying again…")
    clips = server.upload(files / "clips.zip")
    server.video(control_reference=clips["id"], prompt="meanwhile")
    expect(page.locator("#connection")).to_have_text("")
    expect(page.locator(".video .title").first).to_have_text("meanwhile")
    expect(page.locator(".video").first).to_have_attribute("data-status", "completed")
    assert not answers


def test_the_whole_way(desktop: Page, server: Server, files: Path, tmp_path: Path) -> None:
    page = desktop
    make = page.get_by_role("button", name="Make the video")

    # What is missing or wrong is said at its place.
    make.click()
    expect(page.locator("#clip-error")).to_have_text("Choose the driving clip, or use the sample.")
    page.set_input_files("#clip-file", files / "character.png")
    expect(page.locator("#clip-error")).to_contain_text("The driving clip is a video")
    drop(page, files / "clip.mp4", files / "character.png")
    expect(page.locator("#clip")).to_contain_text("clip.mp4 160×120, 20 frames, 12 a second")
    expect(page.locator("#reference img")).to_be_visible()
    page.get_by_label("Replace").check()
    page.get_by_text("Person and mask settings").click()
    page.get_by_label("Mask made by").select_option("box")
    page.get_by_label("Grow the mask").fill("999")
    page.get_by_role("button", name="Find the person").click()
    expect(page.locator("#look-error")).to_contain_text("A mask cannot grow by 999 pixels")
    page.get_by_label("Grow the mask").fill("0")
    page.get_by_label("Point, in").fill("here")
    page.get_by_role("button", name="Find the person").click()
    error = page.locator("label:has([name=point]) + .error")
    expect(error).to_have_text("Invalid value for '--point': 'here' is not 2 pixel numbers such as 410,220.")
    expect(page.get_by_label("Point, in")).to_be_focused()
    page.get_by_label("Point, in").fill("")

    # The larger person is found. A click chooses the other one.
    looked(page, page.get_by_role("button", name="Find the person").click)
    boxes = json.loads(prepared_file(server, "keypoints.json", tmp_path).read_text())["frames"]
    assert boxes[0]["box"][:4] == pytest.approx(LEFT, abs=1)
    page.get_by_role("button", name="Choose another person").click()
    people = page.locator("#people")
    people.scroll_into_view_if_needed()
    place = people.bounding_box()
    assert place is not None
    scale = place["width"] / SIZE[0]
    looked(page, lambda: people.click(position={"x": 120 * scale, "y": 75 * scale}))
    assert newest(server)["settings"]["point"] == "120,75"
    boxes = json.loads(prepared_file(server, "keypoints.json", tmp_path).read_text())["frames"]
    assert boxes[0]["box"][:4] == pytest.approx(RIGHT, abs=1)

    # White paint adds to the mask, black takes away, and an undone stroke does nothing.
    def mask() -> Any:
        with Clip(prepared_file(server, "src_mask.mp4", tmp_path)) as clip:
            return clip.window([0])[0, ..., 0] > 127

    before = mask()
    page.get_by_role("button", name="Paint the mask").click()
    canvas = page.locator("#painting canvas")
    expect(canvas).to_have_js_property("width", PLAN.width)

    def stroke(size: int, x0: float, x1: float, y: float) -> None:
        page.locator("#brush-size").fill(str(size))
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        assert box is not None
        across, down = box["width"] / PLAN.width, box["height"] / PLAN.height
        page.mouse.move(box["x"] + x0 * across, box["y"] + y * down)
        page.mouse.down()
        page.mouse.move(box["x"] + x1 * across, box["y"] + y * down, steps=4)
        page.mouse.up()

    stroke(8, 6, 10, 8)
    stroke(8, 6, 10, 40)
    page.get_by_role("button", name="Undo").click()
    page.get_by_label("Take away").check()
    stroke(40, 44, 52, 30)
    looked(page, page.get_by_role("button", name="Use this mask").click)
    after = mask()
    assert before[:, 32:].any() and not before[:, :32].any()  # blocks of 32 pixels
    assert after[:32, :32].all() and not after[32:].any() and not after[:, 32:].any()

    # A reload shows the same.
    page.reload()
    expect(page.locator("#found")).to_be_visible()
    expect(page.get_by_label("Replace")).to_be_checked()
    expect(page.locator("#reference")).to_contain_text("character.png")

    # The video: progress, the finished windows, the result beside its clip, the same bytes.
    page.get_by_label("Prompt", exact=True).fill(HTML)
    page.get_by_text("More settings").click()
    page.get_by_label("Steps").fill("4")
    card = queued(page, make.click)
    expect(card.locator(".title")).to_have_text(HTML)
    expect(card.locator(".doing")).to_contain_text(re.compile("window [12] of 2"), timeout=30_000)
    expect(card.locator("figcaption")).to_have_text("Finished so far")
    expect(card).to_have_attribute("data-status", "completed")
    assert page.title() == "trt-wan"
    expect(page.locator("#announcer")).to_have_text(f"{HTML}: Done.")
    video = newest(server, "videos")
    assert (video["preparation"], video["settings"]["steps"]) == (newest(server)["id"], 4)
    with page.expect_download() as download:
        card.get_by_role("link", name="Download").click()
    assert download.value.path().read_bytes() == server.content(video)
    leader = card.get_by_label("The video")
    leader.evaluate("video => video.play()")
    leader.evaluate(
        "video => new Promise((played) => (video.ontimeupdate = () => video.currentTime > 0.3 && played()))"
    )
    times = page.evaluate(
        "Array.from(document.querySelectorAll('.pair video'), (video) => video.currentTime)"
    )
    assert abs(times[0] - times[1]) < 0.15

    # Again: another seed, cancelled; the first window alone; other settings.
    again = queued(page, card.get_by_role("button", name="Another seed").click)
    again.get_by_role("button", name="Cancel").click()
    expect(again).to_have_attribute("data-status", "cancelled")
    done = page.locator('.video[data-status="completed"]', has_text=HTML)
    done.get_by_text("Redo single windows").click()
    expect(done.get_by_role("group", name="Windows")).to_have_text(
        re.compile(r"1 \(from 0:00\) *2 \(from 0:01\)")
    )
    done.get_by_label("1 (from 0:00)").check()
    done.get_by_role("button", name="Redo").click()
    expect(done).to_have_count(2)
    assert newest(server, "videos")["redo"] == [1]
    done.last.get_by_role("button", name="Change settings").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(HTML)
    expect(page.locator("[name=point]")).to_have_value("120,75")
    expect(page.locator("#found")).to_be_visible()


def test_on_a_phone(phone: Page, files: Path) -> None:
    """Prepared clips; nothing is wider than the screen."""
    page = phone
    page.set_input_files("#clip-file", files / "clips.zip")
    expect(page.locator("#check-about")).to_have_text("The pose and the mask are in the prepared clips.")
    expect(page.locator("#reference")).to_be_hidden()
    card = queued(page, page.get_by_role("button", name="Make the video").tap)
    expect(card).to_have_attribute("data-status", "completed")
    expect(card).to_be_in_viewport()
    card.locator("summary", has_text="Settings").tap()
    for width in (PHONE["width"], 360):
        page.set_viewport_size({"width": width, "height": 740})
        assert page.evaluate("document.documentElement.scrollWidth") == width
    card.locator("summary").first.tap()


# What has the keyboard's focus: its name, and whether it can be seen that it has it.
FOCUSED = """() => {
  const element = document.activeElement;
  const texts = [element.getAttribute("aria-label"), element.labels?.[0]?.textContent, element.textContent];
  const ringed = [element, element.closest(".drop")].filter(Boolean);
  const isRinged = ringed.some((one) => getComputedStyle(one).outlineStyle !== "none");
  const isSeen = isRinged || element.tagName === "VIDEO"; // the browser rings its buttons
  return { name: (texts.find(Boolean) ?? "").trim(), isSeen };
}"""


@pytest.mark.long
def test_with_the_keyboard_alone(desktop: Page, server: Server, files: Path) -> None:
    """The whole way; the focus is always seen, has a name, and comes round. The system's own dialog, which
    chooses files, is no part of the page.
    """
    page = desktop

    def tab_to(element: Locator) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            focused = page.evaluate(FOCUSED)
            assert focused["name"] and focused["isSeen"], focused
            if element.evaluate("element => element === document.activeElement"):
                return
        raise AssertionError(f"60 times Tab do not reach {element}")

    page.set_input_files("#reference-file", files / "character.png")
    page.set_input_files("#clip-file", files / "clip.mp4")
    expect(page.locator("#clip.full")).to_be_visible()
    tab_to(page.get_by_label("Animate"))
    page.keyboard.press("ArrowDown")
    expect(page.get_by_label("Replace")).to_be_checked()
    tab_to(page.locator("#preparing summary"))
    page.keyboard.press("Enter")
    tab_to(page.locator("[name=person]"))
    page.keyboard.type("2")
    tab_to(page.locator("[name=segmenter]"))
    page.keyboard.type("The")
    page.keyboard.press("Shift+Tab")
    while page.evaluate("document.activeElement.id") != "look":
        page.keyboard.press("Shift+Tab")
    looked(page, lambda: page.keyboard.press("Enter"))
    assert newest(server)["settings"]["person"] == 2
    expect(page.locator("#announcer")).to_have_text("The preview is ready.")
    tab_to(page.get_by_role("button", name="Paint the mask"))
    page.keyboard.press("Enter")
    expect(page.locator("#painting canvas")).to_have_js_property("width", PLAN.width)
    tab_to(page.locator("#painting canvas"))
    for key in ("ArrowLeft", "ArrowUp", "Space"):
        page.keyboard.press(key)
    tab_to(page.locator("#paint-apply"))
    looked(page, lambda: page.keyboard.press("Enter"))
    assert "mask_paint" in newest(server)["uploads"]
    tab_to(page.locator("#make"))
    card = queued(page, lambda: page.keyboard.press("Enter"))
    expect(card).to_have_attribute("data-status", "completed")
    tab_to(card.get_by_role("link", name="Download"))
    for _ in range(100):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break
    else:
        raise AssertionError("the focus does not leave the page")
