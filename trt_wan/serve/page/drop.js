// A place that takes one file: chosen, dropped, or given by its id. It uploads the file and shows it.

import { announce, attempt, make, megabytes, showError } from "./dom.js";
import { get, upload } from "./server.js";

export class Drop {
  #place;
  #input;
  #error;
  #shown;
  #uploads = 0;
  file = null; // as the server describes it

  // `kinds` are the file's kinds that fit, with the sentence for others; `changed` is called after every change.
  constructor(place, kinds, wrong, most, changed) {
    this.#place = place;
    this.#input = place.querySelector("input");
    this.#error = place.querySelector(".error");
    this.#shown = place.querySelector(".shown");
    Object.assign(this, { kinds, wrong, most, changed });
    this.#input.addEventListener("change", () => this.take(this.#input.files[0]));
    place.addEventListener("dragover", (event) => {
      event.preventDefault();
      place.classList.add("over");
    });
    for (const end of ["dragleave", "drop"])
      place.addEventListener(end, () => place.classList.remove("over"));
    place.addEventListener("drop", (event) => {
      event.preventDefault();
      this.take(event.dataTransfer.files[0]);
    });
  }

  refuse(error) {
    showError(this.#error, error);
    this.#input.focus();
  }

  // A file of the server, or null.
  set(file) {
    this.#uploads += 1; // an upload that is still running is no longer wanted
    showError(this.#error, null);
    this.file = file;
    this.#input.value = "";
    this.#show();
    this.changed();
  }

  // The file with this id, if the server still has it.
  async restore(id) {
    if (!id) return this.set(null);
    try {
      this.set(await get(`v1/files/${encodeURIComponent(id)}`));
    } catch {
      this.set(null);
    }
  }

  // Sends a file of the user's.
  async take(chosen) {
    if (!chosen) return;
    const bar = make("progress", { max: 1, value: 0, "aria-label": `Sending ${chosen.name}` });
    const number = ++this.#uploads;
    this.#shown.replaceChildren(make("span", {}, chosen.name), bar);
    await attempt(this.#error, async () => {
      try {
        if (chosen.size > this.most) {
          const hint = "Cut or compress it first.";
          const message = `${chosen.name} has ${megabytes(chosen.size)}; this server takes ${megabytes(this.most)}.`;
          throw Object.assign(new Error(message), { hint });
        }
        const file = await upload(chosen, chosen.name, (share) => (bar.value = share));
        if (number !== this.#uploads) return;
        if (!this.kinds.includes(file.kind)) throw Object.assign(new Error(this.wrong), { hint: "" });
        this.set(file);
        announce(`${file.filename} is here.`);
      } catch (error) {
        if (number !== this.#uploads) return;
        this.#show();
        throw error;
      }
    });
  }

  #show() {
    const file = this.file;
    this.#place.classList.toggle("full", file !== null);
    this.#shown.replaceChildren();
    if (!file) return;
    const address = `v1/files/${encodeURIComponent(file.id)}/content`;
    if (file.kind === "picture") {
      this.#shown.append(make("img", { src: address, alt: "" }));
    } else if (file.kind === "clip") {
      const video = { src: address, muted: true, controls: true, playsInline: true, preload: "metadata" };
      this.#shown.append(make("video", { ...video, "aria-label": file.filename }));
    }
    const facts = [
      file.width && `${file.width}×${file.height}`,
      file.frames && `${file.frames} frames`,
      file.fps && `${+file.fps.toFixed(2)} a second`,
      file.kind === "prepared" && "prepared clips",
    ].filter(Boolean);
    const away = make(
      "button",
      { type: "button", className: "link", onclick: () => this.set(null) },
      "Remove",
    );
    away.setAttribute("aria-label", `Remove ${file.filename}`);
    this.#shown.append(make("p", {}, make("b", {}, file.filename), " ", facts.join(", "), " ", away));
  }
}
