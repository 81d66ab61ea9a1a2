// Two videos in step: the second follows the first, which has the controls and the sound.

import { make } from "./dom.js";

const APART = 0.08; // seconds, about two frames

export function pair(driving, result) {
  const follower = make("video", {
    src: driving,
    muted: true,
    playsInline: true,
    preload: "metadata",
    tabIndex: -1,
  });
  const leader = make("video", {
    src: result,
    controls: true,
    loop: true,
    playsInline: true,
    preload: "metadata",
  });
  leader.setAttribute("aria-label", "The video");
  follower.setAttribute("aria-label", "The driving clip, which plays along");
  follow(leader, follower);
  return make(
    "div",
    { className: "pair" },
    make("figure", {}, follower, make("figcaption", {}, "Driven by")),
    make("figure", {}, leader, make("figcaption", {}, "Video")),
  );
}

function follow(leader, follower) {
  const meet = () => {
    if (Math.abs(follower.currentTime - leader.currentTime) > APART)
      follower.currentTime = leader.currentTime;
  };
  const play = () => {
    meet();
    follower.play().catch(() => {}); // it may end before the leader
  };
  leader.addEventListener("play", play);
  leader.addEventListener("pause", () => {
    follower.pause();
    follower.currentTime = leader.currentTime;
  });
  leader.addEventListener("waiting", () => follower.pause());
  leader.addEventListener("playing", play);
  leader.addEventListener("seeked", () => (leader.paused ? meet() : play()));
  leader.addEventListener("timeupdate", () => leader.paused || meet());
  leader.addEventListener("ratechange", () => (follower.playbackRate = leader.playbackRate));
}
