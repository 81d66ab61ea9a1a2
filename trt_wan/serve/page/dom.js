// Elements, and the few ways in which the page speaks. Text from users is only ever set as text.

export const byId = (id) => document.getElementById(id);

// A new element: properties are set as properties, `on…` as listeners, children are elements or texts.
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

// The sentence and the hint that the command line would print. null clears the place.
export function showError(place, error) {
  place.replaceChildren();
  if (!error) return;
  place.append(make("p", {}, error.message));
  if (error.hint) place.append(make("p", { className: "hint" }, error.hint));
  announce(error.message);
}

// Runs `work` and shows its error, if any, in `place`. The button cannot be pressed twice meanwhile.
export async function attempt(place, work, button) {
  showError(place, null);
  if (button?.getAttribute("aria-disabled") === "true") return undefined;
  button?.setAttribute("aria-disabled", "true"); // `disabled` would take the keyboard's focus away
  try {
    return await work();
  } catch (error) {
    showError(place, error);
    return undefined;
  } finally {
    button?.removeAttribute("aria-disabled");
  }
}

export function announce(text) {
  byId("announcer").textContent = text;
}

export function setShown(element, isShown) {
  element.hidden = !isShown;
}

export const calm = matchMedia("(prefers-reduced-motion: reduce)");

export function clock(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

export function megabytes(bytes) {
  return `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;
}
