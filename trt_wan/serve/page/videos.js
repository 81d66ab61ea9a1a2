// The queue and the results, newest first. Cards are changed in place, so that nothing that plays begins anew.

import { announce, attempt, byId, calm, clock, make, setShown, showError } from "./dom.js";
import { pair } from "./player.js";
import { get, post, remove } from "./server.js";

const PAGE = 30; // videos that are listed at a time
const WORDS = {
  queued: "Waiting",
  in_progress: "Running",
  completed: "Done",
  failed: "Failed",
  cancelled: "Cancelled",
};
const ENDED = ["completed", "failed", "cancelled"];

export class Videos {
  #cards = new Map();
  #last = null;

  // `change` is called with a video that is to be made again with other settings.
  constructor(change) {
    this.change = change;
    byId("older").addEventListener("click", (event) =>
      attempt(byId("older-error"), () => this.#read(`&after=${this.#last}`), event.target),
    );
  }

  // The newest that the server has: call after a connection, for events in between are lost.
  async refresh() {
    const listed = await this.#read("");
    const oldest = listed.at(-1)?.created_at ?? 0;
    const ids = new Set(listed.map(({ id }) => id));
    for (const [id, { video }] of this.#cards) {
      if (!ids.has(id) && video.created_at > oldest) this.remove(id);
    }
    setShown(byId("none"), this.#cards.size === 0);
    byId("list").setAttribute("aria-busy", "false");
  }

  // A video of an event is newer than those of the same second that are here.
  update(video, isNew = true) {
    const card = this.#cards.get(video.id);
    if (card) return card.update(video);
    const made = new Card(video, this);
    this.#cards.set(video.id, made);
    const before = video.created_at + (isNew ? 1 : 0);
    const next = [...byId("list").children].find((element) => element.created < before);
    made.element.created = video.created_at;
    byId("list").insertBefore(made.element, next ?? null);
    setShown(byId("none"), false);
  }

  add(video) {
    this.update(video);
    const { element } = this.#cards.get(video.id);
    element.open = true;
    element.scrollIntoView({ block: "nearest", behavior: calm.matches ? "auto" : "smooth" });
    announce("The video is in the queue.");
  }

  remove(id) {
    this.#cards.get(id)?.element.remove();
    this.#cards.delete(id);
    setShown(byId("none"), this.#cards.size === 0);
  }

  async #read(after) {
    const { data, has_more: hasMore } = await get(`v1/videos?limit=${PAGE}&order=desc${after}`);
    data.forEach((video) => this.update(video, false));
    this.#last = data.at(-1)?.id ?? this.#last;
    setShown(byId("older"), hasMore);
    const newest = data.find(({ status }) => status === "completed");
    if (!after && newest) this.#cards.get(newest.id).element.open = true;
    return data;
  }
}

class Card {
  #list;
  #told = "";
  #frames = 0;

  constructor(video, list) {
    this.#list = list;
    this.video = video;
    const part = (tag, className) => (this[className] = make(tag, { className }));
    this.element = make(
      "details",
      { className: "video", open: !ENDED.includes(video.status) },
      make("summary", {}, part("span", "state"), part("span", "title"), part("span", "left")),
      make(
        "div",
        { className: "body" },
        part("div", "doing"),
        part("div", "shown"),
        part("div", "error"),
        part("div", "row"),
        part("div", "about"),
      ),
    );
    this.bar = make("progress", { max: 100, "aria-label": "Progress" });
    this.told = make("p");
    this.doing.append(this.bar, this.told);
    this.element.addEventListener("toggle", () => this.#fill());
    this.update(video);
  }

  get hasEnded() {
    return ENDED.includes(this.video.status);
  }

  get #address() {
    return `v1/videos/${this.video.id}`;
  }

  update(video) {
    const before = this.video;
    this.video = video;
    this.element.dataset.status = video.status;
    this.state.textContent = WORDS[video.status];
    this.title.textContent = titleOf(video);
    this.left.textContent = shortly(video);
    setShown(this.doing, !this.hasEnded);
    this.bar.value = video.progress;
    this.told.textContent = atLength(video);
    if (before.status !== video.status) {
      announce(`${titleOf(video)}: ${this.state.textContent}.`);
      if (video.status === "completed") this.element.open = true;
    } else if (Math.floor(before.progress / 25) !== Math.floor(video.progress / 25)) {
      announce(`${titleOf(video)}: ${video.progress} %.`);
    }
    this.#fill();
  }

  // The contents of an open card. Videos are loaded when it is opened first.
  #fill() {
    const { video } = this;
    if (!this.element.open) return;
    const { status, frames, frames_done: done } = video;
    if (status === "in_progress" && done > this.#frames && done < frames) this.#showPreview();
    if (this.#told === video.status) return;
    this.#told = video.status;
    showError(this.error, video.status === "failed" ? video.error : null);
    if (video.status === "completed")
      this.shown.replaceChildren(pair(`${this.#address}/driving`, `${this.#address}/content`));
    else if (this.hasEnded) this.shown.replaceChildren();
    this.row.replaceChildren(...this.#actions());
    this.about.replaceChildren(...about(video));
    if (video.status === "completed" && video.windows > 1) this.about.append(this.#redo());
  }

  // The finished windows. The next picture stands ready before it takes the place of the last.
  #showPreview() {
    this.#frames = this.video.frames_done;
    const video = make("video", {
      src: `${this.#address}/preview?frames=${this.#frames}`,
      muted: true,
      loop: true,
      playsInline: true,
      controls: true,
      autoplay: !calm.matches,
    });
    video.setAttribute("aria-label", "The finished part of the video");
    const place = () => {
      const last = this.shown.querySelector("video");
      if (last) video.currentTime = last.currentTime;
      if (!this.hasEnded)
        this.shown.replaceChildren(make("figure", {}, video, make("figcaption", {}, "Finished so far")));
    };
    video.addEventListener("loadeddata", place, { once: true });
  }

  #actions() {
    const button = (text, work, className = "") => {
      const act = (event) => attempt(this.error, work, event.currentTarget);
      return make("button", { type: "button", className, onclick: act }, text);
    };
    if (!this.hasEnded) return [button("Cancel", () => post(`${this.#address}/cancel`))];
    const change = button("Change settings", () => this.#list.change(this.video));
    const away = button("Delete", () => this.#delete(), "link");
    if (this.video.status !== "completed") return [change, away];
    const download = make(
      "a",
      { href: `${this.#address}/content`, download: `${this.video.id}.mp4`, className: "button" },
      "Download",
    );
    return [download, button("Another seed", () => this.#again({ seed: anySeed() })), change, away];
  }

  async #again(changes) {
    this.#list.add(await post("v1/videos", { source: this.video.id, ...changes }));
  }

  async #delete() {
    if (!confirm("Delete this video from the server?")) return;
    await remove(this.#address);
    this.#list.remove(this.video.id);
    byId("videos").focus();
  }

  #redo() {
    const { windows, frames, fps, settings } = this.video;
    const { window = 77, overlap = 1 } = settings; // the command line's defaults; a preset may have others
    const isKnown = Math.ceil((frames - overlap) / (window - overlap)) === windows;
    const boxes = Array.from({ length: windows }, (_, k) => {
      const from = isKnown ? ` (from ${clock((k * (window - overlap)) / fps)})` : "";
      return make(
        "label",
        { className: "tick" },
        make("input", { type: "checkbox", value: k + 1 }),
        ` ${k + 1}${from}`,
      );
    });
    const place = make("div", { className: "error" });
    const again = async () => {
      const redo = boxes.filter((box) => box.control.checked).map((box) => Number(box.control.value));
      if (!redo.length) throw Object.assign(new Error("Choose the windows to render again."), { hint: "" });
      await this.#again({ redo });
    };
    const send = make(
      "button",
      { type: "button", onclick: (event) => attempt(place, again, event.currentTarget) },
      "Redo",
    );
    return make(
      "details",
      {},
      make("summary", {}, "Redo single windows"),
      make(
        "p",
        { className: "aside" },
        "They are rendered again with another seed, and the others are copied.",
      ),
      make("div", { className: "row", role: "group", "aria-label": "Windows" }, ...boxes, send),
      place,
    );
  }
}

const anySeed = () => Math.floor(Math.random() * 2 ** 31);

function titleOf({ prompt, settings, size, seed }) {
  const mode = settings.mode === "replace" ? "Replace" : "Animate";
  return prompt || [mode, size, `seed ${seed}`].filter(Boolean).join(", ");
}

function shortly({ status, progress, eta, queue_position: position, seconds }) {
  if (status === "queued") return position > 1 ? `${position - 1} before it` : "next";
  if (status === "in_progress") return eta == null ? `${progress} %` : `${clock(eta)} left`;
  return status === "completed" && seconds ? `${seconds} s` : "";
}

function atLength(video) {
  if (video.cancelling) return "It is being cancelled.";
  if (video.status === "queued") return "It starts when the jobs before it are done.";
  const { stage, window, windows, step, steps, seconds_per_step: pace, eta } = video;
  const parts = [
    stage,
    windows > 0 && `window ${window} of ${windows}`,
    stage === "denoising" && steps > 0 && `step ${step} of ${steps}`,
    pace && `${pace.toPrecision(2)} s a step`,
    eta != null && `${clock(eta)} left`,
  ];
  return parts.filter(Boolean).join(", ");
}

function about(video) {
  const { loras, ...settings } = video.settings;
  const { notes, names, seed, size, frames, fps, redo } = video;
  const facts = {
    character: names.input_reference,
    "driving clip": names.control_reference,
    size,
    frames,
    "frames per second": fps,
    seed,
    ...settings,
    LoRAs: loras.map(({ name, strength }) => `${name} ${strength}`).join(", "),
    "windows rendered again": redo.join(", "),
  };
  const rows = Object.entries(facts).filter(([, value]) => value != null && value !== "");
  const list = make(
    "dl",
    {},
    ...rows.flatMap(([name, value]) => [
      make("dt", {}, name.replaceAll("_", " ")),
      make("dd", {}, String(value)),
    ]),
  );
  const told = notes.length
    ? make("ul", { className: "notes" }, ...notes.map((note) => make("li", {}, note)))
    : null;
  return [make("details", {}, make("summary", {}, "Settings"), list, told)];
}
