// The page: a list of chats, the open chat with its live answers, and the account.

import { api, ApiError, follow, onConnection, request, token } from "./api.js";
import {
  $, button, confirm, count, el, focusComposer, hideError, highlighted, icon, iconButton, onSubmit, say, setUpDialogs,
  setUpTheme, shortTime, showError, tellProgress,
} from "./dom.js";

const UNTITLED = "Untitled chat";
const tabs = new BroadcastChannel("chats"); // tells other tabs that the list has changed

let me = { user: "", guest: true };
let chat = null; // the open chat: its id and user; once loaded, what showPage sets
let archivedView = false;
let chats = { items: [], next: null, pinned: [] };

/* ---------- Account ---------- */

async function start() {
  if (!token.get()) token.set((await api("/guests", { method: "POST" })).token);
  me = await api("/me");
  const name = me.guest ? "Guest" : me.user.replace(/^user-/, "");
  $("who").textContent = $("account-name").textContent = name;
  $("who-hint").textContent = me.guest ? "Not signed in" : "Signed in";
  $("avatar").textContent = [...name][0].toUpperCase();
  $("sign-in").hidden = !me.guest;
  $("signed-in").hidden = me.guest;
  await Promise.all([refreshList(), openRoute()]);
}

let started; // the first start(), until it fails

/** Wait until there is a user, for what the reader does while the page is still loading. */
async function ready() {
  try {
    await (started ??= start());
  } catch (error) {
    started = undefined;
    throw error;
  }
}

/** Show an error of a request. If the session has ended, continue as a new guest. */
function fail(error, retry) {
  if (error.status === 401 && !farewell.get()) {
    return becomeGuest("error", "Your session has ended, and you are a new guest. Sign in to see your chats again.");
  }
  showError(error, error.status === 0 || error.status === 503 ? retry : undefined);
}

async function attempt(action) {
  hideError();
  try {
    await action();
  } catch (error) {
    if (error instanceof ApiError) fail(error, () => attempt(action));
    else {
      console.error(error);
      showError(new Error("Something went wrong on this page. Please reload it."));
    }
  }
}

async function signIn() {
  const { token: received, moved } = await api("/sign-in", { method: "POST", body: { name: $("name").value } });
  token.set(received);
  $("name").value = "";
  await start();
  const kept = moved?.conversations ? ` ${count(moved.conversations, "chat")} moved to your account.` : "";
  say(`Signed in as ${$("who").textContent}.${kept}`);
}

/** Load the page anew, so that nothing of the user stays on it, and then say why. */
function becomeGuest(kind, text) {
  token.clear();
  farewell.set(kind, text);
  history.replaceState(null, "", location.pathname);
  location.reload();
}

/** What the page says after it was loaded anew. */
const farewell = {
  get: () => sessionStorage.getItem("farewell"),
  set: (kind, text) => sessionStorage.setItem("farewell", JSON.stringify({ kind, text })),
  show() {
    const { kind, text } = JSON.parse(farewell.get() ?? "{}");
    sessionStorage.removeItem("farewell");
    if (kind === "error") showError(new Error(text));
    else if (text) say(text);
  },
};

async function exportData() {
  const answer = await request("/me/export");
  const url = URL.createObjectURL(await answer.blob());
  el("a", { href: url, download: "chatdb-export.jsonl" }).click();
  URL.revokeObjectURL(url);
  say("Your data was exported to chatdb-export.jsonl.");
}

async function deleteAccount() {
  const text = "All your chats and their messages are deleted. This cannot be undone.";
  if (!(await confirm("Delete your account?", text, "Delete account"))) return;
  const deleted = await api("/me", { method: "DELETE" });
  const counts = `${count(deleted.conversations, "chat")} and ${count(deleted.messages, "message")}`;
  becomeGuest("notice", `Your account was deleted, with ${counts}.`);
}

/* ---------- List of chats ---------- */

async function refreshList() {
  const limit = Math.min(100, Math.max(20, chats.items.length));
  const query = `/conversations?archived=${archivedView}&limit=${limit}`;
  const [page, pinned] = await Promise.all([api(query), api("/conversations?pinned=true")]);
  chats = { ...page, pinned: pinned.items };
  showList();
}

async function moreChats() {
  const page = await api(`/conversations?archived=${archivedView}&limit=20&after=${encodeURIComponent(chats.next)}`);
  chats = { ...chats, items: [...chats.items, ...page.items], next: page.next };
  showList();
}

function showList() {
  const pinned = archivedView ? [] : chats.pinned.filter((conversation) => !conversation.archived);
  const others = chats.items.filter((conversation) => archivedView || !conversation.pinned);
  const focused = $("lists").contains(document.activeElement) && document.activeElement.id;
  $("pinned-section").hidden = !pinned.length;
  $("pinned").replaceChildren(...pinned.map(chatRow));
  $("chats-title").textContent = archivedView ? "Archived chats" : "Chats";
  $("chats").replaceChildren(...others.map(chatRow));
  $("more-chats").hidden = !chats.next;
  $("no-chats").hidden = pinned.length + others.length > 0;
  $("no-chats").textContent = archivedView ? "No archived chats." : "No chats yet.";
  if (focused) ($(focused) ?? $("new-chat")).focus();
  markOpenChat();
}

function chatRow(conversation) {
  const { id, title, pinned, updated_at: time } = conversation;
  const { preview } = chats.items.find((each) => each.id === id) ?? conversation;
  const link = el("a", { id: `chat-${id}`, href: `#/c/${id}`, textContent: title || UNTITLED });
  const options = iconButton("more", `Options for ${title || UNTITLED}`, () => openMenu(options, conversation));
  options.id = `options-${id}`;
  const heading = el("div", { className: "title" }, pinned ? icon("pin") : null, link, shortTime(time));
  const text = preview && el("div", { className: "preview" }, preview.text || "…");
  return el("li", {}, el("div", {}, heading, text), options);
}

function markOpenChat() {
  for (const link of $("chats-panel").querySelectorAll("a")) {
    link.ariaCurrent = link.id === `chat-${chat?.id}` ? "page" : null;
  }
}

let listTimer;

/** Refresh the list soon, here and, after a change made here, in the other tabs. */
function listChanged(isOurs = true) {
  if (isOurs) tabs.postMessage("changed");
  clearTimeout(listTimer);
  listTimer = setTimeout(() => refreshList().catch(() => {}), 200);
}

/* ---------- Menu of a chat ---------- */

function openMenu(opener, conversation) {
  const menu = $("menu");
  const { pinned, archived } = conversation;
  const labels = { pin: pinned ? "Unpin" : "Pin", archive: archived ? "Unarchive" : "Archive" };
  for (const item of menu.querySelectorAll("button")) {
    item.textContent = labels[item.dataset.action] ?? item.textContent;
    item.onclick = () => {
      menu.hidePopover();
      ($(opener.id) ?? $("message")).focus();
      attempt(() => actions[item.dataset.action](conversation));
    };
  }
  menu.ontoggle = ({ newState }) => {
    if (newState === "closed" && menu.contains(document.activeElement)) $(opener.id)?.focus();
  };
  menu.showPopover();
  const place = opener.getBoundingClientRect();
  menu.style.left = `${Math.max(8, Math.min(place.left, innerWidth - menu.offsetWidth - 8))}px`;
  menu.style.top = `${Math.max(8, Math.min(place.bottom + 4, innerHeight - menu.offsetHeight - 8))}px`;
  menu.querySelector("button").focus();
}

const actions = {
  async pin({ id, pinned }) {
    changed(await api(`/conversations/${id}`, { method: "PATCH", body: { pinned: !pinned } }));
    say(pinned ? "Chat unpinned." : "Chat pinned.");
  },
  async archive({ id, archived }) {
    changed(await api(`/conversations/${id}`, { method: "PATCH", body: { archived: !archived } }));
    say(archived ? "Chat moved back to your chats." : "Chat archived.");
  },
  async rename({ id }) {
    renamed = (await api(`/conversations/${id}?limit=1`)).conversation;
    $("new-title").value = renamed.title ?? "";
    $("rename-dialog").querySelector(".error").textContent = "";
    $("rename-dialog").showModal();
    $("new-title").select();
  },
  async delete({ id, title }) {
    const text = `“${title || UNTITLED}” and all its messages are deleted. This cannot be undone.`;
    if (!(await confirm("Delete this chat?", text, "Delete chat"))) return;
    const deleted = await api(`/conversations/${id}`, { method: "DELETE" });
    if (chat?.id === id) goHome();
    listChanged();
    say(`Chat deleted, with ${count(deleted.messages, "message")}.`);
  },
};

let renamed = null;

/** Save the title, unless the chat was changed since the dialog opened: then show what it is now. */
async function rename() {
  const { id, etag } = renamed;
  const title = $("new-title").value.trim() || null;
  try {
    changed(await api(`/conversations/${id}`, { method: "PATCH", etag, body: { title } }));
  } catch (error) {
    if (error.status !== 412) throw error;
    changed((renamed = (await api(`/conversations/${id}?limit=1`)).conversation));
    $("new-title").value = renamed.title ?? "";
    throw new ApiError(412, "This chat was changed in the meantime. This is its title now; save again to change it.");
  }
}

function changed(conversation) {
  if (chat?.id === conversation.id) {
    chat.conversation = conversation;
    showTitle();
  }
  listChanged();
}

/* ---------- Open chat ---------- */

function goHome() {
  location.hash = "#/";
}

async function openRoute() {
  const [, id, seq] = /^#\/c\/(\d+)(?:\/m\/(\d+))?$/.exec(location.hash) ?? [];
  closeDrawer();
  if (!id) return showNewChat();
  if (chat?.id === Number(id) && chat.user === me.user) return seq && attempt(() => reveal(Number(seq)));
  closeChat();
  await attempt(() => openChat(Number(id), Number(seq)));
}

async function openChat(id, seq) {
  const opened = { id, user: me.user };
  chat = opened;
  let page;
  try {
    page = await api(`/conversations/${id}?limit=100`);
  } catch (error) {
    if (chat === opened && error.status === 404) goHome();
    throw error;
  }
  if (chat !== opened) return;
  showPage(page);
  if (seq) await reveal(seq);
  else focusComposer();
}

function closeChat() {
  chat?.closing?.abort();
  chat = null;
  document.body.dataset.events = "closed";
  $("messages").replaceChildren();
  $("earlier").hidden = true;
}

function showNewChat() {
  closeChat();
  $("welcome").hidden = false;
  showTitle();
  showStreaming();
  markOpenChat();
  focusComposer();
}

function showTitle() {
  const title = chat ? chat.conversation?.title || UNTITLED : "New chat";
  $("title").textContent = title;
  document.title = `${title} · chatdb chat`;
  $("chat-options").hidden = !chat?.conversation;
}

/** Show the newest page of the current line, and follow the events from there. */
function showPage({ conversation, messages, versions, before, events }) {
  const isDown = isAtBottom();
  const above = $("log").scrollTop;
  Object.assign(chat, { conversation, versions, before, messages, views: new Map(), lastId: events });
  $("welcome").hidden = true;
  quietly(() => $("messages").replaceChildren(...messages.map(messageView)));
  $("earlier").hidden = !before;
  showTitle();
  showStreaming();
  markOpenChat();
  $("log").scrollTop = isDown ? $("log").scrollHeight : above;
  if (!document.hidden) followEvents();
}

/** Change the log without a screen reader reading all of it. */
function quietly(change) {
  $("log").ariaLive = "off";
  change();
  setTimeout(() => ($("log").ariaLive = "polite"), 500);
}

async function loadEarlier() {
  const from = chat;
  const page = await api(`/conversations/${from.id}/messages?limit=100&before=${encodeURIComponent(from.before)}`);
  if (chat !== from) return;
  from.messages.unshift(...page.messages);
  from.versions = { ...page.versions, ...from.versions };
  from.before = page.before;
  const below = $("log").scrollHeight - $("log").scrollTop;
  quietly(() => $("messages").prepend(...page.messages.map(messageView)));
  if (!page.before && document.activeElement === $("earlier")) $("log").focus({ preventScroll: true });
  $("earlier").hidden = !page.before;
  $("log").scrollTop = $("log").scrollHeight - below;
}

async function loadBackTo(seq) {
  const from = chat;
  while (chat === from && from.before && seq < from.messages[0].seq) await loadEarlier();
}

/** Scroll to a message: load earlier pages, or show the version that contains it. */
async function reveal(seq) {
  const from = chat;
  await loadBackTo(seq);
  if (chat === from && !from.views.has(seq)) await switchTo(seq);
  const node = from.views.get(seq)?.node;
  if (chat !== from || !node) return;
  node.scrollIntoView({ block: "center" });
  node.focus({ preventScroll: true });
  node.classList.add("found");
  setTimeout(() => node.classList.remove("found"), 2500);
}

/** Make the version `seq` of a message the current one. */
async function switchTo(seq) {
  const from = chat;
  const page = await api(`/conversations/${from.id}/head`, { method: "PUT", body: { seq } });
  if (chat !== from) return;
  showPage(page);
  await loadBackTo(seq);
}

/** Show another version where this one is, and keep the focus on the button. */
async function showVersion(seq, label) {
  await switchTo(seq);
  const node = chat?.views.get(seq)?.node;
  if (!node) return;
  node.scrollIntoView({ block: "nearest" });
  const enabled = [...node.querySelectorAll(".versions button:enabled")];
  (enabled.find((each) => each.ariaLabel === label) ?? enabled[0])?.focus();
}

/* ---------- Live events ---------- */

async function followEvents() {
  const from = chat;
  from.closing?.abort();
  from.closing = new AbortController();
  document.body.dataset.events = "closed";
  const { signal } = from.closing;
  const onOpen = (isOpen) => {
    if (!signal.aborted) document.body.dataset.events = isOpen ? "open" : "closed";
  };
  const handle = (event) => {
    if (signal.aborted) return;
    from.lastId = event.id ?? from.lastId;
    receive[event.type]?.(JSON.parse(event.data));
  };
  try {
    await follow(`/conversations/${from.id}/events`, from.lastId, handle, onOpen, signal);
  } catch (error) {
    if (signal.aborted) return;
    if (error.status === 404) goHome();
    listChanged(false);
    await fail(error.status === 404 ? new ApiError(404, "This chat was deleted.") : error);
  }
}

const receive = {
  message(message) {
    if (chat.views.has(message.seq)) updateMessage(message);
    else if (followsLine(message)) appendMessage(message);
    else reload().catch(fail); // another version
    listChanged(false);
  },
  delta({ seq, offset, text }) {
    const view = chat.views.get(seq);
    if (!view) return;
    if (offset > view.length) return reload().catch(fail);
    const fresh = [...text].slice(view.length - offset); // code points, like the offset
    if (fresh.length) updateMessage({ ...view.message, content: view.message.content + fresh.join("") });
  },
};

function followsLine({ seq, parent_seq: parent }) {
  const last = chat.messages.at(-1)?.seq ?? 0;
  return parent === null || parent === undefined ? seq === last + 1 : parent === last;
}

/** Load the current line again, which another version may have become. */
async function reload() {
  const from = chat;
  const page = await api(`/conversations/${from.id}?limit=100`);
  if (chat === from) showPage(page);
}

/* ---------- Messages ---------- */

function messageView(message) {
  const isUser = message.role === "user";
  const text = document.createTextNode(message.content);
  const actions = el("div", { className: "actions" });
  const tools = el("div", { className: "tools" });
  const body = el("div", { className: "text" }, text);
  const node = el("article", { className: isUser ? "user" : "assistant", ariaLabel: isUser ? "You" : "Assistant" });
  node.append(body, tools, actions);
  node.tabIndex = -1;
  node.dataset.seq = message.seq;
  const view = { node, text, body, actions, tools, message, length: [...message.content].length };
  chat.views.set(message.seq, view);
  showDetails(view);
  return node;
}

function appendMessage(message) {
  const isDown = isAtBottom();
  chat.messages.push(message);
  $("messages").append(messageView(message));
  $("welcome").hidden = true;
  showStreaming();
  if (isDown) scrollDown();
}

function updateMessage(message) {
  const view = chat.views.get(message.seq);
  if (isOlder(message, view.message)) return;
  const isDown = isAtBottom();
  const grown = message.content.startsWith(view.message.content);
  if (grown) view.text.appendData(message.content.slice(view.message.content.length));
  else view.text.data = message.content;
  const isDone = message.state !== view.message.state;
  view.message = message;
  view.length = [...message.content].length;
  chat.messages[chat.messages.findIndex(({ seq }) => seq === message.seq)] = message;
  if (isDone) {
    showDetails(view);
    showStreaming();
  }
  if (isDown) scrollDown();
}

/** A streaming message may arrive twice, as an event and as the answer to a request: later with more text. */
function isOlder(message, known) {
  if (message.state !== "streaming") return false;
  return known.state !== "streaming" || message.content.length < known.content.length;
}

/** What stands below the text: tools, buttons, state. */
function showDetails({ node, message, tools, actions, body }) {
  const isStreaming = message.state === "streaming";
  node.ariaBusy = String(isStreaming);
  tools.replaceChildren(...(message.tools ?? []).map(toolView));
  const { seq, role, content } = message;
  const versions = versionSwitch(chat.versions[seq], seq);
  if (isStreaming) return actions.replaceChildren(...(versions ? [versions] : []));
  const copy = () => attempt(() => navigator.clipboard.writeText(content).then(() => say("Message copied.")));
  const again = () => attempt(() => regenerate(message));
  actions.replaceChildren(
    ...[
      versions,
      role === "user" && iconButton("edit", "Edit", () => editMessage(node, body, message), { title: "Edit" }),
      navigator.clipboard && iconButton("copy", "Copy", copy, { title: "Copy" }), // only on https and localhost
      role === "assistant" && iconButton("again", "Regenerate", again, { title: "Regenerate" }),
      message.state === "aborted" && el("span", { className: "note" }, "Stopped"),
    ].filter(Boolean),
  );
}

function toolView({ name, arguments: input, output }) {
  const shown = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  const text = `${name}(${shown(input)})\n→ ${shown(output)}`;
  return el("details", {}, el("summary", {}, `Used ${name}`), el("pre", {}, text));
}

function versionSwitch(seqs, seq) {
  if (!seqs || seqs.length < 2) return null;
  const place = seqs.indexOf(seq);
  const step = (name, label, to) =>
    iconButton(name, label, () => attempt(() => showVersion(to, label)), { disabled: to === undefined });
  return el(
    "span",
    { className: "versions" },
    step("previous", "Previous version", seqs[place - 1]),
    el("span", {}, `${place + 1} of ${seqs.length}`),
    step("next", "Next version", seqs[place + 1]),
  );
}

function editMessage(node, body, message) {
  const field = el("textarea", { ariaLabel: "Edit message", value: message.content });
  const end = () => {
    form.replaceWith(body);
    node.querySelector(".actions").hidden = false;
    node.querySelector("[aria-label=Edit]").focus();
  };
  const form = el("form", { className: "edit" }, field);
  const cancel = button("Cancel", end, { className: "quiet" });
  form.append(el("div", { className: "row end" }, cancel, el("button", { className: "primary" }, "Send edit")));
  form.onkeydown = (event) => {
    if (event.key === "Escape") end();
    sendOnEnter(event, form);
  };
  form.onsubmit = (event) => {
    event.preventDefault();
    if (field.value.trim()) attempt(() => sendEdit(message, field.value));
  };
  body.replaceWith(form);
  node.querySelector(".actions").hidden = true;
  fit(field);
  field.focus();
}

/** The seq of the message before this one, 0 for the first one. */
async function parentOf(message) {
  if (message.parent_seq !== null && message.parent_seq !== undefined) return message.parent_seq;
  const place = () => chat.messages.findIndex(({ seq }) => seq === message.seq);
  if (place() === 0 && chat.before) await loadEarlier();
  return chat.messages[place() - 1]?.seq ?? 0;
}

async function sendEdit(message, content) {
  const from = chat;
  const body = { content, parent_seq: await parentOf(message) };
  await post(`/conversations/${from.id}/messages`, body);
  if (chat === from) await reload();
  scrollDown();
  focusComposer();
}

async function regenerate(message) {
  const from = chat;
  await post(`/conversations/${from.id}/answers`, { parent_seq: await parentOf(message) });
  if (chat === from) await reload();
  scrollDown();
  focusComposer();
}

/* ---------- Composer ---------- */

const keys = new Map(); // the Idempotency-Key of each request without an answer, so that sending again changes nothing

async function post(path, body) {
  const request = path + JSON.stringify(body);
  if (!keys.has(request)) keys.set(request, crypto.getRandomValues(new Uint32Array(4)).join("-"));
  const answer = await api(path, { method: "POST", body, key: keys.get(request) });
  keys.delete(request);
  listChanged();
  return answer;
}

async function send() {
  const content = $("message").value;
  if (!content.trim() || $("message").readOnly) return;
  if (streamingMessage()) return say("Wait for the answer, or stop it.");
  $("message").readOnly = true;
  try {
    await ready();
    const id = chat?.id ?? (await createChat(content));
    if (!chat?.lastId) await openChat(id);
    const answer = await post(`/conversations/${id}/messages`, { content, parent_seq: null });
    $("message").value = "";
    if (chat?.id !== id) return;
    receive.message(answer.message);
    receive.message(answer.answer);
    scrollDown();
  } finally {
    $("message").readOnly = false;
    fitComposer();
  }
}

async function createChat(content) {
  const { id } = await post("/conversations", { title: titleOf(content) });
  history.pushState(null, "", `#/c/${id}`);
  return id;
}

/** The first line, at most 60 characters of it, without a part of a word. */
function titleOf(content) {
  const [line] = content.trim().split("\n");
  const start = [...line].slice(0, 60).join("");
  return start === line ? line : `${start.replace(/\s+\S*$/, "")}…`;
}

function streamingMessage() {
  return chat?.messages?.findLast((message) => message.state === "streaming");
}

async function stop() {
  const from = chat;
  const streaming = streamingMessage();
  if (!streaming) return;
  const { message } = await api(`/conversations/${from.id}/messages/${streaming.seq}/stop`, { method: "POST" });
  if (chat === from && chat.views.has(message.seq)) updateMessage(message);
  focusComposer();
}

/** Show Stop instead of Send while an answer streams. */
function showStreaming() {
  const isStreaming = Boolean(streamingMessage());
  const hadFocus = [$("send"), $("stop")].includes(document.activeElement);
  if (isStreaming) tellProgress("The assistant is answering.");
  else if (!$("stop").hidden) tellProgress("The answer is complete.");
  $("stop").hidden = !isStreaming;
  $("send").hidden = isStreaming;
  if (hadFocus) focusComposer();
}

/** Make a field as high as its text, up to the limit of the style sheet. */
function fit(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`; // with the border
}

function fitComposer() {
  fit($("message"));
  $("send").disabled = !$("message").value.trim();
}

function sendOnEnter(event, form) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
}

/* ---------- Scrolling ---------- */

function isAtBottom() {
  const { scrollHeight, scrollTop, clientHeight } = $("log");
  return scrollHeight - scrollTop - clientHeight < 60;
}

function scrollDown() {
  $("log").scrollTop = $("log").scrollHeight;
}

/* ---------- Search ---------- */

let search = { query: "", next: null };

async function runSearch() {
  const query = $("query").value.trim();
  const isSearching = [...query].length >= 2;
  search = { query, next: null };
  $("clear-search").hidden = !$("query").value;
  $("search-panel").hidden = !isSearching;
  $("chats-panel").hidden = isSearching;
  if (isSearching) await showResults(null);
}

async function showResults(after) {
  const current = search;
  const rest = after ? `&after=${encodeURIComponent(after)}` : "";
  const page = await api(`/search?q=${encodeURIComponent(current.query)}&limit=20${rest}`);
  if (search !== current) return;
  current.next = page.next;
  if (!after) $("results").replaceChildren();
  $("results").append(...page.items.map(resultRow));
  $("more-results").hidden = !page.next;
  $("no-results").hidden = $("results").children.length > 0;
  tellProgress(page.next ? "More results than shown." : count($("results").children.length, "result"));
}

function resultRow({ conversation_id: id, title, seq, snippet, created_at: time }) {
  const known = title ?? chats.items.find((each) => each.id === id)?.title;
  const link = el("a", { href: `#/c/${id}/m/${seq}`, textContent: known || "Chat" });
  link.onclick = () => {
    if (link.hash === location.hash) openRoute(); // otherwise the hash changes
  };
  const text = el("div", { className: "preview" }, ...highlighted(fromMatch(snippet, search.query), search.query));
  return el("li", {}, el("div", {}, el("div", { className: "title" }, link, shortTime(time)), text));
}

/** The snippet from shortly before the match, so that the match is within its three lines. */
function fromMatch(snippet, query) {
  const start = snippet.toLowerCase().indexOf(query.toLowerCase()) - 40;
  return start > 0 ? `…${snippet.slice(start)}` : snippet;
}

function clearSearch() {
  $("query").value = "";
  $("query").focus();
  return runSearch();
}

/* ---------- Drawer on a phone ---------- */

function openDrawer() {
  document.body.classList.add("drawer");
  $("backdrop").hidden = false;
  $("main").inert = true;
  $("open-list").ariaExpanded = "true";
  $("close-list").focus();
}

function closeDrawer() {
  if (!document.body.classList.contains("drawer")) return;
  document.body.classList.remove("drawer");
  $("backdrop").hidden = true;
  $("main").inert = false;
  $("open-list").ariaExpanded = "false";
  $("open-list").focus();
}

/* ---------- Set-up ---------- */

function onEscape(event) {
  if (event.key !== "Escape" || document.querySelector("dialog[open], :popover-open")) return;
  if (event.target.closest(".edit")) return;
  if (event.target === $("query") && $("query").value) attempt(clearSearch);
  else if (document.body.classList.contains("drawer")) closeDrawer();
  else attempt(stop);
}

function setUpControls() {
  const on = (id, action) => ($(id).onclick = () => attempt(action));
  on("new-chat", async () => (location.hash === "#/" || !location.hash ? (closeDrawer(), showNewChat()) : goHome()));
  on("archived", async () => {
    archivedView = !archivedView;
    $("archived").ariaPressed = String(archivedView);
    chats.items = [];
    await refreshList();
  });
  on("more-chats", moreChats);
  on("more-results", () => showResults(search.next));
  on("clear-search", clearSearch);
  on("open-list", async () => openDrawer());
  on("close-list", async () => closeDrawer());
  on("backdrop", async () => closeDrawer());
  on("account", async () => $("account-dialog").showModal());
  on("sign-out", async () => becomeGuest("notice", "Signed out."));
  on("export", exportData);
  on("delete-account", deleteAccount);
  on("earlier", loadEarlier);
  on("latest", async () => (scrollDown(), $("message").focus()));
  on("stop", stop);
  on("chat-options", async () => openMenu($("chat-options"), chat.conversation));
  onSubmit($("sign-in"), signIn);
  onSubmit($("rename-dialog").querySelector("form"), rename);
}

function setUpComposer() {
  $("composer").onsubmit = (event) => {
    event.preventDefault();
    attempt(send);
  };
  $("message").oninput = fitComposer;
  $("message").onkeydown = (event) => sendOnEnter(event, $("composer"));
  for (const suggestion of $("welcome").querySelectorAll("button")) {
    suggestion.onclick = () => {
      $("message").value = suggestion.textContent;
      attempt(send);
    };
  }
}

function setUpPage() {
  let searchTimer;
  $("query").oninput = () => {
    clearTimeout(searchTimer);
    searchTimer = setTimeout(() => attempt(runSearch), 250);
  };
  $("log").onscroll = () => ($("latest").hidden = isAtBottom());
  addEventListener("keydown", onEscape);
  addEventListener("hashchange", openRoute);
  addEventListener("storage", (event) => event.key === "token" && location.reload());
  tabs.onmessage = () => listChanged(false);
  document.addEventListener("visibilitychange", () => {
    if (!chat?.lastId) return;
    if (document.hidden) chat.closing?.abort(); // a browser opens only six connections to a host
    else followEvents();
  });
  onConnection((isConnected) => {
    $("connection").textContent = isConnected ? "" : "Connection lost. Reconnecting…";
  });
}

setUpTheme();
setUpDialogs();
setUpControls();
setUpComposer();
setUpPage();
attempt(async () => (await ready(), farewell.show()));
