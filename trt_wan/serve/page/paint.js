// A canvas over a frame, painted white (the mask grows) and black (it goes). What is transparent stays as found.

const SNAPSHOTS = 30; // strokes that can be taken back
const STEP = 8; // pixels of the canvas that an arrow key moves the brush

export class Painting {
  #canvas;
  #context;
  #past = [];
  #last = null;
  #spot = null;
  #ring;
  brush = { size: 40, erases: false };

  constructor(place) {
    this.#canvas = place.querySelector("canvas");
    this.#context = this.#canvas.getContext("2d", { willReadFrequently: true });
    this.#ring = document.createElement("span");
    this.#ring.className = "ring";
    this.#ring.hidden = true;
    place.append(this.#ring);
    this.#canvas.addEventListener("pointerdown", (event) => this.#begin(event));
    this.#canvas.addEventListener("pointermove", (event) => this.#move(event));
    this.#canvas.addEventListener("pointerleave", () => (this.#ring.hidden = true));
    for (const end of ["pointerup", "pointercancel"])
      this.#canvas.addEventListener(end, () => (this.#last = null));
    this.#canvas.addEventListener("keydown", (event) => this.#key(event));
    this.#canvas.addEventListener("blur", () => (this.#ring.hidden = true));
  }

  // A size that differs empties it: the old strokes belong to another frame.
  resize(width, height) {
    if (this.#canvas.width === width && this.#canvas.height === height) return;
    this.#canvas.width = width;
    this.#canvas.height = height;
    this.#past = [];
    this.#spot = null;
  }

  // A painting that was made before; null empties the canvas.
  async load(address) {
    this.#context.clearRect(0, 0, this.#canvas.width, this.#canvas.height);
    this.#past = [];
    if (!address) return;
    const picture = new Image();
    picture.src = address;
    await picture.decode();
    this.#context.drawImage(picture, 0, 0, this.#canvas.width, this.#canvas.height);
  }

  get isEmpty() {
    const { data } = this.#context.getImageData(0, 0, this.#canvas.width, this.#canvas.height);
    for (let k = 3; k < data.length; k += 4) if (data[k]) return false;
    return true;
  }

  blob() {
    return new Promise((resolve) => this.#canvas.toBlob(resolve, "image/png"));
  }

  undo() {
    const before = this.#past.pop();
    if (before) this.#context.putImageData(before, 0, 0);
  }

  clear() {
    this.#remember();
    this.#context.clearRect(0, 0, this.#canvas.width, this.#canvas.height);
  }

  #remember() {
    this.#past.push(this.#context.getImageData(0, 0, this.#canvas.width, this.#canvas.height));
    this.#past = this.#past.slice(-SNAPSHOTS);
  }

  #begin(event) {
    event.preventDefault();
    this.#canvas.focus({ preventScroll: true });
    this.#canvas.setPointerCapture(event.pointerId);
    this.#remember();
    this.#last = this.#spot = this.#place(event);
    this.#stroke(this.#last, this.#last);
  }

  #move(event) {
    this.#spot = this.#place(event);
    this.#show();
    if (!this.#last) return;
    this.#stroke(this.#last, this.#spot);
    this.#last = this.#spot;
  }

  #key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const { width, height } = this.#canvas;
    this.#spot ??= [width / 2, height / 2];
    if (event.key in moves) {
      const [x, y] = moves[event.key].map((way, axis) => this.#spot[axis] + way * STEP);
      this.#spot = [Math.min(Math.max(x, 0), width), Math.min(Math.max(y, 0), height)];
    } else if (event.key === " ") {
      this.#remember();
      this.#stroke(this.#spot, this.#spot);
    } else if (event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey)) {
      this.undo();
    } else {
      return;
    }
    event.preventDefault();
    this.#show();
  }

  #place(event) {
    const box = this.#canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) * this.#canvas.width) / box.width,
      ((event.clientY - box.top) * this.#canvas.height) / box.height,
    ];
  }

  #stroke(from, to) {
    const context = this.#context;
    context.fillStyle = context.strokeStyle = this.brush.erases ? "black" : "white";
    context.lineWidth = this.brush.size;
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(...to);
    context.stroke();
    for (const [x, y] of [from, to]) {
      // a line without a length has no round ends
      context.beginPath();
      context.arc(x, y, this.brush.size / 2, 0, 2 * Math.PI);
      context.fill();
    }
  }

  // The brush as a ring, at its place on the screen.
  #show() {
    const scale = this.#canvas.clientWidth / this.#canvas.width;
    const side = this.brush.size * scale;
    this.#ring.hidden = false;
    this.#ring.style.width = this.#ring.style.height = `${side}px`;
    this.#ring.style.left = `${this.#spot[0] * scale - side / 2}px`;
    this.#ring.style.top = `${this.#spot[1] * scale - side / 2}px`;
  }
}
