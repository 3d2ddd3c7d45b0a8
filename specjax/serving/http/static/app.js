// A chat over /v1/chat/completions: streams answers, marks drafted tokens, shows what speculation gains.
const $ = (id) => document.getElementById(id);
const messages = [];
let running = null;

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function turn(role, text) {
  const element = document.createElement("div");
  element.className = `turn ${role}`;
  element.textContent = text;
  $("chat").append(element);
  element.scrollIntoView({ block: "end" });
  return element;
}

// One span per piece; a piece of drafted tokens only is marked.
function add(element, text, drafted) {
  const span = document.createElement("span");
  if (drafted.length && drafted.every(Boolean)) span.className = "drafted";
  span.textContent = text;
  element.append(span);
  $("chat").scrollTop = $("chat").scrollHeight;
}

function figures(stats, tokens, seconds) {
  $("speed").textContent = tokens > 1 && seconds > 0 ? ((tokens - 1) / seconds).toFixed(1) : "–";
  if (!stats) return;
  $("length").textContent = stats.acceptance_length ? stats.acceptance_length.toFixed(2) : "–";
  const drafted = stats.num_draft_tokens;
  $("kept").textContent = drafted ? `${stats.num_accepted_draft_tokens} of ${drafted}` : "none drafted";
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value.replaceAll("\r\n", "\n");
    const parts = buffer.split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((l) => l.startsWith("data:")).map((l) => l.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

async function ask(text) {
  messages.push({ role: "user", content: text });
  turn("user", text);
  const element = turn("assistant", "");
  running = new AbortController();
  $("send").textContent = "Stop";
  let answer = "", tokens = 0, begin = 0, stats = null;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), signal: running.signal,
      body: JSON.stringify({
        messages, stream: true, temperature: Number($("temperature").value),
        speculation: $("speculate").checked ? "auto" : "off",
      }),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (!choice) continue;
      if (!begin && choice.token_ids) begin = performance.now();
      tokens += (choice.token_ids ?? []).length;
      if (choice.delta.content) {
        answer += choice.delta.content;
        add(element, choice.delta.content, choice.drafted ?? []);
      }
      stats = choice.speculative_decoding_stats ?? stats;
      figures(stats, tokens, (performance.now() - begin) / 1000);
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      element.classList.add("error");
      element.append(`${error.message}`);
    }
  }
  if (answer) messages.push({ role: "assistant", content: answer });
  else messages.pop();
  running = null;
  $("send").textContent = "Send";
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return running.abort();
  const text = $("text").value.trim();
  if (!text) return;
  $("text").value = "";
  ask(text);
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("clear").addEventListener("click", () => {
  running?.abort();
  messages.length = 0;
  $("chat").replaceChildren();
});
const marked = () => $("chat").classList.toggle("marked", $("show").checked);
$("show").addEventListener("change", marked);
marked();
fetch("v1/models", { headers: headers() })
  .then((r) => r.json())
  .then((found) => { $("model").textContent = found.data?.[0]?.id ?? ""; })
  .catch(() => {});
