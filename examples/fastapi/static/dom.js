// Small helpers for the page: elements, notices, dialogs. Texts are only ever set as text, never as HTML.

export const $ = (id) => document.getElementById(id);

/** Create an element; `props` are DOM properties, such as `className`, `ariaLabel` or `onclick`. */
export function el(tag, props = {}, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children.filter((child) => child !== null));
  return node;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

export function button(label, onclick, props = {}) {
  return el("button", { type: "button", textContent: label, onclick, ...props });
}

export function iconButton(name, label, onclick, props = {}) {
  return el("button", { type: "button", className: "icon", ariaLabel: label, onclick, ...props }, icon(name));
}

/** The text with each place of `query` marked. */
export function highlighted(text, query) {
  const found = text.toLowerCase().indexOf(query.toLowerCase());
  if (found < 0 || !query) return [text];
  const end = found + query.length;
  return [text.slice(0, found), el("mark", {}, text.slice(found, end)), ...highlighted(text.slice(end), query)];
}

export function shortTime(iso) {
  const date = new Date(iso);
  const isToday = date.toDateString() === new Date().toDateString();
  const format = isToday ? { hour: "2-digit", minute: "2-digit" } : { month: "short", day: "numeric" };
  return el("time", { dateTime: iso, textContent: date.toLocaleString([], format) });
}

export function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

/** Focus the composer, but not on a phone, where the keyboard would cover the chat. */
export function focusComposer() {
  if (matchMedia("(hover: hover)").matches) $("message").focus({ preventScroll: true });
}

let statusTimer;

/** Show a notice for some seconds; a screen reader reads it. */
export function say(text) {
  clearTimeout(statusTimer);
  statusTimer = setTimeout(() => $("status").replaceChildren(), 6000);
  $("status").replaceChildren(el("span", {}, text));
}

/** Show an error until the reader dismisses it. With `retry`, offer to do it again. */
export function showError(error, retry) {
  const again = retry && button("Try again", () => (hideError(), retry()), { className: "quiet" });
  const dismiss = iconButton("close", "Dismiss", () => (hideError(), focusComposer()));
  $("alert").replaceChildren(...[el("span", {}, error.message), again, dismiss].filter(Boolean));
}

export function hideError() {
  $("alert").replaceChildren();
}

/** Tell a screen reader how the answer proceeds, once, not with every word. */
export function tellProgress(text) {
  if ($("progress").textContent !== text) $("progress").textContent = text;
}

/** Ask, and return whether the reader agreed. */
export function confirm(title, text, verb) {
  const dialog = $("confirm-dialog");
  $("confirm-title").textContent = title;
  $("confirm-text").textContent = text;
  $("confirm-yes").textContent = verb;
  $("confirm-yes").onclick = () => dialog.close("yes");
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

/** Run `submit` when the form is sent; its error is shown in the form, and a success closes the dialog. */
export function onSubmit(form, submit) {
  const error = form.querySelector(".error");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    error.textContent = "";
    try {
      await submit();
      form.closest("dialog").close();
    } catch (failure) {
      error.textContent = failure.message;
    }
  });
}

/** Buttons with `data-close`, and a click beside it, close a dialog. */
export function setUpDialogs() {
  for (const dialog of document.querySelectorAll("dialog:not([popover])")) {
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
    });
  }
}

/** Dark or light as the system says, until the reader switches. */
export function setUpTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    const theme = localStorage.getItem("theme");
    document.documentElement.dataset.theme = theme ?? "";
    $("theme").ariaPressed = String(theme ? theme === "dark" : system.matches);
  };
  $("theme").onclick = () => {
    localStorage.setItem("theme", $("theme").ariaPressed === "true" ? "light" : "dark");
    apply();
  };
  system.addEventListener("change", apply);
  apply();
}
