// The preparation, before the long step: who is followed, the pose, the mask, and their corrections by hand.

import { announce, attempt, byId, calm, make, setShown, showError } from "./dom.js";
import { Painting } from "./paint.js";
import { get, post, upload } from "./server.js";

const address = (preparation, name) => `v1/preparations/${preparation.id}/files/${name}`;

export class Check {
  #form;
  #key = "";
  #shown = "";
  #painting;
  preparation = null; // the last one that was asked for
  paint = null; // the id of the painted picture

  // `form` gives the request, and is told when the paint, the point or the preparation changes.
  constructor(form, options) {
    this.#form = form;
    this.options = options;
    this.#painting = new Painting(byId("painting"));
    byId("look").addEventListener("click", () => this.look());
    byId("look-cancel").addEventListener("click", (event) =>
      attempt(byId("look-error"), () => post(`v1/preparations/${this.preparation.id}/cancel`), event.target),
    );
    for (const tab of document.querySelectorAll("[data-view]")) {
      tab.addEventListener("click", () => this.#open(tab.dataset.view));
    }
    this.#followRange("people");
    this.#followRange("painting");
    byId("people").addEventListener("click", (event) => this.#point(event));
    byId("people")
      .querySelector("video")
      .addEventListener("error", () =>
        showError(byId("look-error"), {
          message: "This browser cannot show the clip.",
          hint: "Give the person's number or point in the settings below.",
        }),
      );
    byId("painting")
      .querySelector("video")
      .addEventListener("loadedmetadata", (event) => {
        this.#painting.resize(event.target.videoWidth, event.target.videoHeight);
        this.#painting.load(this.paint && `v1/files/${this.paint}/content`).catch(() => {});
      });
    for (const radio of document.getElementsByName("brush")) {
      radio.addEventListener("change", () => (this.#painting.brush.erases = radio.value === "erase"));
    }
    byId("brush-size").addEventListener(
      "input",
      (event) => (this.#painting.brush.size = +event.target.value),
    );
    byId("paint-undo").addEventListener("click", () => this.#painting.undo());
    byId("paint-clear").addEventListener("click", () => this.#painting.clear());
    byId("paint-apply").addEventListener("click", (event) => this.#usePaint(event.target));
  }

  // The finished preparation, if it was made from what the form has now.
  get fresh() {
    const { preparation } = this;
    return preparation?.status === "completed" && this.#key === this.#form.preparingKey()
      ? preparation
      : null;
  }

  get isRunning() {
    return ["queued", "in_progress"].includes(this.preparation?.status);
  }

  // Shows a preparation that was made from what the form has now; null empties the panel.
  adopt(preparation) {
    this.#key = this.#form.preparingKey();
    this.preparation = preparation;
    this.render();
    this.#form.save();
  }

  async restore(id) {
    try {
      this.adopt(id ? await get(`v1/preparations/${encodeURIComponent(id)}`) : null);
    } catch {
      this.adopt(null);
    }
  }

  async look() {
    if (!this.#form.requireFiles()) return;
    await attempt(
      byId("look-error"),
      () => this.#form.atField(async () => this.adopt(await post("v1/preparations", this.#form.preparing()))),
      byId("look"),
    );
  }

  update(preparation) {
    if (preparation.id !== this.preparation?.id) return;
    const before = this.preparation.status;
    this.preparation = preparation;
    if (before !== preparation.status && preparation.status === "completed")
      announce("The preview is ready.");
    this.render();
  }

  // What the panel says depends on the form as well: call after it has changed.
  render() {
    const { preparation, isRunning } = this;
    const isPrepared = this.#form.hasPreparedClips;
    byId("check-about").textContent = this.#about(isPrepared);
    byId("look").textContent = preparation ? "Look again" : "Find the person";
    setShown(byId("looking"), (!isPrepared && this.#canLook) || isRunning);
    setShown(byId("look"), !isRunning);
    setShown(byId("look-cancel"), isRunning);
    setShown(byId("look-progress"), isRunning);
    if (isRunning) this.#showProgress();
    if (preparation?.status === "failed") this.#showFailure();
    const isDone = preparation?.status === "completed" && this.#form.clip !== null && !isPrepared;
    setShown(byId("found"), isDone);
    if (isDone) this.#showFound();
  }

  get #canLook() {
    return this.options.people || this.#form.hasKeypoints;
  }

  #about(isPrepared) {
    if (isPrepared) return "The pose and the mask are in the prepared clips.";
    if (!this.#canLook) {
      const ways =
        "Here you can use the sample, prepared clips, or an edited keypoints.json (in the settings below).";
      return `${this.options.people_hint}\n${ways}`;
    }
    if (this.preparation?.status === "completed" && !this.fresh)
      return "The settings have changed since this preview.";
    return "See the person, the pose and the mask before the long step.";
  }

  #showProgress() {
    const { progress, stage, queue_position: position } = this.preparation;
    const [bar, text] = byId("look-progress").children;
    bar.value = progress;
    bar.setAttribute("aria-label", "Preparation");
    text.textContent = position > 1 ? `Waiting; ${position - 1} before it` : stage || "Starting";
  }

  #showFailure() {
    if (this.#shown === `failed ${this.preparation.id}`) return;
    this.#shown = `failed ${this.preparation.id}`;
    showError(byId("look-error"), this.preparation.error);
  }

  #showFound() {
    const isReplaced = this.preparation.files.includes("src_mask.mp4");
    setShown(document.querySelector('[data-view="paint"]'), isReplaced);
    setShown(document.querySelector('[data-view="person"]'), this.options.people && !this.#form.hasKeypoints);
    if (this.#shown === this.preparation.id) return;
    this.#shown = this.preparation.id;
    const preview = byId("preview");
    preview.src = address(this.preparation, "preview.mp4");
    preview.autoplay = !calm.matches;
    byId("look-notes").replaceChildren(...this.preparation.notes.map((note) => make("li", {}, note)));
    this.#open("preview");
  }

  #open(view) {
    for (const tab of document.querySelectorAll("[data-view]")) {
      tab.setAttribute("aria-pressed", String(tab.dataset.view === view));
    }
    for (const panel of document.querySelectorAll("[data-panel]"))
      setShown(panel, panel.dataset.panel === view);
    if (view !== "preview") byId("preview").pause();
    if (view === "person") this.#load("people", this.#form.clipAddress);
    if (view === "paint") this.#load("painting", address(this.preparation, "preview.mp4"));
  }

  #load(place, source) {
    const video = byId(place).querySelector("video");
    if (video.getAttribute("src") !== source) video.src = source;
  }

  #followRange(place) {
    const video = byId(place).querySelector("video");
    const range = byId(`${place}-time`);
    range.addEventListener("input", () => (video.currentTime = range.value * (video.duration || 0)));
    video.addEventListener("loadedmetadata", () => {
      range.value = 0;
      byId(place).style.setProperty("--shape", video.videoWidth / video.videoHeight);
    });
  }

  #point(event) {
    const box = byId("people").getBoundingClientRect();
    const { width, height } = this.#form.clip;
    const x = Math.round(((event.clientX - box.left) / box.width) * width);
    const y = Math.round(((event.clientY - box.top) / box.height) * height);
    this.#form.choosePoint(`${x},${y}`);
    this.look();
  }

  async #usePaint(button) {
    await attempt(
      byId("look-error"),
      async () => {
        const picture = this.#painting.isEmpty ? null : await upload(await this.#painting.blob(), "mask.png");
        this.paint = picture?.id ?? null;
      },
      button,
    );
    await this.look();
  }
}
