"use strict";
// All text of a model is set as textContent, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("samples").textContent);
  const tip = document.getElementById("tip");
  const find = (id) => document.getElementById(id);
  const TOP = 2; // Nats from which on a token is as red as can be.

  function make(parent, tag, name, text) {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  }

  // Control characters are seen; a line break still breaks the line.
  const picture = (c) =>
    c === "\n" ? "↵" : c === "\t" ? "⇥"
      : c === "\x7f" ? "␡" : String.fromCharCode(0x2400 + c.charCodeAt(0));
  const pictured = (text) => text.replace(/[\x00-\x1f\x7f]/g, picture);
  const visible = (text) => text.split("\n").map(pictured).join("↵\n");
  // In the tip, spaces are seen as well.
  const quoted = (text) =>
    text === "" ? "(part of a character)" : pictured(text).replace(/ /g, "␣");
  const percent = (p) =>
    p === null ? "?" : p >= 0.001 ? `${(100 * p).toFixed(1)} %` : "< 0.1 %";
  const nats = (x) =>
    x === null ? "not finite" : x < 0.001 ? "< 0.001" : x.toFixed(3);
  // The root shows small divergences too.
  const heat = (x) => Math.sqrt(Math.min(Math.max(x, 0) / TOP, 1));
  const counted = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
  const end = (line) => (line.finished ? "finished" : "cut");

  function segments(parent, parts) {
    for (const [text, special] of parts) {
      make(parent, "span", special ? "special" : "", visible(text));
    }
  }

  // Which filters of a section are ticked.
  function ticked(section) {
    const boxes = document.querySelectorAll(
      `[data-filter=${section}] input:checked`);
    return new Set([...boxes].map((box) => box.value));
  }

  function option(select, value, text) {
    make(select, "option", "", text).value = value;
  }

  // Says why a section has nothing to choose from, instead of its choices.
  function none(section, text) {
    find(section).querySelector(".bar").hidden = true;
    make(find(section), "p", "", text);
  }

  // ---- Rollouts

  const rollouts = data.rollouts;
  const steps = [...new Set(rollouts.map((line) => line.step))];
  const shownTokens = new WeakMap(); // Token element -> [rollout, position].

  function showTokens(parent, line) {
    const box = make(parent, "div", "text tokens");
    box.setAttribute("role", "listbox");
    box.setAttribute("aria-label", "tokens of the rollout");
    const special = new Set(line.special);
    line.texts.forEach((text, i) => {
      const token = make(box, "span", "token", text === "" ? "·" : visible(text));
      const value = line.divergence[i];
      if (text === "") token.classList.add("gap");
      if (special.has(i)) token.classList.add("special");
      if (value === null) token.classList.add("unknown");
      else token.style.setProperty("--heat", heat(value).toFixed(3));
      token.setAttribute("role", "option");
      token.setAttribute("aria-describedby", "tip");
      token.tabIndex = i ? -1 : 0; // One stop for Tab, arrows from there.
      shownTokens.set(token, [line, i]);
    });
    const more = line.length - line.texts.length;
    if (more > 0) make(box, "span", "gap", ` … ${counted(more, "more token")}`);
  }

  function showRollout(line) {
    const card = make(find("rollout-list"), "article", "card rollout");
    card.dataset.end = end(line);
    const head = make(card, "div", "head");
    make(head, "strong", "", `update ${line.step}`);
    make(head, "span", "", `record ${line.record + 1}`); // As errors count.
    make(head, "span", end(line), end(line));
    make(head, "span", "", counted(line.length, "token"));
    const values = line.divergence.filter((x) => x !== null);
    const mean = values.reduce((a, b) => a + b, 0) / (values.length || 1);
    const what = line.measure === "cross_entropy" ? "cross-entropy" : "KL";
    make(head, "span", "", `mean ${what} ${nats(mean)} nats`);
    if (line.source !== "student") {
      make(head, "span", "", `tokens of the ${line.source}`);
    }
    segments(make(card, "div", "text prompt"), line.prompt);
    if (line.teacher_prompt) {
      const other = make(card, "details");
      make(other, "summary", "", "what the teacher reads instead");
      segments(make(other, "div", "text prompt"), line.teacher_prompt);
    }
    showTokens(card, line);
  }

  function filterRollouts() {
    const wanted = ticked("rollouts");
    const cards = [...document.querySelectorAll(".rollout")];
    cards.forEach((card) => { card.hidden = !wanted.has(card.dataset.end); });
    const seen = cards.filter((card) => !card.hidden).length;
    find("rollouts-shown").textContent = `${seen} of ${counted(cards.length, "rollout")}`;
    hideTip();
  }

  function showUpdate() {
    find("rollout-list").replaceChildren();
    const step = Number(find("update").value);
    rollouts.filter((line) => line.step === step).forEach(showRollout);
    find("before").disabled = find("update").selectedIndex <= 0;
    find("after").disabled = find("update").selectedIndex >= steps.length - 1;
    filterRollouts();
  }

  function move(by) {
    find("update").selectedIndex += by;
    showUpdate();
  }

  // ---- The tip of a token

  function row(parent, text, p) {
    const item = make(parent, "li");
    make(item, "code", "", quoted(text));
    make(item, "span", "", percent(p));
    item.style.setProperty("--part", p === null ? 0 : p);
  }

  function showTip(token) {
    const [line, i] = shownTokens.get(token);
    hideTip();
    make(make(tip, "p"), "code", "", quoted(line.texts[i]));
    const of = line.measure === "cross_entropy" ? "-log p" : "KL";
    make(tip, "p", "", `position ${i}, ${of} ${nats(line.divergence[i])} nats`);
    const both = line.teacher ? `, teacher ${percent(line.teacher[i])}` : "";
    make(tip, "p", "", `student ${percent(line.student[i])}${both}`);
    make(tip, "p", "gap",
      line.teacher ? "The teacher would write" : "The student would write");
    const list = make(tip, "ol");
    line.alternatives[i].forEach(([text, p]) => row(list, text, p));
    tip.hidden = false;
    token.classList.add("on");
    place(token);
  }

  function place(token) {
    const at = token.getClientRects()[0] || token.getBoundingClientRect();
    const { width, height } = tip.getBoundingClientRect();
    const left = Math.min(at.left, document.documentElement.clientWidth - width - 8);
    const below = at.bottom + 6;
    const fits = below + height < window.innerHeight;
    tip.style.left = `${Math.max(left, 4)}px`;
    tip.style.top = `${fits ? below : Math.max(at.top - height - 6, 4)}px`;
  }

  let opened = ""; // The kind of event that opened the tip.

  function hideTip() {
    tip.hidden = true;
    tip.replaceChildren();
    document.querySelectorAll(".token.on").forEach(
      (token) => token.classList.remove("on"));
  }

  const tokenOf = (event) =>
    event.target instanceof Element && event.target.closest(".tokens .token");

  function walk(event) {
    const token = tokenOf(event);
    const all = token && [...token.parentNode.querySelectorAll(".token")];
    const to = token && {
      ArrowRight: all[all.indexOf(token) + 1],
      ArrowLeft: all[all.indexOf(token) - 1],
      Home: all[0],
      End: all[all.length - 1],
    }[event.key];
    if (event.key === "Escape") hideTip();
    if (!to) return;
    event.preventDefault();
    token.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  }

  // ---- Answers

  const answers = data.answers;
  const key = (line) => JSON.stringify([line.set, line.mode]);

  function title(line, last) {
    if (line.model === "teacher") return "teacher";
    if (line.step === 0) return "before training";
    return line.step === last ? `after (update ${last})` : `update ${line.step}`;
  }

  function showAnswer(parent, line, last) {
    const card = make(parent, "div", "card answer");
    const verdict = line.right ? "right" : "wrong";
    card.dataset.verdict = verdict;
    card.dataset.end = end(line);
    const head = make(card, "div", "head");
    make(head, "strong", "", title(line, last));
    make(head, "span", verdict, verdict);
    make(head, "span", end(line), end(line));
    make(head, "span", "", counted(line.length, "token"));
    const text = make(card, "div", "text");
    text.tabIndex = 0;
    segments(text, line.text);
  }

  function showSet() {
    const list = find("answer-list");
    list.replaceChildren();
    const mine = answers.filter((line) => key(line) === find("set").value);
    const last = Math.max(...mine.map((line) => line.step));
    for (const number of [...new Set(mine.map((line) => line.problem))]) {
      const lines = mine.filter((line) => line.problem === number);
      const card = make(list, "article", "card problem");
      make(make(card, "div", "head"), "h3", "", `Problem ${number + 1}`);
      segments(make(card, "div", "text prompt"), lines[0].prompt);
      const gold = make(card, "p", "", "Right answer: ");
      make(gold, "code", "", lines[0].answer);
      const columns = make(card, "div", "columns");
      lines.forEach((line) => showAnswer(columns, line, last));
    }
    filterAnswers();
  }

  function filterAnswers() {
    const wanted = ticked("answers");
    const cards = [...document.querySelectorAll(".answer")];
    cards.forEach((card) => {
      card.hidden = !(wanted.has(card.dataset.verdict) && wanted.has(card.dataset.end));
    });
    document.querySelectorAll(".problem").forEach((problem) => {
      problem.hidden = !problem.querySelector(".answer:not([hidden])");
    });
    const seen = cards.filter((card) => !card.hidden).length;
    find("answers-shown").textContent = `${seen} of ${counted(cards.length, "answer")}`;
  }

  // ---- Everything is there

  if (rollouts.length) {
    for (const step of steps) option(find("update"), step, step);
    const scale = document.querySelector(".scale");
    for (const x of [0, 0.02, 0.1, 0.5, 1, 2]) {
      const swatch = make(scale, "span", "token text", x < TOP ? ` ${x} ` : ` ${x} nats or more `);
      swatch.style.setProperty("--heat", heat(x));
    }
    showUpdate();
  } else {
    none("rollouts", "The run kept no rollouts (samples.rollouts).");
  }
  if (answers.length) {
    for (const value of new Set(answers.map(key))) {
      option(find("set"), value, JSON.parse(value).join(", "));
    }
    showSet();
  } else {
    none("answers", data.evaluates
      ? "The run kept no answers (samples.problems)."
      : "The run has no evaluation set (evaluation.sets).");
  }
  find("update").addEventListener("change", showUpdate);
  find("before").addEventListener("click", () => move(-1));
  find("after").addEventListener("click", () => move(1));
  find("set").addEventListener("change", showSet);
  document.querySelector("[data-filter=rollouts]")
    .addEventListener("change", filterRollouts);
  document.querySelector("[data-filter=answers]")
    .addEventListener("change", filterAnswers);
  for (const kind of ["pointerover", "focusin", "click"]) {
    document.addEventListener(kind, (event) => {
      const token = tokenOf(event);
      if (token) {
        showTip(token);
        opened = kind;
      } else if (kind === "click" || kind === opened) {
        hideTip(); // The pointer hides only what the pointer has opened.
      }
    });
  }
  document.addEventListener("focusout", hideTip);
  document.addEventListener("keydown", walk);
  document.addEventListener("scroll", () => {
    const token = document.querySelector(".token.on");
    if (token) place(token);
  }, { passive: true });
})();
