// Starts the page: logs in where the server wants a token, draws the form, and listens to the server.

import { attempt, byId, setShown } from "./dom.js";
import { Form } from "./form.js";
import { get, listen, post } from "./server.js";
import { Videos } from "./videos.js";

async function start() {
  let options;
  try {
    options = await get("v1/options");
  } catch (error) {
    if (error.status === 401) return logIn();
    byId("connection").textContent = `${error.message} ${error.hint}`;
    setTimeout(start, 2000);
    return undefined;
  }
  setShown(byId("login"), false);
  setShown(byId("main"), true);
  describe(options);

  const videos = new Videos(async (video) => {
    await form.fillFrom(video);
    byId("job").scrollIntoView();
    byId("job").elements.namedItem("prompt").focus();
  });
  const form = new Form(options, (video) => videos.add(video));
  await form.restore();
  listen({
    began: async () => {
      byId("connection").textContent = "";
      await videos.refresh();
      if (form.check.isRunning) form.check.update(await get(`v1/preparations/${form.check.preparation.id}`));
    },
    lost: () => (byId("connection").textContent = "The connection is lost. Trying again…"),
    changed: (kind, data) => {
      if (kind === "video") videos.update(data);
      else if (kind === "preparation") form.check.update(data);
      else videos.remove(data.id);
    },
  });
}

async function describe({ demo }) {
  const { data } = await get("v1/models");
  const about = demo ? "A demo: its weights are random, so its picture is noise." : "";
  byId("model").textContent = [data[0]?.id, about].filter(Boolean).join(". ");
}

function logIn() {
  setShown(byId("login"), true);
  byId("connection").textContent = "";
  byId("token").focus();
}

byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(byId("login-error"), async () => {
    await post("session", { token: byId("token").value });
    byId("token").value = "";
    await start();
  });
});

start();
