// The form: its fields are those of a request, and a request fills it again. It survives a reload.

import { Check } from "./check.js";
import { attempt, byId, make, setShown, showError } from "./dom.js";
import { Drop } from "./drop.js";
import { get, post } from "./server.js";

const KEPT = "trt-wan form"; // in the browser's storage
const MODE = "control_type"; // all other fields are options of the command line, by their names
const OTHERS = "others"; // and this one has those without a field

export class Form {
  #form = byId("job");
  #isFilling = false;
  #reference;
  #clip;
  #keypoints;
  #options;

  // `queued` is called with every new video.
  constructor(options, queued) {
    this.#options = options;
    const most = options.limits.upload;
    const changed = () => this.#changed();
    this.#reference = new Drop(byId("reference"), ["picture"], "The character is a picture.", most, changed);
    const clip = "The driving clip is a video, or a .zip of prepared clips.";
    this.#clip = new Drop(byId("clip"), ["clip", "prepared"], clip, most, () => this.#clipChanged());
    this.#keypoints = new Drop(byId("keypoints"), ["keypoints"], "This is no keypoints.json.", most, changed);
    this.#describe();
    this.check = new Check(this, options);
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      attempt(byId("job-error"), () => this.#send(queued), byId("make"));
    });
    this.#form.addEventListener("input", changed);
    byId("sample").addEventListener("click", () => this.#useSample());
    document.addEventListener("dragover", (event) => event.preventDefault());
    document.addEventListener("drop", (event) => this.#dropped(event));
  }

  // --- What the check needs to know

  get clip() {
    return this.#clip.file;
  }

  get clipAddress() {
    return `v1/files/${this.#clip.file.id}/content`;
  }

  get hasPreparedClips() {
    return this.#clip.file?.kind === "prepared";
  }

  get hasKeypoints() {
    return this.#keypoints.file !== null;
  }

  choosePoint(point) {
    this.#field("person").value = "";
    this.#field("point").value = point;
    this.#changed();
  }

  preparing() {
    return this.#request((name) => name === MODE || this.#prepares(name));
  }

  // Two requests with the same key make the same clips.
  preparingKey() {
    return JSON.stringify(this.preparing());
  }

  // Shows what is missing, where it is missing.
  requireFiles() {
    if (!this.#clip.file) this.#clip.refuse({ message: "Choose the driving clip, or use the sample." });
    if (!this.#reference.file && !this.hasPreparedClips) {
      this.#reference.refuse({ message: "Choose a picture of the character, or use the sample." });
      return false;
    }
    return this.#clip.file !== null;
  }

  // --- Requests

  async #send(queued) {
    if (!this.requireFiles()) return;
    const { fresh } = this.check;
    const afterwards = (name) => !this.#prepares(name);
    const request = fresh
      ? { ...this.#request(afterwards, []), preparation: fresh.id }
      : this.hasPreparedClips
        ? this.#request(afterwards, ["control_reference"])
        : this.#request(() => true);
    await this.atField(async () => queued(await post("v1/videos", request)));
  }

  // Shows an error of `work` below the field that it is about; one that is about none is thrown.
  async atField(work) {
    this.#showFieldError(null);
    try {
      await work();
    } catch (error) {
      if (!this.#showFieldError(error)) throw error;
    }
  }

  // Whether the option decides the prepared clips.
  #prepares(name) {
    return name in this.#options.options.preparation;
  }

  // The fields whose names are wanted, and these files; what is empty is left out.
  #request(isWanted, files = ["input_reference", "control_reference", "keypoints", "mask_paint"]) {
    const request = {},
      extra = {};
    for (const field of this.#form.elements) {
      const isOption = field.name && ![OTHERS, "brush"].includes(field.name) && !field.matches(":disabled");
      const value = isOption ? valueOf(field) : undefined;
      if (value !== undefined) (field.name === MODE ? request : extra)[field.name] = value;
    }
    Object.assign(extra, optionsIn(this.#field(OTHERS).value));
    for (const name of Object.keys(extra)) if (!isWanted(name)) delete extra[name];
    const loras = [...byId("loras").querySelectorAll("label")].filter((row) => row.control.checked);
    if (loras.length && isWanted("lora")) {
      const strength = (row) => Number(row.nextElementSibling.value || 1);
      request.lora = loras.map((row) => ({ name: row.control.value, scale: strength(row) }));
    }
    const ids = {
      input_reference: this.#reference.file?.id,
      control_reference: this.#clip.file?.id,
      keypoints: this.#keypoints.file?.id,
      mask_paint: request[MODE] === "replace" ? this.check?.paint : null,
    };
    for (const name of files) if (ids[name]) (name.endsWith("reference") ? request : extra)[name] = ids[name];
    if (Object.keys(extra).length) request.extra_params = extra;
    return request;
  }

  #showFieldError(error) {
    for (const place of this.#form.querySelectorAll(".of-field")) place.remove();
    for (const field of this.#form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
    if (!error?.param) return false;
    const drops = {
      input_reference: this.#reference,
      control_reference: this.#clip,
      keypoints: this.#keypoints,
    };
    if (error.param in drops) {
      drops[error.param].refuse(error);
      return true;
    }
    const field = this.#field(error.param);
    if (!(field instanceof HTMLElement)) return false;
    const place = make("div", { className: "error of-field" });
    (field.closest("label") ?? field).after(place);
    showError(place, error);
    for (let around = field.closest("details"); around; around = around.parentElement.closest("details")) {
      around.open = true;
    }
    field.setAttribute("aria-invalid", "true");
    field.focus();
    return true;
  }

  // --- Filling

  // From a request that was kept.
  async fill(request) {
    this.#isFilling = true;
    try {
      this.#form.reset();
      const { extra_params: extra = {}, lora = [], ...plain } = request;
      const { keypoints, mask_paint: paint, ...options } = extra;
      const others = Object.entries(options).filter(([name]) => !this.#field(name));
      this.#field(OTHERS).value = others.map((one) => one.join(" ")).join("\n");
      for (const [name, value] of Object.entries({ ...plain, ...options }))
        setValue(this.#field(name), value);
      for (const { name, scale } of lora) this.#setLora(name, scale);
      this.check.paint = paint ?? null;
      await Promise.all([
        this.#reference.restore(plain.input_reference),
        this.#clip.restore(plain.control_reference),
        this.#keypoints.restore(keypoints),
      ]);
      this.#adapt();
      await this.check.restore(plain.preparation);
    } finally {
      this.#isFilling = false;
    }
    this.#changed();
  }

  // From a video, and the preparation that made its clips.
  async fillFrom({ settings, uploads, preparation }) {
    const made = preparation && (await get(`v1/preparations/${preparation}`).catch(() => null));
    const { mode, loras, ...options } = { ...made?.settings, ...settings };
    const { input_reference, control_reference, ...files } = { ...made?.uploads, ...uploads };
    const lora = loras.map(({ name, strength }) => ({ name, scale: strength }));
    await this.fill({
      [MODE]: mode ?? "animate",
      input_reference,
      control_reference,
      preparation: made?.id,
      lora,
      extra_params: { ...options, ...files },
    });
  }

  async restore() {
    let kept;
    try {
      kept = JSON.parse(localStorage.getItem(KEPT));
    } catch {
      kept = null;
    }
    await this.fill(kept ?? {});
  }

  save() {
    const preparation = this.check.isRunning ? this.check.preparation.id : this.check.fresh?.id;
    try {
      localStorage.setItem(KEPT, JSON.stringify({ ...this.#request(() => true), preparation }));
    } catch {
      // Without storage a reload empties the form, and nothing else is lost.
    }
  }

  #setLora(name, scale) {
    const box = [...byId("loras").querySelectorAll("input[type=checkbox]")].find((one) => one.value === name);
    if (!box) return;
    box.checked = true;
    box.closest("label").nextElementSibling.value = scale ?? 1;
  }

  // Files that are dropped beside the places for them; the browser would leave the page and show them.
  #dropped(event) {
    if (event.defaultPrevented) return;
    event.preventDefault();
    for (const file of event.dataTransfer.files) {
      const isPicture = file.type.startsWith("image/") && file.type !== "image/gif";
      (isPicture ? this.#reference : this.#clip).take(file);
    }
  }

  #useSample() {
    const { sample, people } = this.#options;
    if (people) this.#reference.restore(sample.reference);
    this.#clip.restore(people ? sample.clip : sample.prepared);
  }

  #field(name) {
    return this.#form.elements.namedItem(name);
  }

  // --- Changes

  #clipChanged() {
    if (!this.#isFilling) {
      this.check.paint = null;
      this.#field("point").value = this.#field("person").value = "";
    }
    this.#changed();
  }

  #changed() {
    if (this.#isFilling || !this.check) return;
    this.#adapt();
    this.check.render();
    this.save();
  }

  // Shows the fields of the mode, and says what the preset is.
  #adapt() {
    for (const part of this.#form.querySelectorAll("[data-mode]")) {
      const isOn = part.dataset.mode === this.#field(MODE).value;
      setShown(part, isOn);
      for (const field of part.querySelectorAll("input, select")) field.disabled = !isOn;
    }
    for (const id of ["reference", "preparing", "size"]) setShown(byId(id), !this.hasPreparedClips);
    const preset = this.#options.presets.find(({ name }) => name === this.#field("preset").value);
    byId("preset-about").textContent = preset?.about ?? "";
  }

  #describe() {
    const { presets, loras, defaults, sample } = this.#options;
    this.#field("preset").append(...presets.map(({ name }) => make("option", { value: name }, name)));
    for (const name of ["size", "steps", "window"]) this.#field(name).placeholder = defaults[name] ?? "";
    if (defaults.preset) this.#field("preset").firstElementChild.textContent = `${defaults.preset} (default)`;
    setShown(byId("sample"), Boolean(sample));
    setShown(byId("loras"), loras.length > 0);
    byId("loras").append(
      ...loras.flatMap((name) => [
        make("label", { className: "tick" }, make("input", { type: "checkbox", value: name }), " ", name),
        make("input", { type: "number", step: "any", defaultValue: 1, "aria-label": `Strength of ${name}` }),
      ]),
    );
  }
}

// undefined for a field that says nothing.
function valueOf(field) {
  if (field.type === "radio") return field.checked ? field.value : undefined;
  if (field.type === "checkbox") return field.checked || undefined;
  const text = field.value.trim();
  return text === "" ? undefined : field.type === "number" ? Number(text) : text;
}

// Lines such as `sampler euler`, `--crf 12` or, for a flag, `freenoise false`.
function optionsIn(text) {
  const lines = text
    .split("\n")
    .map((line) => line.trim().replace(/^--/, ""))
    .filter(Boolean);
  return Object.fromEntries(
    lines.map((line) => {
      const [name, ...rest] = line.split(/[\s=]+/);
      const value = rest.join(" ");
      return [name.replaceAll("-", "_"), { "": true, true: true, false: false }[value] ?? value];
    }),
  );
}

function setValue(field, value) {
  if (!field) return;
  if (field.type === "checkbox") field.checked = value === true;
  else field.value = value ?? ""; // of radio buttons as well
}
