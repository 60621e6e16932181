// The server as the page sees it: the model's name, and answers that come in chunks.

const KEY = "redrafter.key";

/**
 * The server said no, or could not be reached.
 *
 * status      of HTTP; 0 if nothing answered
 * retryAfter  seconds until it is worth another try, if the server said so
 */
export class ServerError extends Error {
  constructor(message, status = 0, retryAfter = null) {
    super(message);
    Object.assign(this, { status, retryAfter });
  }
}

function key() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null;
  }
}

/** Keep an API key until the tab is closed. */
export function keepKey(value) {
  try {
    sessionStorage.setItem(KEY, value);
  } catch {
    // It is asked for again then.
  }
}

async function call(path, options = {}) {
  const known = key();
  const headers = { ...options.headers, ...(known ? { Authorization: `Bearer ${known}` } : {}) };
  let response;
  try {
    // Relative to the page, which may be served under some path.
    response = await fetch(new URL(path, document.baseURI), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const said = body?.error?.message ?? (typeof body?.error === "string" ? body.error : null);
  const seconds = Number.parseFloat(response.headers.get("Retry-After"));
  const message = said ?? `The server answered ${response.status} ${response.statusText}`.trim();
  return new ServerError(message, response.status, seconds >= 0 ? seconds : null);
}

/** The names of the models that the server answers with, the one that is loaded first. */
export async function modelNames() {
  const response = await call("v1/models");
  const body = await response.json();
  return (body.data ?? []).map((model) => model.id);
}

/** The chunks of an answer. Raises ServerError, also for one that the server sends in the stream. */
export async function* answer(request, signal) {
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(request),
    signal,
  });
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    let chunk;
    try {
      chunk = JSON.parse(data);
    } catch {
      throw new ServerError("The server sent something that is not JSON.");
    }
    if (chunk.error) throw new ServerError(chunk.error.message ?? String(chunk.error));
    yield chunk;
  }
}

/** The data of server-sent events. */
async function* events(body, signal) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const lines = rest.split("\n");
      rest = lines.pop();
      for (const line of lines) {
        // Every event of this API is one line; comments keep the connection alive.
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
      if (done) return;
    }
  } catch (error) {
    if (signal.aborted || error instanceof ServerError) throw error;
    throw new ServerError("The connection broke before the answer was complete.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
