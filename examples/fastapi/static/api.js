// The service's API: requests with the bearer token, problems as errors, and server-sent events over fetch.

const RETRY_DELAYS = [1, 2, 4]; // seconds before a request that is safe to repeat is sent again
const RECONNECT = [1, 10]; // the first and the longest pause before the event stream is opened again
const SILENCE = 45; // seconds without a byte until a stream counts as broken; the service sends one every 15

const UNREACHABLE = "The service cannot be reached. Check your connection and try again.";

let reportConnection = () => {};

/** Call `report(true)` or `report(false)` whenever the service is reached or not. */
export function onConnection(report) {
  reportConnection = report;
}

/** An answer that is not 2xx, or (status 0) no answer. The message is a sentence for the reader. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const token = {
  get: () => localStorage.getItem("token"),
  set: (value) => localStorage.setItem("token", value),
  clear: () => localStorage.removeItem("token"),
};

/** Request JSON. With a `key` (Idempotency-Key), as with GET, a lost answer is asked for again. */
export async function api(path, options = {}) {
  const answer = await request(path, options);
  return answer.json();
}

export async function request(path, { method = "GET", body, key, etag } = {}) {
  const headers = authorization();
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (key) headers["Idempotency-Key"] = key;
  if (etag) headers["If-Match"] = quoted(etag);
  const send = () => fetch(`/api${path}`, { method, headers, body: body && JSON.stringify(body) });
  const repeatable = method === "GET" || Boolean(key);
  for (const delay of repeatable ? [...RETRY_DELAYS, null] : [null]) {
    const answer = await send().catch(() => null);
    if (answer?.ok) {
      reportConnection(true);
      return answer;
    }
    if (answer && answer.status !== 503) throw await problem(answer);
    if (!answer) reportConnection(false);
    if (delay === null) throw answer ? await problem(answer) : new ApiError(0, UNREACHABLE);
    await pause(delay);
  }
}

function authorization() {
  return token.get() ? { Authorization: `Bearer ${token.get()}` } : {};
}

function quoted(etag) {
  return etag.startsWith('"') ? etag : `"${etag}"`;
}

async function problem(answer) {
  const { detail, title } = await answer.json().catch(() => ({}));
  return new ApiError(answer.status, detail || title || `The service answered with status ${answer.status}.`);
}

/**
 * Pass the events of a stream to `handle` until `signal` aborts, and open it again after the last one whenever it ends.
 * Throws ApiError if the service refuses the stream.
 */
export async function follow(path, lastId, handle, onOpen, signal) {
  let delay = RECONNECT[0];
  while (!signal.aborted) {
    try {
      for await (const event of events(path, lastId, onOpen, signal)) {
        delay = RECONNECT[0];
        if (event.id) lastId = event.id;
        handle(event);
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof ApiError && error.status < 500) throw error;
      reportConnection(false);
    }
    onOpen(false);
    await pause(delay + Math.random() / 2, signal);
    delay = Math.min(delay * 2, RECONNECT[1]);
  }
}

async function* events(path, lastId, onOpen, signal) {
  const connection = new AbortController();
  const close = () => connection.abort();
  signal.addEventListener("abort", close);
  let timer = setTimeout(close, SILENCE * 1000);
  try {
    const headers = { ...authorization(), ...(lastId ? { "Last-Event-ID": lastId } : {}) };
    const answer = await fetch(`/api${path}`, { headers, signal: connection.signal });
    if (!answer.ok) throw await problem(answer);
    reportConnection(true);
    onOpen(true);
    const parse = eventParser();
    const decoder = new TextDecoder();
    for (const reader = answer.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) return;
      clearTimeout(timer);
      timer = setTimeout(close, SILENCE * 1000);
      for (const event of parse(decoder.decode(value, { stream: true }))) {
        if (event.type === "end") return;
        yield event;
      }
    }
  } finally {
    clearTimeout(timer);
    signal.removeEventListener("abort", close);
    close();
  }
}

/** Return a function that takes the next piece of an event stream and returns the events that it completes. */
export function eventParser() {
  let rest = "";
  return (piece) => {
    const blocks = (rest + piece).replaceAll("\r\n", "\n").split("\n\n");
    rest = blocks.pop();
    return blocks.map(parseEvent).filter((event) => event.data !== undefined);
  };
}

function parseEvent(block) {
  const event = { type: "message" };
  const data = [];
  for (const line of block.split("\n")) {
    const [, field, value] = /^([^:]*):? ?(.*)$/.exec(line);
    if (field === "event") event.type = value;
    else if (field === "id") event.id = value;
    else if (field === "data") data.push(value);
  }
  if (data.length) event.data = data.join("\n");
  return event;
}

function pause(seconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, seconds * 1000);
    for (const [target, type] of [[window, "online"], [signal, "abort"]]) {
      target?.addEventListener(type, () => (clearTimeout(timer), resolve()), { once: true });
    }
  });
}
