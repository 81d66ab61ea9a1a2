// Requests to the server. Addresses are relative, so that the page also works below a prefix.

export class Refused extends Error {
  // `hint` says what to do, `param` names the field that is wrong, if it is one.
  constructor(status, { message, hint = "", param = null }) {
    super(message);
    Object.assign(this, { status, hint, param });
  }
}

const UNREACHABLE = {
  message: "The server cannot be reached.",
  hint: "Check that trt-wan serve is running.",
};

function refusal(status, text) {
  try {
    return new Refused(status, JSON.parse(text).error);
  } catch {
    return new Refused(status, { message: `The server answered ${status} without a reason.` });
  }
}

async function request(method, path, body) {
  const options = { method, headers: {} };
  if (body !== undefined) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let answer, text;
  try {
    answer = await fetch(path, options);
    text = await answer.text();
  } catch {
    throw new Refused(0, UNREACHABLE);
  }
  if (!answer.ok) throw refusal(answer.status, text);
  return text ? JSON.parse(text) : null;
}

export const get = (path) => request("GET", path);
export const post = (path, body = {}) => request("POST", path, body);
export const remove = (path) => request("DELETE", path);

// Sends a file and calls `progress` with the share that is sent. `fetch` cannot tell that.
export function upload(file, name, progress = () => {}) {
  return new Promise((resolve, reject) => {
    const form = new FormData();
    form.append("purpose", "page");
    form.append("file", file, name);
    const sending = new XMLHttpRequest();
    sending.open("POST", "v1/files");
    sending.upload.onprogress = (event) => event.lengthComputable && progress(event.loaded / event.total);
    sending.onerror = () => reject(new Refused(0, UNREACHABLE));
    sending.onload = () => {
      if (sending.status < 300) resolve(JSON.parse(sending.responseText));
      else reject(refusal(sending.status, sending.responseText));
    };
    sending.send(form);
  });
}

// Server-sent events, for as long as the page is open. `began` is called after every connection, also a later one:
// what happened in between is not sent again.
export function listen({ began, lost, changed }) {
  const source = new EventSource("v1/events");
  source.onopen = began;
  source.onerror = () => {
    lost();
    if (source.readyState === EventSource.CLOSED) setTimeout(() => again({ began, lost, changed }), 2000);
  };
  for (const kind of ["video", "preparation", "deleted"]) {
    source.addEventListener(kind, (event) => changed(kind, JSON.parse(event.data)));
  }
}

// A server that was started again may want another token: then the page begins anew, and asks for it.
async function again(listener) {
  const error = await get("v1/options").then(
    () => null,
    (refused) => refused,
  );
  if (error?.status === 401) location.reload();
  else listen(listener);
}
